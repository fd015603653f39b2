"""S²FT: some input or output channels of a linear map are trained, whole, https://arxiv.org/abs/2412.06289.

>>> import jax
>>> adapter = S2FT(fraction=0.5)
>>> leaves = adapter.init(jax.random.key(0), 4, 3)
>>> jax.tree.map(jax.numpy.shape, leaves)
{'delta': (2, 3), 'indices': (2,)}

`calibrate` gives the scores by which channels can be chosen; `decouple`, `fuse` and `restore` move what was learned between models
bit for bit; `permute` makes the chosen channels adjacent.
"""

from jaxmethods.adapters.s2ft.adapter import BUDGETS, S2FT, SELECTIONS
from jaxmethods.adapters.s2ft.calibration import calibrate
from jaxmethods.adapters.s2ft.permutation import permute, unpermute
from jaxmethods.adapters.s2ft.switching import Change, decouple, fuse, require_disjoint, restore

__all__ = [
    "BUDGETS", "S2FT", "SELECTIONS", "Change", "calibrate", "decouple", "fuse", "permute", "require_disjoint", "restore",
    "unpermute",
]  # fmt: skip
