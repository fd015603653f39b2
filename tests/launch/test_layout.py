"""Where every array of the pod recipes lies. A change shows as a difference to tests/golden/layouts.

python -m tests.launch.test_layout      # writes them anew
"""

import difflib
from pathlib import Path

import jax
import pytest

from jaxmethods import sharding, tree
from jaxmethods.launch import config, plan
from jaxmethods.launch.assembly import Assembly, assemble, model_shapes

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "layouts"
RECIPES = (
    "llama3_8b_full",
    "llama3_8b_lora",
    "llama3_8b_s2ft",
    "llama3_8b_smore",
    "llama3_70b_full",
    "llama3_70b_lora",
)


def assembled(recipe: str) -> Assembly:
    run = config.load_config(str(ROOT / "configs" / f"{recipe}.py"))
    return assemble(run, *model_shapes(run), sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8]))


def written(assembly: Assembly) -> str:
    rows = plan.layout(assembly).items()
    return "".join(f"{path}  {a['part']}  {a['dtype']}{a['shape']}  {', '.join(a['over'])}\n" for path, a in rows)


@pytest.mark.parametrize("recipe", RECIPES)
def test_arrays_lie_where_they_did(recipe):
    expected, found = (GOLDEN / f"{recipe}.txt").read_text(), written(assembled(recipe))
    assert found == expected, "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm=""))


@pytest.mark.parametrize("recipe", RECIPES)
def test_moments_lie_where_their_parameters_do_and_nothing_large_is_whole(recipe):
    state = assembled(recipe).state
    trained = {path: x.sharding for path, x in tree.flatten(state.trained).items()}
    moments = [m for m in jax.tree.leaves(state.opt, is_leaf=lambda x: isinstance(x, dict)) if isinstance(m, dict)]
    assert len(moments) == 2
    for moment in moments:
        assert {path: x.sharding for path, x in tree.flatten(moment).items()} == trained
    for path, x in tree.flatten(state.trained).items():
        if x.size > 2**20:
            assert x.sharding.shard_shape(x.shape) != x.shape, path


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.mkdir(exist_ok=True)
    for name in RECIPES:
        (GOLDEN / f"{name}.txt").write_text(written(assembled(name)))
