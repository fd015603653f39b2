"""SAUP: how sure an agent's answer is, from the uncertainty of every step, weighted by how far it has drifted (arXiv 2412.01033).

>>> import numpy as np
>>> float(propagate(np.array([[0.5, 2.0, 1.0]]), np.array([[2.0, 0.5, 1.0]]))[0])
1.0

Step uncertainties U_n (`uncertainty`), distances of the trajectory to its question and of actions to what they brought
(`distances`), weights W_n of these (`weights`, and `hmm` for the learned ones), and their root mean square (`propagation`).
`scoring` has a model give log-probabilities of trajectories, and `agent` makes trajectories.
"""

from jaxmethods.evals.saup import agent, distances, hmm, propagation, scoring, uncertainty, weights
from jaxmethods.evals.saup.learned import learned_weights
from jaxmethods.evals.saup.propagation import arithmetic_mean, geometric_mean, last_step, propagate
from jaxmethods.evals.saup.scoring import Scored, score
from jaxmethods.evals.saup.uncertainty import StepLogps, step_uncertainty
from jaxmethods.evals.saup.weights import distance_weights, hybrid_weights, position_weights, state_weights

__all__ = [
    "Scored", "StepLogps", "agent", "arithmetic_mean", "distance_weights", "distances", "geometric_mean", "hmm", "hybrid_weights",
    "last_step", "learned_weights", "position_weights", "propagate", "propagation", "score", "scoring", "state_weights",
    "step_uncertainty", "uncertainty", "weights",
]  # fmt: skip
