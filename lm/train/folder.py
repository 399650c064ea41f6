"""The files in the folder of a training run."""

from __future__ import annotations

from pathlib import Path

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
