"""The files in the folder of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.data.record import FILES, TextRecord
from lm.errors import UserError
from lm.files import read_json, sum_of_file, summed, without_sum, write_json

ABOUT = "run.json"  # what the run is
PARAMETERS = "parameters.txt"  # what is trained, for people
METRICS = "metrics.jsonl"  # one line per logged step
SAMPLES = "samples.jsonl"  # what the model wrote meanwhile
GOODPUT = "goodput.json"  # where the time went, one entry per session
CHECKPOINTS = "checkpoints"  # one folder per step that was saved


def steps(folder: Path) -> list[int]:
    """The steps of all complete checkpoints of the run in `folder`, oldest first; opens none of them."""
    saved = (folder / CHECKPOINTS).iterdir() if (folder / CHECKPOINTS).is_dir() else ()
    return sorted(int(p.name) for p in saved if p.name.isdigit())


def write_about(folder: Path, about: Mapping[str, Any], text: TextRecord) -> None:
    """The files of the run's tokenizer, and ``run.json`` with sums over them and over itself. Raises ``OSError``."""
    text.save(folder)
    found = sorted({p for pattern in FILES for p in folder.glob(pattern)})
    sums = {p.relative_to(folder).as_posix(): sum_of_file(p) for p in found}
    write_json(folder / ABOUT, summed({**about, "tokenizer": text.describe(), "files": sums}))


def read_about(folder: Path) -> dict[str, Any]:
    """``run.json``. One from before there were sums is read as it is.

    Raises `UserError` for a file that training did not write, or that was changed since.
    """
    valid = "valid: one that training wrote"
    try:
        about = read_json(folder / ABOUT)
    except (FileNotFoundError, UserError):
        raise UserError(f"{folder / ABOUT}: not the description of a training run; {valid}") from None
    if not isinstance(about, dict) or not isinstance(about.get("model"), dict):
        raise UserError(f"{folder / ABOUT}: not the description of a training run; {valid}")
    bare = without_sum(about)
    if bare is None:
        raise UserError(f"{folder / ABOUT}: was changed since training wrote it, by its sum; valid: the file as it was")
    return bare


def check_files(folder: Path, about: Mapping[str, Any]) -> None:
    """Raises `UserError` for a file of the tokenizer that is not what ``run.json`` was written with."""
    for name, found in dict(about.get("files") or {}).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; valid: the file as training wrote it")
        if sum_of_file(path) != found:
            raise UserError(f"{path}: was changed since training wrote it, by its sum; valid: the file as it was")
