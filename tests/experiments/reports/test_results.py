"""Statistics, curves over seeds, claims, the experiment list and the progress line."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from toy_experiment import CONFIG, Lab

from experiments import list as list_
from experiments.reports import results
from experiments.running import progress
from experiments.running.cache import Cache, Point, key, write_json
from experiments.spec import registry
from experiments.spec.claims import Missing, Results, claim
from lm.errors import UserError


def test_statistics() -> None:
    assert results.statistics([2.0]) == {"mean": 2.0, "std": None, "n": 1}  # one sample has no deviation
    assert results.statistics([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2)), "n": 2}
    assert math.isnan(results.statistics([1.0, math.nan])["mean"])


def test_curves_of_several_seeds() -> None:
    line = [{"x": [0, 1], "y": [1.0, 2.0], "y_by_sample": [[1.0, 2.0]], "names": ["a"]}]
    line.append({"x": [0, 1], "y": [3.0, None], "y_by_sample": [[3.0, None]], "names": ["b"]})
    mean = results.average(line)
    assert mean["y"][0] == 2.0 and math.isnan(mean["y"][1])
    assert mean["y_by_sample"] == [[1.0, 2.0], [3.0, None]] and mean["names"] == ["a", "b"]
    grid = [{"kind": "grid", "x": [0], "y": [0, 1], "z": [[a], [1.0]]} for a in (0.0, 1.0)]
    assert results.average(grid)["z"] == [[0.5], [1.0]]
    assert results.average([grid[0], {**grid[1], "z": [[1.0]]}]) == grid[0]  # other shapes are not mixed


def test_clean_is_strict_json() -> None:
    import numpy as np

    value = {"a": (1, math.nan), "b": np.float32(0.5), "c": np.array([math.inf]), "d": np.bool_(True)}
    assert json.loads(json.dumps(results.clean(value), allow_nan=False)) == {
        "a": [1, None],
        "b": 0.5,
        "c": [None],
        "d": True,
    }
    assert results.clean([math.nan, -math.inf], words=True) == ["NaN", "-infinite"]


def test_a_claim_about_nan_fails_and_says_so(lab: Lab) -> None:
    lab.config.write_text(CONFIG.replace('"value": 1.0}', '"value": float("nan")}'))
    assert lab("--arms=zero,window") == 0
    made = lab.results()
    assert made["arms"]["zero"]["toy/value"] == {"mean": None, "std": None, "n": 4, "by_seed": [None, None]}
    assert made["claims"][1]["holds"] is False and made["claims"][1]["measured"] == {"zero": "NaN"}


def test_claims() -> None:
    r = Results({"a": {"m/x": {"mean": 1.0, "std": None, "n": 1}}, "b": {}}, "a")
    assert (r.arms, r.has("a", "m/x"), r.has("b", "m/x"), r.mean("a", "m/x"), r.n("a", "m/x")) == (
        ["a"],
        True,
        False,
        1,
        1,
    )
    for ask in (lambda: r.mean("b", "m/x"), lambda: r.mean("c", "m/x"), lambda: r.std("a", "m/x")):
        with pytest.raises(Missing):
            ask()
    made = claim("yes", lambda: (r.mean("a", "m/x") > 0, {"x": 1.0}), paper=3)
    assert made.to_dict() == {"text": "yes", "holds": True, "measured": {"x": 1.0}, "paper": 3}
    assert claim("no", lambda: (False, {})).holds is False
    unknown = claim("unknown", lambda: (True, {"x": r.mean("b", "m/x")}))
    assert (unknown.holds, unknown.measured, unknown.missing) == (None, {}, "b m/x")
    assert claim("index", lambda: (True, {"x": {"a": 1.0}["b"]})).missing == "b"

    def wrong() -> tuple[bool, dict[str, float]]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # a mistake in a claim is no missing number
        claim("wrong", wrong)


def test_keys_follow_content(tmp_path: Path) -> None:
    what: dict[str, Any] = {"model": {"a": 1, "b": [2]}, "seed": 0}
    assert key(what) == key({"seed": 0, "model": {"b": [2], "a": 1}})
    assert len({key(what), key({**what, "seed": 1}), key({**what, "seed": None})}) == 3
    cache = Cache(tmp_path / "run", tmp_path / "shared")
    cache.put(Point(what, {"x": [math.nan, 1.0]}))
    assert [len(list((tmp_path / f / "points").iterdir())) for f in ("run", "shared")] == [1, 1]
    other = Cache(tmp_path / "other", tmp_path / "shared")
    assert other.get(what, own=True) is None
    found = other.get(what)
    assert found is not None and math.isnan(found.samples["x"][0])
    other.adopt(found)
    assert other.get(what, own=True) is not None


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot be written"):
        write_json(path / "below" / "b.json", {})


def test_the_list(lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROOT", lab.root)
    (lab.root / "configs").mkdir()
    (lab.root / "configs" / "broken.py").write_text("import absent_module")
    (lab.root / "configs" / "_helper.py").write_text("import absent_module")
    lab.config.rename(lab.root / "configs" / "toy.py")
    folder = f"--configs={lab.root / 'configs'}"
    assert list_.main([folder]) == 0
    broken, toy = capsys.readouterr().out.splitlines()[2:]
    assert "does not load" in broken and "ModuleNotFoundError" in broken and "absent_module" in broken
    assert "smoke laptop" in toy and "not run" in toy and "0000.00000" in toy and "two is more than one" in toy
    assert lab(config=str(lab.root / "configs" / "toy.py"), workdir=lab.root / "runs" / "mine") == 0
    capsys.readouterr()
    list_.main([folder])
    assert "2 holds, 1 not measured (laptop)" in capsys.readouterr().out.splitlines()[3]
    # committed results come first
    made = {**lab.results(lab.root / "runs" / "mine"), "scale": "long", "claims": [{"text": "x", "holds": False}]}
    write_json(lab.root / "results" / "kept" / "results.json", made)
    write_json(lab.root / "results" / "torn" / "results.json", {"schema": 0})
    list_.main([folder])
    assert "1 fails (long)" in capsys.readouterr().out.splitlines()[3]
    list_.main([folder, "--json"])
    first, second = json.loads(capsys.readouterr().out)
    assert "absent_module" in first["error"] and second["error"] is None
    assert second["last"]["verdicts"] == {"FAILS": 1} and second["paper"]["title"] == "A Toy"
    assert second["scales"] == ["smoke", "laptop"]


def test_every_config_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [e["file"] for e in found] == sorted(p.name for p in registry.CONFIGS.glob("[!_]*.py"))
    assert [e for e in found if e["error"]] == []


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = progress.Progress(10.0, stream)
    bar.begin("a / nll")
    now[0] += 30
    bar.at(0.5, 4.0, "Genesis")  # a fifth of all work in 30 s: 120 s to go
    bar.end(4.0)
    bar.begin("b / nll")
    now[0] += 5
    bar.at(0.1, 6.0, "too soon for another line")
    bar.end(6.0)
    assert stream.getvalue().splitlines() == [
        "  0% a / nll: starts",
        " 20% a / nll: Genesis, 2 min left",
        " 40% b / nll: starts, 45 s left",
    ]
    assert bar.fraction == 1.0
    assert [progress.duration(s) for s in (7, 100, 6000)] == ["7 s", "2 min", "1 h 40 min"]


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = progress.Progress(2.0, stream)
    bar.begin("a / nll")
    bar.at(1.0, 1.0, "Genesis")
    bar.end(1.0)
    bar.last = 0.0
    bar.begin("b / nll")
    bar.close()
    text = stream.getvalue()
    assert "50%|" in text and "b / nll" in text and "\n" not in text.strip()
