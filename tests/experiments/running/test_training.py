"""Experiments that train: arms and seeds, sharing, overrides, and what a mistake gets, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from experiments import run
from lm.objectives.base import Batch, LossOut, Objective
from lm.objectives.forward import Forward
from lm.plug import table
from lm.train import loop
from lm.train.log import read

ROOT = Path(__file__).resolve().parents[3]
CONFIG = '''
"""Hypothesis: none. Cost: seconds."""

from ml_collections import ConfigDict

from experiments.claims import claim

SCALES = ("smoke", "laptop")


def get_config(scale="laptop"):
    c = ConfigDict(convert_dict=False)
    c.name = "trains"
    c.scale = scale
    c.paper = {"title": "A Toy", "arxiv": "0000.00000", "claim": "it learns"}
    c.checkpoint = "random"
    c.model = {"vocab_size": 258, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "max_positions": 32}
    c.train = {
        "steps": 6, "batch": 8, "eval_every": 3, "eval_rows": 8, "final_rows": 8, "save_every": 3,
        "data": {"texts": ("TEXTS",), "tokenizer": "bytes", "seq_len": 16, "held_out": 0.3},
    }
    c.baseline = "adamw"
    c.measures = {
        "training": {"name": "train_log", "bin": 2},
        "nll": {"name": "nll_by_position", "texts": ("python-docs",), "tokens": 24, "bin": 8},
    }
    c.arms = {
        "adamw": {},
        "window": {"model.pattern.name": "sliding_window", "model.pattern.window": 4, "only": ("nll",)},
        "lion": {"train.optimizer.name": "lion", "train.optimizer.learning_rate": 1e-3, "only": ("training",)},
        "trained_window": {
            "trains": True, "model.pattern.name": "sliding_window", "model.pattern.window": 4, "only": ("training",),
        },
    }
    return c


def claims(r):
    return [claim("the loss is finite", lambda: (r.mean("adamw", "training/nll") < 100, {}))]
'''


@pytest.fixture
def config(experiment: Callable[..., Path]) -> Path:
    return experiment("trains", CONFIG, [f"This is text number {i}. " * (10 + i) for i in range(8)])


def trainings(root: Path) -> list[Path]:
    return sorted((root / "cache" / "trained").glob("*"))


def test_arms_train_once_each_and_share_what_is_the_same(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = config.parent
    assert run.main([f"--config={config}", "--workdir=run", "--config.seeds=(0,1)"]) == 0
    made = json.loads((root / "run" / "results.json").read_text())
    assert made["complete"] and made["claims"][0]["holds"]
    # three trainings for each of two seeds: `window` reads what `adamw` trained
    assert len(trainings(root)) == 6
    arms = made["arms"]
    assert arms["adamw"]["training/nll"]["n"] == 2 and arms["adamw"]["training/nll"]["std"] > 0
    assert arms["adamw"]["nll/nll_inside"]["mean"] != arms["window"]["nll/nll_inside"]["mean"]
    assert arms["adamw"]["training/nll"]["mean"] != arms["trained_window"]["training/nll"]["mean"]
    assert arms["lion"]["training/optimizer_mib"]["mean"] == pytest.approx(
        arms["adamw"]["training/optimizer_mib"]["mean"] / 2, rel=1e-2
    )
    held = made["curves"]["adamw"]["training/held_out"]
    assert held["x"] == [0, 3, 6] and held["y"][0] > held["y"][-1]
    assert made["curves"]["adamw"]["training/loss"]["x"] == [0, 2, 4]
    assert made["config"]["train"]["optimizer"]["name"] == "adamw" and made["config"]["train"]["data"]["seq_len"] == 16
    capsys.readouterr()

    # the run folder rebuilds the run, and nothing is trained again for it or for another experiment of the same base
    before = {p: p.stat().st_mtime_ns for f in trainings(root) for p in f.rglob("*") if p.name != "lock"}
    assert run.main(["--config=run/config.json", f"--file={config}", "--workdir=again"]) == 0
    assert "10 of them kept" in capsys.readouterr().out
    assert run.main([f"--config={config}", "--workdir=more", "--config.measures.nll.tokens=20"]) == 0
    assert {p: p.stat().st_mtime_ns for f in trainings(root) for p in f.rglob("*") if p.name != "lock"} == before


def test_overrides_reach_the_training(config: Path) -> None:
    root = config.parent
    changes = [
        "--config.train.steps=4",
        "--config.train.optimizer=sgd_sai",
        "--config.train.optimizer.learning_rate=0.02",
        "--config.train.schedule.name=wsd",
        "--config.train.data.packing=best_fit",
        "--config.train.accumulate=2" if jax.device_count() <= 4 else "--config.train.clip=None",
        "--config.arms.lion.train.steps=5",
    ]
    assert run.main([f"--config={config}", "--workdir=run", "--arms=adamw,lion", *changes]) == 0
    found = {
        f["train"]["steps"]: f["train"] for f in (json.loads((t / "run.json").read_text()) for t in trainings(root))
    }
    assert set(found) == {4, 5}
    assert found[4]["optimizer"]["name"] == "sgd_sai" and found[4]["optimizer"]["learning_rate"] == 0.02
    assert found[4]["schedule"]["name"] == "wsd" and found[4]["data"]["packing"] == "best_fit"
    assert found[5]["optimizer"]["name"] == "lion" and found[5]["schedule"]["name"] == "wsd"


def test_training_goes_on_from_a_pretrained_checkpoint(config: Path, checkpoint: Any) -> None:
    root, folder = config.parent, checkpoint()
    text = config.read_text().replace('c.checkpoint = "random"', f'c.checkpoint = "{folder}"')
    config.write_text("\n".join(line for line in text.splitlines() if "c.model =" not in line))
    assert (
        run.main([f"--config={config}", "--workdir=run", "--arms=adamw", "--config.train.optimizer.learning_rate=1e-8"])
        == 0
    )
    (made,) = trainings(root)
    assert json.loads((made / "run.json").read_text())["start"] != "random"
    from lm import interop
    from lm.train.checkpoint import Checkpoints

    pretrained = interop.load(str(folder)).params
    kept = Checkpoints(made / "checkpoints")
    state = kept.manager.restore(6)["state"]
    kept.close()
    np.testing.assert_allclose(state["params"]["embed"], pretrained["embed"], atol=1e-5)


def test_a_checkpoint_of_another_model_is_refused_before_any_training(
    config: Path, checkpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config that describes a model of its own, and a checkpoint of other shapes: one line on what differs."""
    source = f"--config.checkpoint={checkpoint()}"
    for file in (config, ROOT / "configs" / "pretrain.py"):
        assert run.main([f"--config={file}:smoke", "--workdir=run", source]) == 2
        err = capsys.readouterr().err
        assert "the model would have" in err and "the checkpoint's is" in err and err.count("\n") == 1
    assert not Path("run").exists()


LINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (("--config.train.step=3",), ("train.step: unknown key", "'steps'")),
    "key without a value": (("--config.train=3",), ("config.train: name the key",)),
    "unknown nested key": (("--config.train.data.text=kjv",), ("train.data.text: unknown key", "'texts'")),
    "unknown optimizer": (("--config.train.optimizer=adam",), ("train.optimizer.name", "'adamw'")),
    "field of another optimizer": (("--config.train.optimizer.momentum=0.5",), ("train.optimizer.momentum",)),
    "wrong type": (("--config.train.steps=many",), ("train.steps", "expected int")),
    "nothing to accumulate": (("--config.train.accumulate=3",), ("train.accumulate: 3 does not divide",)),
    "small corpus": (("--config.train.batch=1000",), ("train.batch: 1000 rows asked for", "more text")),
    "rows longer than the text": (("--config.train.data.seq_len=50000",), ("train.data.seq_len: 50000",)),
    "rows longer than positions": (
        ("--config.model.positions=learned", "--config.model.positions.size=8"),
        ("train.data.seq_len: 16 tokens, but model.positions has 8 rows",),
    ),
    "foreign vocabulary": (("--config.train.data.tokenizer=bpe:300",), ("model.vocab_size = 258",)),
    "batch and devices": (("--config.train.batch=12",), ("train.batch: 12 rows", "not divisible by 8 devices")),
    "missing text": (("--config.train.data.texts=nowhere.txt",), ("train.data.texts", "nowhere.txt")),
    "one document": (("--config.train.data.texts=python-docs",), ("train.data.held_out", "one document")),
    "training key of an arm": (("--config.arms.lion.train.stepz=3",), ("arms.lion", "train.stepz", "'steps'")),
    "trains is a word": (("--config.arms.window.trains=yes",), ("arms.window", "trains: expected True or False")),
}


@pytest.mark.parametrize("case", LINES)
def test_a_mistake_is_one_line_before_any_training(config: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, names = LINES[case]
    assert run.main([f"--config={config}", "--workdir=run", *args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == "", (out, err)
    for name in names:
        assert name in err
    assert not (config.parent / "run").exists() and trainings(config.parent) == []


def test_an_arm_cannot_train_where_nothing_is_trained(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text()
    start, end = text.index("    c.train = {"), text.index("    c.baseline")
    config.write_text(text[:start] + text[end:])
    assert run.main([f"--config={config}", "--workdir=run"]) == 2
    assert "arms.lion: train.optimizer.name: nothing is trained; valid: set config.train" in capsys.readouterr().err


def test_sigterm_ends_the_command_with_code_0_and_it_goes_on(config: Path) -> None:
    """The real process, as a cluster treats it."""
    root = config.parent
    args = [f"--config={config}", "--workdir=run", "--arms=adamw", "--config.train.steps=2000"]
    command = [sys.executable, "-m", "experiments.run", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    child = subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if any(loop.steps_done(f) >= 9 for f in trainings(root)):
            child.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err[-2000:]
    line = err.strip().splitlines()[-1]
    assert line.startswith("terminated: step ") and line.endswith("the same command goes on")
    (folder,) = trainings(root)
    saved = loop.steps_done(folder)
    assert f"step {saved} of 2000 saved" in line and 9 <= saved < 2000
    steps = [x["step"] for x in read(folder / "metrics.jsonl") if "loss" in x]
    assert steps == list(range(saved))


@pytest.mark.parametrize(
    "name", ["pretrain", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("chat", "fourier_head", "sgd_sai"))]
)
def test_a_training_config_runs_at_its_smallest_scale(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECODER_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm.compat.keep_compiled", lambda folder: None)
    assert run.main([f"--config={ROOT}/configs/{name}.py:smoke", f"--workdir={tmp_path / name}"]) == 0
    made = json.loads((tmp_path / name / "results.json").read_text())
    assert made["complete"] and all(c["holds"] is not None or "deviation" in c["missing"] for c in made["claims"])
    if name == "sgd_sai":
        mib = made["arms"]["adamw"]["training/optimizer_mib"]["mean"]
        assert made["arms"]["sgd_sai"]["training/optimizer_mib"]["mean"] == pytest.approx(mib / 2, rel=1e-2)


@pytest.mark.nightly
def test_mixtures_train_and_are_measured_at_their_smallest_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training each: a program per router would take minutes (tests/ffn has every router)."""
    monkeypatch.setenv("DECODER_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm.compat.keep_compiled", lambda folder: None)
    made: dict[str, Any] = {}
    for name, arms in (("moe_routers", "bias"), ("openmoe", "moe,capacity,capacity_k")):
        args = [f"--config={ROOT}/configs/{name}.py:smoke", f"--workdir={tmp_path / name}", f"--arms={arms}"]
        assert run.main(args) == 0
        made[name] = json.loads((tmp_path / name / "results.json").read_text())
    row = made["moe_routers"]["arms"]["bias"]
    assert row["training/moe_max_vio"]["mean"] >= 0 == row["training/moe_dropped"]["mean"]
    assert 0 < row["training/moe_bias_range"]["mean"] <= 4 * 2e-3 and row["training/tokens_per_second"]["mean"] > 0
    assert all(c["holds"] is None for c in made["moe_routers"]["claims"])  # every one compares two arms
    holds = [c["holds"] for c in made["openmoe"]["claims"]]
    assert holds[0] is None and None not in holds[1:]
    assert {"routing/dropped", "routing/spread_id", "routing/spread_position", "history/overlap"} <= set(
        made["openmoe"]["curves"]["moe"]
    )
    arms = made["openmoe"]["arms"]
    assert arms["moe"]["routing/dropped"]["mean"] == 0 < arms["capacity_k"]["routing/dropped"]["mean"]
    assert arms["capacity"]["routing/dropped"]["mean"] > arms["capacity_k"]["routing/dropped"]["mean"]


@dataclass(frozen=True)
class Towards(Objective):
    """Cross-entropy to what a frozen model says."""

    models: ClassVar[tuple[str, ...]] = ("teacher",)

    def loss(self, forward: Forward, batch: Batch) -> LossOut:
        inputs, teacher = forward.rows(batch), forward.models["teacher"]
        log_p = jax.nn.log_softmax(forward.model.readout(forward.params, forward(inputs).hidden_BTD))
        nll = -(jax.nn.softmax(teacher.logits(teacher(inputs).hidden_BTD)) * log_p).sum(-1)
        own = (batch["weights"] * nll).sum()
        return LossOut(own, {"nll": own, "weight": batch["weights"].sum(), "z": 0 * own, "correct": 0 * own})


def test_an_arm_teaches_another(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frozen model of ``train.models`` is another arm's training, or a checkpoint; it is trained first, and once."""
    monkeypatch.setitem(table("lm.objectives"), "towards", Towards)
    student = "--config.arms.lion.train.objective=towards"
    shared = [f"--config={config}", "--arms=adamw,lion", student]
    assert run.main([*shared, "--config.arms.lion.train.models={'teacher':'arm:adamw'}", "--workdir=run"]) == 0
    kept = trainings(config.parent)
    assert len(kept) == 2
    about = {json.loads((folder / "run.json").read_text())["train"]["objective"]["name"]: folder for folder in kept}
    said = json.loads((about["towards"] / "run.json").read_text())
    assert said["train"]["models"] == {"teacher": "arm:adamw"} and said["models"] == {"teacher": about["causal"].name}
    made = json.loads((config.parent / "run" / "results.json").read_text())
    held = made["curves"]["lion"]["training/held_out"]["y"]
    assert np.isfinite(held).all() and held[-1] < held[0]
    checkpoint = f"--config.arms.lion.train.models={{'teacher':'{about['causal']}'}}"
    assert run.main([*shared, checkpoint, "--workdir=other"]) == 0
    assert len(trainings(config.parent)) == 3
    capsys.readouterr()
    for place, message in (
        ("arm:adam", "arms.lion: train.models.teacher: unknown name 'adam' (did you mean 'adamw'?)"),
        ("arm:lion", "arms.lion: train.models.teacher: arm 'lion' waits for this one"),
    ):
        wrong = f"--config.arms.lion.train.models={{'teacher':'{place}'}}"
        assert run.main([*shared, wrong, "--workdir=wrong", "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert run.main([*shared, "--workdir=wrong", "--dry-run"]) == 2
    assert "train.models.teacher: is missing, train.objective asks for it" in capsys.readouterr().err
