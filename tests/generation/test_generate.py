import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, generation, models, sharding
from jaxmethods.models import decoder as decoder_file
from tests import tiny

PROMPTS = [[5, 9, 30], [7], [8, 44, 3, 60, 12], [3, 2]]
WIDTH = 8  # one shape for most tests: they then share compiled programs
NEW = 6
program = importlib.import_module("jaxmethods.generation.generate")


@functools.cache
def model(family="llama"):
    layers = {"window_layers": (True, False)} if family == "gemma2" else {}
    return tiny.decoder(family, num_layers=2, **layers)


def padded(prompts, side="left", width=None):
    width = width or max(WIDTH, *map(len, prompts))
    tokens, mask = np.full((len(prompts), width), 17, np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        tokens[row, place], mask[row, place] = prompt, True
    return tokens, mask


def run(prompts=PROMPTS, family="llama", side="left", width=None, **options):
    options = {"max_new_tokens": NEW, "temperature": 0} | options
    return jax.tree.map(np.asarray, generation.generate(*model(family), *padded(prompts, side, width), **options))


def from_scratch(module, params, prompts, result):
    """Log-probabilities of each row's generated tokens and the highest there were, by full passes of one row."""
    rows = [[*p, *new[m].tolist()] for p, new, m in zip(prompts, result.tokens, result.mask, strict=True)]
    tokens, mask = padded(rows, "right")
    logps = np.asarray(jax.nn.log_softmax(models.logits(module, params, tokens, mask)))
    found, best = np.zeros_like(result.logps), np.full_like(result.tokens, -1)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        for n in range(len(row) - len(prompt)):
            before = logps[i, len(prompt) + n - 1]
            found[i, n], best[i, n] = before[row[len(prompt) + n]], before.argmax()
    return found, best


def same(one, two):
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.mask, two.mask)
    np.testing.assert_allclose(one.logps, two.logps, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logps_are_the_models_own_and_greedy_takes_the_best(family):
    greedy = run(family=family)
    found, best = from_scratch(*model(family), PROMPTS, greedy)
    np.testing.assert_allclose(greedy.logps, found, atol=1e-5)
    np.testing.assert_array_equal(greedy.tokens, best)
    drawn = run(family=family, temperature=0.7, top_k=20, top_p=0.9, key=jax.random.key(3))
    found, best = from_scratch(*model(family), PROMPTS, drawn)
    np.testing.assert_allclose(drawn.logps, found, atol=1e-5)
    assert (drawn.tokens != best).any()
    assert drawn.mask.all() and drawn.tokens.dtype == np.int32 and drawn.logps.dtype == np.float32


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "key": jax.random.key(1)}])
def test_padding_on_either_side_changes_nothing(options):
    plain = run(**options)
    same(plain, run(side="right", **options))
    same(plain, run(width=5, **options))


def test_a_row_does_not_depend_on_the_others():
    options = {"temperature": 1.0, "key": jax.random.key(1)}
    together = run(**options)
    changed = run([PROMPTS[0], [1, 2, 3, 4], PROMPTS[2], [9]], **options)
    for row in (0, 2):
        np.testing.assert_array_equal(together.tokens[row], changed.tokens[row])
    np.testing.assert_array_equal(together.tokens[:, :3], run(max_new_tokens=3, **options).tokens)
    keys = jax.random.split(jax.random.key(4), 4)  # a key of its own follows a row to another place
    forward, backward = run(temperature=1.0, key=keys), run(PROMPTS[::-1], temperature=1.0, key=keys[::-1])
    np.testing.assert_array_equal(forward.tokens, backward.tokens[::-1])


def test_a_row_ends_after_its_end_token():
    free = run()
    ends = (int(free.tokens[0, 2]), int(free.tokens[1, 0]))
    result = run(eos_id=ends)
    for row in range(len(PROMPTS)):
        hits = np.flatnonzero(np.isin(free.tokens[row], ends))
        length = hits[0] + 1 if hits.size else NEW
        assert result.mask[row].tolist() == [True] * length + [False] * (NEW - length)
        np.testing.assert_array_equal(result.tokens[row, :length], free.tokens[row, :length])
        assert (result.tokens[row, length:] == ends[0]).all() and (result.logps[row, length:] == 0).all()


def test_the_loop_stops_when_all_rows_have_ended():
    end = int(run([[7]]).tokens[0, 0])
    module, params = model()
    turns = []

    class Counting(models.Decoder):
        def __call__(self, *args, **kwargs):
            jax.debug.callback(lambda: turns.append(1))
            return super().__call__(*args, **kwargs)

    counting = Counting(module.config)
    tokens, mask = padded([[7]])
    for eos_id, expected in ((end, 1), (60_000, NEW)):
        turns.clear()
        out = generation.generate(counting, params, tokens, mask, max_new_tokens=NEW, temperature=0, eos_id=eos_id)
        jax.block_until_ready(out)
        jax.effects_barrier()
        assert len(turns) == expected


def test_one_program_for_one_shape():
    run(temperature=1.0, top_k=3, top_p=0.5, key=jax.random.key(0))
    before = program._generate._cache_size()
    for n in range(1, 4):
        run(temperature=0.2 * n, top_k=n, top_p=0.3 * n, key=jax.random.key(n))
    assert program._generate._cache_size() == before


def test_many_tokens_take_the_laid_out_kernels(monkeypatch):
    used = []
    original = program._kernel_first
    monkeypatch.setattr(program, "_kernel_first", lambda *a, **k: used.append(1) or original(*a, **k))
    result = run(family="qwen2", max_new_tokens=program._MANY)  # tied, so that the table's product is covered too
    assert used
    found, best = from_scratch(*model("qwen2"), PROMPTS, result)
    np.testing.assert_allclose(result.logps, found, atol=1e-5)
    np.testing.assert_array_equal(result.tokens, best)


def test_layers_are_views_of_the_stack():
    module, params = model()
    split_module, split = program._by_layer(module, params)
    stack = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    layers = split["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert split_module.unroll == len(layers) == 2
    np.testing.assert_array_equal(np.stack(layers), stack)
    if stack.unsafe_buffer_pointer() % 64 == 0:
        assert layers[1].unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + stack[0].nbytes


@pytest.mark.parametrize(
    ("adapter", "new"),
    [
        (adapters.LoRA(rank=2), program._MANY),
        (adapters.SMoRE(experts=(3, 2), fanout=(2, 1), ranks=(1, 2), router_dim=4, gate_dim=4), NEW),
    ],
)
def test_with_adapters(adapter, new):
    base, base_params = model()
    adapted = adapters.attach(base, {"up_proj|q_proj": adapter})
    params = adapters.init(adapted, base_params, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05, params)
    tokens, mask = padded(PROMPTS)
    result = generation.generate(adapted, params, tokens, mask, max_new_tokens=new, temperature=0)
    result = jax.tree.map(np.asarray, result)
    found, best = from_scratch(adapted, params, PROMPTS, result)
    np.testing.assert_allclose(result.logps, found, atol=1e-5)
    np.testing.assert_array_equal(result.tokens, best)


def test_inside_jit():
    base, base_params = model()
    tokens, mask = padded(PROMPTS)

    @jax.jit
    def traced(params, tokens, mask, temperature, key):
        options = {"max_new_tokens": NEW, "temperature": temperature, "key": key}
        return generation.generate(base, params, tokens, mask, **options)

    for temperature in (0.0, 0.8):
        inside = traced(base_params, tokens, mask, temperature, jax.random.key(5))
        same(jax.tree.map(np.asarray, inside), run(temperature=temperature, key=jax.random.key(5)))


def test_eight_devices_give_what_one_gives():
    module, params = model()
    tokens, mask = padded(PROMPTS)
    options = {"max_new_tokens": NEW, "temperature": 0.9, "key": jax.random.key(6)}
    one = jax.tree.map(np.asarray, generation.generate(module, params, tokens, mask, **options))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.shardings_for(params, mesh, decoder_file.RULES))
    rows = jax.device_put((tokens, mask), sharding.batch_sharding(mesh))
    same(one, jax.tree.map(np.asarray, generation.generate(module, placed, *rows, **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "key is missing"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"images": np.zeros((3, 4, 4, 3))}, "reads no images"),
        ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 2)}, "one for each of the 4 rows"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_row_of_padding_is_refused():
    with pytest.raises(ValueError, match="row 1 of the prompts is padding alone"):
        run([[3], [], [4, 5], [1]])


def test_bfloat16_parameters():
    module, params = model()
    low = module.clone(dtype=jnp.bfloat16)
    result = generation.generate(low, params, *padded(PROMPTS), max_new_tokens=3, temperature=0)
    assert np.isfinite(result.logps).all() and result.logps.dtype == jnp.float32
