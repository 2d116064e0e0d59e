"""Training: the supervised warm-up, and preference optimization itself."""

from dpo_keras.scoring.batch_layout import Layout, choose_layout
from dpo_keras.training import callbacks
from dpo_keras.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from dpo_keras.training.distribution import STRATEGIES, strategy
from dpo_keras.training.dpo_model import DPOModel, outputs_of
from dpo_keras.training.fit import train_preferences, warm_up
from dpo_keras.training.generation import generate_responses
from dpo_keras.training.optimizers import make_optimizer
from dpo_keras.training.policy_trainer import PolicyTrainer
from dpo_keras.training.reward_model import RewardModel
from dpo_keras.training.streaming import stream_responses
from dpo_keras.training.supervised_model import SupervisedModel, supervised_dataset

__all__ = [
    "STRATEGIES",
    "DPOModel",
    "Layout",
    "PolicyTrainer",
    "RewardModel",
    "SupervisedModel",
    "callbacks",
    "choose_layout",
    "generate_responses",
    "latest_checkpoint",
    "load_checkpoint",
    "make_optimizer",
    "outputs_of",
    "save_checkpoint",
    "strategy",
    "stream_responses",
    "supervised_dataset",
    "train_preferences",
    "warm_up",
]
