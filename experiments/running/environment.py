"""What a run ran on: versions, device, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[2]


def describe() -> dict[str, Any]:
    """Versions, platform, device, and the git commit of this repository with whether it had changes (None: no git)."""
    out: dict[str, Any] = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "numpy"):
        out[name] = metadata.version(name)
    status = _git("status", "--porcelain")
    return {
        **out,
        "platform": platform.platform(),
        "device": device(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def device() -> str:
    """The accelerator as ``N x KIND``, or the CPU with its cores."""
    found = jax.devices()
    if found[0].platform == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    return f"{len(found)} x {found[0].device_kind}"


def code() -> str:
    """A hash of the library's source: says whether a kept point was measured by this very code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "lm").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git(*args: str) -> str | None:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # whoever commits meanwhile does not find the index locked
    command = ["git", "-C", str(ROOT), *args]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
