"""Orbax says what fails in an exception; its threads and its event loops say it again, in hundreds of lines.

A read or a write that fails in one of many arrays leaves the others under way: their threads report that the event loop
is closed, coroutines that nobody waits for are told by the interpreter, and the library logs the traceback of the error
that it raises. None of this says more than the exception does.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from types import CoroutineType, TracebackType

LIBRARIES = ("orbax", "tensorstore")
CLOSED = "Event loop is closed"

_installed = False


def quiet() -> None:
    """From now on this process is silent about what a checkpoint's exception says already. Other threads' errors and
    other unraisable ones are told as before."""
    global _installed
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # a line per save and thread, and tracebacks, otherwise
    if _installed:
        return
    _installed = True
    thread, unraisable, uncaught = threading.excepthook, sys.unraisablehook, sys.excepthook

    def in_thread(found: threading.ExceptHookArgs) -> None:
        if not _theirs(found.exc_value, found.exc_traceback):
            thread(found)

    def not_raised(found: sys.UnraisableHookArgs) -> None:
        if not (_theirs(found.exc_value, found.exc_traceback) or _coroutine(found.object)):
            unraisable(found)

    def not_caught(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        """Threads that Python did not start come here."""
        if threading.current_thread() is threading.main_thread() or not _theirs(value, trace):
            uncaught(kind, value, trace)

    def logged(record: logging.LogRecord) -> bool:
        """Tasks that failed and that nobody waits for; those of tensorstore, which is no Python, have no traceback."""
        return not (record.exc_info and (record.exc_info[2] is None or _theirs(record.exc_info[1], record.exc_info[2])))

    logging.getLogger("asyncio").addFilter(logged)
    warnings.filterwarnings("ignore", r"coroutine '(\w+\.)*(_|async_)\w+' was never awaited", RuntimeWarning)
    threading.excepthook, sys.unraisablehook, sys.excepthook = in_thread, not_raised, not_caught


def _theirs(value: BaseException | None, trace: TracebackType | None) -> bool:
    """Whether an error is of a closed event loop, or passed through the library."""
    if isinstance(value, RuntimeError) and str(value) == CLOSED:
        return True
    while trace is not None:
        if _of_library(trace.tb_frame.f_code.co_filename):
            return True
        trace = trace.tb_next
    return False


def _coroutine(found: object) -> bool:
    """Whether a coroutine of the library was given up."""
    code = found.cr_code if isinstance(found, CoroutineType) else None
    return code is not None and _of_library(code.co_filename)


def _of_library(file: str) -> bool:
    return any(f"/{name}/" in file for name in LIBRARIES)
