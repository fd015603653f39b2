"""Whether a model that is given retrieved reports still looks at the picture (MMed-RAG, https://arxiv.org/abs/2410.13085).

Both are means over cases, as sum and weight; `.value()` is the share, and 0 where no case counts.

>>> float(over_reliance(np.array([True, True, False]), np.array([True, False, False])).value())  # one of two errors
0.5
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxmethods import tree
from jaxmethods.tree import Mean

OF = ("errors", "right")


def copied_reference(noised: Bool[Array | np.ndarray, "cases"]) -> Mean:
    """The share of cases answered rightly with the reports and a picture of noise: what the reports tell, and no picture.

    Args:
        noised: [N], whether the answer to reports and noise is right.
    """
    return Mean.of(jnp.asarray(noised).astype(jnp.float32))


def over_reliance(
    alone: Bool[Array | np.ndarray, "cases"], with_reports: Bool[Array | np.ndarray, "cases"], *, of: str = "errors"
) -> Mean:
    """The share of errors with reports that the model does not make alone.

    Args:
        alone, with_reports: [N], whether each answer is right.
        of: what it is a share of, which the paper does not tell beyond doubt: "errors", the answers with reports that are wrong; or
            "right", the answers alone that are right.
    """
    tree.require_one_of("of", of, OF)
    alone, with_reports = jnp.asarray(alone), jnp.asarray(with_reports)
    lost = alone & ~with_reports
    return Mean.of(lost.astype(jnp.float32), ~with_reports if of == "errors" else alone)
