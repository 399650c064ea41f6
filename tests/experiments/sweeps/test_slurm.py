"""Sweeps on a real Slurm: job arrays, preemption by signal and by requeueing, lost jobs, several processes of one run.

The trainings of jobs wait at one step until Slurm has told them to end, so that every interruption comes in the middle
of one, on a busy machine too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slurm_cluster import NoCluster, cluster

from lm.train.log import read

ROOT = Path(__file__).resolve().parents[3]
STEPS, WAITS = 12, 6
SAVED = WAITS + 2  # a step's numbers are written while the next one runs
PATIENCE = 240.0  # seconds, for what takes a few on a machine that has time

CONFIG = f"""
import os, signal, time
from pathlib import Path

from configs.pretrain import SCALES, claims, get_config
from experiments.sweeps import grid
from lm.train.log import Log


def sweep_seeds():
    return grid(seeds=[(0,), (1,), (2,), (3,)])


def wait(self, step, write=Log.write, **values):
    write(self, step, **values)
    place = Path(os.environ["PLACE"])
    if step == {WAITS} and "loss" in values and not (place / "free").exists():
        told = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: (told.append(number), before(number, frame)))
        (place / ("waits-" + os.environ["SLURM_ARRAY_TASK_ID"])).touch()
        while not told and not (place / "free").exists():
            time.sleep(0.02)


if os.environ.get("SLURM_ARRAY_TASK_ID", "0") != "0":
    Log.write = wait
"""
SETTINGS = [
    *(f"--config.train.{kv}" for kv in (f"steps={STEPS}", "save_every=100", "eval_every=0", "final_rows=8")),
    "--config.model.n_layers=1",
    '--config.arms.base.only=("training",)',
]


class Cluster:
    """Commands with the cluster's environment; `sweep` starts the sweep of `CONFIG` on it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.work, self.cache = folder, folder / "work", folder / "cache"
        here = {"PYTHONPATH": str(ROOT), "DECODER_LAB_CACHE": str(self.cache), "PLACE": str(folder)}
        self.env = {**os.environ, **environment, **here, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        (folder / "slow.py").write_text(CONFIG)

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sweep(self, *args: str, name: str) -> subprocess.Popen[bytes]:
        where = [f"--config={self.folder / 'slow.py'}:smoke", f"--workdir={self.work}", "--engine=slurm"]
        command = [sys.executable, "-m", "experiments.sweep", *where, *SETTINGS, *args]
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            return subprocess.Popen(command, env=self.env, stdout=out, stderr=err)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text() + (self.folder / f"{name}.err").read_text()

    def until(self, ready: Callable[[], Any], process: subprocess.Popen[bytes], name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, self.said(name)
            time.sleep(0.05)

    def point(self, seed: int) -> Path:
        [found] = self.work.glob(f"*-seeds_{seed}")
        return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with cluster(folder / "daemons") as environment:
            yield Cluster(folder, environment)
    except NoCluster as e:
        pytest.skip(f"no Slurm here: {e}")


def log(cache: Path, seed: int) -> list[Any]:
    """Everything that is not a time in the log of the training with this seed."""
    for folder in (cache / "trained").iterdir():
        if json.loads((folder / "run.json").read_text())["seed"] == seed:
            timed = ("seconds", "tokens_per_second", "mfu")
            return [{k: v for k, v in x.items() if k not in timed} for x in read(folder / "metrics.jsonl")]
    raise AssertionError(f"no training with seed {seed}")


def reference(slurm: Cluster) -> subprocess.Popen[bytes]:
    """The trainings of the points that are interrupted, undisturbed, in the cache ``unbroken``."""
    where = ["--config=configs/pretrain.py:smoke", "--config.seeds=(1, 2, 3)", f"--workdir={slurm.folder / 'run'}"]
    command = [sys.executable, "-m", "experiments.run", *where, *SETTINGS]
    env = {**slurm.env, "DECODER_LAB_CACHE": str(slurm.folder / "unbroken")}
    with (slurm.folder / "reference.out").open("wb") as out, (slurm.folder / "reference.err").open("wb") as err:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=err)


@pytest.mark.nightly
def test_an_array_is_preempted_requeued_cancelled_and_resumed(slurm: Cluster) -> None:
    undisturbed, unbroken = reference(slurm), slurm.folder / "unbroken"
    process = slurm.sweep("--slurm=timeout_min=60,signal_delay_s=60", name="first")
    jobs = [slurm.folder / f"waits-{i}" for i in (1, 2, 3)]
    slurm.until(lambda: all(j.exists() for j in jobs), process, "first")
    [array] = {line.split("_")[0] for line in slurm("squeue", "--noheader", "--array", "--format=%i").split()}
    slurm("scancel", "--signal=USR2", f"{array}_1")  # what Slurm sends before a time limit or a preemption
    slurm("scontrol", "requeue", f"{array}_2")
    slurm("scancel", f"{array}_3")
    code = process.wait(PATIENCE)
    text = slurm.said("first")
    assert code == 1 and "3 done, 1 failed of 4 points" in text, text
    assert f"submitted as job {array}_3" in text and f"job {array}_3 ended before its point: " in text
    script = slurm.work / "slurm" / f"{array}_submission.sh"
    for line in ("--array=0-3%4", "--time=60", "--signal=USR2@60", "--requeue", "--job-name=seeds"):
        assert f"#SBATCH {line}\n" in script.read_text()
    for seed, lives in enumerate((1, 2, 2, 1)):
        said = (slurm.point(seed) / "log.txt").read_text()
        assert said.count("$ ") == lives and said.count(f"going on from step {SAVED} of ") == lives - 1
        assert said.count("terminated: ") == (1 if seed else 0)
        assert not (slurm.point(seed) / "RUNNING").exists()
    assert undisturbed.wait(PATIENCE) == 0, slurm.said("reference")
    assert all(log(slurm.cache, seed) == log(unbroken, seed) for seed in (1, 2))
    assert len(log(slurm.cache, 3)) == SAVED

    # Again: what is done is left alone; the cancelled point goes on, as two processes that find each other by Slurm.
    process = slurm.sweep("--slurm=tasks_per_node=2", name="second")
    assert process.wait(PATIENCE) == 0, slurm.said("second")
    text = slurm.said("second")
    assert text.count("done already") == 3 and "4 done of 4 points" in text
    said = (slurm.point(3) / "log.txt").read_text()
    assert f"going on from step {SAVED} of " in said and said.count("$ ") == 2
    assert (slurm.point(3) / "log-1.txt").read_text().count("$ ") == 1
    got, want = ([x["loss"] for x in log(cache, 3) if "loss" in x] for cache in (slurm.cache, unbroken))
    assert len(got) == len(want) == STEPS
    np.testing.assert_allclose(got, want, rtol=1e-5)
