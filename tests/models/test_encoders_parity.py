# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""Random tiny CLIPs, SigLIPs and BERTs, and a real MiniLM: the same vectors in transformers and here, both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxmethods.models import weights
from jaxmethods.models.dual import DualConfig, DualEncoder
from jaxmethods.models.files import read_json
from jaxmethods.models.hf_encoders import (
    canonical,
    encoder_config_from_hf,
    encoder_config_to_hf,
    encoder_layout,
    ignored_tensors,
    preprocessor_to_hf,
)
from jaxmethods.models.layout import assemble, check_tensors
from jaxmethods.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxmethods.models.tokenizers import load_tokenizer
from jaxmethods.models.vision import VisionConfig, VisionTower
from jaxmethods.tree import flatten

ATOL = 2e-4  # float32; hidden states are of order 1

LAYERS = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
VISION = LAYERS | {"image_size": 23, "patch_size": 7}  # two pixels a side stand in no patch
TEXT = LAYERS | {"vocab_size": 61, "max_position_embeddings": 12, "bos_token_id": 3, "pad_token_id": 1}
EOS = 5


def random(kind: str, **options):
    """A model of transformers with large random weights: at its own initialisation most mistakes would not show."""
    config = getattr(transformers, f"{kind}Config")(**options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            spread = 0.3 if weight.ndim < 2 else 1.5 * weight[0].numel() ** -0.5
            weight.normal_(0.0, spread).add_(1.0 if re.search(r"norm\w*\.weight", path.lower()) else 0.0)
    return model


CASES = {
    "clip": ("CLIP", {"text_config": TEXT | {"eos_token_id": EOS}, "vision_config": VISION, "projection_dim": 10}),
    "siglip": ("Siglip", {"text_config": TEXT | {"eos_token_id": EOS}, "vision_config": VISION}),
    "bert": ("Bert", TEXT | {"hidden_act": "gelu"}),
}


@functools.cache
def theirs(name: str):
    kind, options = CASES[name]
    return random(kind, **options)


def opened(folder: Path, change=lambda config: config):
    """(module, parameters) of a folder that transformers wrote."""
    config = change(encoder_config_from_hf(read_json(folder / "config.json")))
    found, _ = weights.read_header(folder / "model.safetensors")
    ignored = re.compile("|".join(ignored_tensors(config)))
    tensors = {name: tensor for old, tensor in found.items() if not ignored.search(name := canonical(config)(old))}
    leaves = encoder_layout(config)
    check_tensors(leaves, {name: (tensor.shape, "model.safetensors") for name, tensor in tensors.items()})
    params = assemble(leaves, lambda name, at: weights.read_slice(name, tensors[name], at), dtype=jnp.float32)
    kind = {VisionConfig: VisionTower, TextEncoderConfig: TextEncoder, DualConfig: DualEncoder}[type(config)]
    return kind(config), params


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, *inputs):
    return module.apply({"params": params}, *inputs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each of their models is written."""
    written = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, folder in written.items():
        theirs(name).save_pretrained(folder)
    return written


def images(config) -> tuple[np.ndarray, dict]:
    """Pixels for us, and the same prepared for transformers."""
    vision = config if isinstance(config, VisionConfig) else config.vision
    pixels = np.random.default_rng(0).integers(0, 256, (2, 23, 23, 3)).astype(np.uint8)
    normed = (pixels / 255 - np.array(vision.mean)) / np.array(vision.std)
    return pixels, {"pixel_values": torch.tensor(normed.transpose(0, 3, 1, 2), dtype=torch.float32)}


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Full; ending early, padded with the end's own token; ending early, padded with any."""
    tokens = np.random.default_rng(1).integers(6, 61, (3, 12))
    mask = np.ones((3, 12), bool)
    mask[1, 7:], mask[2, 4:] = False, False
    tokens[[0, 1, 2], [11, 6, 3]] = EOS
    tokens[1, 7:] = EOS
    return tokens, mask


def same(ours, others, where=...) -> None:
    """`where`: real tokens; at padding our positions stand still and theirs go on."""
    ours, others = np.asarray(ours)[where], others.detach().float().numpy()[where]
    assert ours.dtype == np.float32 and ours.shape == others.shape
    assert np.abs(others).max() > 0.2  # else any tolerance passes
    np.testing.assert_allclose(ours, others, atol=ATOL)


def asked(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_dual_encoders_parity(name, folders):
    module, params = opened(folders[name])
    pixels, prepared = images(module.config)
    tokens, mask = texts()
    told = {"input_ids": torch.tensor(tokens), **prepared}
    if name == "clip":
        told["attention_mask"] = torch.tensor(mask).long()
    out = asked(theirs(name), **told)

    seen = mask if name == "clip" else None

    @jax.jit
    def ours(params):
        bound = module.bind({"params": params})
        return bound.vision(pixels), bound.text(tokens, seen), bound.images(pixels), bound.texts(tokens, seen)

    vision, text, image_embeds, text_embeds = ours(params)
    same(vision.features, out.vision_model_output.last_hidden_state)
    same(image_embeds, out.image_embeds)
    same(text_embeds, out.text_embeds)
    hidden = out.text_model_output.last_hidden_state
    same(text.hidden, hidden, ... if seen is None else mask)
    # Their pooled outputs of CLIP are projected already.
    tower = asked(theirs(name).text_model, **{key: x for key, x in told.items() if key != "pixel_values"})
    same(text.pooled, tower.pooler_output)
    same(vision.pooled, asked(theirs(name).vision_model, **prepared).pooler_output)
    scale, bias = module.apply({"params": params}, method="scale_and_bias")
    logits = scale * image_embeds @ text_embeds.T + (0 if bias is None else bias)
    same(logits, out.logits_per_image)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_features_of_an_inner_layer_parity(name, folders):
    """hidden_states[-2], as LLaVA reads it, of a file with all layers; hidden_states[-1], which SigLIP's norm has not seen."""
    vision = theirs(name).vision_model
    vision.save_pretrained(folders[name] / "vision")  # transformers 5 names the tensors of a lone tower otherwise
    for layer in (-2, -1):
        module, params = opened(folders[name] / "vision", lambda config: config.reading(layer, class_token=True))  # noqa: B023
        assert len(params["encoder"]["layers"]["layer_norm1"]["scale"]) == 4 + layer
        assert not params.keys() & {"post_layernorm", "head"}
        pixels, prepared = images(module.config)
        states = asked(vision, **prepared, output_hidden_states=True).hidden_states
        same(run(module, params, pixels).features, states[layer])


def test_single_towers_parity(folders):
    """A text tower alone; the old end of texts, id 2, where the largest id of a text marks it."""
    options = TEXT | {"eos_token_id": 2}
    model = random("CLIPText", **options)
    model.save_pretrained(folders["clip"] / "text")
    module, params = opened(folders["clip"] / "text")
    tokens, mask = texts()
    tokens[:, 1:3] = 60, 60
    out = asked(model, input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    got = run(module, params, tokens, mask)
    same(got.hidden, out.last_hidden_state, mask)
    same(got.pooled, out.pooler_output)
    np.testing.assert_allclose(got.pooled, got.hidden[:, 1], atol=1e-6)


def test_siglip_with_a_mask_parity(folders):
    text = theirs("siglip").text_model
    text.save_pretrained(folders["siglip"] / "text")
    module, params = opened(folders["siglip"] / "text")
    tokens, mask = texts()
    out = asked(text, input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    got = run(module, params, tokens, mask)
    same(got.hidden, out.last_hidden_state)
    same(got.pooled, out.pooler_output)


def test_bert_parity(folders):
    module, params = opened(folders["bert"])
    tokens, mask = texts()
    types = (np.arange(12) % 5 > 2).astype(np.int64)[None].repeat(3, 0)
    told = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}
    out = asked(theirs("bert"), **told, token_type_ids=torch.tensor(types)).last_hidden_state
    ours = jax.jit(lambda p, types: module.apply({"params": p}, tokens, mask, token_type_ids=types))(params, types)
    same(ours.hidden, out, mask)
    weight = torch.tensor(mask)[..., None].float()
    same(ours.pooled, (out * weight).sum(1) / weight.sum(1))
    first = dataclasses.replace(module.config, pooling="first")
    same(run(TextEncoder(first), params, tokens, mask).pooled, asked(theirs("bert"), **told).last_hidden_state[:, 0])


def written(folder: Path, config, params) -> None:
    """config.json and model.safetensors, from our configuration and parameters."""
    from safetensors.numpy import save_file

    flat, tensors = flatten(params), {}
    for leaf in encoder_layout(config):
        array = np.asarray(flat[leaf.path])
        for layer, name in enumerate(leaf.names):
            part = array[layer] if leaf.stacked else array
            tensors[name] = np.ascontiguousarray(part.T if leaf.transposed else part).reshape(leaf.tensor_shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(encoder_config_to_hf(config)))


def architecture(config) -> dict:
    """A configuration of transformers without what says nothing of the architecture, and without `projection_dim` of single
    towers: of the three places where a CLIP has it, one is read."""
    loose = {"_name_or_path", "architectures", "transformers_version", "dtype"}
    told = {key: value for key, value in config.to_dict().items() if key not in loose}
    single = "text_config" not in told
    told |= {
        f"{part}_config": architecture(getattr(config, f"{part}_config")) for part in ("text", "vision") if not single
    }
    return {key: value for key, value in told.items() if key != "projection_dim" or not single}


@pytest.mark.parametrize("name", ["clip", "siglip", "bert", "clip/vision", "siglip/vision", "siglip/text"])
def test_ours_opened_there_parity(name, folders, tmp_path):
    """Files with our names and our config.json: transformers finds every tensor, each where it was, and the same architecture."""
    model = theirs(name.split("/")[0])
    if "/" in name:
        model = getattr(model, f"{name.split('/')[1]}_model")
        model.save_pretrained(folders[name.split("/")[0]] / name.split("/")[1])
    module, params = opened(folders[name.split("/")[0]] / name.partition("/")[2])
    params = jax.tree.map(lambda x: x + 1, params)  # what is compared is what we wrote
    written(tmp_path, module.config, params)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    if name == "bert":
        assert {key for key in report.pop("missing_keys") if not key.startswith("pooler.")} == set()
    assert not any(report.values()), report
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[path] + 1, new[path]) for path in old if not path.startswith("pooler."))
    assert architecture(again.config) == architecture(model.config)


def test_old_files_with_two_configs_parity():
    """Files of 2021 say the same twice; where they do not agree, transformers takes the second."""
    old = {"text_config": TEXT | {"eos_token_id": 2}, "text_config_dict": {"hidden_size": 48, "num_attention_heads": 3}}
    config = encoder_config_from_hf(old | {"model_type": "clip", "vision_config": VISION, "vision_config_dict": None})
    text = transformers.CLIPConfig(**old, vision_config=VISION).text_config
    ours = encoder_config_to_hf(config.text)
    assert {key: ours[key] for key in TEXT} == {key: getattr(text, key) for key in TEXT}
    assert (config.text.eos_id, text.eos_token_id) == (49407, 49407)


@pytest.mark.parametrize(
    "name", ["clip_vision_model", "siglip_vision_model", "clip_text_model", "siglip_text_model", "bert"]
)
def test_what_config_json_leaves_out_parity(name):
    ours = encoder_config_to_hf(encoder_config_from_hf({"model_type": name}))
    others = transformers.AutoConfig.for_model(name).to_dict()
    assert {key: ours[key] for key in ours if key != "architectures"} == {
        key: others[key] for key in ours if key != "architectures"
    }


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_pixels_prepared_by_transformers_parity(name, tmp_path):
    """Their image processor, from our preprocessor_config.json, gives what our tower makes of the pixels."""
    image = pytest.importorskip("PIL.Image")
    told = {"clip": {"text_config": TEXT | {"eos_token_id": EOS}}, "siglip": {"text_config": TEXT}}[name]
    config = encoder_config_from_hf({"model_type": name, "vision_config": VISION, **told})
    kind = {"clip": "CLIPImageProcessorPil", "siglip": "SiglipImageProcessorPil"}[name]
    processor = getattr(transformers, kind).from_dict(preprocessor_to_hf(config))
    pixels, prepared = images(config)
    out = processor([image.fromarray(x) for x in pixels], return_tensors="pt")
    np.testing.assert_allclose(out["pixel_values"], prepared["pixel_values"], atol=1e-5)


def test_a_real_sentence_encoder_parity(minilm_folder):
    folder = minilm_folder
    module, params = opened(folder)
    words = load_tokenizer(folder)(
        ["A cat sits on the mat.", "No focal consolidation, pleural effusion or pneumothorax is seen.", "Yes."],
        padding=True, return_tensors="np",
    )  # fmt: skip
    mask = words["attention_mask"] > 0
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    out = asked(model, **{key: torch.tensor(x) for key, x in words.items()}).last_hidden_state
    got = run(module, params, words["input_ids"], mask)
    same(got.hidden, out, mask)
    weight = torch.tensor(mask)[..., None].float()
    same(got.pooled, (out * weight).sum(1) / weight.sum(1))
