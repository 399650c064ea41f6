"""Several processes, one program: how they find each other, speak, and end together.

Every process runs the same command, and JAX's runtime (`jax.distributed`) joins their devices into one mesh. Process 0
writes logs, tables and ledgers; all write their parts of checkpoints, into a folder that all of them see. A process
that dies ends the others: at once where a collective notices, else after the heartbeat's timeout.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lm import compat
from lm.errors import TrainingStopped, UserError, shown

HEARTBEAT = 100  # seconds of silence after which a process counts as dead; JAX's own default
LONG = 7 * 24 * 3600  # seconds: as long as process 0 may measure while the others wait for the next training
GRACE = 3.0  # seconds that process 0, whose end ends all, leaves the others to say what is wrong with them
_LOST = re.compile(
    r"gloo|nccl|\bpeer\b|connection|coordinat|heartbeat|barrier|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.I
)
_meetings, _calls = itertools.count(), itertools.count(1)
_joined: list[int] = []  # this process's number, once the others have been met


class Lost(TrainingStopped):
    """Another process of the run is gone; what was saved is good."""


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, heartbeat: int = HEARTBEAT
) -> int:
    """Joins the other processes, before any array exists, and returns how many there are; 1 = alone, nothing is done.

    The three arguments together (`coordinator` is ``HOST:PORT`` of process 0), or what the machine says: a Slurm step
    of several tasks, a TPU pod. `processes` = 1 is alone whatever the machine says. Raises `UserError` for arguments
    that do not fit together, and when the others cannot be reached.
    """
    options = check(coordinator, processes, process, heartbeat)
    if options is None:
        options = _slurm() if processes is None else None
    if options is None:
        options = {} if processes is None and _tpu_pod() else None
    if options is None:
        return 1
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat, **options)
    except (RuntimeError, ValueError, OSError) as e:
        where = options.get("coordinator_address", "the coordinator")
        raise UserError(
            f"--coordinator: {where} does not bring the processes together ({_first_line(e)}); valid: an address of "
            "process 0 that every host reaches, a free port there, and the same command everywhere"
        ) from None
    n = jax.process_count()  # starts the backend, for which the processes wait for each other
    _joined.append(jax.process_index())
    return n


def check(coordinator: str | None, processes: int | None, process: int | None, heartbeat: int) -> dict[str, Any] | None:
    """What the four arguments of `start` say, None where they leave it to the machine; nothing is started."""
    if not 5 <= heartbeat <= 10**6:
        raise UserError(f"--heartbeat: must be at least 5 seconds and at most 1,000,000, found {heartbeat}")
    return _explicit(coordinator, processes, process)


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> dict[str, Any] | None:
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if processes is not None and processes < 1:
        raise UserError(f"--processes: must be at least 1, found {processes}")
    if processes == 1 and process in (None, 0):
        return None
    if all(v is None for v in given.values()):
        return None
    missing = [name for name, v in given.items() if v is None]
    if missing:
        raise UserError(
            f"{missing[0]}: is missing beside {', '.join(n for n, v in given.items() if v is not None)}; valid: "
            "--coordinator=HOST:PORT --processes=N --process=I, or none of them"
        )
    assert coordinator is not None and processes is not None and process is not None
    if not 0 <= process < processes:
        raise UserError(f"--process: found {process}; valid: 0 to {processes - 1} (--processes={processes})")
    host, colon, port = coordinator.rpartition(":")
    if not (colon and host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise UserError(f"--coordinator: found {shown(coordinator)}; valid: HOST:PORT, the port from 1 to 65535")
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _slurm() -> dict[str, Any] | None:
    """A task of a step with several; a batch script by itself, and `salloc`'s shell, are no steps."""
    known = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in os.environ for name in known) or os.environ["SLURM_NTASKS"] == "1":
        return None
    return {"cluster_detection_method": "slurm"}


def _tpu_pod() -> bool:
    """Whether this machine has TPUs; JAX then knows how many hosts there are, which may be one."""
    return compat.on_tpu_vm() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def meet(seconds: float = LONG) -> None:
    """Waits until every process is here. The hosts speak, not the devices: the wait may be long."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=f"meet-{next(_meetings)}", timeout_ms=int(seconds * 1000))


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Process 0 does it, then the others: they find the files that it has written."""
    if jax.process_index() != 0:
        meet()
    yield
    if jax.process_index() == 0:
        meet()


def everyones(text: str) -> list[str]:
    """The texts of all processes, in their order; 400 bytes of each."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    raw = np.zeros(400, np.uint8)
    data = text.encode()[:400]
    raw[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(raw))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def shared(value: Any) -> Any:
    """Process 0's value (JSON-ready) in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    n = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    raw = np.zeros(n, np.uint8)
    if jax.process_index() == 0:
        raw[:] = data
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(raw))).decode())


def local(tree: Any) -> Any:
    """A tree of arrays over all processes as process 0's own arrays, None elsewhere; leaf by leaf, so that a device
    holds one of them whole at a time. Alone: the tree itself."""
    if jax.process_count() == 1:
        return tree

    def one(x: jax.Array) -> Any:
        assert isinstance(x.sharding, jax.sharding.NamedSharding)
        everywhere = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
        whole = jax.jit(lambda y: y, out_shardings=everywhere)(x)
        return np.asarray(whole.addressable_data(0)) if jax.process_index() == 0 else None

    found = jax.tree.map(one, tree)
    return jax.tree.map(jax.numpy.asarray, found) if jax.process_index() == 0 else None


def asked_to_stop() -> bool:
    """Whether all processes stop after this step, because one of them received SIGTERM: JAX's runtime, which then
    handles that signal, has them agree on a call of this function. To be called by all at every step."""
    from jax.experimental import multihost_utils

    # Calls are counted from 1 over the life of the process, and not by the run's steps: after a signal that comes
    # before the first one the runtime waits for number 1, and no other.
    return bool(multihost_utils.reached_preemption_sync_point(next(_calls)))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raises `Lost` for the errors that collectives end in when another process is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        if jax.process_count() == 1 or not _LOST.search(str(e)):
            raise
        raise Lost(
            f"process {jax.process_index()} of {jax.process_count()}: another process is gone ({_first_line(e)}); what "
            "was saved is good, and the same command on every host goes on from there"
        ) from e


def leave(code: int) -> int:
    """To be called last, with the exit code: where it is not 0 in a run of several processes, this one ends here and
    now, without waiting for the others, who may wait for it."""
    if code and jax.distributed.is_initialized():
        _exit(code)
    return code


def unexpected() -> None:
    """In an ``except`` block: prints the traceback and ends the process, if others might wait for it."""
    if jax.distributed.is_initialized():
        traceback.print_exc()
        _exit(1)


def _exit(code: int) -> None:
    if _joined == [0]:
        time.sleep(GRACE)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines or [type(e).__name__])[0][:200]
