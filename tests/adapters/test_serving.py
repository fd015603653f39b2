"""Rows of a batch by adapters of their own, against each row run alone with its own fused weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, models
from jaxmethods.adapters import S2FT, DoRA, LoRA, SMoRE, s2ft
from jaxmethods.generation import generate
from tests import tiny

ROWS = np.array([2, 0, 2, -1, 1], np.int32)
TOKENS = np.random.default_rng(0).integers(3, 61, (5, 7)).astype(np.int32)
KINDS = {
    "lora": {"up_proj|o_proj": LoRA(rank=3)},
    "dora": {"v_proj": DoRA(rank=3)},
    "s2ft": {"up_proj": S2FT(count=5, side="out"), "down_proj": S2FT(count=7)},
    "smore": {"down_proj": SMoRE(experts=(2, 2), fanout=(1, 1), ranks=(2, 2), gate_dim=4, router_dim=5)},
}


def variants(pairs, count=3):
    made = [tiny.adapted(pairs, seed=n) for n in range(count)]
    module, base, adapted, _ = made[0]
    return module, base, adapted, [params for *_, params in made]


@pytest.mark.parametrize("pairs", KINDS.values(), ids=KINDS)
def test_each_row_by_its_own_adapter(pairs):
    module, base, adapted, made = variants(pairs)
    served, params = adapters.bank(adapted, made)
    run = jax.jit(lambda params, rows: models.logits(served, adapters.for_rows(params, rows), TOKENS))
    for rows in (ROWS, ROWS[::-1].copy()):
        got = run(params, rows)
        for n, row in enumerate(rows):
            if row < 0:
                want = models.logits(module, base, TOKENS[n : n + 1])
            elif "down_proj" in pairs and pairs["down_proj"].kind == "smore":
                want = models.logits(adapted, made[row], TOKENS[n : n + 1])
            else:
                want = models.logits(*adapters.merge(adapted, made[row]), TOKENS[n : n + 1])
            np.testing.assert_allclose(got[n : n + 1], want, atol=5e-5)
    assert run._cache_size() == 1  # other rows do not compile anew


@pytest.mark.parametrize("kind", ["lora", "s2ft"])
def test_rows_through_the_tpu_kernel(kind):
    """Interpreted; it is what one TPU uses."""
    _, _, adapted, made = variants(KINDS[kind])
    logits = []
    for implementation in ("pallas_tpu", "xla"):
        served, params = adapters.bank(adapted, made, implementation=implementation)
        logits.append(jax.jit(lambda p, m=served: models.logits(m, adapters.for_rows(p, ROWS), TOKENS))(params))
    np.testing.assert_allclose(*logits, atol=5e-5)


def test_generation_and_switched_adapters_agree():
    module, base, adapted, made = variants(KINDS["s2ft"], 2)
    served, params = adapters.bank(adapted, made)
    prompt, mask = TOKENS[:3], np.ones((3, 7), bool)
    together = generate(served, adapters.for_rows(params, [0, 1, -1]), prompt, mask, max_new_tokens=4, temperature=0.0)
    for n, variant in enumerate(made):
        tuned, _ = s2ft.fuse(base, s2ft.decouple(adapted, variant)[1])
        alone = generate(module, tuned, prompt[n : n + 1], mask[:1], max_new_tokens=4, temperature=0.0)
        np.testing.assert_array_equal(together.tokens[n], alone.tokens[0])


def test_what_does_not_fit_says_so():
    _, base, adapted, made = variants(KINDS["lora"], 2)
    served, params = adapters.bank(adapted, made)
    with pytest.raises(ValueError, match=r"adapters.for_rows was given 2 rows, and the batch has 5"):
        models.logits(served, adapters.for_rows(params, jnp.zeros(2, jnp.int32)), TOKENS)
    with pytest.raises(ValueError, match=r"rows have no adapters yet"):
        models.logits(served, params, TOKENS)
    with pytest.raises(ValueError, match=r"that adapters.bank made"):
        adapters.for_rows(base, [0])
    other = adapters.attach(adapters.detach(adapted, made[0])[0], {"up_proj|o_proj": LoRA(rank=2)})
    with pytest.raises(ValueError, match=r"variant 1 holds shape .*up_proj/adapter/lora/a"):
        adapters.bank(adapted, [made[0], adapters.init(other, base, jax.random.key(0))])
