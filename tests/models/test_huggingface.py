"""Model folders: what is read, into which shards, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmethods import models, tree
from jaxmethods.models import DecoderConfig, huggingface
from jaxmethods.models.architectures import shapes
from jaxmethods.models.hf_config import config_to_hf
from jaxmethods.models.layout import assemble, layout
from jaxmethods.sharding import make_mesh, shardings_for

BASE = DecoderConfig(
    family="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=6,
)  # fmt: skip
CONFIGS = {
    "llama": BASE,
    "llama-tied": dataclasses.replace(BASE, tie_embeddings=True),
    "mistral": dataclasses.replace(BASE, family="mistral", sliding_window=8),
    "qwen2": dataclasses.replace(BASE, family="qwen2", attention_bias=True),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm=True, tie_embeddings=True),
    "gemma2": dataclasses.replace(
        BASE, family="gemma2", activation="gelu_tanh", sliding_window=8, window_layers=(True, False, True),
        tie_embeddings=True, post_norms=True, embedding_scale=True, norm_plus_one=True, attention_softcap=50.0,
        final_softcap=30.0,
    ),
}  # fmt: skip


def hf_tensors(config: DecoderConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names, listed here by hand: [out, in], one a layer."""
    c, rng = config, np.random.default_rng(0)
    d, f, q, k = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, d), "model.norm.weight": (d,)}
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, d)
    for i in range(c.num_layers):
        layer = {
            "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (k, d), "self_attn.v_proj.weight": (k, d),
            "self_attn.o_proj.weight": (d, q), "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f), "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
        }  # fmt: skip
        if c.family == "qwen2":
            layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (k,), "self_attn.v_proj.bias": (k,)}
        if c.family == "qwen3":
            layer |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
        if c.family == "gemma2":
            layer |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, config, tensors=None, shards=1):
    """A model folder, written by the safetensors package."""
    tensors = hf_tensors(config) if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: x for name, x in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def assert_equal_trees(one, two):
    one, two = tree.flatten(one), tree.flatten(two)
    assert one.keys() == two.keys()
    for path in one:
        assert one[path].dtype == two[path].dtype, path
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(two[path]), err_msg=path)


def same_parameters(params, tensors):
    """Layer l of a stacked kernel is the transpose of layer l's matrix."""
    flat = tree.flatten(params)
    seen = set()
    for path, array in flat.items():
        *parents, leaf = path.split("/")
        for layer in range(len(array)) if parents[:2] == ["model", "layers"] else [None]:
            where = parents if layer is None else ["model", "layers", str(layer), *parents[2:]]
            name = ".".join(where) + (".bias" if leaf == "bias" else ".weight")
            ours = np.asarray(array if layer is None else array[layer])
            np.testing.assert_array_equal(ours.T if leaf in ("kernel", "unembedding") else ours, tensors[name])
            seen.add(name)
    assert seen == tensors.keys()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_finds_its_place(name, shards, tmp_path):
    config = CONFIGS[name]
    module, params = models.load(write(tmp_path, config, shards=shards))
    assert module.config == config
    same_parameters(params, hf_tensors(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_is_the_modules_own_tree(name):
    """`layout` lists what `Decoder.init` would make."""
    config = CONFIGS[name]
    tokens = jnp.zeros((1, 4), jnp.int32)
    made = jax.eval_shape(lambda key: models.Decoder(config).init(key, tokens), jax.random.key(0))["params"]
    as_told = {path: (x.shape, x.dtype) for path, x in tree.flatten(shapes(config, jnp.float32)).items()}
    assert as_told == {path: (x.shape, x.dtype) for path, x in tree.flatten(made).items()}


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numbers_are_converted_once(stored, dtype, tmp_path):
    tensors = hf_tensors(BASE, stored)
    module, params = models.load(write(tmp_path, BASE, tensors), dtype=dtype)
    assert module.dtype == module.param_dtype == dtype
    same_parameters(params, {name: x.astype(dtype) for name, x in tensors.items()})


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}, {"data": 4, "tensor": 2}])
def test_on_a_mesh_each_leaf_lies_by_the_rules(axes, tmp_path):
    config = dataclasses.replace(BASE, head_dim=8)
    mesh = make_mesh(axes)
    _, whole = models.load(write(tmp_path, config))
    _, params = models.load(tmp_path, mesh=mesh)
    assert_equal_trees(params, whole)
    wanted = tree.flatten(shardings_for(whole, mesh, models.RULES))
    for path, leaf in tree.flatten(params).items():
        assert leaf.sharding == wanted[path], path
    assert not tree.flatten(params)["model/layers/mlp/up_proj/kernel"].is_fully_replicated


def test_each_byte_is_read_once_and_in_shards(tmp_path):
    """Replicas are not read again, and no read is larger than a shard of one layer."""
    config = dataclasses.replace(BASE, head_dim=8, vocab_size=64, hidden_size=32)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    tensors, reads = hf_tensors(config), []

    def read(name, index):
        reads.append((name, tensors[name][index].size))
        return tensors[name][index]

    shardings = shardings_for(shapes(config, np.float32), mesh, models.RULES)
    params = assemble(layout(config), read, dtype=np.float32, shardings=shardings)
    same_parameters(params, tensors)
    assert sum(size for _, size in reads) == sum(x.size for x in tensors.values())
    for name, size in reads:
        assert size == tensors[name].size // (4 if tensors[name].ndim == 2 else 1), name


TWO_PROCESSES = """
import sys, jax, numpy as np
from pathlib import Path
rank, port, source, target = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60, heartbeat_timeout_seconds=20)
from jaxmethods import models
from jaxmethods.models import weights
from jaxmethods.sharding import make_mesh
taken, whole = [], weights.read_slice
weights.read_slice = lambda *of: (taken.append(whole(*of)), taken[-1])[1]
module, params = models.load(source, mesh=make_mesh({"fsdp": 4}))
print("read", sum(x.nbytes for x in taken))
models.save(target, module, params, shard_bytes=4000)
"""


@pytest.mark.slow
def test_two_processes_read_half_each_and_write_one_model(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = dataclasses.replace(BASE, head_dim=8, vocab_size=64)
    source, target = write(tmp_path / "source", config), tmp_path / "target"
    command = [sys.executable, "-c", TWO_PROCESSES]
    ran = [
        subprocess.Popen(
            [*command, str(rank), port, source, target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in ran]
    assert [process.returncode for process in ran] == [0, 0], outputs
    tensors = hf_tensors(config)
    matrices, vectors = (sum(x.nbytes for x in tensors.values() if x.ndim == n) for n in (2, 1))
    for output in outputs:
        assert f"read {matrices // 2 + vectors}\n" in output
    same_parameters(models.load(target)[1], tensors)


PEAK = """
import re, sys
import jax, numpy as np
from jaxmethods import models
jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i))(np.ones((3, 3)), 1).block_until_ready()  # the compiler too
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
module, params = models.load(sys.argv[1], dtype=np.float32)
print(peak() - before)
models.save(sys.argv[2], module, params, shard_bytes=3e7)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux' /proc")
def test_peak_memory_is_about_one_copy(tmp_path):
    """Of a 230 MB model, in a process of its own: a leaf more to read it, nothing more to write it."""
    config = dataclasses.replace(
        BASE, vocab_size=500, hidden_size=512, intermediate_size=2048, num_layers=16, head_dim=64
    )
    tensors = hf_tensors(config)
    size = sum(x.nbytes for x in tensors.values())
    largest = 16 * 512 * 2048 * 4
    write(tmp_path / "one", config, tensors)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "one", tmp_path / "two"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    loaded, saved = map(int, ran.stdout.split())
    slack = 50e6  # does not grow with the model: what the threads hold, and the allocator keeps
    assert loaded < size + largest + slack, (loaded, size)
    assert saved < size + largest + slack, (saved, size)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    whole = hf_tensors(BASE)
    name = "model.layers.1.mlp.up_proj.weight"

    write(tmp_path, BASE, {k: v for k, v in whole.items() if k != name})
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor '{name}' \[24, 16\] is missing\.$"):
        models.load(tmp_path)
    write(tmp_path, BASE, {k: v for k, v in whole.items() if ".mlp." not in k})
    with pytest.raises(ValueError, match=r"is missing \(and 8 more\)"):
        models.load(tmp_path)
    write(tmp_path, BASE, {k: v for k, v in whole.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"'lm_head.weight' \[40, 16\] is missing; set tie_word_embeddings to true"):
        models.load(tmp_path)
    write(tmp_path, BASE, whole | {name: np.zeros((24, 17), np.float32)})
    with pytest.raises(
        ValueError, match=rf"model.safetensors: tensor '{name}' has shape \[24, 17\].*makes it \[24, 16\]"
    ):
        models.load(tmp_path)
    write(tmp_path, BASE, whole | {"model.layers.1.self_attn.q_proj.bias": np.zeros(24, np.float32)})
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj.bias' \[24\] has no place in the model"):
        models.load(tmp_path)
    write(tmp_path, dataclasses.replace(BASE, num_layers=2), whole)
    with pytest.raises(ValueError, match=r"'model.layers.2.*has no place in the model .* \(and 8 more\)"):
        models.load(tmp_path)
    write(tmp_path, BASE, whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)})
    same_parameters(models.load(tmp_path)[1], whole)  # a buffer of old files


def test_an_index_is_held_against_its_files(tmp_path):
    write(tmp_path, BASE, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    listed = json.loads(file.read_text())["weight_map"]
    moved = listed | {"model.norm.weight": {*listed.values()}.difference({listed["model.norm.weight"]}).pop()}
    file.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match=r"'model.norm.weight' is missing, though the index lists it there"):
        models.load(tmp_path)
    file.write_text(json.dumps({"weight_map": listed}))
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is cut short"):
        models.load(tmp_path)


def test_a_tied_model_may_hold_its_matrix_twice_if_equal(tmp_path):
    config = CONFIGS["llama-tied"]
    tensors = hf_tensors(config)
    write(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    same_parameters(models.load(tmp_path)[1], tensors)
    write(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from .* set tie_word_embeddings to false"):
        models.load(tmp_path)


def test_files_of_headless_models_have_no_prefix(tmp_path):
    """As transformers' AutoModel writes them, and embedding models are published."""
    config = CONFIGS["llama-tied"]
    tensors = hf_tensors(config)
    write(tmp_path, config, {name.removeprefix("model."): x for name, x in tensors.items()})
    same_parameters(models.load(tmp_path)[1], tensors)


def test_ends_of_a_generation_are_those_of_generation_config(tmp_path):
    write(tmp_path, dataclasses.replace(BASE, eos_ids=(2,)))
    assert models.load(tmp_path)[0].config.eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert models.load(tmp_path)[0].config.eos_ids == (2, 7)


# ---- writing


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), shapes(config, dtype))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_saved_is_loaded(name, dtype, tmp_path):
    config = CONFIGS[name]
    params = random_params(config, dtype)
    models.save(tmp_path / "m", models.Decoder(config), params)
    module, again = models.load(tmp_path / "m", dtype=dtype)
    assert module.config == config
    assert_equal_trees(again, params)


def test_the_files_are_as_others_expect(tmp_path):
    models.save(tmp_path / "m", models.Decoder(BASE), random_params(BASE), shard_bytes=8000)
    folder = tmp_path / "m"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert (
        files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 2
    )
    contents = {file: load_file(folder / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in contents.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(x.nbytes for tensors in contents.values() for x in tensors.values())
    for file, tensors in contents.items():
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 8000, file
    told = json.loads((folder / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLM"] and told["torch_dtype"] == told["dtype"] == "float32"
    assert list(tmp_path.iterdir()) == [folder]  # no temporary folder stays


def test_sharded_parameters_are_saved_as_whole_ones(tmp_path):
    config = dataclasses.replace(BASE, head_dim=8)
    params = random_params(config)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(params, shardings_for(params, mesh, models.RULES))
    with jax.transfer_guard("disallow"):
        models.save(tmp_path / "m", models.Decoder(config), placed)
    assert_equal_trees(models.load(tmp_path / "m")[1], params)


def test_numbers_are_converted_while_saving(tmp_path):
    params = random_params(BASE)
    models.save(tmp_path / "m", models.Decoder(BASE), params, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    _, again = models.load(tmp_path / "m", dtype=jnp.bfloat16)
    assert_equal_trees(again, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    with pytest.raises(ValueError, match=r"is int8; write it as float32, bfloat16 or float16"):
        models.save(tmp_path / "n", models.Decoder(BASE), params, dtype=np.int8)


def test_parameters_that_would_be_lost_or_missed_are_named(tmp_path):
    module, params = models.Decoder(BASE), random_params(BASE)
    flat = tree.flatten(params)
    wrong = {
        "hold an adapter .model/layers/mlp/up_proj/adapter/lora/a, 1 leaves.*merge": flat
        | {"model/layers/mlp/up_proj/adapter/lora/a": np.zeros((3, 16, 2), np.float32)},
        "parameter 'model/head/kernel' is no part of the llama model": flat
        | {"model/head/kernel": np.zeros((2, 2), np.float32)},
        r"parameter 'model/norm/scale' \[16\] of the llama model is missing": {
            k: v for k, v in flat.items() if k != "model/norm/scale"
        },
        r"has shape \[15\]; the configuration makes it \[16\]": flat | {"model/norm/scale": np.zeros(15, np.float32)},
    }
    for words, leaves in wrong.items():
        with pytest.raises(ValueError, match=words):
            models.save(tmp_path / "m", module, tree.unflatten(leaves))
    with pytest.raises(ValueError, match=r"Dense is no model of this library"):
        import flax.linen as nn

        models.save(tmp_path / "m", nn.Dense(3), params)
    assert not any(tmp_path.iterdir())


def test_only_an_earlier_save_is_replaced(tmp_path):
    module, params = models.Decoder(BASE), random_params(BASE)
    target = tmp_path / "deep" / "er" / "m"
    models.save(target, module, params, shard_bytes=8000)
    models.save(target, module, params)  # ours: replaced as a whole, the shards of before are gone
    assert [file.name for file in target.glob("*.safetensors")] == ["model.safetensors"]

    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes.txt; choose another path, or overwrite=True"):
        models.save(target, module, params)
    models.save(target, module, params, overwrite=True)
    assert not (target / "notes.txt").exists()

    foreign = write(tmp_path / "foreign", BASE)
    with pytest.raises(FileExistsError, match=r"is not an earlier save"):
        models.save(foreign, module, params)
    same_parameters(models.load(foreign)[1], hf_tensors(BASE))

    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"is a file; a model is written as a folder"):
        models.save(tmp_path / "file", module, params, overwrite=True)
    (tmp_path / "empty").mkdir()
    models.save(tmp_path / "empty", module, params)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["deep", "empty", "file", "foreign"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    module, params = models.Decoder(BASE), random_params(BASE)
    models.save(tmp_path / "m", module, params)
    with pytest.raises(OSError, match=r"no space left"):
        models.save(tmp_path / "m", module, jax.tree.map(lambda x: x + 1, params), tokenizer=Broken())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert_equal_trees(models.load(tmp_path / "m")[1], params)


def test_the_configurations_error_names_the_folder(tmp_path):
    write(tmp_path, BASE)
    told = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: model_type 'gpt2' is not supported"):
        huggingface.read_config(tmp_path)
