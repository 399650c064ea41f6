"""One process trains in a folder at a time, and ends after a step when it is asked to."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lm.errors import UserError
from lm.sharding import processes


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which is made if need be. The system frees the lock when the process dies.

    Raises `UserError` when another process holds the lock, or when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e}); valid: another --workdir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another process is training here; valid: wait for it, or another folder"
            ) from None
        yield


@contextlib.contextmanager
def terminations() -> Iterator[Callable[[], bool]]:
    """A function that says whether the run is to end after the present step: SIGTERM has come since the context began.

    Several processes agree on the step. Outside the main thread, which alone gets signals, the answer is always False.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield processes.asked_to_stop if jax.process_count() > 1 else lambda: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
