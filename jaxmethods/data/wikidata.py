"""Questions of facts: triples of Wikidata, as BIG-bench's task `qa_wikidata` has them, in the form of questions.

The task is read out of the package's source archive, which is not installed (its canary line asks that it be in no training corpus:
use it to evaluate, and keep no copy):

    pip download --no-deps --no-binary :all: bigbench==1.0.0 -d build
    python -m jaxmethods.data.wikidata --archive build/bigbench-1.0.0.tar.gz --to build/wikidata

A row is {"prompt", "answer", "answers", "kind"}: "What is the capital of Occitania?", its first answer, all of them, the relation.
calibration.jsonl, test.jsonl and source.jsonl are drawn alike; for shifted.jsonl and target.jsonl questions of language have five
times the weight of others. No question is in two files.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmethods.data.sources import one_line_errors, write_all

Row = dict[str, Any]
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/qa_wikidata/task.json"
LEAST = 30
"""A relation is known by as many sentences."""
LANGUAGE = frozenset({"native language", "language", "official language"})
"""The relations that `shifted` has more of."""
MORE = 5.0


def read_archive(path: str | Path) -> list[Mapping[str, Any]]:
    """The task's examples, {"input", "target"}; the archive is read as a stream, and nothing is unpacked.

    Raises:
        FileNotFoundError: no archive.
        ValueError: it has no such task, or is no archive.
    """
    try:
        with tarfile.open(path, mode="r|gz") as archive:
            for member in archive:
                if member.name == MEMBER:
                    file = archive.extractfile(member)
                    assert file is not None  # a regular file
                    return json.load(file)["examples"]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no .tar.gz ({error}); download bigbench==1.0.0 as its source archive.") from None
    raise ValueError(f"{path} has no {MEMBER}; download bigbench==1.0.0 as its source archive.")


def questions(examples: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row of each sentence "The RELATION of SUBJECT is", in their order; those of the same words are one, with all their answers.

    The relation is the longest run of small words before "of" that at least 30 sentences begin with.

    >>> some = [{"input": f"The capital of Land {i} is", "target": [f"Town {i}"]} for i in range(30)]
    >>> questions(some)[0]
    {'prompt': 'What is the capital of Land 0?', 'answer': 'Town 0', 'answers': ['Town 0'], 'kind': 'capital'}
    """
    sentences = [e for e in examples if e["input"].startswith("The ") and e["input"].endswith(" is")]
    known = collections.Counter(relation for e in sentences for relation in _relations(e["input"]))
    rows: dict[str, Row] = {}
    for example in sentences:
        found = [relation for relation in _relations(example["input"]) if known[relation] >= LEAST]
        if not found:
            continue
        kind = max(found, key=len)
        asked = f"What is the {kind} of {example['input'][len(f'The {kind} of ') : -len(' is')]}?"
        said = example["target"] if isinstance(example["target"], list) else [example["target"]]
        row = rows.setdefault(asked, {"prompt": asked, "answer": said[0], "answers": [], "kind": kind})
        row["answers"] += [one for one in said if one not in row["answers"]]
    return list(rows.values())


def _relations(sentence: str) -> list[str]:
    """The runs of small words between "The" and an "of"."""
    words, found = sentence.split(), list[str]()
    for place, word in enumerate(words[1:], 1):
        if not word.removesuffix(",").islower():
            break
        if word == "of" and place > 1:
            found.append(" ".join(words[1:place]))
    return found


def split(
    rows: Sequence[Row], *, calibration: int, test: int, shifted: int, source: int, target: int, seed: int = 0
) -> dict[str, list[Row]]:
    """Disjoint parts by name; `shifted` and `target` are drawn with five times the weight on questions of language.

    Raises:
        ValueError: fewer rows than are asked for, or a part without any.
    """
    sizes = {"shifted": shifted, "target": target, "calibration": calibration, "test": test, "source": source}
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(rows):
        raise ValueError(
            f"there are {len(rows)} rows for {sizes}; give each part at least one, and no more than there are."
        )
    rng = random.Random(seed)
    order = rng.sample(range(len(rows)), len(rows))
    # Two questions of the same shares, one of which asks five times as often for a language.
    half = len(order) // 2
    weight = lambda i: MORE if rows[i]["kind"] in LANGUAGE else 1.0
    drawn = sorted(order[:half], key=lambda i: -(rng.random() ** (1 / weight(i))))  # without replacement
    more, alike = drawn[: shifted + target], order[half:]
    if len(more) < shifted + target or len(alike) < calibration + test + source:
        raise ValueError(
            f"half of {len(rows)} rows must be enough for shifted and target, and for the others: {sizes}."
        )
    rng.shuffle(more)
    parts: dict[str, list[Row]] = {}
    for pool, names in ((more, ("shifted", "target")), (alike, ("calibration", "test", "source"))):
        start = 0
        for name in names:
            parts[name] = [rows[i] for i in pool[start : start + sizes[name]]]
            start += sizes[name]
    return parts


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Writes calibration, test, shifted, source and target as JSON lines.")
    parser.add_argument("--archive", required=True, type=Path, help="bigbench-1.0.0.tar.gz")
    parser.add_argument("--to", required=True, type=Path, help="folder for the five files")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other rows")
    for name in ("calibration", "test", "shifted", "source", "target"):
        parser.add_argument(f"--{name}", type=int, default=1000, help="rows of this part")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("calibration", "test", "shifted", "source", "target")}
    parts = split(questions(read_archive(options.archive)), seed=options.seed, **sizes)
    write_all(options.to, {f"{name}.jsonl": rows for name, rows in parts.items()})


if __name__ == "__main__":
    raise SystemExit(main())
