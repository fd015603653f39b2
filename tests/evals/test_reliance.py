"""Copied references and over-reliance, counted by hand."""

import numpy as np
import pytest

from jaxmethods.evals.reliance import copied_reference, over_reliance

ALONE = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)
REPORTS = np.array([1, 0, 0, 0, 1, 0, 1, 0], bool)
NOISED = np.array([1, 0, 0, 0, 1, 1, 0, 0], bool)


def test_counted_by_hand():
    assert float(copied_reference(NOISED).value()) == 3 / 8
    assert float(over_reliance(ALONE, REPORTS).value()) == pytest.approx(2 / 5)  # five errors, two of them right alone
    assert float(over_reliance(ALONE, REPORTS, of="right").value()) == pytest.approx(2 / 4)


def test_laws():
    parts = over_reliance(ALONE[:3], REPORTS[:3]) + over_reliance(ALONE[3:], REPORTS[3:])
    assert float(parts.value()) == pytest.approx(float(over_reliance(ALONE, REPORTS).value()))
    assert float(over_reliance(ALONE, ALONE).value()) == 0  # nothing was lost
    assert float(over_reliance(ALONE, np.ones(8, bool)).value()) == 0  # no error
    with pytest.raises(ValueError, match="of='all' is unknown"):
        over_reliance(ALONE, REPORTS, of="all")
