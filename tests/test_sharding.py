import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmethods import models, sharding
from tests import tiny


def test_a_mesh_fills_the_axis_that_is_left_open():
    sizes = lambda *arguments: tuple(sharding.make_mesh(*arguments).shape[name] for name in sharding.AXES)
    assert sizes({"data": 2, "tensor": 2}, jax.devices()[:4]) == (2, 1, 1, 2)
    assert sizes({"tensor": 2, "fsdp": -1}) == (1, 4, 1, 2)
    assert sizes({"sequence": 2, "fsdp": -1}) == (1, 4, 2, 1)
    assert sizes() == (1, 8, 1, 1)


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ({"fsdp": 3}, "there are 8"),
        ({"data": -1, "fsdp": -1}, "at most once"),
        ({"fsdp": 0}, "must be positive"),
        ({"model": 8}, "'model' is unknown"),
        ({"tensor": 3, "fsdp": -1}, "product is 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_by_name(axes, says):
    with pytest.raises(ValueError, match=says):
        sharding.make_mesh(axes)


def test_tokens_lie_over_what_divides_them():
    mesh = sharding.make_mesh({"data": 2, "sequence": 4})
    assert sharding.tokens_spec((6, 16), mesh) == P(("data", "fsdp"), "sequence")
    assert sharding.tokens_spec((6, 1), mesh) == P(("data", "fsdp"), None)  # as in decoding
    assert sharding.tokens_spec((3, 8, 5), mesh) == P(None, "sequence")


def test_rules_skip_the_scanned_axis_and_what_does_not_divide():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    spec = lambda path, shape: sharding.spec_for(path, shape, mesh, models.RULES)
    assert spec("model/layers/mlp/up_proj/kernel", (3, 32, 48)) == P(None, "fsdp", "tensor")
    assert spec("model/layers/mlp/down_proj/kernel", (3, 48, 30)) == P(None, "tensor", None)  # 30 is no multiple of 4
    assert spec("model/norm/scale", (32,)) == P()
    assert spec("model/embed_tokens/embedding", (61, 32)) == P(None, "fsdp")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_every_matrix_of_a_decoder_has_a_rule(family):
    _, params = tiny.decoder(family)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    from jaxmethods import tree

    for path, leaf in tree.flatten(params).items():
        if path.endswith(("kernel", "embedding")) and min(leaf.shape[-2:]) % 8 == 0:
            assert any(sharding.spec_for(path, leaf.shape, mesh, models.RULES)), path


def test_a_batch_is_placed_row_by_row_however_devices_are_ordered():
    rows = {"tokens": np.arange(24).reshape(8, 3), "weight": np.arange(24.0).reshape(8, 3)}
    for devices in (jax.devices(), jax.devices()[::-1]):
        mesh = sharding.Mesh(np.array(devices).reshape(2, 2, 1, 2), sharding.AXES)
        assert sharding.rows_here(8, mesh) == list(range(8))  # one process holds them all
        placed = sharding.place_rows(rows, 8, mesh)
        for name, values in rows.items():
            assert placed[name].sharding == sharding.batch_sharding(mesh)
            np.testing.assert_array_equal(placed[name], values)
            for number, device in enumerate(devices):  # two of tensor hold the same two rows
                shard = next(s for s in placed[name].addressable_shards if s.device == device)
                np.testing.assert_array_equal(shard.data, values[number // 2 * 2 : number // 2 * 2 + 2])


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({"fsdp": 2, "sequence": 4}, (4, 8, 3)), ({"data": 2, "fsdp": 2, "sequence": 2}, (8, 6)), ({"fsdp": 8}, (8, 5)),
        ({"sequence": 2, "tensor": 4}, (3, 4)), ({"fsdp": 2, "sequence": 4}, (4, 1, 3)),
    ],
)  # fmt: skip
def test_joined_tokens_stay_with_their_device(axes, shape):
    """Each device's part, before and after, holds the same numbers, and parting gives back the plain order."""
    mesh = sharding.make_mesh(axes)
    x = jnp.arange(math.prod(shape)).reshape(shape)
    placed = jax.device_put(x, NamedSharding(mesh, sharding.tokens_spec(shape, mesh)))
    joined = jax.jit(lambda a: sharding.join_tokens(a, mesh))(placed)
    assert joined.shape == (shape[0] * shape[1], *shape[2:])
    held = lambda a: {shard.device: np.asarray(shard.data).ravel().tolist() for shard in a.addressable_shards}
    assert held(joined) == held(placed)
    np.testing.assert_array_equal(jax.jit(lambda a: sharding.part_tokens(a, shape[:2], mesh))(joined), x)
    np.testing.assert_array_equal(sharding.join_tokens(x, None), x.reshape(-1, *shape[2:]))
