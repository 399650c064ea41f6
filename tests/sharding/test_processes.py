"""Several processes train as one, by the command that users give: killed, asked to end, damaged, on another layout.

Every process is a real one with a CPU device of its own; they speak through Gloo.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import run
from lm import compat
from lm.sharding import processes
from lm.train.log import read

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16
SETTINGS = [
    "--config=configs/pretrain.py:smoke",
    *(f"--config.train.{kv}" for kv in (f"steps={STEPS}", "save_every=4", "keep_every=4", "eval_every=8")),
    "--config.model.n_layers=1",
]
FSDP = ["--config.train.mesh.fsdp=2"]  # and data 1 of two processes, 2 of four
ENDS = 60.0  # seconds: a bound for tests, on a busy machine; Gloo notices at once


def training(cache: Path) -> Path:
    (folder,) = (cache / "trained").iterdir()
    return folder


def losses(cache: Path) -> list[Any]:
    """Everything in the training's log that is not a time."""
    timed = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in x.items() if k not in timed} for x in read(training(cache) / "metrics.jsonl")]


class Pair:
    """Two processes of one run (or `n`), their output in files."""

    def __init__(
        self, folder: Path, cache: Path, who: Callable[[int], tuple[list[str], Mapping[str, str]]], n: int = 2
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.processes = folder, []
        for i in range(n):
            flags, more = who(i)
            env = {**os.environ, "PYTHONPATH": str(ROOT), "DECODER_LAB_CACHE": str(cache), **more}
            env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
            env.pop("JAX_COMPILATION_CACHE_DIR", None)  # a kill may leave half a file: programs go to `cache`
            command = [sys.executable, "-m", "experiments.run", *SETTINGS, *FSDP, f"--workdir={folder / 'run'}", *flags]
            with (folder / f"out{i}").open("w") as out, (folder / f"err{i}").open("w") as err:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))

    def out(self, i: int) -> str:
        return (self.folder / f"out{i}").read_text()

    def err(self, i: int) -> str:
        return (self.folder / f"err{i}").read_text()

    def codes(self, seconds: float) -> list[int]:
        """The exit codes; the test fails, and nothing stays behind, when it takes longer."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.01)) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()

    def until(self, path: Path) -> None:
        """Waits for a checkpoint."""
        deadline = time.monotonic() + 300
        while not any(p.name.isdigit() for p in path.glob("trained/*/checkpoints/*")):
            assert all(p.poll() is None for p in self.processes), self.err(0) + self.err(1)
            assert time.monotonic() < deadline
            time.sleep(0.02)


def by_flags(n: int = 2) -> Callable[[int], tuple[list[str], dict[str, str]]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return lambda i: ([f"--coordinator=127.0.0.1:{port}", f"--processes={n}", f"--process={i}", "--heartbeat=10"], {})


def by_slurm() -> Callable[[int], tuple[list[str], dict[str, str]]]:
    """What srun says to the tasks of a step on one node; JAX makes the port from the job's number."""
    job = str(random.randrange(10**6))
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    return lambda i: ([], {**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    """A run of two processes that nothing happened to, and its cache."""
    folder = tmp_path_factory.mktemp("unbroken")
    pair = Pair(folder, folder / "cache", by_slurm())
    assert pair.codes(300) == [0, 0], pair.err(0) + pair.err(1)
    return pair, folder / "cache"


def alone(cache: Path, workdir: Path, *more: str) -> None:
    """The same command in this process, which has eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("DECODER_LAB_CACHE", str(cache))
        assert run.main([*SETTINGS, f"--workdir={workdir}", *more]) == 0


SHORT = ["--config.train.steps=6", "--config.train.eval_every=0", '--config.arms.base.only=("training",)']


@pytest.mark.nightly
def test_four_processes_train_as_one(tmp_path: Path) -> None:
    """The loss of every step, by fsdp 2 x data 2: the order of the texts does not depend on the processes either."""
    who = by_flags(4)
    four = Pair(tmp_path / "four", tmp_path / "cache4", lambda i: ([*SHORT, *who(i)[0]], {}), 4)
    assert four.codes(300) == [0] * 4, "".join(four.err(i) for i in range(4))
    alone(tmp_path / "cache", tmp_path / "run", *SHORT)
    got, want = ([x["loss"] for x in losses(tmp_path / c) if "loss" in x] for c in ("cache4", "cache"))
    assert len(got) == len(want) == 6 and len(set(want)) == 6
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_two_processes_train_as_one(unbroken: tuple[Pair, Path], tmp_path: Path) -> None:
    alone(tmp_path / "cache", tmp_path / "run")
    got, want = losses(unbroken[1]), losses(tmp_path / "cache")
    assert [x["step"] for x in got] == [x["step"] for x in want] and len(got) == STEPS + 3
    for name in ("loss", "grad_norm", "held_out_nll", "final_nll", "tokens"):
        pairs = np.array([(g[name], w[name]) for g, w in zip(got, want, strict=True) if name in w])
        assert len(pairs) >= 1
        np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4 if name == "grad_norm" else 1e-5)
    assert want[0]["held_out_nll"] - want[-1]["final_nll"] > 0.2  # they learned something


def test_one_process_writes_and_prints(unbroken: tuple[Pair, Path]) -> None:
    pair, cache = unbroken
    said = [line for line in pair.out(1).splitlines() if not line.startswith("[Gloo]")]
    assert said == [] and pair.err(1) == ""
    assert "no step had to be skipped" in pair.out(0)
    results = json.loads((pair.folder / "run" / "results.json").read_text())
    assert results["complete"] and set(results["arms"]["base"]) >= {"training/bits_per_byte", "nll/bits_per_byte"}
    assert len(json.loads((training(cache) / "goodput.json").read_text())) == 1


@pytest.mark.nightly
def test_one_process_on_another_layout_goes_on_from_what_two_saved(
    unbroken: tuple[Pair, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameters in halves by fsdp over two processes, then whole on eight devices of one."""
    _, cache = unbroken
    shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns("points"))
    for step in ("12", "16"):
        shutil.rmtree(training(tmp_path / "cache") / "checkpoints" / step)
    alone(tmp_path / "cache", tmp_path / "run")
    assert "going on from step 8 of" in capsys.readouterr().err
    got, want = ([x["loss"] for x in losses(c) if "loss" in x] for c in (tmp_path / "cache", cache))
    assert got[:8] == want[:8]
    np.testing.assert_allclose(got[8:], want[8:], rtol=1e-5)
    assert len(got) == STEPS


@pytest.mark.nightly
def test_killed_then_terminated_then_damaged_it_ends_as_if_nothing_had_been(
    unbroken: tuple[Pair, Path], tmp_path: Path
) -> None:
    """Bit for bit, through three deaths: of one process, of the job, of the newest checkpoint."""
    cache = tmp_path / "cache"
    pair = Pair(tmp_path, cache, by_flags())
    pair.until(cache)
    pair.processes[1].kill()
    assert pair.codes(ENDS) == [1, -signal.SIGKILL]
    (said,) = [line for line in pair.err(0).splitlines() if line.startswith("error:")]
    assert said.startswith("error: process 0 of 2: another process is gone (")
    assert said.endswith("what was saved is good, and the same command on every host goes on from there")
    saved = {p.name for p in (training(cache) / "checkpoints").iterdir()}

    pair = Pair(tmp_path, cache, by_flags())
    deadline = time.monotonic() + 300
    while "going on from step" not in pair.err(0):
        assert time.monotonic() < deadline and pair.processes[0].poll() is None, pair.err(0)
        time.sleep(0.02)
    pair.processes[1].terminate()
    assert pair.codes(ENDS) == [0, 0], pair.err(0) + pair.err(1)
    told = [next(x for x in pair.err(i).splitlines() if x.startswith("terminated:")) for i in range(2)]
    assert told[0] == told[1] and told[0].endswith("the same command goes on")
    stopped = told[0].split()[2]
    assert (training(cache) / "checkpoints" / stopped).is_dir() and stopped not in saved

    newest = training(cache) / "checkpoints" / stopped / "state"
    for path in (p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 1000):
        path.write_bytes(path.read_bytes()[:500])
    pair = Pair(tmp_path, cache, by_flags())
    assert pair.codes(300) == [0, 0], pair.err(0) + pair.err(1)
    assert f"checkpoints/{stopped}: damaged (" in pair.err(0) and "damaged" not in pair.err(1)
    assert (training(cache) / f"damaged-{stopped}").is_dir()
    assert losses(cache) == losses(unbroken[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--processes=2"],
            "--coordinator: is missing beside --processes; valid: --coordinator=HOST:PORT --processes=N",
        ),
        (["--coordinator=a:1", "--processes=2"], "--process: is missing beside --coordinator, --processes; valid"),
        (["--coordinator=a:1", "--processes=2", "--process=2"], "--process: found 2; valid: 0 to 1 (--processes=2)"),
        (["--coordinator=a", "--processes=2", "--process=0"], "--coordinator: found 'a'; valid: HOST:PORT"),
        (["--coordinator=a:99999", "--processes=2", "--process=0"], "--coordinator: found 'a:99999'; valid: HOST:PORT"),
        (["--processes=0"], "--processes: must be at least 1, found 0"),
        (["--processes=two"], "argument --processes: invalid int value: 'two'"),
        (["--heartbeat=1"], "--heartbeat: must be at least 5 seconds"),
        (["--coordinater=a:1"], "--coordinater: unknown argument (did you mean '--coordinator'?)"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([SETTINGS[0], *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(
    ("machine", "flags", "asked"),
    [
        ({}, {}, None),
        ({"slurm": "2"}, {}, {"cluster_detection_method": "slurm"}),
        ({"slurm": "1"}, {}, None),
        ({"slurm": "2"}, {"processes": 1}, None),
        ({"tpu": "1"}, {}, {}),
        ({"tpu": "1"}, {"processes": 1}, None),
    ],
)
def test_what_the_machine_says(
    machine: dict[str, str], flags: dict[str, Any], asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing when alone; a Slurm step of several tasks and a TPU machine are left to JAX's own detection."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(processes, "_joined", [])
    monkeypatch.setattr(compat, "on_tpu_vm", lambda: "tpu" in machine)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
        if "slurm" in machine:
            monkeypatch.setenv(name, machine["slurm"])
    processes.start(**flags)
    assert calls == ([] if asked is None else [{"heartbeat_timeout_seconds": processes.HEARTBEAT, **asked}])
