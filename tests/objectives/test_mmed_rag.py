"""MMed-RAG's number of reports, prompts, pictures and kinds of pairs: worked examples, plain loops, and laws."""

import itertools
import math

import jax
import numpy as np
import pytest

from jaxmethods import losses, models
from jaxmethods.data import Source
from jaxmethods.data.pictures import MARKER
from jaxmethods.data.views import conversation_of
from jaxmethods.objectives import mmed_rag
from jaxmethods.objectives.mmed_rag import Case, keep_contexts, preference_rows, preference_subsets, prompt
from jaxmethods.objectives.mmedpo import signal_rates
from jaxmethods.objectives.preference import chosen_view, rejected_view
from tests import tiny

RNG = np.random.default_rng(0)
SORTED = -np.sort(-RNG.uniform(0.05, 1, (64, 6)), axis=1)


def in_a_loop(row, threshold, mode):
    for i in range(len(row) - 1):
        if row[i + 1] <= 0:
            return i + 1
        if mode == "consecutive" and math.log(row[i] / row[i + 1]) > threshold:
            return i + 1
        if mode == "top1" and row[0] / row[i + 1] >= threshold:
            return i + 1
    return len(row)


@pytest.mark.parametrize(
    ("mode", "threshold"), [("consecutive", 0.1), ("consecutive", 0.4), ("top1", 1.5), ("top1", 3.0)]
)
def test_as_a_loop_says(mode, threshold):
    rows = np.concatenate([SORTED, SORTED - 0.4]).astype(np.float32)
    got = keep_contexts(rows, threshold=threshold, mode=mode)
    assert got.tolist() == [in_a_loop(row, threshold, mode) for row in rows.tolist()]
    traced = jax.jit(lambda x: keep_contexts(x, threshold=threshold, mode=mode))(rows.reshape(2, 64, 6))
    np.testing.assert_array_equal(traced.ravel(), got)


def test_worked_examples():
    """Where the two modes part: no single jump, but far from the best."""
    falling, jump = np.array([0.9, 0.7, 0.55, 0.43, 0.33]), np.array([0.9, 0.88, 0.85, 0.4, 0.39])
    assert (
        keep_contexts(falling, threshold=math.log(1.5)) == 5 and keep_contexts(falling, threshold=1.5, mode="top1") == 2
    )
    assert keep_contexts(jump, threshold=math.log(1.5)) == 3 and keep_contexts(jump, threshold=1.5, mode="top1") == 3
    assert keep_contexts(np.array([-0.1, -0.2, -0.3]), threshold=9.0) == 1
    assert keep_contexts(np.array([0.5, -0.2, -0.3]), threshold=9.0, mode="top1") == 1
    assert keep_contexts(np.array([0.5, 0.4, -np.inf, -np.inf]), threshold=9.0) == 2  # no more reports are there


def test_laws():
    of = lambda threshold, rows=SORTED, **mode: np.asarray(keep_contexts(rows, threshold=threshold, **mode))
    np.testing.assert_array_equal(of(0.2, 7.0 * SORTED), of(0.2))
    np.testing.assert_array_equal(of(np.inf), 6)
    np.testing.assert_array_equal(of(1e-9), 1)
    np.testing.assert_array_equal(of(1e-9, np.full((3, 6), 0.4)), 6)
    counts = np.stack([of(t) for t in (0.05, 0.1, 0.3, 1.0)])
    assert (np.diff(counts, axis=0) >= 0).all() and counts.min() >= 1 and counts.max() <= 6
    two = SORTED[:, :2]
    np.testing.assert_array_equal(of(1.3, two, mode="top1"), of(math.log(1.3), two))
    later = SORTED.copy()
    later[:, -1] = 1e-6  # a later gap changes nothing where an earlier one has stopped
    stopped = of(0.2) < 5
    np.testing.assert_array_equal(of(0.2, later)[stopped], of(0.2)[stopped])


def test_truth_table():
    """(right without, with reports, with reports and noise) -> subsets."""
    cases = list(itertools.product((False, True), repeat=3))
    found = preference_subsets(*np.array(cases).T)
    told = {
        case: "".join(letter for letter, kind in zip("abc", found, strict=True) if kind[i])
        for i, case in enumerate(cases)
    }
    assert told == {
        (0, 0, 0): "", (0, 0, 1): "", (0, 1, 0): "b", (0, 1, 1): "ab",
        (1, 0, 0): "c", (1, 0, 1): "c", (1, 1, 0): "", (1, 1, 1): "a",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(threshold=0.0), "threshold=0.0 must be positive"),
        (dict(threshold=math.nan), "threshold=nan must be positive"),
        (dict(threshold=0.5, mode="first"), "mode='first' is unknown"),
    ],
)
def test_refuses(given, said):
    with pytest.raises(ValueError, match=said):
        keep_contexts(SORTED, **given)
    with pytest.raises(ValueError, match="sorted, the largest first"):
        mmed_rag.keep_contexts(SORTED[:, ::-1], threshold=0.5)


# The prompt


REPORTS = ["The heart is large.", "Clear lungs, no effusion, no fracture.", "Old calcified granuloma in the left lung."]
ASKED = dict(domain="radiology", options=("yes", "no"))
WORDS = lambda text: len(text.split())


def test_prompt_has_what_the_data_have():
    text = prompt("Is there an effusion?", REPORTS, **ASKED)
    places = [
        text.index(part)
        for part in (MARKER, "radiologist", "3 reference reports", "1. The heart", "2. Clear", "3. Old")
    ]
    places += [text.index(part) for part in ("comparison only", "Question: Is there an effusion?", "yes, no")]
    assert places == sorted(places) and text.count(MARKER) == 1
    report = prompt("Describe the eye.", REPORTS[:1], domain="ophthalmology")
    assert "ophthalmologist" in report and "1 reference report of" in report and "report alone" in report
    alone = prompt("Is there an effusion?", [], **ASKED)
    assert "reference" not in alone and alone.endswith(text[text.index("Question") :])
    own = prompt("What is it?", [], domain="animals", domains={"animals": "You are a zoologist."})
    assert "zoologist" in own


def test_reports_are_cut_last_first_then_their_tail():
    full = prompt("Is there an effusion?", REPORTS, **ASKED)
    shorter = [prompt("Is there an effusion?", REPORTS[:count], **ASKED) for count in (2, 1, 0)]
    seen = []
    for limit in range(WORDS(full) + 3, WORDS(shorter[-1]) - 1, -1):
        text = prompt("Is there an effusion?", REPORTS, **ASKED, limit=limit, length=WORDS)
        assert WORDS(text) <= limit and text.endswith(full[full.index("Question") :]) and text.startswith(full[:60])
        seen.append(text)
    assert seen[0] == full and {*shorter} < {*seen}
    kept = [text.count("\n1. ") + text.count("\n2. ") + text.count("\n3. ") for text in seen]
    assert kept == sorted(kept, reverse=True) and set(kept) == {0, 1, 2, 3}
    tails = [text.split("1. ")[1].split("\n")[0] for text in seen if kept[seen.index(text)] == 1]
    assert {"The heart is large.", "The heart is", "The heart", "The"} == set(tails)
    with pytest.raises(ValueError, match=f"without any report the prompt has length {WORDS(shorter[-1])}, and limit=9"):
        prompt("Is there an effusion?", REPORTS, **ASKED, limit=9, length=WORDS)


def test_prompt_refuses():
    with pytest.raises(ValueError, match="domain='radiolgy' is unknown; did you mean 'radiology'"):
        prompt("?", [], domain="radiolgy")
    with pytest.raises(ValueError, match="limit=5 with length=None"):
        prompt("?", [], domain="radiology", limit=5)


# Pictures


def test_noise_as_the_code_draws_it():
    noise = mmed_rag.noise_picture((96, 64, 3), jax.random.key(0))
    assert noise.shape == (96, 64, 3) and noise.dtype == np.uint8
    assert (noise == 0).mean() == pytest.approx(0.5 + 0.5 / 255 * 0.8, abs=0.01)  # and what is below one grey level
    assert (noise == 255).mean() == pytest.approx(0.1587, abs=0.01)
    assert (noise != mmed_rag.noise_picture((96, 64, 3), jax.random.key(1))).any()


def test_noised_other_has_the_schedule_s_moments():
    picture = np.full((64, 64, 3), 96, np.uint8)
    np.testing.assert_allclose(np.int32(mmed_rag.noised_other(picture, 0, jax.random.key(0))), 96, atol=3)
    x = 96 / 127.5 - 1
    for step in (100, 300):
        signal = signal_rates()[step]
        got = mmed_rag.noised_other(picture, step, jax.random.key(0)) / 127.5 - 1
        assert got.mean() == pytest.approx(signal * x, abs=0.02)
        assert got.std() == pytest.approx(math.sqrt(1 - signal**2), rel=0.03)
    ends = mmed_rag.noised_other(picture, 999, jax.random.key(0))
    assert ends.dtype == np.uint8 and ends.min() == 0 and ends.max() == 255
    with pytest.raises(ValueError, match="step=1000 must be between 0 and 999"):
        mmed_rag.noised_other(picture, 1000, jax.random.key(0))


# Rows


def case(i, truth=None):
    return Case(f"<image>\nprompt {i}", f"{i}.png", f"noise{i}.png", f"alone {i}", f"reports {i}", f"noised {i}", truth)


@pytest.mark.parametrize("truth", [None, "the truth"])
def test_rows_of_all_eight_outcomes(truth):
    """Written out: which rows, which texts, and the noise picture on cross-modal rows alone."""
    outcomes = list(itertools.product((False, True), repeat=3))
    right = dict(zip(("alone", "with_reports", "noised"), np.array(outcomes).T, strict=True))
    rows = preference_rows([case(i, truth) for i in range(8)], right)
    written = [  # outcome number 4 alone + 2 with reports + noised
        (2, "use_reports", "reports 2", "alone 2"), (3, "cross_modal", "reports 3", "noised 3"),
        (3, "use_reports", "reports 3", "alone 3"), (4, "resist_reports", "alone 4", "reports 4"),
        (5, "resist_reports", "alone 5", "reports 5"), (7, "cross_modal", "reports 7", "noised 7"),
    ]  # fmt: skip
    expected = [
        {
            "prompt": f"<image>\nprompt {i}",
            "images": f"{i}.png",
            "chosen": truth or chosen,
            "rejected": rejected,
            "subset": subset,
        }
        | ({"rejected_images": f"noise{i}.png"} if subset == "cross_modal" else {})
        for i, subset, chosen, rejected in written
    ]
    assert rows == expected


def test_rows_refuse():
    told = {"alone": np.array([True]), "with_reports": np.array([False])}
    with pytest.raises(ValueError, match="right has alone, with_reports; give alone, with_reports, noised"):
        preference_rows([case(0)], told)
    with pytest.raises(ValueError, match="2 cases, and right has 1 of 'alone'"):
        preference_rows([case(0), case(1)], told | {"noised": np.array([True])})


def test_rows_are_read_and_the_picture_alone_tells_equal_texts_apart():
    """Through the data pipeline and the loss: of equal texts the gradient is not 0 where the rejected picture is noise."""
    module, params = tiny.vlm()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    noise = mmed_rag.noise_picture((8, 8, 3), jax.random.key(0))
    told = Case(
        prompt("a?", ["b c"], domain="radiology", domains={"radiology": "d"}), picture, noise, "no", "yes", "yes"
    )
    rows = preference_rows([told], {name: np.array([name != "alone"]) for name in ("alone", "with_reports", "noised")})
    assert [row["subset"] for row in rows] == ["cross_modal", "use_reports"] and rows[0]["chosen"] == rows[0][
        "rejected"
    ]
    conversation = conversation_of(rows[0], Source("rows"), "row")
    assert conversation.pair.rejected_images[0] is noise and not conversation.pair.equal
    assert chosen_view(conversation).messages == rejected_view(conversation).messages

    tokens = np.array([[60, 60, 60, 60, 5, 6, 7]], np.int32)  # four places of the picture, and a text
    targets = np.arange(7)[None] > 4

    def loss(params, *pictures):
        """DPO's loss of one text given two pictures, the reference being the policy itself."""
        given = [picture[None, None].astype(np.float32) for picture in pictures]
        policy = losses.PairLogps(*(models.sequence_logps(module, params, tokens, targets, images=x) for x in given))
        return losses.dpo_loss(policy, jax.lax.stop_gradient(policy)).sum()

    of = jax.jit(jax.grad(loss))
    size = lambda grads: max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
    assert size(of(params, picture, picture)) < 1e-6 and size(of(params, picture, noise)) > 1e-4
