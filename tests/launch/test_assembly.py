"""What the compiler makes of a run's step on several devices."""

import math
import re

import jax
import pytest

from jaxmethods import adapters, sharding
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.launch.assembly import assemble
from tests import tiny

ROWS, LENGTH, WIDTH, LAYERS = 16, 40, 64, 3
SMORE = adapters.SMoRE(experts=(2, 3), fanout=(1, 2), ranks=(2, 2), router_dim=6, gate_dim=4)


@pytest.mark.parametrize(
    ("axes", "pairs"),
    [
        ({"fsdp": 4, "tensor": 2}, {}), ({"data": 2, "fsdp": 4}, {"proj": adapters.LoRA(2)}),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, {"proj": adapters.LoRA(2)}),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, {"up_proj": SMORE}), ({"fsdp": 2, "sequence": 4}, {"down_proj": SMORE}),
    ],
)  # fmt: skip
def test_no_device_holds_the_activations_of_all_rows_or_of_whole_long_ones(axes, pairs):
    module, params = tiny.decoder(hidden_size=WIDTH, intermediate_size=96, vocab_size=128)
    shapes = jax.eval_shape(lambda: params)
    run = Run(model="", data=Data(train="x.jsonl", sequence_length=LENGTH), workdir="", batch_size=ROWS, adapters=pairs)
    made = assemble(run, module, shapes, sharding.make_mesh(axes))
    text = made.step.lower(made.state, made.frozen, made.batch()).compile().as_text()
    found = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}
    size = lambda shape: math.prod(shape[1:] if shape[0] == LAYERS else shape)
    largest = max(found, key=size)
    assert size(largest) < ROWS * LENGTH * WIDTH / 2, largest
    own, tokens = ROWS // (axes.get("data", 1) * axes["fsdp"]), LENGTH // axes.get("sequence", 1)
    assert f"f32[{own},{tokens},{WIDTH}]" in text


def test_rows_that_the_sequence_axis_does_not_divide_are_refused():
    module, params = tiny.decoder()
    run = Run(model="", data=Data(train="x.jsonl", sequence_length=30), workdir="", batch_size=8)
    with pytest.raises(ValueError, match=r"sequence_length=30 must be a multiple of mesh.sequence=4"):
        assemble(run, module, jax.eval_shape(lambda: params), sharding.make_mesh({"fsdp": 2, "sequence": 4}))
