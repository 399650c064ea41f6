"""Checkpoints as folders of this library, like those of a training run of no steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm.config import to_dict
from lm.files import new_folder
from lm.interop import Checkpoint
from lm.train.checkpoint import Checkpoints
from lm.train.folder import CHECKPOINTS, write_about


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint`, weights and tokenizer; the folder appears whole or not at all, and must not exist."""
    with new_folder(folder) as swap:
        about: dict[str, Any] = {"model": to_dict(checkpoint.config), "start": checkpoint.identity}
        checkpoints = Checkpoints(swap / CHECKPOINTS)
        checkpoints.save(0, {"params": checkpoint.params}, about)
        checkpoints.wait()
        checkpoints.close()
        write_about(swap, about, checkpoint.text)
