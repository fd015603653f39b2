"""What the benchmarks share: a measurement as a process of its own. Standard library only, so that it adds no memory."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run(script: str, arguments: Sequence[str], threads: int, environment: Mapping[str, str], *, lane: int = 0) -> Any:
    """Runs a script on `threads` cores of the CPU, offline; what its last line says in JSON.

    Runs at the same time each take a lane, so that they do not share cores.
    """
    settings = {
        "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    line = [sys.executable, script, *arguments]
    if hasattr(os, "sched_setaffinity"):
        line = ["taskset", "-c", f"{lane * threads}-{(lane + 1) * threads - 1}", *line]
    done = subprocess.run(line, env=os.environ | settings | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """The largest resident size of this process. (On Linux getrusage also counts what its parent was before.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def machine() -> str:
    """The GPU that JAX would take, or else the processor."""
    if os.environ.get("JAX_PLATFORMS", "cuda") != "cpu" and shutil.which("nvidia-smi"):
        line = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(line, capture_output=True, text=True, check=False).stdout.split("\n")
        if names[0]:
            return f"one {names[0].strip()}"
    return cpu()


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
