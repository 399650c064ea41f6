"""What every command shares: one place for errors and interrupts, arguments that fail in one line, aligned tables."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lm import files
from lm.errors import Terminated, TrainingStopped, UserError, check_number, nearest, shown, told, unknown

INTERRUPTED = "interrupted; finished points are kept, the same command goes on from there"

Command = Callable[[Sequence[str]], int | None]
Documented = Callable[[Sequence[str], str | None], int | None]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s of one line, with the nearest option."""

    def __init__(self, prog: str, description: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Numbers are finite and not too large (`lm.errors.check_number`), paths such as files can have; `UserError`
        that names the first argument which is not so."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = vars(found).get(action.dest)
            if value is not action.default and not action.dest.endswith("seed"):  # seeds have bounds of their own
                flag = next(iter(action.option_strings), action.metavar or action.dest)
                setattr(found, action.dest, _checked(value, str(flag)))
        return found, rest

    def refuse(self, unknown: Sequence[str]) -> None:
        """Raises `UserError` for the first argument that was not understood."""
        for word in unknown:
            flag = word.partition("=")[0]
            valid = sorted(o for a in self._actions for o in a.option_strings)
            raise UserError(f"{flag}: unknown argument{nearest(flag, valid)}; valid: {', '.join(valid)}")


def _checked(value: object, flag: str) -> object:
    if value == []:  # what argparse makes of --flag=--
        raise UserError(f"{flag}: found '--'; valid: a value")
    if isinstance(value, list):
        return [_checked(v, flag) for v in value]
    if isinstance(value, (int, float)):
        check_number(value, flag)
    if isinstance(value, Path):
        return files.user_path(value, flag)
    return value


def _utf8(words: Sequence[str]) -> Sequence[str]:
    """The words of a command line, unless one has bytes that are not UTF-8 (which Python keeps as half characters)."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as e:
            said = f"character {e.start} of {shown(word)} is not UTF-8"
            raise UserError(f"the command line: {said}; valid: UTF-8 text") from None
    return words


def refuse_given(args: argparse.Namespace, flags: Iterable[str], where: str, valid: str) -> None:
    """Raises `UserError` for the first of `flags` that was given, though it would be ignored."""
    for flag in flags:
        if vars(args)[flag] not in (None, False):
            raise UserError(f"--{flag.replace('_', '-')}: has no meaning {where}; valid: {valid}")


def axes(text: str, valid: Collection[str]) -> dict[str, int]:
    """``{"fsdp": 8, "tensor": -1}`` of ``--mesh=fsdp=8,tensor=-1``. Raises `UserError` for an axis that is none of
    `valid`, and for what is no number."""
    out = {}
    for part in text.split(","):
        name, _, n = part.strip().partition("=")
        if name not in valid:
            raise unknown("--mesh", name, valid)
        if not re.fullmatch(r"-1|[0-9]{1,9}", n):
            raise UserError(f"--mesh: {name}: found {shown(n)}; valid: a number, or -1 for what is left")
        if name in out:
            raise UserError(f"--mesh: {name} is given twice; valid: every axis once")
        out[name] = int(n)
    return out


def main(fn: Command, argv: Sequence[str] | None = None) -> int:
    """The exit code of ``fn(argv)``: 2 and ``error: …`` on stderr for a `UserError`, 1 for a training that cannot go
    on and for a machine that refuses, 0 for one that was asked to end and has saved, 130 for an interrupt.

    Output that its encoding cannot write is escaped, output that nobody reads is dropped."""
    _open_streams()
    try:
        code = fn(_utf8(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
        return code
    except SystemExit as e:  # --help
        if not _flush():
            return 1
        raise e
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except TrainingStopped as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except Terminated as e:
        print(f"terminated: {e}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print(f"\n{INTERRUPTED}" if sys.stderr.isatty() else INTERRUPTED, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe has seen enough
        _drop_output()
        return 0
    except RuntimeError as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            print(f"error: a device has not enough memory for this ({told(e)})", file=sys.stderr)
            return 1
        platform = re.search(r"[Uu]nable to initialize backend|Unknown backend|no platforms that are instances", str(e))
        if platform is None:
            raise
        asked = os.environ.get("JAX_PLATFORMS", "")
        valid = "cpu, or a platform of this machine"
        print(f"error: {UserError(f'JAX_PLATFORMS: found {shown(asked)}: {told(e)}; valid: {valid}')}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: the machine has not enough memory for this", file=sys.stderr)
        return 1
    except OSError as e:
        place = f"{e.filename}: " if isinstance(e.filename, str) else ""
        if not place and e.errno in MACHINE:  # the output's own disk is full
            _drop_output()
        print(f"error: {UserError(f'{place}{e.strerror or e}')}", file=sys.stderr)
        return 1 if e.errno in MACHINE else 2


MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _flush() -> bool:
    """Whether what was printed could be written, or nobody wants it."""
    try:
        sys.stdout.flush()
    except OSError as e:
        _drop_output()
        if not isinstance(e, BrokenPipeError):
            print(f"error: the output cannot be written ({e.strerror})", file=sys.stderr)
            return False
    return True


def _open_streams() -> None:
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (open as long as the process)
    for name in ("stdout", "stderr"):
        stream = vars(sys)[name]
        if stream is None:  # whoever started this has closed it
            vars(sys)[name] = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What is still to be flushed goes nowhere, also at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def command(fn: Documented, doc: str | None) -> Callable[..., int]:
    """``main(argv=None)`` of a command: ``fn(argv, doc)`` by `main`; `doc` is what ``--help`` prints."""
    return lambda argv=None: main(lambda words: fn(words, doc), argv)


_LAST: list[Callable[[], None]] = []  # what is still to be done when a signal ends the process
_PATIENCE = 10.0  # seconds that it may take


@contextlib.contextmanager
def before_the_end(fn: Callable[[], None]) -> Iterator[None]:
    """A signal that ends the process meanwhile (`enter`) calls `fn` first, in another thread."""
    _LAST.append(fn)
    try:
        yield
    finally:
        _LAST.remove(fn)


def enter(fn: Callable[[], int]) -> NoReturn:
    """Runs a command as the whole process, which SIGINT and SIGTERM end at once, even inside a compiled computation.

    Python runs signal handlers between byte codes of the main thread: that thread may wait minutes for a computation,
    or be inside a callback of one, where JAX turns the exception into another. So the handler does nothing, and a
    thread that reads the wake-up descriptor (written at once, in C) ends the process. No moment is a bad one: files
    are written whole or not at all. A training that handles SIGTERM itself, to save first, is left to do so.
    """
    read, write = socket.socketpair()
    write.setblocking(False)

    def nothing(number: int, frame: object) -> None:
        pass

    def watch() -> None:
        number = 0
        while number != signal.SIGINT and not (
            number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is nothing
        ):
            if not (byte := read.recv(1)):
                return  # the process ends by itself
            number = byte[0]
        last = threading.Thread(target=_last_words, daemon=True)
        last.start()
        last.join(_PATIENCE)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            print(f"\n{INTERRUPTED}" if sys.stderr.isatty() else INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, nothing)
    signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    sys.exit(fn())


def _last_words() -> None:
    for fn in list(_LAST):
        with contextlib.suppress(Exception):
            fn()


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of cells as text, each column as wide as its widest cell, the first row underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        return (indent + "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True))).rstrip()

    head, *body = rows
    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(row) for row in body)])
