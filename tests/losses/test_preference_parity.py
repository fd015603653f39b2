"""The same numbers as TRL's trainers give for the same log-probabilities."""

import types

import numpy as np
import pytest

from jaxmethods import losses
from jaxmethods.losses import PairLogps

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

RNG = np.random.default_rng(1)
SUMS = PairLogps(*RNG.uniform(-60, -1, (2, 32)).astype(np.float32))
LENGTHS = PairLogps(*RNG.integers(1, 30, (2, 32)))
MEANS = PairLogps(*(x / n for x, n in zip(SUMS, LENGTHS, strict=True)))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def of_trl(method, logps, **settings):
    accelerator = types.SimpleNamespace(device="cpu")
    told = types.SimpleNamespace(accelerator=accelerator, **settings)
    return method(told, *(torch.tensor(np.asarray(x, np.float32)) for x in logps))[0].numpy()


def test_cpo_and_simpo_parity():
    from trl.experimental.cpo import CPOTrainer

    given = dict(alpha=0.0, label_smoothing=0.0)
    cpo = of_trl(CPOTrainer.cpo_loss, SUMS, beta=0.3, loss_type="sigmoid", **given)
    np.testing.assert_allclose(losses.cpo_loss(SUMS, beta=0.3), cpo, rtol=1e-5, atol=1e-6)
    simpo = of_trl(CPOTrainer.cpo_loss, MEANS, beta=2.5, simpo_gamma=1.4, loss_type="simpo", **given)
    np.testing.assert_allclose(losses.simpo_loss(SUMS, LENGTHS, beta=2.5, gamma=1.4), simpo, rtol=1e-5, atol=1e-6)


def test_orpo_parity():
    from trl.experimental.orpo import ORPOTrainer

    orpo = -of_trl(ORPOTrainer.odds_ratio_loss, MEANS, beta=0.3)  # TRL subtracts what it calls the losses
    np.testing.assert_allclose(losses.orpo_loss(SUMS, LENGTHS, beta=0.3), orpo, rtol=1e-5, atol=1e-6)
