"""MMEB's data sets and averages, against published ones."""

import pytest

from jaxmethods.evals.mmeb import MMEB, mmeb_overall, mmeb_score


def test_the_data_sets_of_mmeb():
    of = lambda kind: sum(data_set.group == kind for data_set in MMEB.values())
    assert [of(kind) for kind in ("classification", "vqa", "retrieval", "grounding")] == [10, 10, 12, 4]
    assert len(MMEB) == 36 and sum(data_set.in_distribution for data_set in MMEB.values()) == 20


def test_published_groups_give_published_totals():
    """CAFe's 7B and 0.5B models (https://arxiv.org/abs/2503.19900)."""
    groups = lambda *means: dict(zip(("classification", "vqa", "retrieval", "grounding"), means, strict=True))
    assert round(mmeb_overall(groups(65.2, 65.6, 70.0, 91.2)), 1) == 69.8
    assert round(mmeb_overall(groups(59.1, 49.1, 61.0, 83.0)), 1) == 59.6
    halves = lambda inside, outside: {"in_distribution": inside, "out_of_distribution": outside}
    assert round(mmeb_overall(halves(75.8, 62.4)), 1) == 69.8
    assert round(mmeb_overall(halves(64.3, 53.7)), 1) == 59.6


def test_every_data_set_counts_alike():
    scores = {name: float(number) for number, name in enumerate(MMEB)}
    found = mmeb_score(scores)
    assert found["overall"] == pytest.approx((17.5, 36))
    assert {kind: of.data_sets for kind, of in found.items()} == {
        "classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4,
        "in_distribution": 20, "out_of_distribution": 16, "overall": 36,
    }  # fmt: skip
    means = {kind: average.mean for kind, average in found.items()}
    pick = lambda *kinds: {kind: means[kind] for kind in kinds}
    assert mmeb_overall(pick("classification", "vqa", "retrieval", "grounding")) == pytest.approx(17.5)
    assert mmeb_overall(pick("in_distribution", "out_of_distribution")) == pytest.approx(17.5)


def test_some_data_sets_are_said_to_be_some():
    assert mmeb_score({"GQA": 40.0, "OK-VQA": 50.0, "RefCOCO": 90.0}) == {
        "vqa": (45.0, 2), "grounding": (90.0, 1), "in_distribution": (50.0, 1), "out_of_distribution": (65.0, 2),
        "overall": (60.0, 3),
    }  # fmt: skip


def test_names_that_mmeb_does_not_have():
    with pytest.raises(ValueError, match="'OKVQA' is no data set of MMEB; the nearest name is 'OK-VQA'"):
        mmeb_score({"OKVQA": 1.0})
    with pytest.raises(ValueError, match="no scores"):
        mmeb_score({})
    with pytest.raises(ValueError, match="means are of vqa; they must be of all of classification"):
        mmeb_overall({"vqa": 1.0})
