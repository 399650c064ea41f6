"""The one exception a user's mistake raises, the helper that names the nearest valid spelling, and how trainings end
early."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message is one line: the key or file, what was found, what is valid, and the nearest name.
    Command-line tools print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def nearest(name: str, valid: Iterable[str]) -> str:
    """``' (did you mean 'x'?)'`` for the closest valid name, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def unknown(key: str, found: object, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a closed list."""
    options = sorted(str(v) for v in valid)
    return UserError(f"{key}: unknown name {found!r}{nearest(str(found), options)}; valid: {', '.join(options)}")


# How a training run ends early; in each case the folder holds what is needed to go on.


class TrainingStopped(Exception):
    """The run cannot go on: too many non-finite steps in a row, or a checkpoint that cannot be written."""


class Terminated(Exception):
    """SIGTERM was received, everything is saved, and the same command goes on from there."""
