"""What a run is, which checkpoints are its own, and what training may import."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import tiny_run

from lm.config import model_config
from lm.errors import UserError
from lm.train import folder
from lm.train.data import prepare
from lm.train.metrics import plain
from lm.train.run import Run, Start

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkpoint_of_another_run_is_refused_by_name(texts: Path, tmp_path: Path) -> None:
    train = tiny_run.settings(texts)
    run = Run(model_config(tiny_run.MODEL), train, prepare(train, tmp_path / "data"), tmp_path, seed=3)
    saved = json.loads(json.dumps(run.about))
    run.check_same({**saved, "step": 5, "fingerprints": {}})
    assert saved["start"] == Start().identity == "random"
    saved["model"]["d_ff"] = 25
    with pytest.raises(UserError, match=r"holds a training run with another model\.d_ff: 25 there, 24 here; valid: "):
        run.check_same(saved)


def test_steps_of_complete_checkpoints(tmp_path: Path) -> None:
    assert folder.steps(tmp_path) == []
    for name in ("12", "3", "7.orbax-checkpoint-tmp-1"):
        (tmp_path / folder.CHECKPOINTS / name).mkdir(parents=True)
    assert folder.steps(tmp_path) == [3, 12]


def test_what_json_cannot_hold() -> None:
    assert [plain(x) for x in (1.5, float("nan"), float("inf"), 3, None)] == [1.5, "nan", "inf", 3, None]


def test_training_knows_no_foreign_formats() -> None:
    """`lm.interop` reads what training wrote; training imports nothing of it, and data nothing of either."""
    wrong = []
    for part, above in (("train", ("interop",)), ("data", ("interop", "train", "model"))):
        for path in sorted((ROOT / "lm" / part).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{name}" for name in names]
                wrong += [f"{path.name}: {n}" for n in names for a in above if f"{n}.".startswith(f"lm.{a}.")]
    assert wrong == []
