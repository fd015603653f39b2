"""What a person sees of a run: on a terminal, in a log file, and when nobody reads."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from jaxmethods.launch import progress
from jaxmethods.launch.progress import Memory, Progress, announce, peak_memory, tolerant


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def log(width=80):
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def terminal(width=110):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def text_of(console):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def run(console, steps, seconds, clock, start=0, **options):
    with Progress(start + steps, start=start, console=console, clock=clock, devices=(), **options) as bar:
        for step in range(start + 1, start + steps + 1):
            clock.now += seconds
            bar.update(step, {"step": step, "loss": 1 / step, "tokens_per_second": 12_345.6})
    return bar


# In a log.


def test_a_log_gets_the_first_line_the_last_and_one_every_ten_seconds():
    console = log()
    run(console, 35, 1.0, Clock())
    lines = text_of(console).splitlines()
    assert [int(re.match(r"step +(\d+)/35", line)[1]) for line in lines] == [1, 11, 21, 31, 35]
    assert lines[1].startswith("step 11/35  loss 0.0909  12.3k tokens/s  24 s left  peak ")
    assert "left" not in lines[0] and "left" not in lines[-1]  # one step gives no pace yet


def test_a_log_may_count_steps_instead():
    console = log()
    run(console, 35, 1.0, Clock(), every_steps=20)
    assert re.findall(r"step +(\d+)/", text_of(console)) == ["1", "20", "35"]


def test_an_interrupted_run_ends_with_its_last_step():
    console, clock = log(), Clock()
    with pytest.raises(KeyboardInterrupt), Progress(99, console=console, clock=clock, devices=()) as bar:
        for step in (1, 2, 3):
            bar.update(step, {"loss": 1.0})
        raise KeyboardInterrupt
    assert re.findall(r"step +(\d+)/", text_of(console)) == ["1", "3"]


def test_lines_are_neither_wrapped_nor_read_as_markup():
    console = log(width=20)
    with Progress(5, console=console, devices=()) as bar:
        bar.say("saved [bold]checkpoints/3[/bold] after a step that was long")
    announce(console, "a title that is longer than twenty", {"model": "tiny [B, T]", "data": "x" * 40})
    assert text_of(console).splitlines() == [
        "saved [bold]checkpoints/3[/bold] after a step that was long",
        "a title that is longer than twenty",
        "  model  tiny [B, T]",
        f"  data   {'x' * 40}",
    ]


def test_only_the_main_process_speaks(capsys):
    bar = run(None, 5, 1.0, Clock(), main=False)
    bar.say("hello")
    assert capsys.readouterr() == ("", "")


# Numbers in the line.


def test_time_left_follows_recent_steps_and_leaves_out_the_first():
    clock = Clock()
    bar = Progress(1000, start=400, console=log(), clock=clock, devices=())
    clock.now += 500  # compiles
    bar.update(401, {})
    assert bar.seconds_left() is None
    for step in range(402, 501):
        clock.now += 2.0
        bar.update(step, {})
    assert bar.seconds_left() == pytest.approx(500 * 2.0)
    for step in range(501, 600):
        clock.now += 1.0
        bar.update(step, {})
    assert bar.seconds_left() == pytest.approx(401 * 1.0)
    clock.now += 5.0  # while the next step runs
    assert bar.seconds_left() == pytest.approx(401 - 5.0)
    clock.now += 5000.0
    assert bar.seconds_left() == 0.0


def test_a_line_shows_what_there_is():
    bar = Progress(100, console=log(), devices=())
    assert bar.text() == "step   0/100  the first step compiles"
    bar.update(1, {"reward": 3.0})
    assert bar.text().startswith("step   1/100  peak")
    bar.update(2, {"loss": 0.00012, "evaluation_loss": 2.5})
    bar.update(3, {"loss": float("nan")})
    assert bar.text().startswith("step   3/100  loss not finite  evaluation 2.5000")  # the latest evaluation stays
    bar.update(4, {"loss": 0.00012})
    assert "loss 1.20e-04" in bar.text()
    bar.update(5, {"loss": None})  # as read back from a metrics file
    assert "loss not finite" in bar.text()


# On a terminal.


def test_a_terminal_gets_one_moving_line_and_what_is_said_above_it():
    console, clock = terminal(), Clock()
    with Progress(4, console=console, clock=clock, devices=()) as bar:
        for step in (1, 2, 3, 4):
            clock.now += 60
            bar.update(step, {"loss": 0.5})
            if step == 2:
                bar.say("saved [2]")
    shown = text_of(console)
    assert shown.count("saved [2]") == 1
    assert shown.index("saved [2]") < shown.rindex("step 4/4  loss 0.5000")
    assert "\x1b[?25l" in console.file.getvalue() and console.file.getvalue().rstrip().endswith("\x1b[?25h")  # cursor


@pytest.mark.parametrize("width", [20, 60, 200])
def test_the_moving_line_fits_any_terminal(width):
    console, clock = terminal(width), Clock()
    bar = Progress(1000, console=console, clock=clock, devices=())
    bar.update(1, {"loss": 0.5, "tokens_per_second": 1e6, "evaluation_loss": 0.25})
    console.file.seek(0)
    console.file.truncate()
    console.print(progress._Line(bar))
    (line,) = text_of(console).splitlines()
    assert len(line) <= width
    assert ("step    1/1000" in line) == (width > 14)


def test_a_terminal_is_freed_after_an_error():
    console = terminal()
    with pytest.raises(RuntimeError), Progress(9, console=console, devices=()) as bar:
        bar.update(1, {"loss": 1.0})
        raise RuntimeError
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_terminal_announces_in_a_frame():
    console = terminal(60)
    announce(console, "starts", {"model": "tiny [B, T]", "data": "many words " * 12})
    lines = text_of(console).splitlines()
    assert "starts" in lines[0] and "tiny [B, T]" in lines[1]
    assert all(len(line) <= 60 for line in lines)


# When nobody reads.


def long_run(console):
    announce(console, "starts", {"model": "tiny"})
    with Progress(99, console=console, every_steps=1, devices=()) as bar:
        for step in range(1, 100):
            bar.update(step, {"loss": 1.0})
            bar.say("x" * 400)


@pytest.mark.parametrize("kind", ["log", "terminal"])
@pytest.mark.parametrize("end", ["nobody reads", "a full disk", "no stream"])
def test_a_stream_that_fails_stops_nothing(kind, end):
    options = {"force_terminal": kind == "terminal"}
    if end == "no stream":  # as under `>&-`
        with contextlib.redirect_stdout(None):
            long_run(Console(**options))
        return
    target: str | int = "/dev/full"
    if end == "nobody reads":
        reader, target = os.pipe()
        os.close(reader)
    with contextlib.suppress(OSError), open(target, "w") as stream:  # closing writes what is still held
        long_run(Console(file=stream, **options))
        options["ended"] = True
    assert options["ended"]


def test_a_program_whose_reader_goes_away_ends_well():
    here = pathlib.Path(progress.__file__)
    load = "import importlib.util as u, sys; s = u.spec_from_file_location('p', sys.argv[1]); p = u.module_from_spec(s)"
    code = f"{load}; sys.modules['p'] = p; s.loader.exec_module(p)\n"
    code += "from rich.console import Console\nbar = p.Progress(9, console=Console())\n"
    code += "for step in range(400): bar.say('x' * 400)\nprint('out')\nprint('done', file=sys.stderr)"
    command = ["bash", "-o", "pipefail", "-c", '"$0" -W error -c "$1" "$2" | head -n 1', sys.executable, code, here]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x" * 400 + "\n", "done\n")


def test_a_closed_or_narrow_stream_raises_nothing():
    console = log()
    with Progress(3, console=console, devices=()) as bar:
        console.file.close()
        bar.update(1, {"loss": 1.0})
        bar.say("hello")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    announce(Console(file=stream, force_terminal=False), "naïve", {})
    stream.flush()
    assert stream.buffer.getvalue() == b"na?ve\n"


def test_making_a_console_tolerant_twice_changes_nothing():
    console = log()
    file = tolerant(console).file
    assert tolerant(console).file is file


# Memory.


def test_the_process_has_a_peak_and_a_cpu_device_has_none():
    memory = peak_memory(jax.local_devices())
    assert memory.device is None and memory.limit is None
    assert 10 * 2**20 < memory.host < 2**40


def test_the_peak_stays_when_memory_is_given_back():
    """In a process of its own, whose parent held more: that does not count."""
    code = """if True:
        from jaxmethods.launch.progress import peak_memory
        before = peak_memory(()).host
        held = bytearray(300 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        del held
        print(before, peak_memory(()).host)"""
    command = [sys.executable, "-c", code]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert before + 290 * 2**20 < after < before + 350 * 2**20


def test_device_memory_is_shown_before_the_host_s():
    bar = Progress(9, console=log(), devices=())
    bar.update(1, {})
    bar._memory = Memory(2**30, 60 * 2**30, 80 * 2**30)
    assert bar.text().endswith("peak 60.0 GiB of 80.0 GiB")
    bar._memory = Memory(2**30, None, None)
    assert bar.text().endswith("peak 1.0 GiB")


def test_numbers_keep_their_width():
    assert [progress.number(n) for n in (0, 7, 0.25, 999, 1000, 99_950, 123_456, 2.5e12)] == [
        "0", "7", "0.25", "999", "1.00k", "100.0k", "123k", "2.50T",
    ]  # fmt: skip
    assert [progress.duration(s) for s in (0, 59.4, 59.6, 3599, 3600, 86_400)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "1 d 00 h",
    ]  # fmt: skip
