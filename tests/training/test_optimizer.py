import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.training import Optimizer


def rates(optimizer, steps):
    schedule = optimizer.learning_rates(steps)
    return np.array([float(schedule(step)) for step in range(steps)])


def test_cosine_with_warmup_by_hand():
    got = rates(Optimizer(learning_rate=2.0, schedule="cosine", warmup=4, final_fraction=0.1), 20)
    expected = [2 * (n + 1) / 4 for n in range(4)]
    expected += [2 * (0.1 + 0.9 * (1 + np.cos(np.pi * n / 16)) / 2) for n in range(16)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_linear_constant_and_a_share_of_warmup():
    np.testing.assert_allclose(
        rates(Optimizer(learning_rate=1.0, schedule="linear", warmup=0.2), 10),
        [0.5, 1, *(1 - np.arange(8) / 8)],
        rtol=1e-6,
    )
    np.testing.assert_allclose(rates(Optimizer(learning_rate=3.0, schedule="constant", warmup=0), 5), 3.0)


def test_adamw_with_groups_decay_and_clipping_by_hand():
    """Two steps of AdamW, worked out in numpy: the clipped gradient, moments, decay of matrices only, rates by group."""
    optimizer = Optimizer(
        learning_rate=0.1, schedule="constant", warmup=0, weight_decay=0.5, clip_norm=1.0, groups=(("router", 0.25),)
    )
    params = {
        "mlp": {"kernel": jnp.ones((2, 2))},
        "router": {"kernel": jnp.ones((2, 2))},
        "norm": {"scale": jnp.ones((3, 2))},
    }
    gradient = {
        "mlp": {"kernel": np.full((2, 2), 3.0)},
        "router": {"kernel": np.full((2, 2), -1.0)},
        "norm": {"scale": np.full((3, 2), 2.0)},
    }
    norm = np.sqrt(4 * 9 + 4 * 1 + 6 * 4)
    tx = optimizer.transformation(10)
    state, moments = tx.init(params), {}
    expected = {name: np.ones(np.shape(next(iter(g.values())))) for name, g in gradient.items()}
    for step in (1, 2):
        updates, state = tx.update(
            {n: {k: jnp.float32(g) for k, g in part.items()} for n, part in gradient.items()}, state, params
        )
        params = {n: {k: params[n][k] + updates[n][k] for k in part} for n, part in params.items()}
        for name, part in gradient.items():
            g = next(iter(part.values())) / norm
            m, v = moments.get(name, (0, 0))
            moments[name] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            move = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            if name != "norm":
                move = move + 0.5 * expected[name]
            expected[name] = expected[name] - 0.1 * (0.25 if name == "router" else 1.0) * move
            np.testing.assert_allclose(next(iter(params[name].values())), expected[name], rtol=1e-5)


def test_momentum_of_sgd_by_hand():
    tx = Optimizer(name="sgd", learning_rate=0.5, schedule="constant", warmup=0, b1=0.5, clip_norm=None).transformation(
        3
    )
    params = {"w": jnp.float32(0)}
    state = tx.init(params)
    for expected in (-0.5, -0.75):  # 0.5 * (1), then 0.5 * (1 + 0.5)
        updates, state = tx.update({"w": jnp.float32(1)}, state, params)
        assert float(updates["w"]) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "adamv"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must not be negative"),
        ({"clip_norm": 0.0}, "must be positive"),
    ],
)
def test_wrong_fields_are_named(fields, says):
    with pytest.raises(ValueError, match=says):
        Optimizer(**fields)


def test_a_group_that_matches_nothing_is_an_error():
    tx = Optimizer(groups=(("ruter", 0.1),)).transformation(3)
    params = {"router": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="'ruter' matches no trained parameter"):
        tx.update(params, tx.init(params), params)
