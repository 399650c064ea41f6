"""The one exception a user's mistake raises, the helper that names the nearest valid spelling, and how trainings end
early."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable

LARGEST = 10**11  # of any number that a user gives
LONGEST = 200  # characters of one value in a message
_RUN = re.compile(rf"\S{{{LONGEST + 1},}}")


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message is one line: the key or file, what was found, what is valid, and the nearest name.
    Command-line tools print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        super().__init__(_RUN.sub(lambda run: cut(run[0]), line))


def cut(text: str) -> str:
    """The text, without its middle where it is longer than `LONGEST`: names of files end in what tells them apart."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 61]}…{text[-60:]}"


def shown(value: object) -> str:
    """A value as a message shows it: its `repr`, cut at `LONGEST` characters."""
    try:
        return cut(repr(value))
    except (ValueError, RecursionError):  # integers of thousands of digits; what holds itself a thousand times
        return f"a {type(value).__name__} too long to show"


def told(e: BaseException) -> str:
    """What an exception says, cut at `LONGEST` characters; nothing for one that cannot say it."""
    try:
        return cut(" ".join(str(e).split()))
    except Exception:
        return ""


def check_number(value: float, key: str) -> None:
    """Raises `UserError` for what is no number, infinite, or larger than `LARGEST`."""
    if not abs(value) <= LARGEST:
        raise UserError(f"{key}: found {shown(value)}; valid: a finite number, of at most {LARGEST:,}")


def divisors(n: int) -> str:
    """The numbers that divide `n`, as a message lists what is valid: the first few of them, found in bounded time."""
    small = [d for d in range(1, min(n, 100_000) + 1) if n % d == 0]
    every = sorted({*small, *(n // d for d in small)})
    return ", ".join(map(str, every)) if len(every) <= 32 else f"{', '.join(map(str, every[:31]))}, …, {every[-1]}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """``' (did you mean 'x'?)'`` for the closest valid name, or an empty string."""
    if len(str(name)) > LONGEST:
        return ""
    match = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def listed(names: Iterable[str], most: int = 100) -> str:
    """Names as a message lists what is valid."""
    first = [str(name) for name in itertools.islice(names, most + 1)]
    return ", ".join(first) if len(first) <= most else f"{', '.join(first[:most])}, …"


def unknown(key: str, found: object, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a closed list."""
    options = sorted(str(v) for v in valid)
    return UserError(f"{key}: unknown name {shown(found)}{nearest(_text(found), options)}; valid: {listed(options)}")


def _text(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


# How a training run ends early; in each case the folder holds what is needed to go on.


class TrainingStopped(Exception):
    """The run cannot go on: too many non-finite steps in a row, or a checkpoint that cannot be written."""


class Terminated(Exception):
    """SIGTERM was received, everything is saved, and the same command goes on from there."""
