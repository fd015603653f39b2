"""The pieces of a training run: optimiser, state, step, checkpoints. Programs put them together."""

from jaxmethods.training.checkpoint import Checkpoints
from jaxmethods.training.optimizer import Optimizer
from jaxmethods.training.step import LossFn, State, init_state, make_evaluation_step, make_train_step

__all__ = ["Checkpoints", "LossFn", "Optimizer", "State", "init_state", "make_evaluation_step", "make_train_step"]
