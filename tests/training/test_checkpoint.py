import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods import sharding, training
from jaxmethods.training import Checkpoints


def a_state(step, mesh=None, scale=1.0):
    spec = sharding.P("fsdp") if mesh else None
    place = lambda x: jax.device_put(x, sharding.NamedSharding(mesh, spec)) if mesh else x
    trained = {"layer": {"adapter": {"lora": {"a": place(scale * jnp.arange(64.0).reshape(8, 8))}}}}
    state = training.init_state(trained, optax.adam(1e-3), jax.random.key(3))
    return state._replace(step=jnp.int32(step)), {"layer": {"adapter": {"s2ft": {"indices": jnp.arange(4)}}}}


def damage(folder):
    """Cuts every data file of a checkpoint short."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.parent.name == "d"]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_what_is_saved_comes_back_to_the_bit_on_another_mesh(tmp_path):
    state, fixed = a_state(5, sharding.make_mesh({"fsdp": 8}))
    made = Checkpoints(tmp_path)
    made.save(state, fixed)
    made.close()
    like, fixed_like = a_state(0, sharding.make_mesh({"fsdp": 2, "data": 4}))
    got, got_fixed = Checkpoints(tmp_path).restore(like, fixed_like)
    key = lambda s: s._replace(key=jax.random.key_data(s.key))
    jax.tree.map(np.testing.assert_array_equal, key(got), key(state))
    np.testing.assert_array_equal(got_fixed["layer"]["adapter"]["s2ft"]["indices"], np.arange(4))
    leaf = got.trained["layer"]["adapter"]["lora"]["a"]
    assert leaf.sharding == like.trained["layer"]["adapter"]["lora"]["a"].sharding


def test_the_latest_and_the_best_are_kept(tmp_path):
    made = Checkpoints(tmp_path, keep_latest=2, keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)):
        state, fixed = a_state(step)
        made.save(state, fixed, metrics=None if loss is None else {"evaluation_loss": loss, "other": 1.0})
    made.close()
    kept = Checkpoints(tmp_path)
    assert kept.steps() == [2, 4, 5] and kept.best() == 2


def test_a_damaged_checkpoint_is_left_aside_and_the_run_can_save_over_it(tmp_path):
    made = Checkpoints(tmp_path)
    for step in (1, 2):
        made.save(*a_state(step, scale=step))
    made.close()
    damage(tmp_path / "2")
    said = []
    again = Checkpoints(tmp_path)
    state, _ = again.restore(*a_state(0), say=said.append)
    assert int(state.step) == 1 and len(said) == 1 and "checkpoint of step 2" in said[0]
    again.save(*a_state(2, scale=7.0))
    again.close()
    state, _ = Checkpoints(tmp_path).restore(*a_state(0))
    assert int(state.step) == 2 and float(state.trained["layer"]["adapter"]["lora"]["a"][0, 1]) == 7.0


def test_nothing_to_restore_and_nothing_that_can_be(tmp_path):
    assert Checkpoints(tmp_path).restore(*a_state(0)) is None
    made = Checkpoints(tmp_path)
    made.save(*a_state(1))
    made.close()
    damage(tmp_path / "1")
    with pytest.raises(ValueError, match=r"none of the checkpoints \[1\]"):
        Checkpoints(tmp_path).restore(*a_state(0), say=lambda text: None)
