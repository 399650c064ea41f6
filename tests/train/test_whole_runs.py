"""Whole runs: they resume bit for bit after anything, say what is damaged, and refuse what is not theirs."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run

from lm.errors import Terminated, TrainingStopped, UserError
from lm.model import params
from lm.train import checkpoint, log, loop, session, step
from lm.train.log import read
from lm.train.placement import Placement

ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path) -> list[Any]:
    """Everything in the log that is not a time."""
    timed = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in line.items() if k not in timed} for line in read(folder / "metrics.jsonl")]


@pytest.fixture
def whole(trained_run: Path) -> Path:
    """A run that nothing happened to."""
    return trained_run


def interrupted(folder: Path, texts: Path, at: int, monkeypatch: pytest.MonkeyPatch, **change: Any) -> None:
    """Runs until step `at` and dies there without another word."""

    class Death(BaseException):
        pass

    original = loop.Loop._read

    def read_step(self: Any, i: int, metrics: Any) -> None:
        original(self, i, metrics)
        if i == at:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_read", read_step)
        with pytest.raises(Death):
            tiny_run.train(folder, texts, **change)


def test_a_run_leaves_what_a_reader_needs(whole: Path) -> None:
    lines = read(whole / "metrics.jsonl")
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps] == list(range(60))
    assert steps[-1]["nll"] < steps[0]["nll"] - 0.5
    held = {x["step"]: x["held_out_nll"] for x in lines if "held_out_nll" in x}
    assert list(held) == [-1, 19, 39]
    final = lines[-1]
    assert final["final_nll"] < held[-1] - 0.5
    n = json.loads((whole / "run.json").read_text())
    assert (
        n["train"]["optimizer"]["name"] == "adamw" and n["flops_per_token"] > 0 and n["peak"].startswith("a measured")
    )
    ratio = final["final_nll"] / np.log(2) / final["final_bits_per_byte"]
    assert 0.95 < ratio <= 1.0  # one token a byte, and one for the end of each document
    (session,) = json.loads((whole / "goodput.json").read_text())
    assert (
        session["total"] == pytest.approx(sum(session[k] for k in log.KINDS), abs=0.01) and 0 < session["goodput"] < 1
    )
    assert "8,560 parameters" in (whole / "parameters.txt").read_text()


@pytest.mark.nightly
def test_kills_leave_no_trace(tmp_path: Path, texts: Path) -> None:
    """SIGKILL at random moments, also while a checkpoint is written (one is, most of the time). More of them:
    `benchmarks.faults`."""
    tiny_run.train(tmp_path / "unbroken", texts, **tiny_run.LONG)
    program = [sys.executable, str(Path(tiny_run.__file__)), str(tmp_path / "killed"), str(texts), "4", "7"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished after 4 kills" in done.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert len(losses(tmp_path / "killed")) == 200 + 10 + 1


def test_resuming_leaves_the_log_of_an_unbroken_run(
    tmp_path: Path, texts: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", texts, 31, monkeypatch)
    told: list[str] = []
    tiny_run.train(tmp_path / "run", texts, told)
    assert told == [f"going on from step 30 of {tmp_path / 'run'}"]
    assert losses(tmp_path / "run") == losses(whole)


def test_a_finished_run_is_only_read(whole: Path, texts: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    told: list[str] = []
    trained = tiny_run.train(whole, texts, told)
    assert told == [] and (whole / "metrics.jsonl").read_bytes() == before
    assert trained.params["embed"].shape == (258, 16)


def damage(folder: Path) -> None:
    """Changes one byte in the middle of every file that holds arrays (the library keeps some of them twice)."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["flipped", *(pytest.param(how, marks=pytest.mark.nightly) for how in ("truncated", "metadata"))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, texts: Path, whole: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", texts, 31, monkeypatch)
    newest = tmp_path / "run" / "checkpoints" / "30"
    if how == "flipped":
        damage(newest / "state")
    elif how == "truncated":
        path = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:40])
    else:
        for path in (newest / "about").iterdir():
            path.write_text("{")
    told: list[str] = []
    tiny_run.train(tmp_path / "run", texts, told)
    assert told[0].startswith(f"{newest}: damaged (") and told[0].endswith("moved to damaged-30, using step 27")
    assert (tmp_path / "run" / "damaged-30").is_dir()
    assert losses(tmp_path / "run") == losses(whole)


def test_a_value_that_changed_on_disk_is_found(tmp_path: Path) -> None:
    """Also when every file is sound: the checkpoint of another state under this one's fingerprints."""
    kept = checkpoint.Checkpoints(tmp_path / "c")
    state = {"a": np.arange(6.0, dtype=np.float32), "flag": np.array(True)}
    marks = checkpoint._marks(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_marks", lambda _: marks)
        kept.save(1, {**state, "a": state["a"][::-1].copy()}, {})  # the same numbers in other places
        kept.wait()
    told: list[str] = []
    assert kept.newest(state, lambda about: None, told.append) is None
    assert "['a'] is not what was saved" in told[0] and "starting from the beginning" in told[0]
    kept.close()


def test_which_checkpoints_stay(tmp_path: Path, texts: Path) -> None:
    tiny_run.train(tmp_path / "run", texts, steps=24, keep_last=2, keep_every=9)
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [9, 18, 21, 24]


def test_sigterm_saves_and_goes_on(tmp_path: Path, texts: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Loop._read

    def read_step(self: Any, i: int, metrics: Any) -> None:
        original(self, i, metrics)
        if i == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_read", read_step)
        with pytest.raises(Terminated, match=r"step 1[89] of 60 saved in .*; the same command goes on"):
            tiny_run.train(tmp_path / "run", texts)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert loop.steps_done(tmp_path / "run") in (18, 19)
    tiny_run.train(tmp_path / "run", texts)
    assert losses(tmp_path / "run") == losses(whole)


def poison(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Makes the loss of steps `first` to `last` NaN."""
    original = Placement.batch

    def batch(self: Any, local: dict[str, np.ndarray]) -> Any:
        n = getattr(self, "count", 0)
        self.count = n + 1
        if first <= n - 1 <= last:  # the first batch is for compiling
            local = {**local, "weights": local["weights"] * np.float32(np.nan)}
        return original(self, local)

    monkeypatch.setattr(Placement, "batch", batch)


def test_steps_that_are_not_finite_are_skipped_counted_and_told(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 5, 7)
    told: list[str] = []
    done = tiny_run.train(tmp_path / "run", texts, told, steps=12, max_skipped=4)
    assert done.skipped == 3 and len(told) == 3
    assert told[0].startswith("step 6: loss nan, gradient norm") and told[2].endswith("not finite, skipped (3 so far)")
    lines = [x for x in read(tmp_path / "run" / "metrics.jsonl") if "skipped" in x]
    assert lines[-1]["skipped"] == 3
    # The rate of a line is the one that its step was taken with: a skipped step does not move the schedule on.
    train = tiny_run.settings(texts, steps=12, max_skipped=4)
    factor, moved = train.schedule.factor(12), 0
    for before, line in zip([{"skipped": 0}, *lines], lines, strict=False):
        assert line["learning_rate"] == pytest.approx(train.optimizer.learning_rate * float(factor(moved)), rel=1e-6)
        moved += line["skipped"] == before["skipped"]
    assert moved == 9


def test_a_run_of_them_stops_with_the_last_good_state(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 8, 99)
        with pytest.raises(TrainingStopped, match=r"4 steps in a row were not finite .* the last good one was step 8"):
            tiny_run.train(tmp_path / "run", texts, steps=60, max_skipped=4, save_every=50)
    kept = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
    train = tiny_run.settings(texts, steps=60, max_skipped=4)
    cfg = tiny_run.model_config(tiny_run.MODEL)
    like = jax.eval_shape(lambda: step.initial(cfg, train, params.init(cfg, jax.random.key(0))))
    found = kept.newest(like, lambda about: None, lambda text: None)
    kept.close()
    assert found is not None and all(np.isfinite(x).all() for x in jax.tree.leaves(found[1]["params"]))


def test_a_full_disk_is_told_and_the_last_checkpoint_survives(tmp_path: Path, texts: Path) -> None:
    """A limit on the size of files stands in for the disk: writes fail half way, as they do there."""
    program = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(tiny_run.__file__).parent)!r})
import tiny_run
from lm.train import checkpoint
from lm.errors import TrainingStopped
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
original = checkpoint.Checkpoints.save
def save(self, step, state, about):
    if step == 9:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    original(self, step, state, about)
checkpoint.Checkpoints.save = save
try:
    tiny_run.train(Path({str(tmp_path / "run")!r}), Path({str(texts)!r}))
except TrainingStopped as e:
    print("stopped:", e)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert "stopped: " in done.stdout, done.stderr[-2000:]
    assert "MiB free on the disk); the last complete checkpoint is step 6" in done.stdout
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 4, done.stderr[-2000:]
    assert loop.steps_done(tmp_path / "run") == 6
    told: list[str] = []
    tiny_run.train(tmp_path / "run", texts, told)
    assert told == [f"going on from step 6 of {tmp_path / 'run'}"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20000


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer": {"name": "sgd_sai"}}, "train.optimizer"),
        (
            {"optimizer": {"name": "adamw", "learning_rate": 0.02}},
            "train.optimizer.learning_rate: 0.01 there, 0.02 here",
        ),
        ({"data": {"seq_len": 8}}, "train.data.seq_len: 16 there, 8 here"),
        ({"data": {"split_seed": 5}}, "train.data.split_seed: 0 there, 5 here"),
        ({"steps": 61}, "train.steps: 60 there, 61 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
    ],
)
def test_a_folder_of_another_run_is_refused(whole: Path, texts: Path, change: dict[str, Any], key: str) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as e:
        tiny_run.train(whole, texts, **change)
    assert f"holds a training run with another {key}" in str(e.value)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_changed_text_is_a_changed_data_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.txt").write_text(f"{name} is a letter. " * 40)
    tiny_run.train(tmp_path / "run", folder, steps=6)
    (folder / "a.txt").write_text("another text " * 60)
    with pytest.raises(UserError, match="holds a training run with another data"):
        tiny_run.train(tmp_path / "run", folder, steps=6)


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path, texts: Path) -> None:
    with session.alone(tmp_path / "run"), pytest.raises(UserError, match="another process is training here"):
        tiny_run.train(tmp_path / "run", texts)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        tiny_run.train(tmp_path / "file" / "run", texts)


def test_tensorboard_and_profiler_files_when_asked(tmp_path: Path, texts: Path) -> None:
    from tensorboardX.proto import event_pb2

    # In a process of its own: the profiler has crashed in one with thousands of programs.
    code = f"import pathlib, tiny_run as t; p = pathlib.Path; t.train(p({str(tmp_path / 'run')!r}), p({str(texts)!r}), "
    code += "steps=6, tensorboard=True, profile=(2, 3))"
    folders = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folders}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    data, tags = path.read_bytes(), set()
    while data:  # length, its checksum, the record, its checksum
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        tags |= {(value.tag, event.step) for value in event.summary.value}
        data = data[16 + size :]
    assert {("loss", 0), ("loss", 5), ("grad_norm", 3), ("final_bits_per_byte", 5)} <= tags
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_thread_may_train(tmp_path: Path, texts: Path) -> None:
    """Signals reach the main thread only; elsewhere a run does without."""
    worker = threading.Thread(target=tiny_run.train, args=(tmp_path / "run", texts), kwargs={"steps": 3})
    worker.start()
    worker.join()
    assert loop.steps_done(tmp_path / "run") == 3
