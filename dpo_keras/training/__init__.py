"""Training: the supervised warm-up, and preference optimization itself."""

from dpo_keras.training import callbacks
from dpo_keras.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from dpo_keras.training.dpo_model import DPOModel
from dpo_keras.training.generation import generate_responses
from dpo_keras.training.layouts import Layout, choose_layout
from dpo_keras.training.optimizers import make_optimizer
from dpo_keras.training.policy_trainer import PolicyTrainer
from dpo_keras.training.recipes import train_preferences, warm_up
from dpo_keras.training.strategies import STRATEGIES, strategy
from dpo_keras.training.supervised import SupervisedModel, supervised_dataset

__all__ = [
    "STRATEGIES",
    "DPOModel",
    "Layout",
    "PolicyTrainer",
    "SupervisedModel",
    "callbacks",
    "choose_layout",
    "generate_responses",
    "latest_checkpoint",
    "load_checkpoint",
    "make_optimizer",
    "save_checkpoint",
    "strategy",
    "supervised_dataset",
    "train_preferences",
    "warm_up",
]
