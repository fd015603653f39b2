"""Preference objectives: by hand from logits, their references, their laws, and steps through every adapter and mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxmethods import adapters, losses, models, training, tree
from jaxmethods.losses import PairLogps
from jaxmethods.objectives import CREAM, MMedPO, Preference
from jaxmethods.objectives import preference as core
from tests import tiny
from tests.objectives.readings import ROWS, close, log_softmax, readings, with_pictures

PAIR = ("chosen", "rejected")
KINDS = {
    "dpo": Preference(beta=0.3), "cdpo": Preference(beta=0.3, label_smoothing=0.2),
    "robust": Preference(loss="robust", beta=0.3, label_smoothing=0.2), "ipo": Preference(loss="ipo", per_token=True),
    "hinge": Preference(loss="hinge", beta=0.3), "simpo": Preference(loss="simpo", beta=2.0, gamma=0.7),
    "cpo": Preference(loss="cpo", nll_weight=1.0), "orpo": Preference(loss="orpo", nll_weight=1.0),
    "weighted": Preference(weight="w", beta=0.3), "mmedpo": MMedPO(beta=0.3), "cream": CREAM(beta=0.3),
}  # fmt: skip
ADAPTERS = {
    "lora": {"self_attn/(q|v)_proj": adapters.LoRA(rank=2)},
    "smore": {"mlp/up_proj": adapters.SMoRE(experts=(3,), fanout=(2,), ranks=(2,), gate_dim=4, router_dim=5)},
    "s2ft": {"mlp/down_proj": adapters.S2FT(count=4)},
}  # fmt: skip


def pairs(objective=KINDS["dpo"], **options):
    """Random pairs, and numbers where the objective reads some; every answer has a target."""
    batch = readings(*PAIR, **options)
    rows = len(batch["chosen/tokens"])
    for side in PAIR:
        batch[f"{side}/target_mask"][:, 5] = True
    rng = np.random.default_rng(4)
    return batch | {name: rng.random(rows).astype(np.float32) for name in objective.numbers()}


def sums_by_hand(module, params, batch, side):
    """From whole logits, in float64."""
    tokens = batch[f"{side}/tokens"]
    given = {}
    if f"{side}/pixels" in batch:
        given["images"] = models.Images(batch[f"{side}/pixels"], batch[f"{side}/places"])
    logits = np.asarray(models.logits(module, params, tokens, batch[f"{side}/segment_ids"] > 0, **given), np.float64)
    logps = log_softmax(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
    of_tokens = np.take_along_axis(logps[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    return np.where(batch[f"{side}/target_mask"][:, 1:], of_tokens, 0).sum(1)


@functools.cache
def moved(kind="lora"):
    """(base module, its parameters, adapted module, its parameters away from their start)."""
    return tiny.adapted(ADAPTERS[kind], num_layers=2)


def value(objective, module, params, batch, key=None):
    loss, metrics = jax.jit(objective.loss_fn(module))(params, batch, key)
    return float(loss.value()), {name: float(mean.value()) for name, mean in metrics.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    """Policy with LoRA, reference without, both from logits; then the loss of `losses` and the metrics' definitions."""
    objective, (base, base_params, module, params) = KINDS[kind], moved()
    batch = pairs(objective)
    policy, start = (
        PairLogps(*(np.float32(sums_by_hand(m, p, batch, side)) for side in PAIR))
        for m, p in ((module, params), (base, base_params))
    )
    lengths = PairLogps(*(batch[f"{side}/target_mask"].sum(1) for side in PAIR))
    means = lambda pair: PairLogps(*(x / n for x, n in zip(pair, lengths, strict=True)))
    each = {
        "dpo": lambda: losses.dpo_loss(policy, start, beta=0.3),
        "cdpo": lambda: losses.dpo_loss(policy, start, beta=0.3, label_smoothing=0.2),
        "robust": lambda: losses.robust_dpo_loss(policy, start, beta=0.3, label_smoothing=0.2),
        "ipo": lambda: losses.ipo_loss(policy, start, beta=0.1, lengths=lengths),
        "hinge": lambda: losses.hinge_loss(policy, start, beta=0.3),
        "simpo": lambda: losses.simpo_loss(policy, lengths, beta=2.0, gamma=0.7),
        "cpo": lambda: losses.cpo_loss(policy) - means(policy).chosen,
        "orpo": lambda: losses.orpo_loss(policy, lengths) - means(policy).chosen,
        "weighted": lambda: batch["weight"] * losses.dpo_loss(policy, start, beta=0.3),
        "mmedpo": lambda: batch["weight"] * losses.dpo_loss(policy, start, beta=0.3),
        "cream": lambda: losses.dpo_loss(policy, start, beta=0.3, label_smoothing=1 - batch["consistency"]),
    }[kind]()  # fmt: skip
    found, metrics = value(objective, module, params, batch)
    assert found == pytest.approx(float(np.mean(each)), rel=2e-5) and metrics["loss"] == found
    gain = {"cpo": policy, "orpo": means(policy), "simpo": means(policy)}.get(
        kind, PairLogps(*(x - y for x, y in zip(policy, start, strict=True)))
    )
    told = {
        "rewards/chosen": objective.beta * gain.chosen.mean(), "rewards/rejected": objective.beta * gain.rejected.mean(),
        "rewards/margins": objective.beta * (gain.chosen - gain.rejected).mean(),
        "rewards/accuracies": (gain.chosen > gain.rejected).mean(),
        "logps/chosen": policy.chosen.mean(), "logps/rejected": policy.rejected.mean(), "nll": -means(policy).chosen.mean(),
    }  # fmt: skip
    assert metrics == pytest.approx(told | {"loss": found}, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "orpo", "mmedpo", "cream"])
def test_laws_of_the_batch(kind):
    """Permuting pairs, padding rows and cutting the batch change nothing; filling rows weigh nothing."""
    objective, (_, _, module, params) = KINDS[kind], moved()
    batch = pairs(objective)
    loss_fn = jax.jit(objective.loss_fn(module))
    whole, _ = loss_fn(params, batch, None)
    order = np.random.default_rng(0).permutation(ROWS)
    close(loss_fn(params, {name: x[order] for name, x in batch.items()}, None)[0], whole)
    halves = [
        loss_fn(params, {name: x[part] for name, x in batch.items()}, None)[0] for part in (slice(3), slice(3, ROWS))
    ]
    close(halves[0] + halves[1], whole)
    wider = {name: np.pad(x, [(0, 0), (0, 5)]) if x.ndim > 1 else x for name, x in batch.items()}
    close(loss_fn(params, wider, None)[0], whole)
    filled = {name: np.concatenate([x, np.zeros_like(x[:2])]) for name, x in batch.items()}
    filled = jax.jit(objective.loss_fn(module))(params, filled, None)
    close(filled[0], whole)
    assert all(np.isfinite(mean.total) and mean.weight == ROWS for mean in filled[1].values())


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "mmedpo", "cream"])
def test_at_the_start_the_policy_is_the_reference(kind):
    """No margin, the loss of none, and a gradient that prefers the chosen answer."""
    objective = KINDS[kind]
    module, base = tiny.decoder(num_layers=2)
    adapted = adapters.attach(module, ADAPTERS["lora"])
    params = adapters.init(adapted, base, jax.random.key(0))
    batch = pairs(objective)
    found, metrics = value(objective, adapted, params, batch)
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] == 0
    expected = {"dpo": np.log(2), "cream": np.log(2), "hinge": 1.0, "ipo": 25.0}.get(kind)
    assert found == pytest.approx(np.log(2) * batch["weight"].mean() if expected is None else expected, rel=1e-5)


def test_swapping_the_sides_turns_the_margin():
    _, _, module, params = moved()
    batch = pairs()
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {f"{other[n.partition('/')[0]]}/{n.partition('/')[2]}": x for n, x in batch.items()}
    margin, turned = (value(KINDS["dpo"], module, params, b)[1]["rewards/margins"] for b in (batch, swapped))
    assert margin == pytest.approx(-turned, rel=1e-4) and abs(margin) > 1e-4


def test_equal_sides_teach_nothing_unless_their_pictures_differ():
    module, params = tiny.vlm(num_layers=2)
    batch = with_pictures(readings("chosen"), "chosen")
    batch["chosen/target_mask"][:, 6] = True
    batch |= {name.replace("chosen", "rejected"): x for name, x in batch.items()}
    params = params | {"reference": jax.tree.map(lambda x: 1.1 * x, params)}  # so that policy and reference differ

    def slope(batch):
        gradient = jax.jit(jax.grad(lambda p: KINDS["dpo"].loss_fn(module)(p, batch, None)[0].value()))(params)
        assert not any(np.any(x) for x in jax.tree.leaves(gradient.pop("reference")))
        return max(np.abs(x).max() for x in jax.tree.leaves(gradient))

    assert slope(batch) < 1e-6
    noised = batch["rejected/pixels"].copy()
    noised[:, :, 2:6] = 255 - noised[:, :, 2:6]
    assert slope(batch | {"rejected/pixels": noised}) > 1e-3


def test_pictures_by_hand():
    """Sides with different pictures, and with room for different numbers of crops."""
    module, params = tiny.vlm(num_layers=2)
    batch = with_pictures(pairs(), *PAIR)
    for side in PAIR:
        batch[f"{side}/target_mask"][:, 6] = True
    batch["rejected/pixels"] = np.pad(batch["rejected/pixels"][::-1], [(0, 0), (0, 1), *[(0, 0)] * 3])
    found = value(Preference(loss="cpo"), module, params, batch)[1]
    for side in PAIR:
        by_hand = sums_by_hand(module, params, batch, side).mean()
        assert found[f"logps/{side}"] == pytest.approx(by_hand, rel=1e-5)


def test_exact_kl_by_hand():
    """Whole distributions of both models in float64; blocks that do not divide the row; not while training."""
    base, base_params, module, params = moved()
    batch = pairs()
    total = count = 0
    for side in PAIR:
        policy, start = (
            log_softmax(x.reshape(-1, x.shape[-1])).reshape(x.shape)
            for x in (
                np.asarray(models.logits(m, p, batch[f"{side}/tokens"], batch[f"{side}/segment_ids"] > 0), np.float64)
                for m, p in ((module, params), (base, base_params))
            )
        )
        each = (np.exp(policy) * (policy - start)).sum(-1)[:, :-1]
        where = batch[f"{side}/target_mask"][:, 1:]
        total, count = total + each[where].sum(), count + where.sum()
    objective = Preference(kl=True)
    found, metrics = value(objective, module, params, batch)
    assert total / count > 1e-3 and metrics["kl"] == pytest.approx(total / count, rel=1e-4)
    both = core.together(*(tree.unflatten({n: x for n, x in batch.items() if "/" in n})[side] for side in PAIR))
    assert float(core.answer_kl(module, params, both, block=5).value()) == pytest.approx(total / count, rel=1e-4)
    assert "kl" not in value(objective, module, params, batch, jax.random.key(0))[1]
    assert value(objective, base, base_params, batch)[1]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_stays_where_training_began():
    """Of trained leaves of the model the copies serve; without copies ("drifting") the leaves as they are now."""
    module, base = tiny.decoder(num_layers=2)
    adapted = adapters.attach(module, ADAPTERS["lora"])
    params = adapters.init(adapted, base, jax.random.key(0))
    start = tree.unflatten({f"reference/{p}": x for p, x in tree.flatten(base).items() if "norm" in p})
    changed = tree.unflatten({p: x + 0.3 * ("norm" in p) for p, x in tree.flatten(params).items()})
    batch = pairs()
    by_hand = {side: sums_by_hand(module, base, batch, side) for side in PAIR}
    moved_by_hand = {side: sums_by_hand(adapted, changed, batch, side) for side in PAIR}
    _, kept = value(Preference(beta=1.0), adapted, changed | start, batch)
    for side in PAIR:
        assert kept[f"rewards/{side}"] == pytest.approx((moved_by_hand[side] - by_hand[side]).mean(), rel=1e-4)
    _, drifted = value(Preference(beta=1.0, reference="drifting"), adapted, changed, batch)
    assert drifted["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert Preference().keeps_start and not Preference(reference="drifting").keeps_start
    assert not Preference(loss="simpo").keeps_start


def test_accumulated_parts_are_the_whole_batch():
    objective, (_, _, module, params) = dataclasses.replace(KINDS["orpo"], weight="w"), moved()
    trained, frozen = adapters.partition(params)
    tx = training.Optimizer(name="sgd", b1=0.0, learning_rate=0.1, schedule="constant", warmup=0).transformation(1)
    new = []
    for parts in (1, 4):
        step = jax.jit(training.make_train_step(objective.loss_fn(module), tx, accumulate=parts))
        new.append(step(training.init_state(trained, tx, jax.random.key(0)), frozen, pairs(objective))[0].trained)
    close(*new)


def test_both_answers_share_one_pass():
    """The trace has both sides' rows in one array, and no hidden states of one side alone."""
    _, _, module, params = moved()
    jaxpr = str(jax.make_jaxpr(lambda p: KINDS["dpo"].loss_fn(module)(p, pairs(), None)[0].value())(params))
    assert f"f32[{2 * ROWS},12,32]" in jaxpr and f"f32[{ROWS},12,32]" not in jaxpr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(loss="dpoo"), "loss='dpoo' is unknown; did you mean 'dpo'"),
        (dict(beta=0.0), r"beta=0\.0 must be positive"),
        (dict(label_smoothing=0.5), r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
        (
            dict(loss="ipo", label_smoothing=0.1),
            "label_smoothing is for loss='dpo' and 'robust'; 'ipo' would not read it",
        ),
        (dict(gamma=1.0), "gamma is for loss='simpo'; 'dpo' would not read it"),
        (
            dict(loss="orpo", kl=True),
            "kl is for loss='dpo' and 'robust' and 'ipo' and 'hinge'; 'orpo' would not read it",
        ),
        (dict(cache="x.parquet", kl=True), "kl wants whole distributions of the reference"),
        (dict(cache="x.parquet", reference="drifting"), "a reference that drifts cannot be kept"),
        (dict(loss="cpo", per_token=True), "per_token is for loss='dpo' and 'ipo'"),
        (dict(nll_weight=-1.0), r"nll_weight=-1\.0 must not be negative"),
        (dict(reference="moving"), "reference='moving' is unknown"),
    ],
)
def test_options_that_contradict(options, said):
    with pytest.raises(ValueError, match=said):
        Preference(**options)
    assert core.LOSSES[0] == "dpo"
