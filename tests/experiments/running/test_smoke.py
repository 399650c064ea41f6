"""Experiments on given parameters run from end to end at their smallest scale (those that train: test_training)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import run
from experiments.spec import registry


def test_longheads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECODER_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm.compat.keep_compiled", lambda folder: None)
    config = registry.CONFIGS / "longheads.py"
    arms = ("full", "lm_infinite", "longheads", "truncation")  # `window` and `ntk` compile as much and add no path
    args = [f"--config={config}:smoke", f"--workdir={tmp_path / 'run'}", f"--arms={','.join(arms)}"]
    assert run.main(args) == 0
    made = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(made["claims"]) == 5
    assert all(c["holds"] is not None for c in made["claims"])
    assert set(made["arms"]) == set(arms)
    assert (tmp_path / "run" / "choice_needle.png").stat().st_size > 0
    for scale in registry.load(config).scales:
        assert run.main([f"--config={config}:{scale}", "--dry-run", f"--workdir={tmp_path / scale}"]) in (0, 2)
