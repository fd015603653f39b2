"""Contact sheets: pictures beside what a model says of them, or finds for them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmethods import data, images
from jaxmethods.evals import completion
from jaxmethods.launch.files import write_figure

_INK, _RIGHT, _WRONG = "#22262b", "#2f7d3b", "#b3261e"
COLUMNS, MOST = 4, 24


def draw_answers(file: str, rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[str]]) -> None:
    """The first pictures of `rows` with prompt, given answer and each model's; those that agree in green.

    Raises:
        ValueError: no row has a picture.
    """
    cells = []
    for i in _with_pictures(rows)[:MOST]:
        lines = [(_question(rows[i]["prompt"]), _INK), (f"given: {rows[i]['answer']}", _INK)]
        for name, said in answers.items():
            agrees = completion.plain(said[i]) == completion.plain(rows[i]["answer"])
            lines.append((f"{name}: {said[i] or '(nothing)'}", _RIGHT if agrees else _WRONG))
        cells.append((_first(rows[i]["images"]), lines))
    _draw(file, cells)


def draw_retrieval(
    file: str,
    pictures: Sequence[Mapping[str, Any]],
    queries: np.ndarray,
    captions: Sequence[str],
    targets: np.ndarray,
    picture_ids: np.ndarray,
    caption_ids: np.ndarray,
    *,
    nearest: int = 4,
) -> None:
    """Some pictures with the captions whose embeddings are nearest; the right ones in green.

    Raises:
        ValueError: no row has a picture.
    """
    seen = _with_pictures(pictures)
    cells = []
    for i in seen[:: max(len(seen) // MOST, 1)][:MOST]:
        order = np.argsort(-(targets @ queries[i]), kind="stable")
        lines, told = [], set[str]()
        for j in order:
            if captions[j] not in told and len(told) < nearest:
                told.add(captions[j])
                lines.append((captions[j], _RIGHT if caption_ids[j] == picture_ids[i] else _INK))
        cells.append((_first(pictures[i]["images"]), lines))
    _draw(file, cells)


def _draw(file: str, cells: Sequence[tuple[Any, Sequence[tuple[str, str]]]]) -> None:
    from matplotlib.figure import Figure

    rows = -(-len(cells) // COLUMNS)
    most = max(sum(len(_wrapped(text)) for text, _ in lines) for _, lines in cells)
    high = 1.7 + 0.17 * most
    figure = Figure(figsize=(COLUMNS * 2.9, rows * high), dpi=110)
    for number, (source, lines) in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        left, top = column / COLUMNS, 1 - row / rows
        axes = figure.add_axes((left + 0.01, top - 1.6 / high / rows, 1 / COLUMNS - 0.02, 1.5 / high / rows))
        axes.imshow(np.asarray(images.open_picture(source, file)))
        axes.axis("off")
        y = top - 1.72 / high / rows
        for text, colour in lines:
            for line in _wrapped(text):
                figure.text(left + 0.01, y, line, fontsize=7.5, color=colour, va="top", parse_math=False)
                y -= 0.17 / high / rows
    write_figure(file, figure, facecolor="white")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 46, max_lines=3, placeholder=" ...") or [""]


def _question(prompt: str) -> str:
    return prompt.replace(data.MARKER, "").strip()


def _with_pictures(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which rows have a picture."""
    seen = [i for i, row in enumerate(rows) if _first(row.get("images")) is not None]
    if not seen:
        raise ValueError("no row has a picture, so there is no sheet to draw; leave --sheet out.")
    return seen


def _first(given: Any) -> Any:
    return next(iter(given), None) if isinstance(given, list | tuple) else given
