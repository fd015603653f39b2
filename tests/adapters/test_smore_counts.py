"""What S'MoRE costs and how many trees it grows: the paper's tables, and all trees enumerated."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import tree
from jaxmethods.adapters import HydraLoRA, MixLoRA, SMoRE, smore
from tests.adapters.test_smore import SMALL, grown, random_params, tokens

TABLE_1 = {
    (8, 2): (5_120, 6_144), (8, 3): (14_336, 26_112), (8, 4): (30_720, 78_848),
    (16, 2): (20_480, 24_576), (16, 3): (57_344, 104_448), (16, 4): (122_880, 315_392),
}  # fmt: skip
"""(rank, layers) -> numbers beyond a LoRA of rank d_L: parameters, multiply-adds."""


@pytest.mark.parametrize(("rank", "layers"), TABLE_1)
def test_parameters_and_compute_beyond_lora_as_in_table_1(rank, layers):
    spec = SMoRE(experts=(4,) * layers, fanout=(2,) * layers, ranks=(rank,) * layers)
    shapes = tree.flatten(jax.eval_shape(lambda: smore.init(jax.random.key(0), 4096, 4096, spec)["experts"]))
    kernels = sum(math.prod(leaf.shape) for path, leaf in shapes.items() if path.endswith("kernel"))
    lora, work = 2 * 4096 * spec.widths[-1], smore.count_multiply_adds(spec, 4096, 4096)
    assert work.ends == lora
    assert (kernels - lora, work.layers) == TABLE_1[rank, layers]


def test_the_routers_multiply_adds():
    """By hand: x_down, then at 1 root and at 2 parents two maps and the keys."""
    spec = SMoRE(experts=(3, 4), fanout=(1, 2), router_dim=5, gate_dim=(6, 7))
    top, low = 5 * 7 + 7 * 7 + 7 * 4, 12 * 6 + 6 * 6 + 6 * 3
    work = smore.count_multiply_adds(spec, 16, 12)
    assert work.router == 16 * 5 + top + 2 * low
    assert work.total == sum(work)


@pytest.mark.parametrize(("ranks", "count"), [
    ((1, 1), 33_001_216), ((2, 2), 47_186_176), ((4, 4), 75_602_176), ((4, 8), 104_045_824), ((8, 8), 132_618_496),
    ((8, 16), 189_751_552), ((16, 16), 247_388_416), ((8, 32), 304_607_488), ((32, 32), 479_877_376),
    ((32, 64), 714_307_840), ((64, 64), 956_651_776),
])  # fmt: skip
def test_parameters_of_an_adapted_llama_3_8b(ranks, count):
    spec = SMoRE(ranks=ranks, router_dim=24, gate_dim=32)
    assert on_llama_3_8b(spec) == on_llama_3_8b(SMoRE(ranks=ranks, variant="star")) == count


def test_parameters_of_the_mixlora_that_it_is_compared_with():
    assert on_llama_3_8b(MixLoRA(rank=64, router_dim=24, gate_dim=32)) == 950_132_992


def on_llama_3_8b(spec):
    maps = ((4096, 14336), (4096, 14336), (14336, 4096))
    return 32 * sum(smore.count_parameters(spec, *shape).total for shape in maps)


@pytest.mark.parametrize("spec", [
    SMoRE((3, 2), (2, 1), (2, 1), gate=gate, activation=activation, **SMALL)
    for gate in smore.GATES for activation in ("tanh", "prelu")
] + [
    SMoRE((3, 2), (2, 1), (2, 1), variant="star", **SMALL),
    SMoRE((3, 3, 3), (2, 1, 1), (2, 2, 2), variant="shared", gate="noisy_topk", **SMALL),
    HydraLoRA(rank=3, **SMALL),
])  # fmt: skip
def test_the_closed_form_counts_the_leaves(spec):
    shapes = jax.eval_shape(lambda: smore.init(jax.random.key(0), 16, 12, spec))
    counted = smore.count_parameters(spec, 16, 12)
    assert counted == (tree.count(shapes["experts"]), tree.count(shapes["router"]))
    if spec == SMoRE((3, 2), (2, 1), (2, 1), **SMALL):
        assert counted == (386, 209)


FLEXIBILITY = {
    ((4,), (2,)): (6, 6, 6),
    ((4, 4), (2, 2)): (66, 126, 216),
    ((4, 4, 4), (2, 2, 2)): (726, 48_006, 279_936),
    ((4, 4, 4, 4), (2, 2, 2, 2)): (7_986, 6_913_872_126, 470_184_984_576),
    ((3, 4), (2, 2)): (24, 36, 54),
    ((8, 8), (2, 2)): (4_312, 11_368, 21_952),
    ((4, 3), (2, 1)): (18, 18, 18),
    ((4, 4), (1, 2)): (60, 60, 96),
    ((2, 2), (1, 1)): (4, 4, 4),
}
"""(experts, fanout) -> momor, star, full."""


@pytest.mark.parametrize(("experts", "fanout"), FLEXIBILITY)
def test_structural_flexibility(experts, fanout):
    momor, star, full = FLEXIBILITY[experts, fanout]
    count = lambda variant: smore.count_structures(experts, fanout, variant)
    assert (count("momor"), count("star"), count("child"), count("full")) == (momor, star, star, full)
    if len(set(experts)) == 1:
        assert count("shared") == full


@pytest.mark.parametrize(("arguments", "message"), [
    (((4, 4), (2,)), "one entry for each layer"),
    (((4, 4), (2, 5)), r"fanout=\(2, 5\) exceeds"),
    (((4, 0), (2, 1)), r"experts=\(4, 0\) must be"),
    (((3, 4), (2, 2), "shared"), "one pool"),
    (((4, 4), (2, 2), "momo"), "did you mean 'momor'"),
])  # fmt: skip
def test_counting_refuses_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        smore.count_structures(*arguments)


@pytest.mark.parametrize(("experts", "variant", "activation", "count"), [
    ((4, 4), "full", "tanh", 216), ((4, 4), "full", "relu", 216), ((4, 4), "full", "identity", 114),
    ((4, 4), "star", "tanh", 126), ((4, 4), "child", "tanh", 126), ((4, 4), "shared", "tanh", 216),
    ((3, 4), "full", "tanh", 54), ((3, 4), "full", "identity", 36), ((3, 4), "star", "tanh", 36),
])  # fmt: skip
def test_how_many_outputs_all_routings_reach(experts, variant, activation, count):
    """Invariant 5, with alpha = 1 and every tree laid out by hand."""
    spec = SMoRE(experts, (2, 2), (3, 3), activation=activation, variant=variant, **SMALL)
    pairs = [list(itertools.combinations(range(s), 2)) for s in experts]
    trees = [(top, lows) for top in pairs[1] for lows in itertools.product(pairs[0], repeat=2)]
    indices = [np.array([lows for _, lows in trees]), np.array([top for top, _ in trees])]
    x = jnp.tile(tokens(1), (len(trees), 1))
    states = grown(random_params(spec, seed=3, size=1.0), x, spec, indices, [np.ones(index.shape) for index in indices])
    assert distinct(states) == count
    if activation != "identity":
        assert count == smore.count_structures(experts, (2, 2), variant)


def distinct(rows):
    """How many rows differ by more than rounding."""
    rows = rows / np.abs(rows).max()
    far = np.abs(rows[:, None] - rows[None]).max(-1) > 1e-4
    return sum(bool(far[i, :i].all()) for i in range(len(rows)))
