"""The pictures of a run: its losses over its steps, drawn from the metrics file alone, and the memory that its step needs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmethods.launch.files import write_figure
from jaxmethods.launch.metrics import Row, read

Values = Float[np.ndarray, "_"]  # one metric at some of the steps

_INK, _FAINT, _BLUE, _ORANGE, _RED = "#22262b", "#8a929b", "#2f6fb3", "#d9662b", "#b3261e"
_MOST_POINTS = 2000


def draw_losses(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    *,
    title: str = "",
    ylabel: str = "Loss (nats)",
) -> None:
    """Draws `loss` (each step faint, the trend over it) and, where rows have it, `evaluation_loss` as points.

    The loss axis is logarithmic where all losses are positive and the trend spans a factor above ten. Steps whose
    loss was not finite are marked. The file is replaced as a whole. No display and no global state of matplotlib
    is used.

    Raises:
        FileNotFoundError: there are no metrics.
        ValueError: they hold no loss.
    """
    rows = read(metrics_path)
    steps, losses = _column(rows, "loss")
    evaluated, evaluations = _column(rows, "evaluation_loss")
    if not steps.size + evaluated.size:
        raise ValueError(f"{os.fspath(metrics_path)} holds no `loss`, so there is nothing to draw.")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    trend = _draw_training(axes, steps, losses)
    held = np.isfinite(evaluations)
    if held.any():
        axes.plot(
            evaluated[held], evaluations[held], color=_ORANGE, linewidth=1.1, marker="o", markersize=4.5,
            markeredgecolor="white", markeredgewidth=0.8, label="Evaluation", zorder=4,
        )  # fmt: skip
    drawn = np.concatenate([losses[np.isfinite(losses)], evaluations[held]])
    logarithmic = _scale_losses(axes, drawn, np.concatenate([trend, evaluations[held]]))
    _scale_steps(axes, np.concatenate([steps, evaluated]))
    axes.set_xlabel("Step (optimiser updates)", color=_INK)
    axes.set_ylabel(f"{ylabel}, log scale" if logarithmic else ylabel, color=_INK)
    if title:
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=12, parse_math=False)
    axes.grid(color=_FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=9, labelcolor=_INK, loc="upper right")

    write_figure(png_path, figure)


_PARTS = {"frozen": "#9aa5b1", "trained": _BLUE, "optimizer": "#7fb0de", "temporaries": "#e9b44c"}


def draw_memory(
    needs: Mapping[str, Mapping[str, int]],
    png_path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    title: str = "",
) -> None:
    """Draws what steps need of one device's memory: a bar each, its parts end to end, and the limit as a line.

    Args:
        needs: name of a bar -> {part: bytes}; the parts are `frozen`, `trained`, `optimizer` and `temporaries`.
        limit: bytes that the device has.
    """
    from matplotlib.figure import Figure

    names = list(needs)
    figure = Figure(figsize=(8, 1.55 + 0.52 * len(names)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    totals = [sum(parts.values()) for parts in needs.values()]
    reach = max(totals) / 2**30
    near = limit is not None and limit / 2**30 < 2.5 * reach  # a limit far away would leave nothing of the bars
    if limit is not None and near:
        reach = max(reach, limit / 2**30)
    start = np.zeros(len(names))
    for part, colour in _PARTS.items():
        sizes = np.array([parts[part] for parts in needs.values()]) / 2**30
        label = "temporaries (activations, gradients)" if part == "temporaries" else part
        axes.barh(names, sizes, left=start, height=0.56, color=colour, edgecolor="white", linewidth=0.6, label=label)
        for at, size in enumerate(sizes):
            if size > reach / 14:
                ink = "white" if part == "trained" else _INK
                axes.text(start[at] + size / 2, at, f"{size:.3g}", ha="center", va="center", fontsize=8, color=ink)
        start += sizes
    for at, total in enumerate(totals):
        over = limit is not None and total > limit
        axes.text(
            total / 2**30 + 0.012 * reach, at, f"{total / 2**30:.3g} GiB" + (", too much" if over else ""), va="center", fontsize=9,
            color=_RED if over else _INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8}, zorder=4,
        )  # fmt: skip
    if limit is not None and near:
        label = f"limit, {limit / 2**30:.3g} GiB"
        axes.axvline(limit / 2**30, color=_RED, linewidth=1.2, linestyle=(0, (4, 2)), label=label, zorder=3)
    elif limit is not None:
        told = f"limit, {limit / 2**30:.3g} GiB, is {limit / max(totals):.0f} times as far \N{RIGHTWARDS ARROW}"
        axes.text(0.995, 1.02, told, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=_RED)
    axes.invert_yaxis()  # the first one on top
    axes.set_xlim(0, 1.2 * reach)
    axes.set_xlabel("Memory of one device (GiB)", color=_INK)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=10, parse_math=False)
    axes.grid(axis="x", color=_FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    figure.legend(
        loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, labelcolor=_INK, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip

    write_figure(png_path, figure)


def _draw_training(axes: Any, steps: Values, losses: Values) -> Values:
    """Draws the training losses; returns their trend."""
    finite = np.isfinite(losses)
    if broken := int((~finite).sum()):
        label = f"Not finite ({broken} step{'s' if broken > 1 else ''})"
        for n, step in enumerate(steps[~finite][:200]):
            axes.axvline(step, color=_RED, linewidth=0.9, alpha=0.6, label=label if n == 0 else None, zorder=0)
    if not finite.any():
        return losses[finite]
    at, low, mean, high = _thinned(steps[finite], losses[finite])
    if len(at) < 20:
        axes.plot(at, mean, color=_BLUE, linewidth=0.9, marker="o", markersize=3.5, label="Training")
        return mean
    if len(at) < finite.sum():
        axes.fill_between(at, low, high, color=_BLUE, alpha=0.22, linewidth=0, label="Training, each step")
    else:
        axes.plot(at, mean, color=_BLUE, alpha=0.3, linewidth=0.9, label="Training, each step")
    trend = _smoothed(mean)
    axes.plot(at, trend, color=_BLUE, linewidth=1.9, label="Training, smoothed")
    return trend


def _scale_losses(axes: Any, drawn: Values, trend: Values) -> bool:
    """Chooses the loss axis; true for a logarithmic one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not drawn.size:
        axes.set_yticks([])
        return False
    if drawn.min() <= 0 or trend.max() <= 10 * trend.min():
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if drawn.max() < 1000 * drawn.min() else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _scale_steps(axes: Any, steps: Values) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes.margins(x=0.02)
    if steps.min() == steps.max():
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    plain = FuncFormatter(lambda step, _: f"{step:,.0f}")
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if steps.max() >= 20_000 else plain)


def _column(rows: list[Row], name: str) -> tuple[Values, Values]:
    """(steps, values) of the rows that have the metric; a null is nan."""
    found = [(row["step"], math.nan if row[name] is None else row[name]) for row in rows if name in row]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def _thinned(steps: Values, values: Values) -> tuple[Values, ...]:
    """(steps, lowest, mean, highest) of equal groups of neighbours, so many that at most 2000 remain."""
    group = -(-len(steps) // _MOST_POINTS)
    starts = np.arange(0, len(steps), group)
    counts = np.diff([*starts, len(steps)])
    mean = np.add.reduceat(values, starts) / counts
    return (
        np.add.reduceat(steps, starts) / counts,
        np.minimum.reduceat(values, starts),
        mean,
        np.maximum.reduceat(values, starts),
    )


def _smoothed(values: Values) -> Values:
    """A Gaussian average of neighbours, a fiftieth of the run wide; it does not lag, and ends use what they have."""
    width = max(len(values) / 50, 1.0)
    reach = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    weights = np.exp(-0.5 * (reach / width) ** 2)
    middle = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(values, weights)[middle]
    return total / np.convolve(np.ones_like(values), weights)[middle]
