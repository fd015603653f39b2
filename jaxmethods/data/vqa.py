"""Real pictures with words, from packages: easy-VQA's questions about shapes, and Tux Paint's stamps with their captions.

easy-VQA (PyPI package easy-vqa, MIT): 5,000 pictures of one coloured shape and 48,248 questions with 13 answers. Tux Paint's stamps
(Debian package tuxpaint-stamps-default, GPL-2): 785 photographs and drawings, each with a sentence. Rows name the pictures where
their packages put them; nothing is copied.

    python -m jaxmethods.data.vqa --to build/pictures --stamps build/stamps
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmethods.data.pictures import MARKER
from jaxmethods.data.sources import one_line_errors, write_all

Row = dict[str, Any]

CAPTION = f"{MARKER}\nWhat is this?"
_PACKAGE = "easy-vqa"
_INSTALLED = Path("/usr/share/tuxpaint/stamps")
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
_LETTERS = "symbols"
"""The folder of letters, digits, coins and flags: captions tell little there."""


def easy_vqa(split: str) -> list[Row]:
    """Rows {"images", "messages"}: each picture of "train" or "test" with all its questions, in the order of the pictures.

    Raises:
        ModuleNotFoundError: easy-vqa is not installed.
        ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown; easy-VQA has 'train' and 'test'.")
    folder = _easy_vqa_folder() / split
    rows: dict[int, Row] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        row = rows.setdefault(number, {"images": str(folder / "images" / f"{number}.png"), "messages": []})
        asked = question if row["messages"] else f"{MARKER}\n{question}"
        row["messages"] += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [rows[number] for number in sorted(rows)]


def single_questions(rows: Iterable[Row]) -> list[Row]:
    """Rows {"images", "prompt", "answer", "kind"}: each question alone; its kind is "colour", "shape" or "yes or no"."""
    out = []
    for row in rows:
        for asked, said in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            question = asked["content"].removeprefix(f"{MARKER}\n")
            answer = said["content"]
            kind = "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes or no"
            out.append({"images": row["images"], "prompt": f"{MARKER}\n{question}", "answer": answer, "kind": kind})
    return out


def short_dialogues(rows: Iterable[Row], seed: int = 0, yes_no: int = 2) -> list[Row]:
    """Rows {"images", "messages"}: of each picture some questions alone, and one dialogue of colour, shape, and what follows.

    Asked all in one dialogue, the questions tell the answers of others ("what is the blue shape?"), and a model learns to read the
    dialogue and not the picture. Of what is asked alone, the answer can only be seen: some questions of yes or no, and one for the
    colour or the shape. The dialogue asks for both, in either order and in words that tell neither, and then the same questions of
    yes or no, which can be answered from what was said: so they are learned as comparisons.

    Of the questions of yes or no, as many ask for something that is there as for something that is not: easy-VQA asks four times as
    often for what is not there, so that the words alone would tell the answer. Which questions of a kind are taken, and in what
    order, is decided by a hash of the picture and the seed.

    Args:
        yes_no: how many questions of yes or no, at most.
    """
    out = []
    for row in rows:
        asked = [m["content"].removeprefix(f"{MARKER}\n") for m in row["messages"][::2]]
        pairs = list(zip(asked, (m["content"] for m in row["messages"][1::2]), strict=True))
        picture = os.path.basename(row["images"])
        order = lambda pair, picture=picture: _digest(f"{seed} {picture} {pair[0]}")
        direct = sorted((pair for pair in pairs if pair[1] in COLOURS | SHAPES), key=order)
        colour = [pair for pair in direct if pair[1] in COLOURS and not SHAPES & set(_words(pair[0]))]
        shape = [pair for pair in direct if pair[1] in SHAPES and not COLOURS & set(_words(pair[0]))]
        plain = _balanced(pairs, yes_no, order)
        seen = sorted(colour[:1] + shape[:1], key=order)
        dialogue = seen + (sorted(plain, key=order) if len(seen) == 2 else [])
        for turns in (*([pair] for pair in plain + direct[:1]), dialogue):
            messages: list[Row] = []
            for question, answer in turns:
                said = question if messages else f"{MARKER}\n{question}"
                messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
            if messages:
                out.append({"images": row["images"], "messages": messages})
    return out


def _balanced(
    pairs: Sequence[tuple[str, str]], count: int, order: Callable[[tuple[str, str]], bytes]
) -> list[tuple[str, str]]:
    """Up to so many questions of yes or no, as many of what is there as of what is not."""
    kinds: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for pair in sorted((pair for pair in pairs if pair[1] in ("yes", "no")), key=order):
        denied = bool({"no", "not"} & set(_words(pair[0])))
        kinds[(pair[1] == "yes") != denied].append(pair)
    each = min(count // 2, *map(len, kinds.values()))
    return kinds[True][:each] + kinds[False][:each]


def without_pictures(rows: Iterable[Row]) -> list[Row]:
    """The rows with neither pictures nor markers: what a model learns of the questions' words alone."""

    def bare(row: Row) -> Row:
        kept = {name: value for name, value in row.items() if name != "images"}
        text = lambda value: value.replace(f"{MARKER}\n", "")
        if "messages" not in row:
            return kept | {"prompt": text(row["prompt"])}
        return kept | {"messages": [m | {"content": text(m["content"])} for m in row["messages"]]}

    return [bare(row) for row in rows]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _easy_vqa_folder() -> Path:
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"easy-VQA is not installed; pip install --no-deps {_PACKAGE}==1.0") from None
    return Path(str(distribution.locate_file("easy_vqa/data")))


def stamps(folder: str | os.PathLike[str] | None = None) -> list[Row]:
    """Rows {"images", "prompt", "answer"}: each stamp but letters and symbols, and its English sentence, by path.

    Args:
        folder: where the package was unpacked, or its `usr/share/tuxpaint/stamps`; by default where Debian installs it.

    Raises:
        FileNotFoundError: no stamps there.
    """
    root = _INSTALLED if folder is None else Path(folder)
    root = next((path for path in (root / "usr/share/tuxpaint/stamps", root) if path.is_dir()), root)
    rows = []
    for text in sorted(root.glob("**/*.txt")):
        picture = text.with_suffix(".png")
        first = text.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        if picture.is_file() and first and first[0].strip() and text.relative_to(root).parts[0] != _LETTERS:
            rows.append({"images": str(picture.absolute()), "prompt": CAPTION, "answer": first[0].strip()})
    if not rows:
        raise FileNotFoundError(
            f"{root} holds no stamps; get them with `apt-get download tuxpaint-stamps-default` and "
            "`dpkg -x tuxpaint-stamps-default*.deb DIR`, and give --stamps DIR."
        )
    return rows


def split_by_caption(rows: Sequence[Row], held_out: float = 0.15, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, held out): about this share of the captions is held out, by a hash of the caption and the seed.

    Stamps with one caption stay on one side.
    """
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = _digest(f"{seed} {row['answer'].casefold()}")
        parts[int.from_bytes(digest) < held_out * 2**64].append(row)
    return parts


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """In an order by hash, so that the first so many are of many pictures."""
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: _digest(f"{seed} {i}"))]


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the rows of both; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxmethods.data.vqa", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write the JSONL files to")
    parser.add_argument("--stamps", type=Path, metavar="DIR", help="where tuxpaint-stamps-default was unpacked")
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the captions to hold out (default 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these (default 0)")
    options = parser.parse_args(arguments)
    train, held_out = split_by_caption(stamps(options.stamps), options.held_out, options.seed)
    asked = short_dialogues(easy_vqa("train"), options.seed)
    asked_held_out = shuffled(single_questions(easy_vqa("test")), options.seed)
    files = {
        "questions.jsonl": asked,
        "questions_heldout.jsonl": asked_held_out,
        "questions_text.jsonl": without_pictures(asked),
        "questions_text_heldout.jsonl": without_pictures(asked_held_out),
        "captions.jsonl": train,
        "captions_heldout.jsonl": held_out,
    }
    write_all(options.to, files)


if __name__ == "__main__":
    raise SystemExit(main())
