"""Searches with Optuna: what is proposed and told, interruptions, failures, mistakes; runs are a small stand-in."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import pytest
from fake_sweeps import Sweeps

from experiments.spec import registry
from experiments.sweeps.points import literal

SPACE = """

def search_value(trial):
    return {"measures.toy.value": trial.suggest_float("value", 0.5, 8.0), "seeds": (trial.suggest_int("seed", 0, 99),)}


def search_choice(trial):
    return {"measures.toy.value": trial.suggest_categorical("value", (1.0, 3.0, 2.0))}
"""
ASKS = ("--search=optuna", "--sweep=value", "--minimise=window:toy/value")


@pytest.fixture
def o(s: Sweeps) -> Sweeps:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    s.write(SPACE)
    return s


def made(o: Sweeps) -> dict[str, Any]:
    return json.loads((o.work / "sweep.json").read_text())


def proposed(o: Sweeps) -> list[str]:
    return [p["overrides"]["measures.toy.value"] for p in made(o)["points"]]


@pytest.mark.parametrize(("storage", "n"), [("", 13), ("sqlite", 5)])  # TPE takes over after ten
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(o: Sweeps, storage: str, n: int) -> None:
    more = [f"--storage=sqlite:///{o.root}/study.db"] if storage else []
    assert o(*ASKS, f"--trials={n}", *more) == 0 and len(o.calls) == n
    unbroken, whole = proposed(o), made(o)
    assert whole["search"] == "value" and whole["objective"] == "minimize window:toy/value"
    assert [t["trial"] for t in whole["trials"]] == list(range(1, n + 1))
    values = [t["value"] for t in whole["trials"]]
    assert values == [float(v) + 1 for v in unbroken]  # the arm `window` adds 1: it is its metric that is told
    assert whole["best"]["value"] == min(values) and f"best         {min(values)} in " in o.out
    assert o(*ASKS, f"--trials={n}", *more) == 0 and o.calls == []  # nothing is left to do

    shutil.rmtree(o.work)
    (o.root / "study.db").unlink(missing_ok=True)
    fourth = "pathlib.Path('calls.txt').read_text().count('\\n') == 4"
    o.behave(f"if {fourth}: os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    assert o(*ASKS, f"--trials={n}", *more) == 130 and o.states() == "done done done interrupted"
    assert [t["state"] for t in made(o)["trials"]] == ["complete"] * 3 + ["running"]
    o.behave("")
    assert o(*ASKS, f"--trials={n}", *more) == 0 and len(o.calls) == n - 3
    assert proposed(o) == unbroken and made(o)["trials"] == whole["trials"]


def test_failed_trials_are_tried_once_more_and_equal_ones_run_once(o: Sweeps) -> None:
    asks = ("--search=optuna:random", "--sweep=choice", "--maximise=zero:toy/value", "--trials=8", "--parallel=2")
    o.behave("if value == 2.0: code, said = 3, 'error: too bad'")
    assert o(*asks) == 1 and sorted(set(o.calls)) == [1.0, 2.0, 3.0] and o.calls.count(1.0) == o.calls.count(3.0) == 1
    trials = made(o)["trials"]
    assert len(trials) == 8 and {t["value"] for t in trials} == {1.0, 3.0, None} and made(o)["best"]["value"] == 3.0
    failed = [t for t in trials if t["state"] == "fail"]
    assert failed and all(t["value"] is None for t in failed) and o.states().count("failed") == 1
    o.behave("")
    assert o(*asks) == 0 and o.calls == [2.0]  # failed trials do not count: as many are asked for, this point first
    trials = made(o)["trials"]
    assert sum(t["state"] == "complete" for t in trials) == 8 and trials[8]["value"] == 2.0
    assert o("--search=optuna", "--sweep=choice", "--minimise=zero:toy/value", "--trials=2") == 0 and o.calls == []
    assert made(o)["best"]["trial"] <= 2  # another question: another study, whose points were done already


def test_jobs_are_submitted_as_the_study_goes(o: Sweeps, submitit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert o(*ASKS, "--trials=3", "--engine=slurm", "--slurm=cluster=local") == 0 and len(o.calls) == 3
    assert o.err.index("done in") < o.err.rindex("submitted as job")


def test_the_space_of_a_config(o: Sweeps) -> None:
    """The one beside the sweep `tune`, at both ends of its parameters, is drawn from and accepted."""
    import optuna

    source, _ = registry.find(f"{registry.CONFIGS / 'sgd_sai.py'}:smoke")
    for values in ({"learning_rate": 1e-3, "weight_decay": 1e-3}, {"learning_rate": 0.1, "weight_decay": 0.1}):
        changes = source.module.search_sgd_sai(optuna.trial.FixedTrial(values))
        assert changes["arms.sgd_sai.train.optimizer.learning_rate"] == values["learning_rate"]
        assert all(literal(v, k) for k, v in changes.items())


WRONG = {
    "--search=optuna:tpee --minimise=zero:toy/value": "--search: optuna: unknown name 'tpee' (did you mean 'tpe'?)",
    "--search=skopt --minimise=zero:toy/value": "--search: found 'skopt'; valid: optuna, or optuna:SAMPLER",
    "--search=optuna": "--minimise: missing; valid: one of --minimise=ARM:METRIC and --maximise=ARM:METRIC",
    "--search=optuna --minimise=a:b/c --maximise=a:b/c": "--minimise: given beside --maximise; valid: one of",
    "--search=optuna --minimise=toy/value": "--minimise: found 'toy/value'; valid: ARM:METRIC",
    "--search=optuna --minimise=zeroo:toy/value": "the objective's arm: unknown name 'zeroo' (did you mean 'zero'?)",
    "--search=optuna --minimise=zero:tory/value": "the objective's measure of arm zero: unknown name 'tory'",
    "--search=optuna --minimise=zero:toy/value --trials=0": "--trials: found 0; valid: 1 or more",
    "--search=optuna --minimise=zero:toy/value --engine=print": "--engine=print: a search needs the results of earlier",
    "--search=optuna --minimise=zero:toy/value --storage=nosql://x": "--storage: nosql://x cannot be opened (",
    "--search=optuna --minimise=zero:toy/value --sweep=valu": "--sweep: unknown name 'valu' (did you mean 'value'?)",
    "--minimise=zero:toy/value": "--minimise: has no meaning without --search",
}


@pytest.mark.parametrize("args", WRONG)
def test_arguments_are_refused(o: Sweeps, args: str) -> None:
    words = args.split(" ")
    more = ["--sweep=value"] * ("--sweep" not in args) + ["--trials=2"] * ("--trials" not in args and len(words) > 1)
    more += ["--trials=2"] if words == ["--search=optuna"] else []
    assert o(*words, *more) == 2 and o.calls == [] and o.err.count("\n") == 1
    assert f"error: {WRONG[args]}" in o.err


BAD = {
    'return {"measures.toy.valu": 1.0}': "search bad: trial 1: measures.toy.valu: unknown key (did you mean 'value'?)",
    "return 1 / 0": "search bad: trial 1: search_bad() failed: ZeroDivisionError",
    "return 5": "search bad: trial 1: expected a dict from dotted keys to values, found 5",
    'return {"seeds": trial.suggest_float("a", 1.0, 0.0)}': "search bad: trial 1: search_bad() failed: ValueError",
}


@pytest.mark.parametrize("body", BAD)
def test_a_space_is_refused_before_anything_starts(o: Sweeps, body: str) -> None:
    o.write(f"\n\ndef search_bad(trial):\n    {body}\n")
    assert o("--search=optuna", "--minimise=zero:toy/value", "--trials=2") == 2 and not o.work.exists()
    assert o.err.startswith("error: ") and o.err.count("\n") == 1 and BAD[body] in o.err


def test_what_is_said_without_running(o: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    assert o(*ASKS, "--trials=5", "--dry-run") == 0 and not o.work.exists()
    assert "value      FloatDistribution(high=8.0" in o.out and "for example measures.toy.value=" in o.out
    assert o("--search=optuna", "--sweep=value", "--minimise=zero:toy/colour", "--trials=2") == 2
    assert "error: the objective's metric of arm zero: unknown name 'toy/colour'" in o.err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert o(*ASKS, "--trials=5") == 2 and "optuna is not installed; valid: pip install 'decoder-lab[optuna]'" in o.err
