"""The code that the documents show, run as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, tree
from jaxmethods.objectives import Supervised
from tests import tiny

ROOT = Path(__file__).parents[1]


def shown(file):
    """What the Python blocks of a document define, run in their order."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def extending():
    return shown("docs/extending.md")


def test_the_adapter_of_the_documents_keeps_the_laws(extending):
    module, params = tiny.decoder("llama")
    adapted = adapters.attach(module, {"mlp/up_proj": extending["Scale"]()})
    params = adapters.init(adapted, params, jax.random.key(0))
    tokens = np.arange(12).reshape(2, 6)
    before = module.apply({"params": adapters.detach(adapted, params)[1]}, tokens).hidden
    np.testing.assert_array_equal(adapted.apply({"params": params}, tokens).hidden, before)

    trained, frozen = adapters.partition(params)
    trained = jax.tree.map(lambda x: x * 1.5, trained)
    params = tree.combine(trained, frozen)
    after = adapted.apply({"params": params}, tokens).hidden
    assert not np.allclose(after, before)
    _, merged = adapters.merge(adapted, params)
    np.testing.assert_allclose(module.apply({"params": merged}, tokens).hidden, after, atol=1e-5)


def test_the_objective_of_the_documents_has_the_supervised_loss_as_its_limit(extending):
    module, params = tiny.decoder("llama")
    tokens = jnp.arange(12).reshape(2, 6)
    batch = {"tokens": tokens, "target_mask": tokens % 6 > 2, "segment_ids": jnp.ones_like(tokens),
             "positions": jnp.tile(jnp.arange(6), (2, 1))}  # fmt: skip
    loss = lambda objective: float(objective.loss_fn(module)(params, batch, None)[0].value())
    supervised = loss(Supervised())
    assert loss(extending["Focal"](gamma=0.0)) == pytest.approx(supervised, rel=1e-6)
    assert loss(extending["Focal"]()) < supervised


def test_the_notebook_of_the_readme(smollm2_file, capsys):
    names = shown("README.md")
    said = names["models"].load_tokenizer(names["model"]).decode([int(capsys.readouterr().out)])
    assert said.strip() == "Paris"
    assert all("/adapter/smore/" in path for path in tree.flatten(names["trained"]))


def test_the_losses_of_the_preference_page():
    names = shown("docs/preference.md")
    margin = (-12.0 + 13.0) - (-15.0 + 13.5)
    expected = np.log1p(np.exp(-0.1 * margin))
    assert float(names["losses"].dpo_loss(names["policy"], names["reference"])[0]) == pytest.approx(expected, rel=1e-6)


def test_the_guide_to_adapters():
    names = shown("docs/adapters_guide.md")
    alone = names["models"].logits(names["module"], names["base"], names["tokens"])
    np.testing.assert_allclose(names["logits"], alone, atol=1e-5)  # nothing was trained yet
    assert names["small"].quantization == "int8"
