# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""Tokenizers of GGUF files against transformers': the same ids for text that is hard to cut."""

from __future__ import annotations

import json
import random

import gguf as reference
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from jaxmethods import models

TEXTS = [
    "Hello, world! It's 12345 o'clock; we'll DON'T I'M",
    "  two  spaces\t\ttabs\n\n\nlines\r\n \n end  ",
    "2024-11-22: 3.14159 ١٢٣ ½ Ⅷ 1234567890",
    "naïve café — “quotes” … ¿qué? ß ŉ",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u2126",  # composed and not
    "日本語とहिन्दी ไทย العربية עברית",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0\u3000x",
    "def f(x):\n    return x**2  # 'it''s' \\n {}[]",
    "<|im_start|>user\nHi <|im_end|>\n<|im_end|><|endoftext|>x <|endoftext|> y",
    "<tool>x</tool> < tool> <|im_star|>",
    "", " ", "\n", "   ", "a", "\u0000\x07", "https://example.org/a?b=c&d=%20#e",
]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def hard_texts() -> list[str]:
    """The list above, and strings of random pieces of it."""
    rng = random.Random(0)
    pieces = [text[i : i + n] for text in TEXTS for n in (1, 2, 5) for i in range(0, len(text), n)]
    return TEXTS + ["".join(rng.choices(pieces, k=40)) for _ in range(200)]


@pytest.mark.slow
def test_smollm2(smollm2_file):
    file = smollm2_file
    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    ours = models.load_tokenizer(file)
    assert len(ours) == len(theirs)
    # Their conversion of the file leaves out the cut around numerals that SmolLM2's own tokenizer.json begins with (and
    # llama.cpp's "smollm" too). It shows where blanks or letters touch a numeral: "\n\n0", "½ ".
    plain = [text for text in TEXTS if not any(c.isnumeric() for c in text)]
    assert [ours(text).input_ids for text in plain] == [
        theirs(text, add_special_tokens=False).input_ids for text in plain
    ]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    )
    for text in hard_texts():
        assert ours(text).input_ids == theirs(text, add_special_tokens=False).input_ids, text
    for text in TEXTS:
        assert ours.decode(ours(text).input_ids) == text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    kept = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(chat, **kept) == theirs.apply_chat_template(chat, **kept)


@pytest.fixture(scope="module")
def vocabulary():
    """A byte-level vocabulary with merges, learnt from texts like those it will cut (but with no cuts of its own)."""
    backend = Tokenizer(kinds.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(hard_texts(), trainer)
    told = json.loads(backend.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in told["merges"]]
    return [*tokens, "<tool>", "</tool>"], merges


def write(path, vocabulary, pre):
    tokens, merges = vocabulary
    writer = reference.GGUFWriter(path, "qwen2" if pre == "qwen2" else "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 4 if t in ("<tool>", "</tool>") else 1 for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs_from_gguf(path):
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, tokenizer, _ = get_gguf_tokenizer(str(path))
    return convert_gguf_tokenizer(architecture, tokenizer)[0]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_cuts_are_theirs(pre, vocabulary, tmp_path):
    """Against their conversion of the same file, where that is what the published tokenizers do.

    It leaves out two things that the models' own tokenizer.json have, and which are set here before comparing: Qwen's
    NFC, and Llama 3's taking of whole tokens without merges.
    """
    path = write(tmp_path / "m.gguf", vocabulary, pre)
    ours, theirs = models.load_tokenizer(path), theirs_from_gguf(path)
    if pre == "qwen2":
        theirs.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        theirs.model.ignore_merges = True
    for text in hard_texts():
        got = ours(text, add_special_tokens=False).input_ids
        assert got == theirs.encode(text, add_special_tokens=False).ids, (pre, text)


def test_qwen2_is_transformers_own_class(vocabulary, tmp_path):
    tokens, merges = vocabulary
    ours = models.load_tokenizer(write(tmp_path / "m.gguf", vocabulary, "qwen2"))
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges],
        additional_special_tokens=SPECIAL,
    )  # fmt: skip
    theirs.add_tokens(["<tool>", "</tool>"])
    for text in hard_texts():
        assert ours(text).input_ids == theirs(text).input_ids, text


def test_folders_of_their_tokenizers(vocabulary, tmp_path):
    """Of a class that adds to tokenizer.json, and of one that does not."""
    tokens, merges = vocabulary
    qwen = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges]
    )
    plain = models.load_tokenizer(write(tmp_path / "m.gguf", vocabulary, "llama-bpe"))
    for name, theirs in {"qwen": qwen, "plain": plain}.items():
        theirs.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        theirs.save_pretrained(tmp_path / name)
        ours, auto = (
            load(tmp_path / name) for load in (models.load_tokenizer, transformers.AutoTokenizer.from_pretrained)
        )
        assert type(ours) is type(theirs) is type(auto)
        assert ours.chat_template == auto.chat_template == theirs.chat_template
        for text in hard_texts():
            assert ours(text).input_ids == theirs(text).input_ids == auto(text).input_ids, (name, text)


def test_llama3_cuts_are_the_published_pattern(vocabulary, tmp_path):
    """The pattern in Llama 3's tokenizer.json, written out here once more."""
    ours = models.load_tokenizer(write(tmp_path / "m.gguf", vocabulary, "llama-bpe")).backend_tokenizer.pre_tokenizer
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    published = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    for text in hard_texts():
        assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)
