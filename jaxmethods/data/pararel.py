"""ParaRel as FactTest splits it: files of questions, parted so that one model can be tuned and certified on them.

The files training_data.json, ID_test_pararel.json and OOD_test_pararel.json are in the repository of FactTest
(https://github.com/fannie1208/FactTest, dataset/pararel; no licence is stated there): lists of [question, answer, relation]. The
last asks for other relations than the first two.

    python -m jaxmethods.data.pararel --files FOLDER --to build/pararel
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from jaxmethods.data.sources import one_line_errors, write_all

FILES = {"train": "training_data.json", "test": "ID_test_pararel.json", "shifted": "OOD_test_pararel.json"}

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Rows {"prompt", "answer", "kind"} of one of the files.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is no list of [question, answer, relation].
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; it is dataset/pararel/{path.name} of FactTest's repository.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from None
    for number, row in enumerate(given if isinstance(given, list) else [given]):
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(x, str) and x.strip() for x in row)):
            raise ValueError(f"{path}, entry {number}: {str(row)[:80]} is no [question, answer, relation].")
    return [{"prompt": prompt, "answer": answer, "kind": kind} for prompt, answer, kind in given]


def parted(rows: Sequence[Row], count: int, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """The rows of `count` questions, drawn by the seed, and those of the others: one that is asked twice stays in one part."""
    questions = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(questions)
    first = set(questions[:count])
    return [row for row in rows if row["prompt"] in first], [row for row in rows if row["prompt"] not in first]


def parts(folder: Path, *, seed: int = 0, target: int = 1000) -> dict[str, list[Row]]:
    """tune and calibration: the halves of the training file. test: the other questions of its relations.

    target: of other relations, some `target` questions to learn their density from; shifted: the others of these.
    """
    train, test, others = (read(folder / name) for name in FILES.values())
    asked = {row["prompt"] for row in train}
    tune, calibration = parted(train, len(asked) // 2, seed=seed)
    target_rows, shifted = parted(others, target, seed=seed)
    return {
        "tune": tune,
        "calibration": calibration,
        "test": [row for row in test if row["prompt"] not in asked],
        "target": target_rows,
        "shifted": shifted,
    }


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Writes tune, calibration, test, target and shifted as JSON lines.")
    parser.add_argument("--files", required=True, type=Path, help="folder of FactTest's three files")
    parser.add_argument("--to", required=True, type=Path, help="folder for the five files")
    parser.add_argument("--seed", type=int, default=0, help="another seed parts them otherwise")
    options = parser.parse_args()
    write_all(options.to, {f"{name}.jsonl": rows for name, rows in parts(options.files, seed=options.seed).items()})


if __name__ == "__main__":
    raise SystemExit(main())
