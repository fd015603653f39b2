"""The picture of losses: drawn for every run there can be, and showing what the file says."""

import os
import sys

import matplotlib.image
import numpy as np
import pytest

from jaxmethods.launch import plot
from jaxmethods.launch.metrics import MetricsFile

BLUE, ORANGE = ([int(code[n : n + 2], 16) for n in (1, 3, 5)] for code in (plot._BLUE, plot._ORANGE))


def draw(folder, rows, **options):
    """The picture as integers [height, width, 3]."""
    with MetricsFile(folder / "metrics.jsonl", buffered=True) as metrics:
        for row in rows:
            metrics.append(row)
    plot.draw_losses(folder / "metrics.jsonl", folder / "loss.png", **options)
    assert sorted(os.listdir(folder)) == ["loss.png", "metrics.jsonl"]
    return np.rint(matplotlib.image.imread(folder / "loss.png")[..., :3] * 255).astype(int)


def where(picture, colour):
    """(rows, columns) of the pixels in a colour, left of the legend."""
    close = np.abs(picture - colour).max(-1) <= 6
    return np.nonzero(close[:, :850])


def test_a_falling_loss_falls_in_the_picture(tmp_path):
    steps = np.arange(1, 301)
    picture = draw(tmp_path, [{"step": int(n), "loss": 3 - n / 150} for n in steps], title="run_1 of $x$")
    assert picture.shape == (675, 1200, 3)
    height, column = where(picture, BLUE)
    assert np.corrcoef(height, column)[0, 1] > 0.99  # down the page, to the right
    assert len(where(picture, ORANGE)[0]) == 0


def test_evaluations_are_points_above_the_training_loss(tmp_path):
    rows = [{"step": n, "loss": 1.0} | ({"evaluation_loss": 2.0} if n % 10 == 0 else {}) for n in range(1, 41)]
    picture = draw(tmp_path, rows)
    assert where(picture, ORANGE)[0].max() < where(picture, BLUE)[0].min()


def test_a_loss_that_was_not_finite_is_marked_at_its_step(tmp_path):
    rows = [{"step": n, "loss": float("nan") if n == 25 else 2.0} for n in range(1, 101)]
    picture = draw(tmp_path, rows)
    red = picture[..., 0] - picture[..., 1:].max(-1) > 40
    columns = np.nonzero(red[:, :850])[1]
    assert columns.max() - columns.min() <= 3
    blue = np.nonzero(np.abs(picture - BLUE).max(-1)[200:] <= 6)[1]  # below the legend
    first, last = blue.min(), blue.max()
    assert (columns.mean() - first) / (last - first) == pytest.approx(24 / 99, abs=0.02)


@pytest.mark.parametrize(
    "losses",
    [
        [2.0],
        [2.0, 1.0],
        [float("nan")] * 3,
        [0.0] * 30,
        [-1.0, 5.0] * 30,
        list(np.geomspace(10, 1e-6, 200)),
        [1e30, 1e-30] * 20,
        list(np.linspace(3, 1, 5001)),
    ],
    ids=["one", "two", "no finite", "zero", "negative", "decades", "extremes", "thinned"],
)
def test_every_run_can_be_drawn(tmp_path, losses):
    draw(tmp_path, [{"step": n, "loss": float(loss)} for n, loss in enumerate(losses, 1)])


def test_a_file_with_evaluations_alone_can_be_drawn(tmp_path):
    draw(tmp_path, [{"step": 0, "evaluation_loss": 2.0}, {"step": 1}])


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no `loss`"):
        draw(tmp_path, [{"step": 1, "reward": 2.0}])
    with pytest.raises(FileNotFoundError, match="no metrics at"):
        plot.draw_losses(tmp_path / "absent.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_thinning_keeps_extremes_and_mean():
    values = np.random.default_rng(0).normal(size=4321)
    steps = np.arange(4321.0)
    at, low, mean, high = plot._thinned(steps, values)
    assert len(at) <= plot._MOST_POINTS
    assert low.min() == values.min() and high.max() == values.max()
    groups = [values[i : i + 3] for i in range(0, 4321, 3)]
    np.testing.assert_allclose(mean, [group.mean() for group in groups])
    np.testing.assert_allclose(at[:2], [1, 4])
    assert all(np.array_equal(x, values[:50]) for x in plot._thinned(steps[:50], values[:50])[1:])


def test_smoothing_keeps_constants_and_the_middle_of_lines():
    np.testing.assert_allclose(plot._smoothed(np.full(80, 2.5)), 2.5)
    line = np.arange(200.0)
    np.testing.assert_allclose(plot._smoothed(line)[20:-20], line[20:-20])
    noise = np.random.default_rng(0).normal(size=1000)
    assert plot._smoothed(noise).std() < 0.2


def test_memory_is_drawn_in_proportion(tmp_path):
    """Each part's width is to the others' as its bytes, and the limit stands where its bytes end."""
    gib = 2**30
    needs = {
        "one": {"frozen": 2 * gib, "trained": 1 * gib, "optimizer": 3 * gib, "temporaries": 4 * gib},
        "two": {"frozen": 2 * gib, "trained": 0, "optimizer": 0, "temporaries": 1 * gib},
    }
    plot.draw_memory(needs, tmp_path / "memory.png", limit=8 * gib)
    picture = np.rint(matplotlib.image.imread(tmp_path / "memory.png")[..., :3] * 255).astype(int)
    bars = picture[: int(picture.shape[0] * 0.7)]  # above the legend

    def columns(colour, line):
        code = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
        return np.nonzero(np.abs(bars[line] - code).max(-1) <= 6)[0]

    kept = [line for line in range(len(bars)) if len(columns(plot._PARTS["frozen"], line)) > 100]
    first, second = kept[3], kept[-3]  # near a bar's edge, where no number is written
    start = columns(plot._PARTS["frozen"], first).min()
    width = {part: np.ptp(columns(colour, first)) for part, colour in plot._PARTS.items()}
    scale = width["temporaries"] / 4
    for part, size in {"frozen": 2, "trained": 1, "optimizer": 3}.items():
        assert width[part] == pytest.approx(size * scale, abs=4)
    assert np.ptp(columns(plot._PARTS["temporaries"], second)) == pytest.approx(scale, abs=4)
    assert len(columns(plot._PARTS["optimizer"], second)) == 0
    line = columns(plot._RED, (first + second) // 2)  # between the bars
    assert line.mean() - start == pytest.approx(8 * scale, abs=8)


def test_a_limit_far_away_leaves_the_bars_their_room(tmp_path):
    parts = {"frozen": 2**20, "trained": 2**20, "optimizer": 2**20, "temporaries": 2**21}
    for limit, name in ((2**37, "far"), (None, "none")):
        plot.draw_memory({"a": parts}, tmp_path / f"{name}.png", limit=limit, title="a_run of $x$")
        picture = np.rint(matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] * 255).astype(int)
        code = [int(plot._PARTS["temporaries"][n : n + 2], 16) for n in (1, 3, 5)]
        assert (np.abs(picture - code).max(-1) <= 6).any(0).sum() > 300


def test_neither_pyplot_nor_a_display_is_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import raises
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    draw(tmp_path, [{"step": 1, "loss": 2.0}])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
