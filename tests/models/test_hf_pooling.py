"""A sentence encoder's folder says how it pools: read, kept when it is saved, refused where we have no such pooling."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxmethods import models
from jaxmethods.models.encoder import EncoderConfig
from jaxmethods.models.hf_pooling import read_pooling
from jaxmethods.models.text_encoder import TextEncoder, TextEncoderConfig

CONFIG = TextEncoderConfig(
    family="bert", vocab_size=40, max_positions=12, token_types=2, pad_id=0,
    encoder=EncoderConfig(hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2, post_norm=True),
)  # fmt: skip
KINDS = ("Transformer", "Pooling", "Normalize")


def described(folder, told, kinds=KINDS):
    """Writes modules.json and 1_Pooling/config.json as sentence-transformers does."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": i, "path": paths.get(k, k), "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("told", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_what_a_folder_says_is_done(tmp_path, told, pooling):
    module = TextEncoder(CONFIG)
    tokens, mask = np.array([[5, 6, 7, 0]]), np.array([[True, True, True, False]])
    params = module.init(jax.random.key(0), tokens, mask)["params"]
    models.save(tmp_path / "model", module, params)
    described(tmp_path / "model", told)
    opened, params = models.load(tmp_path / "model")
    out = opened.apply({"params": params}, tokens, mask)
    expected, atol = (out.hidden[0, 0], 0) if pooling == "first" else (out.hidden[0, :3].mean(axis=0), 1e-6)
    np.testing.assert_allclose(out.pooled[0], expected, rtol=0, atol=atol)
    models.save(tmp_path / "again", opened, params)
    assert models.load(tmp_path / "again")[0].config == dataclasses.replace(CONFIG, pooling=pooling)


def test_a_folder_that_says_nothing(tmp_path):
    assert read_pooling(tmp_path) is None


@pytest.mark.parametrize(
    ("told", "kinds", "message"),
    [
        ({"pooling_mode_max_tokens": True}, KINDS, "pools max_tokens; supported are"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, KINDS, "pools max_tokens and cls_token"),
        ({"pooling_mode_cls_token": True}, (*KINDS, "Dense"), "has a Dense behind the encoder"),
    ],
)
def test_other_pooling_is_refused(tmp_path, told, kinds, message):
    described(tmp_path, told, kinds)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pooling(tmp_path)


@pytest.mark.parametrize("text", ["{}", '[{"type": "x"}]', "[["])
def test_a_broken_list_of_modules(tmp_path, text):
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ValueError, match=r"modules\.json"):
        read_pooling(tmp_path)
