"""Likelihoods, divergences and Min-K% by other routes."""

import numpy as np
import pytest

from jaxmethods.evals import completion
from jaxmethods.evals.scylla import TASKS
from jaxmethods.evals.scylla.intrinsic import divergences, likelihood, min_k, normalised_accuracy, orders, token_logps
from tests import tiny
from tests.launch.conftest import chatml_tokenizer

PROBABILITIES = np.array([0.5, 0.1, 0.8, 0.4])


def test_likelihood_by_hand():
    found = likelihood(np.log(PROBABILITIES))
    assert found.prob == pytest.approx(PROBABILITIES.prod() ** 0.25) and found.ppl == pytest.approx(1 / found.prob)
    assert likelihood([0.0]) == (1, 1)
    with pytest.raises(ValueError, match="without tokens"):
        likelihood([])


def test_min_k_by_hand():
    assert min_k(np.log(PROBABILITIES), 50) == pytest.approx(np.sqrt(0.1 * 0.4))
    assert min_k(np.log(PROBABILITIES), 10) == pytest.approx(0.1)  # one token at least
    assert min_k(np.log(PROBABILITIES), 100) == pytest.approx(likelihood(np.log(PROBABILITIES)).prob)
    assert normalised_accuracy(0.2, 0.4) == 0.5
    for wrong in (lambda: min_k([0.0], 0), lambda: normalised_accuracy(0.5, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()


def test_divergences_by_hand():
    p, q = np.array([0.1, 0.3, 0.35, 0.9]), np.array([0.2, 0.8, 0.85])
    grid = np.linspace(0.1, 0.9, 100)

    def density(values):  # Scott's width, kernels summed
        width = values.std(ddof=1) * len(values) ** -0.2
        return np.mean([np.exp(-(((grid - v) / width) ** 2) / 2) / width / np.sqrt(2 * np.pi) for v in values], axis=0)

    a, b = (np.maximum(density(values), 1e-10) for values in (p, q))
    found = divergences(p, q)
    assert found.kl == pytest.approx((a * np.log(a / b)).sum())
    middle = (a + b) / 2
    assert found.js == pytest.approx(((a * np.log(a / middle)).sum() + (b * np.log(b / middle)).sum()) / 2)
    assert divergences(p, p) == (0, 0) and divergences(q, p).js == pytest.approx(found.js) and found.js > 0
    far = divergences(p, p + 50)
    assert np.isfinite(far).all() and far.kl > 10  # floored densities
    for values in ([0.5], [0.5, 0.5], [0.5, np.nan]):
        with pytest.raises(ValueError, match=r"outside: .* have no density"):
            divergences(p, values)


def test_orders_of_answers():
    assert orders(TASKS["FindMinimum"], 3) == [3] and orders(TASKS["SortNumbers"], [1, 2]) == [[1, 2]]
    assert orders(TASKS["TSP"], [0, 2, 1, 3, 0]) == [[0, 2, 1, 3, 0], [0, 3, 1, 2, 0]]
    assert (
        sorted(orders(TASKS["TwoSum"], [1, 2])) == [[1, 2], [2, 1]] and len(orders(TASKS["FourSum"], [1, 2, 3, 4])) == 6
    )
    assert orders(TASKS["TwoSum"], [4, 4]) == [[4, 4]]


def test_tokens_sum_to_the_answers_logp():
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder("llama", num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    rows = [{"prompt": f"sort {i}", "answer": "The answer is [1, 2]" * (i + 1)} for i in range(3)]
    made = token_logps(module, params, tokenizer, rows, sequence_length=128, batch_size=2)
    sums, lengths = completion.answer_logps(module, params, tokenizer, rows, sequence_length=128, batch_size=2)
    assert [len(one) for one in made] == lengths.tolist()
    np.testing.assert_allclose([one.sum() for one in made], sums, rtol=1e-4)
    with pytest.raises(ValueError, match="sequence_length=16 is less than the"):
        token_logps(module, params, tokenizer, rows, sequence_length=16)
