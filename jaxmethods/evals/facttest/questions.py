"""Questions with answers, from files."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from jaxmethods import data

Row = dict[str, Any]


def read_questions(path: str) -> list[Row]:
    """{"prompt", "answers", "kind"} of each row of a file.

    Raises:
        ValueError: a row without them, naming its place.
    """
    records: Any
    if str(path).endswith(".json") and (lists := _lists(path)) is not None:
        records = data.records_in_memory(lists)
        records.source = path
    else:
        records = data.open_records(path)
    rows = []
    for place, row in records.placed():
        said = row.get("answers") or row.get("answer")
        said = [said] if isinstance(said, str) else said
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{place}: field 'prompt' must be text; the fields are {', '.join(row)}.")
        if not isinstance(said, list) or not said or not all(isinstance(one, str) and one.strip() for one in said):
            raise ValueError(
                f"{place}: field 'answer' must be text, or 'answers' a list of it; the fields are {', '.join(row)}."
            )
        rows.append({"prompt": row["prompt"], "answers": said, "kind": str(row.get("kind", ""))})
    return rows


def _lists(path: str) -> list[Row] | None:
    """Rows of FactTest's own files, lists of [question, answer, relation]; None for other files."""
    file = epath.Path(path)
    try:
        given = json.loads(file.read_text()) if file.exists() else None
    except ValueError:
        return None
    if not isinstance(given, list) or not given or not all(isinstance(row, list) and len(row) == 3 for row in given):
        return None
    return [{"prompt": prompt, "answer": answer, "kind": kind} for prompt, answer, kind in given]
