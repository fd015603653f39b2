"""Any adapter x any objective x any model x any mesh: two steps of each, on one device and on eight.

`make test` takes a few of the combinations; all of them are run apart (-m ci).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, models, sharding, training, tree
from jaxmethods.objectives import CREAM, KTO, CAFe, MMedPO, Preference, Supervised
from tests import tiny
from tests.objectives.readings import ROWS, THREE, close, readings, with_pictures
from tests.objectives.test_kto import labelled
from tests.objectives.test_preference import ADAPTERS, PAIR, pairs

OBJECTIVES = {
    "sft": Supervised(), "dpo": Preference(beta=0.3), "ipo": Preference(loss="ipo", per_token=True),
    "orpo": Preference(loss="orpo", nll_weight=1.0), "mmedpo": MMedPO(beta=0.3), "cream": CREAM(beta=0.3),
    "mmed_rag": Preference(beta=0.3), "kto": KTO(),
    "cafe": CAFe(alpha_lm=0.7, alpha_con=1.3, temperature=0.2),
}  # fmt: skip
MODELS = ("text", "pictures")
MESHES = ({"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8})
ONLY = {"mmed_rag": "pictures"}
"""Its pairs differ in what is seen."""


def rows_for(name, model):
    """A batch as the data room lays it out for the objective."""
    objective, seen = OBJECTIVES[name], model == "pictures"
    if name == "kto":
        return labelled(sees=seen)
    if name == "sft":
        batch = readings("row")
        batch = with_pictures(batch, "row") if seen else batch
        return {key.partition("/")[2]: x for key, x in batch.items()}
    if name == "cafe":
        return with_pictures(readings(*THREE), "generation", "query") if seen else readings(*THREE)
    batch = pairs(objective)
    if seen:
        batch = with_pictures(batch, *PAIR)
    if name == "mmed_rag":  # the same answer, preferred for the picture and not for noise
        for part in ("tokens", "segment_ids", "positions", "target_mask", "places"):
            batch[f"rejected/{part}"] = batch[f"chosen/{part}"].copy()
        batch["rejected/pixels"] = 255 - batch["chosen/pixels"]
    for side in PAIR:
        batch[f"{side}/target_mask"][:, 6] = True
    return batch


def two_steps(name, adapter, model, axes=None):
    """(trained leaves before, after two steps, metrics of each) on a tiny model."""
    objective, batch = OBJECTIVES[name], rows_for(name, model)
    module, params = (tiny.vlm if model == "pictures" else tiny.decoder)(num_layers=2)
    if adapter != "full":
        module = adapters.attach(module, ADAPTERS[adapter])
        params = adapters.init(module, params, jax.random.key(2))
    trained, frozen = adapters.partition(params, (lambda path: True) if adapter == "full" else None)
    if adapter == "full" and getattr(objective, "keeps_start", False):
        frozen = tree.combine(frozen, {"reference": jax.tree.map(jnp.copy, trained)})
    before = jax.tree.map(np.asarray, trained)
    if axes:
        mesh = sharding.make_mesh(axes)
        module = module.clone(mesh=mesh)
        rules = (*adapters.RULES, *models.RULES)
        trained, frozen = (jax.device_put(x, sharding.shardings_for(x, mesh, rules)) for x in (trained, frozen))
        batch = sharding.place_rows(batch, ROWS, mesh)
    tx = training.Optimizer(name="sgd", b1=0.0, learning_rate=0.05, schedule="constant", warmup=0).transformation(2)
    step = jax.jit(training.make_train_step(objective.loss_fn(module), tx))
    state, told = training.init_state(trained, tx, jax.random.key(0)), []
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        told.append({name: float(x) for name, x in metrics.items()})
    return before, jax.tree.map(np.asarray, state.trained), told


def check(name, adapter, before, after, told):
    for path, leaf in tree.flatten(after).items():
        assert np.isfinite(leaf).all() and adapters.is_adapter(path) == (adapter != "full"), path
    moves = [np.any(x != y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert np.mean(moves) > 0.5  # LoRA's a, and a gate behind it, start without a gradient
    assert all(step["finite"] for step in told) and told[1]["loss"] < told[0]["loss"]
    assert (told[0].get("auxiliary_loss", 0) > 0) == (adapter == "smore")


QUICK = [
    ("sft", "smore", "pictures"),
    ("dpo", "full", "text"),
    ("mmed_rag", "s2ft", "pictures"),
    ("cafe", "lora", "text"),
]


@pytest.mark.parametrize(("name", "adapter", "model"), QUICK)
def test_one_device(name, adapter, model):
    check(name, adapter, *two_steps(name, adapter, model))


def combinations():
    """Every objective with every adapter; models and meshes take turns, so that each meets each."""
    for i, name in enumerate(OBJECTIVES):
        for j, adapter in enumerate(("full", *ADAPTERS)):
            yield name, adapter, ONLY.get(name, MODELS[(i + j) % 2]), MESHES[(i + j) % 3]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("name", "adapter", "model", "axes"), list(combinations()), ids=str)
def test_one_device_and_eight(name, adapter, model, axes):
    before, alone, told = two_steps(name, adapter, model)
    check(name, adapter, before, alone, told)
    _, together, also = two_steps(name, adapter, model, axes)
    close(together, alone, atol=2e-5)
    for one, other in zip(told, also, strict=True):
        counted = {key: 0 for key in one if key.endswith("accuracies")}  # margins of 0 at the start, but for rounding
        assert other | counted == pytest.approx(one | counted, rel=3e-4, abs=3e-5)
