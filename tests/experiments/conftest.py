"""Fixtures: the toy experiment in a folder of its own, sweeps of it, and a tiny checkpoint on disk."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cases import tiny_llama
from fake_sweeps import Cluster, Sweeps
from toy_experiment import CONFIG, Fixed, Lab, Toy

import lm.measures
from experiments.sweeps import local, slurm


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECODER_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(lm.measures.TABLE, "toy", Toy)
    monkeypatch.setitem(lm.measures.TABLE, "fixed", Fixed)
    monkeypatch.setattr(Toy, "after", None)
    monkeypatch.setattr(Toy, "error", KeyboardInterrupt())
    config = tmp_path / "toy.py"
    config.write_text(CONFIG)
    return Lab(tmp_path, config, tmp_path / "run", Toy.calls)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Sequence[str]], Path]:
    """Writes an experiment's file and the texts that its word TEXTS stands for; everything it keeps is in the folder
    of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECODER_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm.compat.keep_compiled", lambda folder: None)  # it would last beyond the test

    def write(name: str, source: str, texts: Sequence[str]) -> Path:
        folder = tmp_path / "texts"
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text, encoding="utf-8")
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace("TEXTS", str(folder)))
        return path

    return write


@pytest.fixture
def s(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweeps:
    monkeypatch.setattr(local, "RUN", (sys.executable, "-S", str(lab.root / "fake.py")))
    monkeypatch.setattr(local, "POLL", 0.01)
    monkeypatch.setattr(local, "HEARTBEAT", 0.02)
    return Sweeps(lab, capsys)


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    again = types.SimpleNamespace(DelayedSubmission=lambda fn: ("again", fn))
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Cluster, helpers=again))
    monkeypatch.setattr(slurm, "POLL", 0.01)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny Llama as a Hugging Face folder without tokenizer; ``change(tensors)`` may spoil it first."""

    def write(change: Callable[[dict[str, Any]], None] = lambda tensors: None, **config: Any) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        tiny_llama.write(folder, change, **config)
        return folder

    return write
