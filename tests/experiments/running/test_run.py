"""`python -m experiments.run` from the arguments to the files it leaves, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_experiment import Lab, Toy

from experiments.reports import results_file
from experiments.running import runner
from lm.errors import UserError
from lm.files import summed

ROOT = Path(__file__).resolve().parents[3]


def test_a_run_leaves_everything(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab(f"--config={lab.config}:smoke") == 0
    made = lab.results()
    results_file.check(made)
    assert (made["experiment"], made["scale"], made["complete"]) == ("toy", "smoke", True)
    assert list(made["arms"]) == ["zero", "window", "also"]  # as defined, not sorted
    # seeds 0 and 1, two samples each: 1, 2, 2, 3
    value = {"mean": 2.0, "std": pytest.approx((2 / 3) ** 0.5), "n": 4, "by_seed": [1.5, 2.5]}
    assert made["arms"]["zero"]["toy/value"] == value
    assert made["arms"]["window"]["toy/value"]["mean"] == 3.0
    assert made["arms"]["zero"]["other/value"]["by_seed"] == [5.0, 6.0]
    assert set(made["arms"]["also"]) == {"toy/value", "toy/embed", "toy/up"}  # `only`
    assert [c["holds"] for c in made["claims"]] == [True, True, None]
    assert made["claims"][0] | {"holds": True, "measured": {"window": 3.0}, "paper": "2"} == made["claims"][0]
    assert made["claims"][2]["missing"] == "zero toy/colour"
    assert made["curves"]["window"]["toy/line"]["y"] == [2.0, 2.5]  # mean of the seeds' [2, 2] and [2, 3]
    assert made["notes"]["zero"]["toy"]["documents"][0]["name"] == "none"
    assert {"python", "jax", "jaxlib", "flax", "numpy", "platform", "device", "commit", "dirty"} <= set(
        made["environment"]
    )
    assert made["environment"]["seconds"] >= 0
    assert made["config"]["seeds"] == [0, 1] and made["config"]["measures"]["toy"]["tags"] == []
    out = capsys.readouterr().out
    for text in (
        "HOLDS  two is more",
        "NOT MEASURED  unknowable",
        "missing: zero toy/colour",
        "report.html",
        "2 ± 0.816 (4)",
    ):
        assert text in out
    for name in ("config.json", "environment.json", "report.html", "report.md", "toy_line.png"):
        assert (lab.folder / name).stat().st_size > 0, name
    assert [p.name for p in lab.folder.rglob("*") if p.name.startswith(".")] == []  # no temporary files left


def test_a_failing_claim_is_no_error(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab("--config.seeds=(0,)") == 0
    assert [c["holds"] for c in lab.results()["claims"]] == [True, False, None]
    assert "FAILS  one is more than two\n    zero = 1.5" in capsys.readouterr().out


def test_arms_share_parameters_unless_shapes_differ(lab: Lab) -> None:
    text = lab.config.read_text().replace('"also": {', '"wide": {"model.d_ff": 16},\n        "also": {')
    lab.config.write_text(text)
    assert lab() == 0
    arms = lab.results()["arms"]
    assert arms["zero"]["toy/embed"] == arms["window"]["toy/embed"] == arms["also"]["toy/embed"]
    assert arms["zero"]["toy/embed"]["std"] > 0  # the seeds draw different parameters
    assert arms["zero"]["toy/up"]["mean"] == arms["window"]["toy/up"]["mean"] < arms["wide"]["toy/up"]["mean"]


def test_finished_points_are_not_run_again(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab()
    assert len(lab.calls) == 10 and len(list((lab.folder / "points").iterdir())) == 10
    first = lab.results()
    assert lab() == 0 and lab.calls == []
    assert "10 points, 10 of them kept" in capsys.readouterr().out
    assert {k: v for k, v in lab.results().items() if k != "environment"} == {
        k: v for k, v in first.items() if k != "environment"
    }
    other = lab.root / "other"
    assert lab("--config.name=toy2", workdir=other) == 0 and lab.calls == []  # shared by runs
    assert len(list((other / "points").iterdir())) == 10
    assert lab("--fresh") == 0 and len(lab.calls) == 10
    assert lab("--config.measures.other.value=6", workdir=lab.root / "third") == 0
    assert sorted(lab.calls) == sorted(
        (pattern, 6.0, seed) for pattern in ("Causal", "SlidingWindow") for seed in (0, 1)
    )


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"what": {}}', '{"what": 1, "samples": {"a": ["x"]}}'])
def test_a_damaged_point_is_measured_again(lab: Lab, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    lab()
    before = lab.results()["arms"]
    victim = sorted((lab.folder / "points").iterdir())[0].name
    for folder in (lab.folder / "points", lab.root / "cache" / "points"):
        (folder / victim).write_text(damage)
    capsys.readouterr()
    assert lab() == 0 and len(lab.calls) == 1
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note:")]
    assert len(notes) == 2 and all(victim in x and "damaged" in x for x in notes)
    assert lab.results()["arms"] == before
    assert json.loads((lab.folder / "points" / victim).read_text())["samples"]


def test_points_of_another_code_are_announced(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab()
    for path in (lab.folder / "points").iterdir():
        data = json.loads(path.read_text())
        path.write_text(json.dumps(summed({**data, "made": {**data["made"], "code": "old"}})))
    capsys.readouterr()
    lab()
    assert "note: 10 kept points were measured by another version of lm/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted; finished"), (UserError("measures.toy: found 1; valid: 2"), 2, "error: ")],
)
def test_a_stopped_run_is_valid_and_goes_on(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr(Toy, "after", 1)
    monkeypatch.setattr(Toy, "error", error)
    assert lab() == code
    lines = [x for x in capsys.readouterr().err.splitlines() if "%" not in x]
    assert len(lines) == 1 and lines[0].startswith(said)
    partial = lab.results()
    results_file.check(partial)
    assert not partial["complete"] and list(partial["arms"]) == ["zero"]
    assert [c["holds"] for c in partial["claims"]] == [None, False, None]
    assert partial["claims"][0]["missing"] == "window toy/value"
    monkeypatch.setattr(Toy, "after", None)
    assert lab() == 0 and len(lab.calls) == 9
    assert lab.results()["complete"]


def test_results_are_assembled_once_a_minute(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning and at the end, and in between only where a minute has passed; the points are the truth."""
    times: list[int] = []
    write = runner.Runner.write

    def counted(self: runner.Runner) -> None:
        write(self)
        times.append(len(lab.results()["arms"].get("zero", {})))

    monkeypatch.setattr(runner.Runner, "write", counted)
    assert lab("--arms=zero") == 0 and times == [0, 6]
    monkeypatch.setattr(runner, "EVERY", 0.0)
    assert lab("--arms=zero", "--fresh") == 0 and len(times) == 2 + 1 + 4 + 1


def test_arms_by_and_by(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab("--arms=window") == 0 and len(lab.calls) == 4
    assert list(lab.results()["arms"]) == ["window"]
    assert "incomplete" in capsys.readouterr().out
    assert lab("--arms=zero,also") == 0 and len(lab.calls) == 6
    assert list(lab.results()["arms"]) == ["zero", "window", "also"]  # what was there stays, in the config's order


def test_a_run_folder_rebuilds_its_run(lab: Lab) -> None:
    assert lab("--config.arms.window.model.pattern.window=7", "--config.seeds=[3]") == 0
    again = lab.root / "again"
    assert lab(config=str(lab.folder / "config.json"), workdir=again) == 0 and lab.calls == []
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (lab.folder, again))
    assert ours == theirs and ours["config"]["seeds"] == [3] and ours["schema"] == 1
    assert ours["resolved"]["window"]["model"]["pattern"] == {"name": "sliding_window", "window": 7}
    first, second = lab.results(), lab.results(again)
    assert (first["arms"], first["claims"], first["curves"]) == (second["arms"], second["claims"], second["curves"])


def test_dry_run_writes_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(lab.root.rglob("*"))
    assert lab("--dry-run") == 0 and lab.calls == []
    out = capsys.readouterr().out
    assert "3 arms, 10 points" in out and "model.pattern='lm_infinite'" in out
    assert sorted(lab.root.rglob("*")) == before


def test_dry_run_without_the_checkpoint(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.config.write_text(lab.config.read_text().replace('"random"', '"checkpoints/absent"'))
    assert lab("--dry-run") == 0
    out = capsys.readouterr().out
    assert "checkpoint not at hand" in out
    assert "2,536" in out  # 258 x 8 embeddings, 3 norms, 4 x 64 attention, 3 x 64 feed-forward
    assert lab() == 2 and not lab.folder.exists()
    lab.config.write_text(lab.config.read_text().replace("c.model = {", "c.model = {} and {"))
    assert lab("--dry-run") == 0 and "unknown" in capsys.readouterr().out


def test_a_checkpoint_is_shared_and_seeds_that_do_not_matter_run_once(
    lab: Lab, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint()
    args = [f"--config.checkpoint={folder}", "--config.model.max_positions=64", "--config.measures.toy=fixed"]
    assert lab(*args) == 0
    # toy: once in three arms; other: seeds 0 and 1 in two arms
    assert len(lab.calls) == 3 + 4
    made = lab.results()
    embeds = {v["mean"] for metrics in made["arms"].values() for k, v in metrics.items() if k.endswith("/embed")}
    assert len(embeds) == 1
    model = json.loads((lab.folder / "config.json").read_text())["resolved"]["zero"]["model"]
    assert (model["n_kv_heads"], model["max_positions"]) == (1, 64)  # the checkpoint's, and the override
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert lab(*args, workdir=lab.root / "other") == 0 and len(lab.calls) == 7  # other content: nothing is reused


def test_values_from_the_command_line(lab: Lab) -> None:
    args = ["--config.measures.toy.tags", "1984", "--config.paper.title=On (0, 1)", "--config.model.pattern=streaming"]
    assert lab(*args, "--config.model.pattern.window=9", "--arms=zero") == 0
    made = lab.results()["config"]
    assert made["measures"]["toy"]["tags"] == ["1984"] and made["paper"]["title"] == "On (0, 1)"
    assert made["model"]["pattern"] == {"name": "streaming", "window": 9, "sinks": 4, "sink_positions": "cache"}


def test_default_workdir_and_scale(lab: Lab) -> None:
    from experiments import run

    assert run.main([f"--config={lab.config}:smoke", "--arms=also"]) == 0
    assert (lab.root / "runs" / "toy-smoke" / "results.json").is_file()
    assert run.main([f"--config={lab.config}", "--arms=also", "--dry-run"]) == 0


SLEEPER = """
import lm.measures, time, dataclasses
from lm.measures import Measure, Measured

@dataclasses.dataclass(frozen=True)
class Sleeper(Measure):
    seconds: float = 0.0
    def run(self, subject, progress):
        import numpy, jax
        print("measuring", self.seconds, flush=True)
        jax.jit(lambda x: jax.pure_callback(lambda y: (time.sleep(self.seconds), y)[1], x, x))(1.0).block_until_ready()
        return Measured({"seconds": [self.seconds]})

lm.measures.TABLE["sleeper"] = Sleeper
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_long_computation(lab: Lab, number: signal.Signals) -> None:
    """It arrives while the main thread waits inside a compiled computation; results.json has all finished points."""
    measures = 'c.measures = {"a": {"name": "sleeper"}, "b": {"name": "sleeper", "seconds": 60.0}}\n    old = {'
    text = lab.config.read_text().replace("c.measures = {", measures).replace('"only": ("toy",)', "")
    lab.config.write_text(SLEEPER + text.replace(', "measures.toy.value": 2.0', ""))
    command = [sys.executable, "-m", "experiments.run", f"--config={lab.config}", "--workdir=run"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "DECODER_LAB_CACHE": "cache"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while "measuring 60.0" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert [x for x in err.splitlines() if "%" not in x and x] == [
        "interrupted; finished points are kept, the same command goes on from there"
    ]
    assert lab.results()["arms"]["zero"]["a/seconds"]["n"] == 1 and out == ""
    results_file.check(lab.results())


def test_progress_lines_are_readable(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  0% zero / toy: starts" and "\r" not in "".join(lines)
    assert [x.split()[0] for x in lines] == [f"{10 * i}%" for i in range(10)]
    assert lines[-1].split(":")[0].endswith("also / toy / seed 1")


def test_records_are_typed(lab: Lab) -> None:
    lab("--arms=also")
    for path in (lab.folder / "points").iterdir():
        data: dict[str, Any] = json.loads(path.read_text())
        assert set(data) == {"what", "samples", "curves", "notes", "seconds", "made", "sum"}
        assert set(data["what"]) == {"checkpoint", "model", "measure", "reads", "seed", "device"}
        assert data["made"]["jax"] and data["made"]["code"]
