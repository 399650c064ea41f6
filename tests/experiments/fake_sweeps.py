"""Sweeps of the toy config through the real command, whose runs are a small stand-in that does what a test says."""

from __future__ import annotations

import contextlib
import json
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
from toy_experiment import Lab

from experiments import sweep
from experiments.sweeps import slurm

TAIL = "\n\nfrom experiments.sweeps import chain, grid, prefix, product, subsample, zip_\n\n\n"
VALUES_SWEEP = TAIL + 'def sweep_values():\n    return grid({"measures.toy.value": (1.0, 2.0, 3.0)})\n'

FAKE = """
import json, os, pathlib, signal, sys, time
signal.alarm(30)  # ends what waits in vain
args = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(args["workdir"])
value = float(args.get("config.measures.toy.value", 1.0))
with open("calls.txt", "a") as f:
    f.write(f"{value}\\n")
exec(pathlib.Path("behave.py").read_text())
names = args.get("arms", "zero,window,also").split(",")
arms = {a: {"toy/value": {"mean": value + i, "std": None, "n": 1}, "toy/more": 7} for i, a in enumerate(names)}
results = {"schema": 1, "experiment": "toy", "arms": arms, "complete": complete and len(names) == 3}
(folder / "results.json").write_text(json.dumps(results))
print("measured", value, flush=True)
print(said, file=sys.stderr)
sys.exit(code)
"""


class Sweeps:
    """``s("--engine=…")`` sweeps the toy config; runs are `FAKE`, which does what `behave` says."""

    def __init__(self, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.config, self.work, self.capsys = lab.root, lab.config, lab.root / "work", capsys
        self.text = self.config.read_text()
        self.write(VALUES_SWEEP)
        (self.root / "fake.py").write_text(FAKE)
        self.behave("")

    def write(self, tail: str) -> None:
        self.config.write_text(self.text + tail)

    def behave(self, text: str) -> None:
        (self.root / "behave.py").write_text(f"code, said, complete = 0, '', True\n{text}\n")

    def __call__(self, *args: str) -> int:
        (self.root / "calls.txt").write_text("")
        code = sweep.main([f"--config={self.config}:smoke", f"--workdir={self.work}", *args])
        self.out, self.err = self.capsys.readouterr()
        return code

    @property
    def calls(self) -> list[float]:
        return [float(x) for x in (self.root / "calls.txt").read_text().split()]

    def folder(self, value: float) -> Path:
        [found] = self.work.glob(f"*-value{value}")
        return found

    def states(self) -> str:
        return " ".join(p["state"] for p in json.loads((self.work / "sweep.json").read_text())["points"])


class Cluster:
    """A stand-in for submitit's executor: jobs run here, one after the other, through a pickle as on a cluster. What a
    real Slurm does is in test_slurm.py; this shows on any machine what the engine makes of jobs."""

    settings: dict[str, Any] = {}

    def __init__(self, folder: Path, cluster: str, **more: Any) -> None:
        self.batch, self.folder = contextlib.nullcontext, folder
        Cluster.settings = {"cluster": cluster, **more}

    def update_parameters(self, **settings: Any) -> None:
        Cluster.settings |= settings
        if "slurm_colour" in settings:
            raise NameError("no\ncolour")

    def submit(self, task: slurm.Task) -> Any:
        lost = Path("lost").exists() and task.point.number == 2
        if not lost:
            pickle.loads(pickle.dumps(task))()
        self.folder.mkdir(parents=True, exist_ok=True)
        result, err = self.folder / ("none" if lost else "."), self.folder / "err"
        paths = types.SimpleNamespace(result_pickle=result, stderr=err, stdout=err)
        paths.stderr.write_text("starts\nnode failed\n\n")
        return types.SimpleNamespace(job_id=f"7_{task.point.number}", done=lambda: True, paths=paths)
