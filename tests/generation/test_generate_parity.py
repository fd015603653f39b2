# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""Greedy generation in transformers and here: the same tokens."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxmethods import generation, models


def left_padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return tokens, mask


def theirs(model, tokens, mask, new: int, eos: int | None = None) -> np.ndarray:
    with torch.inference_mode():
        out = model.generate(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long(), max_new_tokens=new,
            do_sample=False, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
    return np.pad(out[:, tokens.shape[1] :].numpy(), ((0, 0), (0, new + tokens.shape[1] - out.shape[1])))


def test_a_tiny_llama(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tokens, mask = left_padded([[5, 9, 30, 2], [7], [8, 44, 3]])
    new = 20
    free = theirs(model, tokens, mask, new)
    eos = int(free[0, 5])  # ends the first row early
    expected = theirs(model, tokens, mask, new, eos)
    module, params = models.load(tmp_path)
    found = generation.generate(module, params, tokens, mask, max_new_tokens=new, temperature=0, eos_id=eos)
    np.testing.assert_array_equal(np.where(found.mask, found.tokens, 0), expected)
    assert not found.mask[0, -1]


@pytest.mark.slow
def test_smollm2(smollm2_file):
    path = smollm2_file
    tokenizer = models.load_tokenizer(path)
    rows = [
        tokenizer.encode(text)
        for text in ("The capital of France is", "Once upon a time", "Water boils at a temperature of about")
    ]
    tokens, mask = left_padded([[int(i) for i in getattr(row, "ids", row)] for row in rows])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    expected = theirs(model, tokens, mask, 24)
    del model
    module, params = models.load(path)
    found = generation.generate(module, params, tokens, mask, max_new_tokens=24, temperature=0)
    np.testing.assert_array_equal(found.tokens, expected)
