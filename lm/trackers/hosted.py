"""Trackers with pages of their own. Both libraries read where to write and as whom from their own environment."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lm.files import read_json, write_json
from lm.trackers.base import Session, Tracker, Write

NAME = "tracker.json"  # in the run's folder: which run of the tracker's it is


@dataclass(frozen=True)
class _Hosted(Tracker):
    """`project`: where runs are listed together; `name`: of the run, empty = its folder's. A run that goes on goes on
    in the same place."""

    project: str = "decoder-lab"
    name: str = ""

    def open(self, folder: Path, about: Mapping[str, Any], after: int | None) -> Session:
        at = folder / NAME
        known = read_json(at).get(self.library) if after is not None and at.is_file() else None
        mark = str(known or uuid.uuid4().hex)
        write_json(at, {**(read_json(at) if at.is_file() else {}), self.library: mark})
        return self._begun(folder, self.name or folder.resolve().name, mark, dict(about), known is not None)

    def _begun(self, folder: Path, name: str, mark: str, about: dict[str, Any], on: bool) -> Session:
        raise NotImplementedError


@dataclass(frozen=True)
class WandB(_Hosted):
    """Weights & Biases; ``WANDB_MODE=offline`` keeps everything in the run's folder."""

    library: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def _begun(self, folder: Path, name: str, mark: str, about: dict[str, Any], on: bool) -> Session:
        library = self._imported()
        run = library.init(
            project=self.project, name=name, id=mark, dir=str(folder), config=about, resume="must" if on else "never"
        )
        return _Pages(run.log, run.finish, lambda text: library.Html(f"<pre>{_escaped(text)}</pre>"))


@dataclass(frozen=True)
class Trackio(_Hosted):
    """Hugging Face's local-first tracker; ``trackio show`` opens its pages."""

    library: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"

    def _begun(self, folder: Path, name: str, mark: str, about: dict[str, Any], on: bool) -> Session:
        library = self._imported()  # runs are told apart by their names
        library.init(project=self.project, name=f"{name}-{mark[:6]}", config=about, resume="must" if on else "never")
        return _Pages(library.log, library.finish, str)


def _escaped(text: str) -> str:
    import html

    return html.escape(text)


@dataclass
class _Pages(Session):
    log: Any
    finish: Any
    shown: Any  # a text as the library shows one

    # A step there is how many have been done: what is measured before the first has 0, where our own log has -1.

    def numbers(self, step: int, values: Write) -> None:
        self.log(dict(values), step=step + 1)

    def text(self, step: int, name: str, text: str) -> None:
        self.log({name: self.shown(text)}, step=step + 1)

    def close(self) -> None:
        self.finish()
