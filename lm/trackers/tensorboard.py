"""TensorBoard's event files, in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lm.trackers.base import Session, Tracker, Write


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """``tensorboard --logdir=FOLDER/tensorboard`` shows them."""

    library: ClassVar[str] = "tensorboardX"
    extra: ClassVar[str] = "tensorboard"

    def open(self, folder: Path, about: Mapping[str, Any], after: int | None) -> Session:
        writer = self._imported().SummaryWriter
        return _Files(writer(str(folder / "tensorboard"), purge_step=None if after is None else after + 1))


@dataclass
class _Files(Session):
    board: Any

    def numbers(self, step: int, values: Write) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.board.add_text(name, text, step)

    def close(self) -> None:
        self.board.close()
