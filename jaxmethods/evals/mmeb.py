"""The averages of MMEB, 36 data sets of embeddings (https://arxiv.org/abs/2410.05160, table 1).

A data set's score is the share of its rows whose right candidate is first (`retrieval.precision_at_1`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import NamedTuple


class DataSet(NamedTuple):
    """Of which group a data set of MMEB is, and whether models train on its training split."""

    group: str
    in_distribution: bool


_IN = {
    "classification": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    "vqa": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    "retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    "grounding": "MSCOCO",
}
_OUT = {
    "classification": "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    "vqa": "ScienceQA VizWiz GQA TextVQA",
    "retrieval": "FashionIQ Wiki-SS-NQ OVEN EDIS",
    "grounding": "RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
MMEB = {
    name: DataSet(group, inside)
    for inside, groups in ((True, _IN), (False, _OUT))
    for group, names in groups.items()
    for name in names.split()
}
"""Name of a subset, as published, -> what it is."""
MMEB_GROUPS = tuple(_IN)
MMEB_DISTRIBUTIONS = ("in_distribution", "out_of_distribution")


class Average(NamedTuple):
    """A mean over data sets, and over how many."""

    mean: float
    data_sets: int


def mmeb_score(scores: Mapping[str, float]) -> dict[str, Average]:
    """Means of MMEB's scores over data sets, each of which counts alike however many rows it has.

    Args:
        scores: data set -> precision at 1, in any unit. Some may be missing: each mean is of those that are there, and says
            how many that are.

    Returns:
        "classification", "vqa", "retrieval", "grounding", "in_distribution", "out_of_distribution", as far as they have data
        sets in `scores`, and "overall".

    Raises:
        ValueError: no scores, or a name that is not in `MMEB`.
    """
    if not scores:
        raise ValueError("there are no scores; give at least one data set's, {'MSCOCO_i2t': 0.7}.")
    found: dict[str, list[float]] = {}
    for name, score in scores.items():
        if name not in MMEB:
            nearest = difflib.get_close_matches(name, MMEB, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name!r} is no data set of MMEB; the nearest name is {nearest!r}.")
        for kind in (*_kinds(MMEB[name]), "overall"):
            found.setdefault(kind, []).append(score)
    order = (*MMEB_GROUPS, *MMEB_DISTRIBUTIONS, "overall")
    return {
        kind: Average(math.fsum(found[kind]) / len(found[kind]), len(found[kind])) for kind in order if kind in found
    }


def mmeb_overall(means: Mapping[str, float]) -> float:
    """The mean over MMEB's 36 data sets, from published means of its groups: (10 c + 10 v + 12 r + 4 g) / 36.

    Args:
        means: of "classification", "vqa", "retrieval" and "grounding"; or of "in_distribution" and "out_of_distribution":
            (20 i + 16 o) / 36.

    Raises:
        ValueError: other names than all of the one or all of the other.
    """
    if set(means) not in (set(MMEB_GROUPS), set(MMEB_DISTRIBUTIONS)):
        raise ValueError(
            f"means are of {', '.join(means) or 'nothing'}; they must be of all of {', '.join(MMEB_GROUPS)}, "
            f"or of {' and '.join(MMEB_DISTRIBUTIONS)}."
        )
    sizes = {kind: sum(kind in _kinds(of) for of in MMEB.values()) for kind in means}
    return math.fsum(sizes[kind] * mean for kind, mean in means.items()) / len(MMEB)


def _kinds(of: DataSet) -> tuple[str, str]:
    return of.group, MMEB_DISTRIBUTIONS[0 if of.in_distribution else 1]
