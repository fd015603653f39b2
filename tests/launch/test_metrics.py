"""The metrics file: every kill leaves a file that reads, and resuming leaves each step once."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.launch.files import write_whole
from jaxmethods.launch.metrics import MetricsFile, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def rows(*steps):
    return [{"step": step, "loss": 1 / step} for step in steps]


def write(path, *steps, **options):
    with MetricsFile(path, **options) as metrics:
        for row in rows(*steps):
            metrics.append(row)


def test_each_row_is_in_the_file_at_once(path):
    metrics = MetricsFile(path)
    for n in (1, 2, 3):
        metrics.append({"step": n, "loss": 1 / n})
        assert read(path) == rows(*range(1, n + 1))  # before any close
    assert path.read_text().count("\n") == 3
    metrics.close()


def test_nothing_is_touched_before_the_first_row(path):
    metrics = MetricsFile(path)
    metrics.cut_after(5)
    assert metrics.last() == {}
    assert not path.parent.exists()


@pytest.mark.parametrize("buffered", [False, True])
def test_a_resumed_run_goes_on_where_it_was_cut(path, buffered):
    write(path, 1, 2, 3, 4, 5, buffered=buffered)
    with MetricsFile(path, buffered=buffered) as metrics:
        metrics.cut_after(3)
        assert metrics.last() == rows(3)[0]
        for row in rows(4, 5, 6):
            metrics.append(row)
        assert metrics.last() == rows(6)[0]
    assert read(path) == rows(1, 2, 3, 4, 5, 6)
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_cutting_twice_or_far_away_changes_nothing(path):
    write(path, 1, 2, 3)
    for step, left in [(9, (1, 2, 3)), (2, (1, 2)), (2, (1, 2)), (0, ())]:
        MetricsFile(path).cut_after(step)
        assert read(path) == rows(*left)


def test_cutting_keeps_the_bytes_of_what_stays(path):
    write(path, 1, 2, 3)
    text = path.read_text().replace('"loss": 1.0', '"loss":   1.00')  # as another program may have written it
    path.write_text(text)
    MetricsFile(path).cut_after(2)
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:2])


def test_a_kill_anywhere_in_the_last_row_is_survived(path):
    write(path, 1, 2, 3)
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for end in (*range(second, len(whole) - 2, 4), *range(len(whole) - 2, len(whole) + 1)):
        complete = rows(1, 2, 3) if end >= len(whole) - 1 else rows(1, 2)  # a row without its line end is whole
        path.write_bytes(whole[:end])
        assert read(path) == complete
        write(path, 4)  # opening mends the line first
        assert read(path) == complete + rows(4)
        path.write_bytes(whole[:end])
        MetricsFile(path).cut_after(3)
        assert path.read_bytes() in (whole, whole[:second])


def test_zeros_at_the_end_as_a_lost_disk_cache_leaves_them_are_cut(path):
    write(path, 1, 2)
    with path.open("ab") as file:
        file.write(b"\0\0\xff\0")
    assert read(path) == rows(1, 2)
    write(path, 3)
    assert read(path) == rows(1, 2, 3)


def test_a_broken_line_elsewhere_is_named(path):
    write(path, 1, 2, 3)
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:9]
    path.write_text("\n".join(lines) + "\n")
    for act in (lambda: read(path), lambda: MetricsFile(path).cut_after(1), lambda: write(path, 4)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no JSON object"):
            act()
    path.write_text('{"step": 1}\n{"loss": 2.0}\n')
    with pytest.raises(ValueError, match="line 2 has step None"):
        read(path)


def test_no_file_is_an_error_that_names_it(path):
    with pytest.raises(FileNotFoundError, match=r"no metrics at .*metrics\.jsonl"):
        read(path)


def test_a_step_comes_once(path):
    write(path, 1, 2)
    metrics = MetricsFile(path)
    for step in (1, 2):
        with pytest.raises(ValueError, match=rf"already holds step 2, so step {step} cannot follow; call cut_after"):
            metrics.append({"step": step})
    for step in (None, 1.0, "3", True):
        with pytest.raises(ValueError, match="needs an integer `step`"):
            metrics.append({"step": step})
    assert read(path) == rows(1, 2)
    metrics.close()


def test_scalars_of_numpy_and_jax_become_plain_numbers(path):
    with MetricsFile(path) as metrics:
        metrics.append(
            {
                "step": np.int64(1),
                "loss": jnp.float32(0.1),
                "half": jnp.bfloat16(1.5),
                "ok": np.True_,
                "name": "x",
                "parts": {"a": np.float32(2), "b": [np.array(3), None]},
            }
        )
    assert read(path) == [
        {
            "step": 1,
            "loss": float(np.float32(0.1)),
            "half": 1.5,
            "ok": True,
            "name": "x",
            "parts": {"a": 2.0, "b": [3, None]},
        }
    ]
    with pytest.raises(ValueError, match="metric 'norms' is a ndarray"):
        MetricsFile(path).append({"step": 2, "norms": np.zeros(3)})


def test_what_is_not_finite_is_null_as_strict_json_wants(path):
    def refuse(constant):
        raise AssertionError(constant)

    with MetricsFile(path) as metrics:
        metrics.append({"step": 1, "loss": float("nan"), "norm": np.float32("inf"), "low": jnp.array(-jnp.inf)})
    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 1, "loss": None, "norm": None, "low": None}


def test_buffered_rows_appear_whole_with_each_sync(path):
    metrics = MetricsFile(path, buffered=True)
    for row in rows(1, 2):
        metrics.append(row)
    assert not path.exists()
    metrics.sync()
    assert read(path) == rows(1, 2)
    metrics.append(rows(3)[0])
    assert read(path) == rows(1, 2)
    metrics.close()
    assert read(path) == rows(1, 2, 3)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "picture.png"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["picture.png"]
