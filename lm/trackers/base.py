"""The socket ``train.tracker``. ``metrics.jsonl`` is written whatever it says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lm.errors import UserError
from lm.plug import Plug

Write = Mapping[str, float]


class Session:
    """A tracker at work in one session of a run."""

    def numbers(self, step: int, values: Write) -> None:
        """The numbers of a step, by name."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text that the model wrote after `step` steps."""

    def close(self) -> None:
        """Everything has been said."""


class Tracker(Plug):
    """Base of trackers. A tracker that fails in the middle of a training is told once and left out."""

    KEY: ClassVar[str] = "train.tracker"
    library: ClassVar[str] = ""  # the module that it needs
    extra: ClassVar[str] = ""  # the extra of this package that installs it

    def check(self) -> None:
        """Raises `UserError` where the tracker's library is not installed."""
        if self.library:
            self._imported()

    def _imported(self) -> Any:
        try:
            return importlib.import_module(self.library)
        except ImportError:
            raise UserError(
                f"{self.KEY}: needs a package that is not here; get it with: pip install 'decoder-lab[{self.extra}]', "
                f"or set {self.KEY} = 'none'"
            ) from None

    def open(self, folder: Path, about: Mapping[str, Any], after: int | None) -> Session:
        """Begins, or goes on with, the run in `folder`. `about` determines the run; `after`: the last step whose
        numbers stand, None = none."""
        return Session()


@dataclass(frozen=True)
class NoTracker(Tracker):
    """Nobody else."""
