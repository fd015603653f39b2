"""Yes or no, against counts by hand and POPE's rule, restated."""

import numpy as np
import pytest

from jaxmethods.evals.yes_no import says_yes, yes_no


def test_always_yes_on_a_balanced_set():
    found = yes_no(["Yes"] * 6, np.arange(6) % 2 == 0)
    assert found == pytest.approx((0.5, 0.5, 1.0, 2 / 3, 1.0, 0))


def test_counts_by_hand():
    """3 hits, 1 false yes, 2 false noes, 4 right noes."""
    says = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    truth = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], bool)
    found = yes_no(says, truth)
    assert found == pytest.approx((7 / 10, 3 / 4, 3 / 5, 2 / (4 / 3 + 5 / 3), 4 / 10, 0))
    assert yes_no(["yes" if s else "no" for s in says], truth) == found
    assert yes_no(says.tolist(), truth.tolist()) == found
    other = yes_no(~says, ~truth)  # now "no" is the class that counts
    assert other.accuracy == pytest.approx(found.accuracy)
    assert (other.precision, other.recall) == pytest.approx((4 / 6, 4 / 5))


def test_a_model_that_never_says_yes_has_no_precision_to_speak_of():
    assert yes_no(["no"] * 4, np.array([1, 0, 1, 0], bool)) == pytest.approx((0.5, 0, 0, 0, 0, 0))
    assert yes_no(["no"] * 4, np.zeros(4, bool)) == pytest.approx((1, 0, 0, 0, 0, 0))


ANSWERS = {
    "Yes": True,
    "yes, there is a dog in the image.": True,
    "YES!": True,
    "No": False,
    "No, there is no dog.": False,
    "There is not a dog": False,
    "Yes, there is no doubt": False,  # a no among the words wins
    "Yes. But no cat": True,  # first sentence alone
    "no.": False,
    "There is a dog": None,
    "Nothing, nobody knows": None,  # no word is "no"
    "No!": None,
    "The dog isn't there": None,
    "": None,
}


def test_free_answers_are_read_as_pope_does():
    for answer, meant in ANSWERS.items():
        assert says_yes(answer) is meant, answer
        # POPE's rule by another route: a no is one of three words between spaces and commas.
        first = " " + answer.partition(".")[0].replace(",", "") + " "
        is_no = any(f" {word} " in first for word in ("No", "no", "not"))
        assert yes_no([answer], [True]).yes_ratio == (not is_no), answer


def test_answers_that_say_neither():
    answers, truth = ["a dog", "a dog", "yes", "no"], [True, False, True, False]
    assert yes_no(answers, truth) == pytest.approx((3 / 4, 2 / 3, 1, 4 / 5, 3 / 4, 2))
    assert yes_no(answers, truth, unparsed="wrong") == pytest.approx((2 / 4, 1, 1 / 2, 2 / 3, 1 / 4, 2))


def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match="2 answers and 1 labels"):
        yes_no(["yes", "no"], [True])
    with pytest.raises(ValueError, match="0 answers"):
        yes_no([], [])
    with pytest.raises(ValueError, match="give booleans"):
        yes_no(["yes", "no"], ["yes", "no"])
    with pytest.raises(ValueError, match="choose of yes, wrong"):
        yes_no(["yes"], [True], unparsed="no")
