"""Log-probabilities of steps by another route, distances by hand and by a real encoder, and the agent's loop."""

import jax
import numpy as np
import pytest

from jaxmethods import data, models
from jaxmethods.data import trajectories
from jaxmethods.evals import saup
from jaxmethods.evals.answers import Failed
from jaxmethods.evals.saup import agent, distances, scoring
from jaxmethods.evals.sentences import sentence_embedder
from tests import tiny
from tests.launch.conftest import chatml_tokenizer

step = lambda thought, action, observation="": {"thought": thought, "action": action, "observation": observation}
ROWS = [
    {"question": "how many cats?", "steps": [step("I look.", "look[mat]", "three"), step("So three.", "finish[3]")]},
    {
        "question": "a",
        "system": "be kind",
        "steps": [step("I know.", "", "Error"), step("", "finish[x y]", "left over")],
    },
    {"question": "and dogs on the log?", "steps": [step("Thought: a Thought", "finish[Thought]")]},
]


@pytest.fixture(scope="module")
def model():
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder("llama", num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    return module, params, tokenizer


def test_logps_of_steps_by_another_route(model):
    module, params, tokenizer = model
    found = scoring.score(*model, ROWS, batch_size=2)
    whole = scoring.score(*model, ROWS, batch_size=8)
    np.testing.assert_array_equal(found.mask, [[True, True], [True, True], [True, False]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found.logps, whole.logps)
    for i, row in enumerate(ROWS):
        # The prompt of each step alone, as the agent saw it, and then what it said, letter by letter where the parts are.
        for n, said in enumerate(row["steps"]):
            before = trajectories.conversation({**row, "steps": row["steps"][:n]})
            if n == 0:
                assert before[-1]["role"] == "user"
            asked = data.prompt_tokens(tokenizer, before)
            text = trajectories.spoken(said)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = np.array(encoded["input_ids"])
            logits = models.logits(module, params, np.concatenate([asked, ids])[None].astype(np.int32))[0]
            logps = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(asked) - 1, len(asked) + len(ids) - 1), ids]
            part = np.zeros(len(text), int)
            part[len("Thought: ") :][: len(said["thought"])] = 1
            part[len(text) - len(said["action"]) :] = 2
            within = np.array([part[start:end].max() for start, end in encoded["offset_mapping"]])
            for mine, where, count in (
                (found.logps.thought, within == 1, found.logps.thought_tokens),
                (found.logps.action, within == 2, found.logps.action_tokens),
            ):
                assert count[i, n] == where.sum()
                assert mine[i, n] == pytest.approx(logps[where].sum(), abs=1e-3)
    assert not found.logps.thought[2, 1] and not found.logps.action_tokens[2, 1]


def test_what_a_step_observes_counts_later_alone(model):
    """Another observation changes nothing before it; and its own tokens are never counted."""
    other = [{**ROWS[0], "steps": [{**ROWS[0]["steps"][0], "observation": "no cat is there"}, ROWS[0]["steps"][1]]}]
    first, second = scoring.score(*model, ROWS[:1]), scoring.score(*model, other)
    np.testing.assert_allclose(first.logps.thought[0, 0], second.logps.thought[0, 0], atol=1e-4)
    assert abs(first.logps.thought[0, 1] - second.logps.thought[0, 1]) > 1e-3
    np.testing.assert_array_equal(first.logps.action_tokens, second.logps.action_tokens)
    assert second.tokens > first.tokens


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "a", "steps": []}, "leave empty trajectories out"),
        ({"question": " ", "steps": ROWS[0]["steps"]}, "field 'question' must be text"),
        ({"question": "a", "steps": [{"thought": "b"}]}, "step 1: a step must be"),
        ({"question": "a", "steps": [step("", " ")]}, "step 1: neither a thought nor an action"),
        ({"question": "a", "steps": [step("b", "c", 3)]}, "'observation' must be text"),
        ({"question": "a b" * 99, "steps": ROWS[0]["steps"]}, "tokens, and max_tokens is 128; raise it"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, row, words):
    with pytest.raises(ValueError, match=words):
        scoring.score(*model, [ROWS[0], row], max_tokens=128)


def test_a_model_that_gives_nan_is_told(model):
    module, params, tokenizer = model
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(ValueError, match="trajectory 1, step 1: its log-probability is not finite"):
        scoring.score(module, broken, tokenizer, ROWS[:1])
    with pytest.raises(ValueError, match="no trajectory to score"):
        scoring.score(*model, [])


def test_distances_by_hand():
    texts = ["the cat", "a cat", "", "The CAT!"]
    np.testing.assert_allclose(distances.token_overlap(["the cat"] * 4, texts), [0, 2 / 3, 1, 0])
    vectors = {"a": [3.0, 0.0], "b": [0.0, 2.0], "c": [-1.0, 0.0], "d": [1.0, 1.0]}
    cosine = distances.cosine_distance(lambda some: np.array([vectors[text] for text in some]))
    np.testing.assert_allclose(cosine(["a"] * 4, ["a", "b", "c", "d"]), [0, 1, 2, 1 - 0.5**0.5], atol=1e-6)
    score = {"sure": 0.5, "unsure": 1e-9, "none": 0.0}
    reciprocal = distances.reciprocal_score(lambda a, b: score[a])
    found = reciprocal(list(score), [""] * 3)
    np.testing.assert_allclose(found, [2, 1000, 1000], rtol=1e-6)
    assert distances.floored(found) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="floor=0"):
        distances.reciprocal_score(lambda a, b: 1.0, 0.0)
    with pytest.raises(ValueError, match="the score of 'x' is nan"):
        distances.reciprocal_score(lambda a, b: np.nan)(["x"], ["y"])
    with pytest.raises(ValueError, match="the vector of 'x' is 0"):
        distances.cosine_distance(lambda some: np.zeros((len(some), 2)))(["x"], ["y"])


def test_drift_is_of_all_so_far_and_the_gap_of_one_step():
    asked = []

    def lengths(first, second):
        asked.extend(zip(first, second, strict=True))
        return np.array([len(a) + 1000 * len(b) for a, b in asked[-len(first) :]], np.float32)

    drift = distances.drifts(ROWS[:1], lengths)
    told = "Thought: I look.\nAction: look[mat]\nObservation: three"
    assert asked[0] == (told, "how many cats?") and asked[1][0].startswith(told + "\nThought: So three.")
    assert len(drift) == 1 and drift[0].shape == (2,)
    gap = distances.gaps(ROWS[:1], lengths)
    np.testing.assert_array_equal(gap[0], [len("look[mat]") + 5000, 0])  # nothing observed: 0
    assert distances.gaps(ROWS[:1], lengths, of="step")[0][0] == len("Thought: I look.\nAction: look[mat]") + 5000
    with pytest.raises(ValueError, match="distance 0 is -1"):
        distances.drifts(ROWS[:1], lambda first, second: -np.ones(len(first), np.float32))


def test_a_real_encoder_reads_the_end_or_all_of_long_texts(minilm_folder):
    module, params = models.load(str(minilm_folder))
    tokenizer = models.load_tokenizer(str(minilm_folder))
    left, whole = (
        sentence_embedder(module, params, tokenizer, truncate=how, batch_size=2) for how in ("left", "chunks")
    )
    cosine = distances.cosine_distance(left)
    found = cosine(
        ["A cat sits on the mat."] * 2, ["A kitten is resting on a rug.", "The stock market fell sharply today."]
    )
    assert found[0] == pytest.approx(1 - 0.655, abs=2e-3) and found[1] > 0.9
    late = "cat " * 600 + "The stock market fell sharply today."
    ids = tokenizer(late, add_special_tokens=False)["input_ids"]
    end = tokenizer.decode(ids[-510:])
    np.testing.assert_allclose(left([late])[0], left([end])[0], atol=1e-5)
    right = sentence_embedder(module, params, tokenizer, batch_size=2)
    np.testing.assert_allclose(right([late])[0], right([tokenizer.decode(ids[:510])])[0], atol=1e-5)
    parts = [tokenizer.decode(ids[:510]), tokenizer.decode(ids[510:])]
    np.testing.assert_allclose(whole([late])[0], whole(parts).mean(axis=0), atol=1e-5)


def test_the_agent_acts_until_it_finishes():
    said = {
        "two": ["Thought: I add.\nAction: calculate[1 + 1]", "Thought: Now.\nAction: finish[2]"],
        "wrong": ["Thought: I guess.\nAction: finish[3]"],
        "lost": ["Well"] * 3,
        "gone": [Failed("no server")],
    }
    seen = []

    def answerer(number):
        seen.append(number)
        return lambda prompts: [said[p[-1]["content"] if len(p) == 1 else p[0]["content"]][number] for p in prompts]

    questions = [{"id": q, "question": q, "answer": "2", "path": ["calculate[1 + 1]", "finish[2]"]} for q in said]
    desk = trajectories.Desk({"users": {}, "orders": {}})
    two, wrong, lost, gone = agent.rollout(answerer, questions, desk, steps=3)
    assert two["correct"] and [s["observation"] for s in two["steps"]] == ["2", ""] and seen == [0, 1, 2]
    assert [s["state"] for s in two["steps"]] == [0, 0] and "path" not in two
    assert not wrong["correct"] and [s["state"] for s in wrong["steps"]] == [1]
    assert (
        not lost["correct"]
        and [s["state"] for s in lost["steps"]] == [2, 2, 2]
        and lost["steps"][0]["thought"] == "Well"
    )
    assert gone == Failed("no server")
    assert saup.distances is distances
