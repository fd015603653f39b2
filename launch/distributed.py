"""Several processes as one run: how they find each other, and how none waits for one that failed.

JAX does the work (`jax.distributed`): it reads what SLURM, Open MPI, Kubernetes or Cloud TPU have set, or is told a coordinator;
it notices dead processes, and carries a notice of preemption to all. Nothing here starts processes: schedulers do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30
"""A process that was silent for so long counts as dead, and the runtime ends the others. JAX's own 100 s would let them wait for
longer than a restart takes."""

LEAVING_SECONDS = 20
"""How long a process that ends waits for the others to end too. They leave a good run together; who failed alone need not wait."""


class OthersFailed(RuntimeError):
    """This process is well, and another one is not."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process finds the others. All three None: by JAX's cluster detection.

    Args:
        coordinator: HOST:PORT where process 0 listens.
        count: of all processes.
        index: of this process, 0 <= index < count.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        given = {"--coordinator": self.coordinator, "--processes": self.count, "--process": self.index}
        missing = [flag for flag, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if missing:
            present = ", ".join(flag for flag in given if flag not in missing)
            raise ValueError(
                f"{present} without {', '.join(missing)}: name all of --coordinator HOST:PORT --processes N --process I, or "
                "give --distributed alone where a cluster can be detected."
            )
        assert self.coordinator is not None and self.count is not None and self.index is not None
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator {self.coordinator} is not HOST:PORT, as in 10.0.0.1:8476.")
        if self.count < 1:
            raise ValueError(f"--processes {self.count} must be at least 1.")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"--process {self.index} is none of --processes {self.count}; they are numbered 0 to {self.count - 1}."
            )


def join(processes: Processes) -> None:
    """Connects this process with the others; comes before anything that touches a device.

    From here on SIGTERM is a notice of preemption, which the runtime takes: `jax.experimental.multihost_utils
    .reached_preemption_sync_point` tells every process where to stop. A handler of Python's for SIGTERM would hide it.
    Where the others do not come within five minutes, the runtime aborts.

    Raises:
        ValueError: no cluster was detected.
        ConnectionError: a detected cluster lacks what JAX needs to ask it, or devices were touched before.
    """
    told = processes.coordinator is not None
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            cluster_detection_method="deactivate" if told else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVING_SECONDS,
        )
    except ValueError as error:
        if told:
            raise
        raise ValueError(
            f"--distributed found no cluster of SLURM, Open MPI, Kubernetes or Cloud TPU here ({error}); name the processes "
            "instead: --coordinator HOST:PORT --processes N --process I."
        ) from error
    except RuntimeError as error:
        raise ConnectionError(f"this process was not joined with the others: {error}") from error


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """A block that all processes leave well, or all by an exception, so that none waits for one that failed in it.

    Every process must come to it. What this process raises comes out as it is.

    Args:
        doing: what is done in the block, for the message to the others.

    Raises:
        OthersFailed: the block went well here and not elsewhere; the message names the processes.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    everywhere = multihost_utils.process_allgather(np.array(failure is not None))
    if failure is not None:
        raise failure
    if everywhere.any():
        failed = ", ".join(map(str, np.flatnonzero(everywhere)))
        raise OthersFailed(f"process {failed} failed while {doing}, and says why in its own output; all of them end.")


def label() -> str:
    """Which process this is, for a message; nothing where there is one."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return ""
    return f" [process {jax.process_index()} of {jax.process_count()}]"
