"""Evaluation: held-out figures, calibration, samples before and after training, and a report.

    evaluate_preferences   DPOModel, pairs -> HeldOut: accuracy, margins, calibration, by group
    sample_and_judge       policy, prompts -> Samples: responses, judged and counted
    change                 before, after   -> the paired difference of a figure
    write_report           all of it, with the training curves -> report.md, .html, .json, plots

A figure is an `Estimate`: a value with its 95 % interval, or the reason why there is none.
"""

from dpo_keras.evaluation.calibration import Bin, Calibration, calibrate
from dpo_keras.evaluation.findings import Finding
from dpo_keras.evaluation.held_out import evaluate_preferences
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.rated_figures import RatedHeldOut, load_held_out
from dpo_keras.evaluation.report_content import most_wrong
from dpo_keras.evaluation.run_report import Report, write_report
from dpo_keras.evaluation.samples import Samples, sample_and_judge, side_by_side
from dpo_keras.evaluation.statistics import change
from dpo_keras.training.callbacks import TrainingLog, read_training_log
from dpo_keras.utils.intervals import Estimate

__all__ = [
    "Bin",
    "Calibration",
    "Estimate",
    "Finding",
    "HeldOut",
    "RatedHeldOut",
    "load_held_out",
    "Report",
    "Samples",
    "TrainingLog",
    "calibrate",
    "change",
    "evaluate_preferences",
    "most_wrong",
    "read_training_log",
    "sample_and_judge",
    "side_by_side",
    "write_report",
]
