"""Examples that are too long: worked out by hand, then laws on random ones."""

import numpy as np
import pytest

from jaxmethods.data import Example, Examples, split_text, truncate


def example(prompt, answer, before=()):
    """Tokens 100.. for the prompt, 200.. for the answer; `before`: positions of targets in the prompt."""
    tokens = np.r_[100 : 100 + prompt, 200 : 200 + answer].astype(np.int32)
    mask = np.arange(prompt + answer) >= prompt
    mask[list(before)] = True
    return Example(tokens, mask)


@pytest.mark.parametrize(
    ("prompt", "answer", "length", "bos", "kept", "cut"),
    [
        (3, 2, 5, None, [100, 101, 102, 200, 201], (0, 0)),  # fits
        (5, 2, 5, None, [102, 103, 104, 200, 201], (2, 0)),  # the prompt loses its beginning
        (5, 2, 5, 100, [100, 103, 104, 200, 201], (2, 0)),  # but not BOS
        (5, 2, 5, 999, [102, 103, 104, 200, 201], (2, 0)),  # which is not here
        (6, 9, 8, None, [104, 105, 200, 201, 202, 203, 204, 205], (4, 3)),  # a quarter stays with the prompt
        (6, 9, 8, 100, [100, 105, 200, 201, 202, 203, 204, 205], (4, 3)),
        (1, 9, 8, None, [100, 200, 201, 202, 203, 204, 205, 206], (0, 2)),  # or less, if it is shorter
        (3, 5, 2, 100, [102, 200], (2, 4)),  # room for one token of each: the last of the prompt
        (2, 6, 7, None, [101, 200, 201, 202, 203, 204, 205], (1, 0)),
    ],
)
def test_by_hand(prompt, answer, length, bos, kept, cut):
    result = truncate(example(prompt, answer), length, bos_id=bos)
    assert result.example.tokens.tolist() == kept
    assert result.example.target_mask.tolist() == [token >= 200 for token in kept]
    assert (result.prompt, result.answer) == cut


def test_earlier_turns_are_cut_like_the_prompt():
    """Targets 103 and 104 are an earlier answer; one that becomes the first token has nothing to be predicted from."""
    result = truncate(example(6, 2, before=(3, 4)), 5)
    assert result.example.tokens.tolist() == [103, 104, 105, 200, 201]
    assert result.example.target_mask.tolist() == [False, True, False, True, True]


def test_tokens_behind_the_last_target_go_first():
    long = Example(np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 0, 0], bool))
    result = truncate(long, 4)
    assert result.example.tokens.tolist() == [0, 1, 2, 3] and (result.prompt, result.answer) == (0, 0)


def test_laws_of_truncation():
    rng = np.random.default_rng(0)
    for _ in range(300):
        given = example(rng.integers(1, 20), rng.integers(1, 20))
        length, bos = int(rng.integers(2, 24)), rng.choice([100, 999])
        out, prompt, answer = truncate(given, length, bos_id=int(bos))
        assert len(out.tokens) == min(length, len(given.tokens))  # no room is wasted
        assert len(out.tokens) + prompt + answer == len(given.tokens)  # and all that went is counted
        assert out.target_mask.any() and not out.target_mask[0]
        assert (np.diff(out.tokens) > 0).all()  # the order stays
        assert (
            out.tokens[out.target_mask] == 200 + np.arange(out.target_mask.sum())
        ).all()  # an answer keeps its start
        if answer:
            assert (~out.target_mask).sum() <= max(1, length // 4)


def test_text_is_split_so_that_every_token_but_the_first_is_predicted_once():
    rng = np.random.default_rng(1)
    for _ in range(200):
        n, length = int(rng.integers(1, 40)), int(rng.integers(2, 12))
        pieces = split_text(Example(np.arange(n, dtype=np.int32), np.arange(n) > 0), length)
        assert all(0 < len(piece.tokens) <= length and not piece.target_mask[0] for piece in pieces)
        predicted = np.concatenate([piece.tokens[piece.target_mask] for piece in pieces])
        assert predicted.tolist() == list(range(1, n))
        assert all((np.diff(piece.tokens) == 1).all() for piece in pieces)


def test_flat_storage_gives_back_what_was_put_in():
    rng = np.random.default_rng(2)
    given = [example(*rng.integers(1, 6, 2)) for _ in range(20)]
    held = Examples.of(iter(given))
    assert len(held) == 20 and held.lengths.tolist() == [len(one.tokens) for one in given]
    for one, other in zip(given, held, strict=True):
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.target_mask, other.target_mask)
        assert np.shares_memory(other.tokens, held.tokens)
    assert len(Examples.of([])) == 0
    with pytest.raises(IndexError, match="there are 20 examples; none has index 20"):
        held[20]
