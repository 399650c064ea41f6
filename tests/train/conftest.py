"""Texts to train on: a few topics of Python's documentation, one file each; programs are compiled once for all."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in sorted(topics)[:12]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs(compiled: None) -> None:
    """Runs of equal shapes share their programs."""
