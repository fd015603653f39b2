"""What a person watches: what a run is about to do, then one line that says how it goes.

On a terminal the line stays in place and moves; in a log file it becomes a plain line now and then. A reader that
went away (`| head`, a closed terminal) never stops a run.

>>> from rich.console import Console
>>> console = Console(width=60)
>>> announce(console, "starts", {"model": "tiny", "devices": "8 x cpu"})
starts
  model    tiny
  devices  8 x cpu
>>> with Progress(2, console=console, devices=()) as bar:
...     bar.say("hello")
hello
"""

from __future__ import annotations

import math
import os
import pathlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, cast

import jax
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


def announce(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Prints once what will happen: a title, then names and values; framed on a terminal."""
    tolerant(console)
    if not console.is_terminal:
        width = max(map(len, rows), default=0)
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
        _print(console, "\n".join(lines))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(Panel(table, title=Text(title, style="bold"), title_align="left", expand=False, border_style="dim"))


class Progress:
    """The line that says how a run goes: step, loss, tokens a second, time left, peak memory.

    Use as a context manager around the loop. Nothing is printed where `main` is false, as it is on all processes
    but the first. On a terminal the line moves in place; elsewhere a plain line is printed for the first step, the
    last one, and between them when `every_seconds` have passed (or, with `every_steps`, at its multiples).
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        console: Console | None = None,
        main: bool = True,
        every_seconds: float | int = 10.0,
        every_steps: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total: the step the run ends with.
            start: the step it goes on from.
            devices: whose memory is watched; None: the local ones.
            clock: seconds, for rate and time left.
        """
        self.total, self.step = total, start
        self._console = tolerant(console or Console()) if main else Console(quiet=True)
        self._moving = main and self._console.is_terminal and not self._console.is_dumb_terminal
        self._main, self._clock, self._devices = main, clock, devices
        self._every_seconds, self._every_steps = every_seconds, every_steps
        self._pace: deque[tuple[float, int]] = deque(maxlen=64)  # (when, step): the rate follows recent steps
        self._metrics: dict[str, Any] = {}
        self._memory = Memory(None, None, None)
        self._printed_at, self._printed_step = -math.inf, start
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._moving:
            self._live = Live(_Line(self), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._main and self.step != self._printed_step:
            self._print_line()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows a finished step. Of `metrics` (numbers on the host) it reads `loss`, `evaluation_loss`,
        `tokens_per_second` and `mfu`, each where present."""
        if not self._main:
            return
        self.step = step
        self._pace.append((self._clock(), step))
        self._metrics.update({name: metrics[name] for name in _SHOWN if name in metrics})
        if self._live is not None:
            self._memory = peak_memory(self._devices)
        elif self._is_due(step):
            self._print_line()

    def say(self, text: str) -> None:
        """Prints a line of its own, above the moving one."""
        if self._main:
            _print(self._console, text)

    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the recent ones; None until two steps are done."""
        if len(self._pace) < 2 or self._pace[-1][1] <= self._pace[0][1]:
            return None
        (first, from_step), (last, to_step) = self._pace[0], self._pace[-1]
        left = (self.total - to_step) * (last - first) / (to_step - from_step) - (self._clock() - last)
        return max(left, 0.0)

    def text(self) -> str:
        """The line as it stands, in ASCII."""
        parts = [f"step {self.step:{len(str(self.total))}d}/{self.total}"]
        if "loss" in self._metrics:
            parts.append(f"loss {_loss(self._metrics['loss'])}")
        if "evaluation_loss" in self._metrics:
            parts.append(f"evaluation {_loss(self._metrics['evaluation_loss'])}")
        if (rate := self._metrics.get("tokens_per_second")) is not None:
            parts.append(f"{number(rate)} tokens/s")
        if (share := self._metrics.get("mfu")) is not None:
            parts.append(f"{share:.0%} of peak")
        if (left := self.seconds_left()) is not None and self.step < self.total:
            parts.append(f"{duration(left)} left")
        if not self._pace:
            parts.append("the first step compiles")
        if self._memory.device is not None:
            limit = f" of {size(self._memory.limit)}" if self._memory.limit else ""
            parts.append(f"peak {size(self._memory.device)}{limit}")
        elif self._memory.host is not None:
            parts.append(f"peak {size(self._memory.host)}")
        return "  ".join(parts)

    def _is_due(self, step: int) -> bool:
        if step >= self.total or self._printed_at == -math.inf:
            return True
        if self._every_steps is not None:
            return step % self._every_steps == 0
        return self._clock() - self._printed_at >= self._every_seconds

    def _print_line(self) -> None:
        self._memory = peak_memory(self._devices)
        self._printed_at, self._printed_step = self._clock(), self.step
        _print(self._console, self.text())


_SHOWN = ("loss", "evaluation_loss", "tokens_per_second", "mfu")


class _Line:
    """The moving line: a bar where there is room, and the text."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        text = Text(self._progress.text(), no_wrap=True, overflow="ellipsis")
        room = options.max_width - text.cell_len - 2
        if room < 8:
            yield text
            return
        row = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=max(self._progress.total, 1), completed=self._progress.step, width=min(room, 24))
        row.add_row(bar, text)
        yield row


class Memory(NamedTuple):
    """Bytes; None where it cannot be told. The fullest device stands for all."""

    host: int | None
    """The most this process ever held in main memory (its peak resident set)."""
    device: int | None
    """The most a device ever held, as its allocator counts."""
    limit: int | None
    """What that device can hold."""


def peak_memory(devices: Sequence[jax.Device] | None = None) -> Memory:
    """Peak memory of this process and of its devices (None: the local ones); a CPU device has no count of its own."""
    host = _host_peak()
    stats = [device.memory_stats() or {} for device in (jax.local_devices() if devices is None else devices)]
    peaks = [(s["peak_bytes_in_use"], s.get("bytes_limit")) for s in stats if "peak_bytes_in_use" in s]
    device, limit = max(peaks, key=lambda peak: peak[0], default=(None, None))
    return Memory(host, device, limit)


def _host_peak() -> int | None:
    try:  # getrusage would also count what the parent held when it started this process
        status = pathlib.Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, others in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def number(value: float | int) -> str:
    """A count, in at most four figures.

    >>> number(950), number(12_345), number(8_030_261_248)
    ('950', '12.3k', '8.03B')
    """
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{letter}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.2f}"


def size(count: float | int) -> str:
    """Bytes, in binary units.

    >>> size(5_500_000_000), size(300 * 2**20)
    ('5.1 GiB', '300 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float | int) -> str:
    """A time, in its two largest units.

    >>> duration(42), duration(250), duration(3_900), duration(200_000)
    ('42 s', '4 min 10 s', '1 h 05 min', '2 d 07 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def tolerant(console: Console) -> Console:
    """The console, which from now on drops what it cannot write instead of raising."""
    if not isinstance(console.file, _Tolerant):
        console.file = cast(IO[str], _Tolerant(console.file))
    return console


class _Tolerant:
    """A text stream whose reader may go away."""

    def __init__(self, file: Any) -> None:
        self._stream = file
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text), text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], Any], text: str) -> None:
        try:
            act()
        except UnicodeEncodeError:  # an ASCII stream, as under LANG=C
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._try(lambda: self._stream.write(text.encode(encoding, "replace").decode(encoding)), "")
        except BrokenPipeError:
            self._send_to_nowhere()
        except (OSError, ValueError):  # a full disk; a closed file
            pass

    def _send_to_nowhere(self) -> None:
        """Points the stream's descriptor to the null device, so that the interpreter's last flush is quiet too."""
        with self._lock:
            try:
                descriptor = self._stream.fileno()
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
            except (OSError, ValueError):
                pass


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _loss(value: Any) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"
