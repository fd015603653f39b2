"""Tokenizers from model folders, the hub and GGUF files, as transformers' fast tokenizers (no torch)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmethods.models import files
from jaxmethods.models.gguf import Gguf, open_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How text is cut before byte pairs are merged, by the names that llama.cpp gives to these conventions. The patterns are
# those in the models' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CUTS = {
    "smollm": "digits", "gpt-2": None,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a model: of a folder, a .gguf file, "package:NAME/FILE", or a hub name.

    A folder is read from disk alone, and no code in it is run.

    Raises:
        FileNotFoundError: no model there, or no tokenizer in the folder.
        ValueError: a tokenizer that is not understood.
    """
    found = files.resolve(path, weights=False)
    if found.suffix == ".gguf":
        return tokenizer_from_gguf(open_gguf(found))
    known = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((found / name).is_file() for name in known):
        raise FileNotFoundError(f"{found} has no tokenizer: none of {', '.join(known)}.")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        if _says_all(found):
            from transformers import PreTrainedTokenizerFast

            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(found), **options)
        else:
            from transformers import AutoTokenizer  # imports torch where it is installed

            tokenizer = AutoTokenizer.from_pretrained(str(found), **options)
    except Exception as error:  # transformers and tokenizers raise many kinds, bare Exception among them
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(f"{found}: its tokenizer cannot be read ({type(error).__name__}: {reason}).") from None
    return tokenizer


def _says_all(folder: Path) -> bool:
    """Whether tokenizer.json is the whole of a tokenizer: no class of its own adds to it."""
    config = folder / "tokenizer_config.json"
    named = files.read_json(config).get("tokenizer_class") if config.is_file() else None
    return (folder / "tokenizer.json").is_file() and named in ("PreTrainedTokenizerFast", "TokenizersBackend")


def tokenizer_from_gguf(file: Gguf) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer that a GGUF file holds, with its special tokens and chat template.

    Raises:
        ValueError: another kind of tokenizer, or a way of cutting text that is not known here.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    told = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    kind, cut = told.get("ggml.model"), told.get("ggml.pre")
    instead = "load the tokenizer from the folder or hub name of the original model."
    if kind != "gpt2":
        raise ValueError(
            f"{file.path}: tokenizer model {kind!r} is not supported, only 'gpt2' (byte BPE) is; {instead}"
        )
    if cut not in _CUTS:
        known = ", ".join(_CUTS)
        raise ValueError(f"{file.path}: pre-tokenizer {cut!r} is not supported, supported are {known}; {instead}")
    if missing := [key for key in ("ggml.tokens", "ggml.merges", "ggml.token_type") if key not in told]:
        raise ValueError(f"{file.path}: tokenizer.{missing[0]} is missing; {instead}")

    tokens, pattern = told["ggml.tokens"], _CUTS[cut]
    pointers = [value for key, value in told.items() if key.endswith("_token_id")]
    if len(told["ggml.token_type"]) != len(tokens) or any(not 0 <= pointer < len(tokens) for pointer in pointers):
        raise ValueError(f"{file.path}: the tokenizer's fields contradict each other; {instead}")
    llama3 = pattern == _LLAMA3
    merges = [tuple(merge.split(" ")) for merge in told["ggml.merges"]]
    # Llama 3 takes a piece that is a token whole, even where no merges lead to it.
    try:
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=llama3)
    except Exception as error:  # tokenizers raises no narrower kind
        raise ValueError(f"{file.path}: the tokenizer's merges do not fit its tokens ({error}); {instead}") from None
    backend = Tokenizer(bpe)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    first: list[Any] = []
    if pattern == "digits":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif pattern is not None:
        first = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_only])
    backend.decoder = decoders.ByteLevel()
    if pattern == _QWEN2:
        backend.normalizer = normalizers.NFC()
    typed = [
        (AddedToken(token, normalized=False), type_)
        for token, type_ in zip(tokens, told["ggml.token_type"], strict=True)
    ]
    backend.add_special_tokens([token for token, type_ in typed if type_ == _CONTROL])
    backend.add_tokens([token for token, type_ in typed if type_ == _USER_DEFINED])

    named = {
        ours: tokens[told[f"ggml.{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"ggml.{theirs}_token_id" in told
    }
    around = {"bos": told.get("ggml.add_bos_token", llama3), "eos": told.get("ggml.add_eos_token", False)}
    added = [name for name, wanted in around.items() if wanted]  # llama.cpp's own defaults
    if lost := [name for name in added if name not in named]:
        raise ValueError(f"{file.path}: add_{lost[0]}_token is set and no token is named for it; {instead}")
    if added:
        first_part, second_part = (
            [*([named["bos"]] if around["bos"] else []), text, *([named["eos"]] if around["eos"] else [])]
            for text in ("$A", "$B:1")
        )
        backend.post_processor = processors.TemplateProcessing(
            single=first_part,
            pair=first_part + second_part,
            special_tokens=[(named[name], told[f"ggml.{name}_token_id"]) for name in added],
        )
    length = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=told.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **({"model_max_length": length} if length else {}),
        **{f"{name}_token": token for name, token in named.items()},
    )


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer's files (tokenizer.json, tokenizer_config.json, chat template) into a model's folder."""
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    told = files.read_json(file)
    if told.get("tokenizer_class") == "TokenizersBackend":  # transformers 5 knows both names, 4 only the other
        told["tokenizer_class"] = "PreTrainedTokenizerFast"
    told.setdefault("clean_up_tokenization_spaces", getattr(tokenizer, "clean_up_tokenization_spaces", False))
    files.write_json(file, told)
