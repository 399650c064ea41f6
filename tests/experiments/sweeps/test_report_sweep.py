"""Reports of sweeps: what counts as one observation, intervals, tables, files; numbers are made up."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.reports import command
from experiments.sweeps import report as report_sweep
from experiments.sweeps import swept
from lm.errors import UserError

# Student's t for 95 %, from any printed table: degrees of freedom -> quantile.
PRINTED = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042}


@pytest.mark.parametrize("df", PRINTED)
def test_intervals_are_students(df: int) -> None:
    values = np.random.default_rng(df).normal(size=df + 1)
    half = swept.interval(list(values))
    assert half is not None
    assert half * math.sqrt(df + 1) / values.std(ddof=1) == pytest.approx(PRINTED[df], abs=5e-4)
    assert swept.interval([1.0]) is None


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng, n = np.random.default_rng(0), 4000
    hit = sum(abs(x.mean()) <= (swept.interval(x) or 0) for x in rng.normal(size=(n, 3)))
    assert abs(hit / n - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n)


def sweep(folder: Path, points: list[tuple[dict[str, Any], dict[str, Any]]], **head: Any) -> Path:
    """A sweep's folder with these points: (changes, arms)."""
    entries = []
    for i, (changes, arms) in enumerate(points, 1):
        state = "done" if arms else "new"
        name = f"{i}-point"
        entries.append({"point": i, "folder": name, "state": state, "overrides": changes, "arms": arms})
        if arms:
            config = {"seeds": list(changes.get("seeds", (0,)))}
            results = {"schema": 1, "experiment": "toy", "complete": True, "arms": arms, "config": config}
            (folder / name).mkdir(parents=True)
            (folder / name / "results.json").write_text(json.dumps(results))
    about = {"schema": 1, "file": "configs/toy.py", "scale": "smoke", "sweep": "widths", **head, "points": entries}
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def one(value: float) -> dict[str, Any]:
    return {"toy/loss": {"mean": value, "std": None, "n": 1}, "toy/text": {"mean": value / 2, "std": 0.1, "n": 7}}


LOSS = {16: (5.0, 5.2, 5.1), 64: (4.0, 4.4, 4.2), 256: (3.5, 3.4, 3.6)}  # by width; of three seeds
WINDOWS = (4, 8)  # of arm `b`, which the widths bear on too; its loss is not asked for here


def grid_points() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    out: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for width, losses in LOSS.items():
        for window in WINDOWS:
            for seed, loss in enumerate(losses):
                changes = {"model.d_ff": width, "arms.b.model.window": window, "train.steps": 9, "seeds": (seed,)}
                out.append((changes, {"a": one(loss), "b": one(loss + window)}))
    return out


def read_csv(folder: Path) -> list[Mapping[str, str]]:
    return list(csv.DictReader((folder / "report.csv").read_text().splitlines()))


def test_settings_are_grouped_and_each_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "sweep", [*grid_points(), ({"model.d_ff": 512, "seeds": (0,)}, {})])
    assert command.run([str(folder)]) == 0
    files = [Path(x) for x in capsys.readouterr().out.split("\n") if x]
    assert {f.name for f in files} >= {"report.md", "report.html", "report.csv"} and all(f.is_file() for f in files)
    rows = read_csv(folder)
    # Windows are arm b's: each loss of `a` was measured in two points, and is one observation of three.
    a = [r for r in rows if r["arm"] == "a" and r["metric"] == "toy/loss"]
    assert [(r["model.d_ff"], r["model.window"], r["n"]) for r in a] == [(str(w), "", "3") for w in LOSS]
    for row, losses in zip(a, LOSS.values(), strict=True):
        half = 4.302653 * np.std(losses, ddof=1) / math.sqrt(3)
        assert float(row["mean"]) == pytest.approx(np.mean(losses))
        assert [float(row["low"]), float(row["high"])] == pytest.approx(
            [np.mean(losses) - half, np.mean(losses) + half]
        )
    assert len([r for r in rows if r["arm"] == "b" and r["metric"] == "toy/loss" and r["n"] == "3"]) == 6
    text = (folder / "report.md").read_text()
    assert "Points: 18 done, 1 new of 19." in text and "The same in all points: train.steps = 9." in text
    assert "| 16 | — | 5.100 ± 0.248 (3) | — |" in text and "| 16 | 4 | — | 9.100 ± 0.248 (3) |" in text
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "5.100 ± 0.248 (3)" in page
    for picture in (f for f in files if f.suffix == ".png"):
        assert imread(picture)[..., :3].std() > 0.05  # something is drawn


def test_seeds_of_one_point_and_single_ones(tmp_path: Path) -> None:
    several = {"toy/loss": {"mean": 2.0, "std": 1.0, "n": 6, "by_seed": [1.0, 2.0, 3.0]}}
    points = [
        ({"model.d_ff": 4, "seeds": (0, 1, 2)}, {"a": several}),
        ({"model.d_ff": 8, "seeds": (0,)}, {"a": one(7)}),
    ]
    report_sweep.write(sweep(tmp_path / "sweep", points), tmp_path / "out")
    first, second = [r for r in read_csv(tmp_path / "out") if r["metric"] == "toy/loss"]
    assert first["n"] == "3" and float(first["high"]) - 2.0 == pytest.approx(4.302653 / math.sqrt(3))
    assert (second["n"], second["mean"], second["low"], second["std"]) == ("1", "7.0", "", "")
    assert "| 8 | 7 (1) |" in (tmp_path / "out" / "report.md").read_text()


def test_a_search(tmp_path: Path) -> None:
    trials = [
        {"trial": i + 1, "folder": f"{i + 1}-point", "state": "complete", "value": v} for i, v in enumerate((3, 1))
    ]
    head = {"sweep": None, "search": "rate", "objective": "minimize a:toy/loss", "trials": trials, "best": trials[1]}
    points = [({"rate": 0.1, "decay": 0.3}, {"a": one(3.0)}), ({"rate": 0.4, "decay": 0.2}, {"a": one(1.0)})]
    files = report_sweep.write(sweep(tmp_path, points, **head), tmp_path)
    assert [f.name for f in files if f.suffix == ".png"] == [
        "sweep_toy_over_rate.png",
        "sweep_toy_over_decay.png",
        "sweep_trials.png",
    ]
    assert "Best of 2 trials (minimize a:toy/loss): 1 in trial 2, 2-point." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "sweep.json: not valid JSON ("),
        ("[]", "sweep.json: expected an object"),
        ('{"points": []}', "no point has"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match="valid: ") as e:
        command.run([str(tmp_path)])
    assert said in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
