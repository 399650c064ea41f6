"""Finished points on disk: one JSON file per (checkpoint, model, measure, seed), addressed by what determines it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm import files
from lm.errors import UserError

CODE = 1  # raise when a change of the code changes numbers: everything measured before is then measured again
ENVIRONMENT = "DECODER_LAB_CACHE"


@dataclass(frozen=True)
class Point:
    """One measurement. `what`: what determined it; `made`: where and by which code; `seconds`: what it took."""

    what: dict[str, Any]
    samples: dict[str, list[float]]
    curves: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    made: dict[str, Any] = field(default_factory=dict)


def key(what: dict[str, Any]) -> str:
    """The content hash (32 hexadecimal digits) of what determines a point."""
    text = json.dumps({"code": CODE, **what}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def shared_folder() -> Path:
    """The cache that runs share: ``$DECODER_LAB_CACHE``, else ``runs/cache``."""
    return files.user_path(os.environ.get(ENVIRONMENT) or "runs/cache", ENVIRONMENT)


class Cache:
    """Points of one run folder, backed by the folder that all runs share."""

    def __init__(self, workdir: Path, shared: Path | None = None) -> None:
        self.own = workdir / "points"
        self.shared = (shared or shared_folder()) / "points"

    def get(self, what: dict[str, Any], own: bool = False) -> Point | None:
        """The finished point, or None; with `own`, only from the run folder. A file that is damaged, or was changed
        since by its sum, is told and counts as absent; one from before there were sums is read as it is."""
        name = key(what) + ".json"
        folders = (self.own,) if own else (self.own, self.shared)
        return next((p for f in folders if (p := _read(f / name, what)) is not None), None)

    def put(self, point: Point) -> None:
        """Keeps a new point, in both places."""
        for folder in (self.own, self.shared):
            write_json(folder / (key(point.what) + ".json"), files.summed(asdict(point)))

    def adopt(self, point: Point) -> None:
        """Makes a point that was found part of the run folder."""
        path = self.own / (key(point.what) + ".json")
        if not path.is_file():
            write_json(path, files.summed(asdict(point)))


def _read(path: Path, what: dict[str, Any]) -> Point | None:
    if not path.is_file():
        return None
    try:
        data = files.without_sum(json.loads(path.read_text(encoding="utf-8")))
        if data is None:
            raise ValueError("it was changed since")
        if json.loads(json.dumps(what)) != data["what"]:
            raise ValueError("it holds another point")
        for values in data["samples"].values():
            if not all(isinstance(v, (int, float)) for v in values):
                raise ValueError("a sample is not a number")
        return Point(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        print(f"note: {path}: damaged ({_why(e)}), ignored and measured again", file=sys.stderr)
        return None


def _why(e: Exception) -> str:
    return str(e) if type(e) is ValueError else type(e).__name__


def write_json(path: Path, data: object) -> None:
    """`lm.files.write_json` into a folder that is made if need be. Raises `UserError` when the disk refuses."""
    with written(path):
        files.write_json(path, data, ascii_only=False)


def claim_json(path: Path, data: object) -> bool:
    """The same where there is no `path` yet; False where there is (`lm.files.claim_text`)."""
    with written(path):
        return files.claim_text(path, files.json_text(data, ascii_only=False))


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Makes the folder of `path`, which is written meanwhile; what the disk refuses is a `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from None
