"""Sweeps: combinators, checks before anything starts, states of points, engines; most runs are a small stand-in."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_sweeps import TAIL, VALUES_SWEEP, Cluster, Sweeps
from hypothesis import example, given
from hypothesis import strategies as st
from toy_experiment import Lab

from experiments import sweep
from experiments.running import command
from experiments.running.plan import prepare
from experiments.spec import registry
from experiments.sweeps import chain, grid, local, points, prefix, product, slurm, subsample, zip_
from experiments.sweeps import shared as sweeps
from experiments.sweeps.points import literal
from lm.errors import UserError
from lm.train import session

ROOT = Path(__file__).resolve().parents[3]


def test_combinators() -> None:
    assert grid({"a.x": (1, 2)}, b=[3, 4]) == [{"a.x": x, "b": b} for x in (1, 2) for b in (3, 4)]
    assert zip_({"a": (1, 1), "b": (3, 4)}) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}]
    assert chain([{}], ({"a": i} for i in range(2))) == [{}, {"a": 0}, {"a": 1}]
    assert product(grid(a=(1, 2)), iter([{"b": 3}, {}])) == [{"a": 1, "b": 3}, {"a": 1}, {"a": 2, "b": 3}, {"a": 2}]
    assert prefix([{"window": 4}, {}], "arms.w.model.pattern") == [{"arms.w.model.pattern.window": 4}, {}]
    every = grid(a=range(20))
    some = subsample(every, 5, seed=1)
    assert some == subsample(every, 5, seed=1) != subsample(every, 5, seed=2) and subsample(every, 20) == every
    assert [p for p in every if p in some] == some and len(some) == 5
    assert grid(a=(1, 1.0, True, "1")) == [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}]  # not the same values
    assert literal((np.float64(0.5), np.int32(3), np.bool_(True), np.str_("a")), "k") == "(0.5, 3, True, 'a')"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NESTED = st.recursive(SCALARS, lambda v: st.lists(v) | st.tuples(v) | st.dictionaries(st.text(), v), max_leaves=8)


@given(NESTED)
@example((float("inf"), [-float("inf")]))
def test_values_survive_the_command_line(value: Any) -> None:
    line = shlex.join([f"--config.some.key={literal(value, 'some.key')}"])
    [(name, text)] = command.arguments(["--config=x", *shlex.split(line)])[1]
    assert "\0" not in line and name == "some.key" and repr(text.literal()) == repr(value)


BAD = {
    'yield {"seeds": (1,)}\n    yield {"modell.d_ff": 8}': ("sweep bad: point 2: config.modell: unknown key", "model"),
    'yield {"model.d_fff": 8}': ("sweep bad: point 1: model.d_fff: unknown key", "did you mean 'd_ff'?"),
    'yield {"model.d_ff": "wide"}': ("sweep bad: point 1: model.d_ff: ", "'wide'"),
    'yield {"seeds": 1}': ("sweep bad: point 1: config.seeds: ", ""),
    'yield {"model.pattern": "windowed"}': ("sweep bad: point 1: model.pattern.name: unknown name 'windowed'", "valid"),
    'yield {"arms.windo.model.d_ff": 8}': ("sweep bad: point 1: config.arms: ", "did you mean 'window'?"),
    'yield {"measures.toy.value": object()}': ("sweep bad: point 1: measures.toy.value: found <object", "type object"),
    'yield {"model.d_ff": 16}\n    yield {"model.d_ff": 16}': ("point 2: comes to the same settings as point 1", "16"),
    'yield {"model.pattern": "causal", "model.pattern.name": "causal"}': ("point 1: model.pattern.name: is set", ""),
    'yield {"model.n_heads": 3}': ("sweep bad: point 1: model", ""),
    "yield {1: 2}": ("sweep bad: point 1: expected a dict from dotted keys", "{1: 2}"),
    "return ()": ("sweep bad: gives no points", ""),
    "return grid(a=(1, 2, 1))": ("sweep bad: grid: a: found 1 twice", ""),
    "return grid(a='abc')": ("grid: a: found 'abc'; valid: a tuple or list", ""),
    "return grid({'a': (1,)}, a=(2,))": ("grid: a: is set twice", ""),
    "return grid(a=(object,))": ("of type type; valid: None", ""),
    "return grid(a=(float('nan'),))": ("grid: a: found nan", ""),
    "return zip_(a=(1, 2), b=(1,))": ("found 2 for a, 1 for b; valid: the same number", ""),
    "return zip_(a=(1, 1), b=(2, 2))": ("zip_: point 2 is point 1 again (a=1, b=2)", ""),
    "return chain([{'a': 1}], [{'a': 2}, {'a': 1}])": ("chain: point 3 is point 1 again", ""),
    "return product([{'model.pattern': 1}], [{'model.pattern.name': 2}])": ("product: model.pattern.name: is set", ""),
    "return subsample(grid(a=(1, 2)), 3)": ("subsample: n: found 3; valid: 1 to 2", ""),
    "yield 1 / 0": ("sweep bad: sweep_bad() failed: ZeroDivisionError", ""),
    "while True:\n        yield {}": ("sweep bad: more than 10000 points", ""),
}


@pytest.mark.parametrize("body", BAD)
def test_points_are_refused_before_anything_starts(s: Sweeps, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    s.write(f"{TAIL}def sweep_bad():\n    {body}\n")
    before = set(s.root.rglob("*"))
    assert s() == 2 and s.err.startswith("error: ") and s.err.count("\n") == 1
    assert all(text in s.err for text in BAD[body]), s.err
    assert set(s.root.rglob("*")) - before == {s.root / "calls.txt"}


WRONG = {
    "--config.sedes=(1,)": "error: config.sedes: unknown key (did you mean 'seeds'?)",  # no point's mistake
    "--config.measures.toy.value=9": "--config.measures.toy.value: sweep values: point 1 sets measures.toy.value",
    "--arms=zeroo": "error: --arms: unknown name 'zeroo'",
    "--sweep=vales": "--sweep: unknown name 'vales' (did you mean 'values'?)",
    "--engine=locl": "--engine: invalid choice: 'locl'",
    "--parallel=0": "--parallel: found 0; valid: 1 or more",
    "--paralel=2": "--paralel: unknown argument (did you mean '--parallel'?)",
    "--slurm=partition=x": "--slurm: has no meaning with --engine=local",
    "--engine=slurm --slurm=partition": "--slurm: found 'partition'; valid: KEY=VALUE",
    "--engine=slurm --slurm=colour=1": "error: --slurm: no colour",
    f"--workdir={__file__}": "is a file or holds another sweep",
}


@pytest.mark.parametrize("args", WRONG)
def test_arguments_are_refused(s: Sweeps, args: str, submitit: None) -> None:
    assert s(*args.split(" ")) == 2 and not s.work.exists()
    assert WRONG[args] in s.err and s.err.count("\n") == 1


def test_which_sweep_and_whose_folder(s: Sweeps) -> None:
    s.write(VALUES_SWEEP + '\n\ndef sweep_base():\n    yield {}\n\n\nsweep_note = "not a function"\n')
    assert s() == 2 and "has several; valid: base, values" in s.err
    assert s("--sweep=base", "--dry-run") == 0 and "-base  new    no changes" in s.out
    s.write("")
    assert s() == 2 and "has no sweep; valid: a function sweep_NAME()" in s.err
    s.write(VALUES_SWEEP)
    assert s("--dry-run") == 0 and s.out.count(" new    measures.toy.value=") == 3 and not s.work.exists()
    assert s() == 0
    (s.folder(2.0) / "config.json").unlink()
    assert s() == 2 and "but no config.json" in s.err
    s.write(VALUES_SWEEP.replace("sweep_values", "sweep_other"))
    assert s() == 2 and "holds another sweep" in s.err


TRICKY = """
def sweep_tricky():
    yield {"model.pattern.window": 3, "model.pattern": "sliding_window", "paper.title": "(0, 1)"}
    yield {"paper.title": "None", "measures.toy.tags": ("5", "it's a \\\\n 'b'"), "paper.numbers": {"a b": [1, (2,)]}}
    yield {"arms.window.model.pattern.window": 7, "seeds": (3,), "paper.claim": " $HOME `x` \\n", "name": "5"}
"""


def test_printed_lines_say_the_same_settings(s: Sweeps) -> None:
    s.write(TRICKY)
    assert s("--engine=print", "--config.measures.other.n=2", "--arms=zero,window") == 0
    lines = [shlex.split(x) for x in s.out.splitlines()]
    assert len(lines) == 3 and not s.work.exists()
    source, settings = registry.find(f"{s.config}:smoke")
    for line, wanted in zip(lines, source.module.sweep_tricky(), strict=True):
        assert tuple(line[:3]) == local.RUN
        args, overrides = command.arguments(line[3:])
        assert (args.config, args.arms, args.workdir.parent) == (f"{s.config}:smoke", "zero,window", s.work)
        assert overrides[0] == ("measures.other.n", "2") and {k: v.literal() for k, v in overrides[1:]} == wanted
        theirs = prepare(settings, overrides, args.arms).exp
        ordered = sorted(wanted.items(), key=lambda x: x[0] != "model.pattern")  # a plug before its fields
        ours = prepare(settings, [("measures.other.n", 2), *ordered], None).exp
        assert theirs == ours and repr(theirs) == repr(ours)


def test_done_points_are_skipped(s: Sweeps) -> None:
    assert s() == 0 and s.calls == [1.0, 2.0, 3.0]
    assert "[2/3] " in s.err and "starts" in s.err and "done in" in s.err and "3 done of 3 points" in s.out
    assert "zero toy/value" in s.out and "toy/more" not in s.out
    folder = s.folder(2.0)
    assert {p.name for p in folder.iterdir()} == {"DONE", "config.json", "environment.json", "log.txt", "results.json"}
    assert (folder / "log.txt").read_text().startswith("$ ") and "measured 2.0" in (folder / "log.txt").read_text()
    made = json.loads((s.work / "sweep.json").read_text())
    assert (made["schema"], made["sweep"], made["scale"]) == (1, "values", "smoke")
    point = made["points"][1]
    assert point["overrides"] == {"measures.toy.value": 2.0} and point["arms"]["window"]["toy/value"]["mean"] == 3.0
    rows = list(csv.DictReader((s.work / "sweep.csv").read_text().splitlines()))
    assert [r["also toy/value"] for r in rows] == ["3.0", "4.0", "5.0"] and rows[0]["zero toy/more"] == "7"
    assert [r["measures.toy.value"] for r in rows] == ["1.0", "2.0", "3.0"] and rows[0]["folder"] == s.folder(1.0).name
    assert s() == 0 and s.calls == [] and "[2/3] " + folder.name + ": done already" in s.err
    (folder / "results.json").unlink()  # without its results it is not done
    assert s() == 0 and s.calls == [2.0]
    assert s("--config.seeds=(4,)") == 0 and len(s.calls) == 3  # other settings: other folders
    assert s("--arms=zero", "--config.seeds=(6,)") == s("--arms=zero", "--config.seeds=(6,)") == 0 and s.calls == []
    assert s("--arms=window", "--config.seeds=(6,)") == 0 and len(s.calls) == 3  # more arms: the same folders
    assert s("--arms=zero", "--config.seeds=(6,)") == s("--arms=window", "--config.seeds=(6,)") == 0 and s.calls == []
    assert len([p for p in s.work.iterdir() if p.is_dir()]) == 9


def test_failed_points_are_tried_again(s: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session.alone(tmp_path), pytest.raises(UserError, match=local.BUSY), session.alone(tmp_path):
        pass  # what a run says whose training another process has
    s.behave("if value == 2.0:\n    code, said = 3, 'first\\nerror: too bad'")
    assert s() == 1 and s.calls == [1.0, 2.0, 3.0] and s.states() == "done failed done"
    assert "exit code 3: error: too bad (log: " in s.err
    failed = json.loads((s.folder(2.0) / "FAILED").read_text())
    assert failed["code"] == 3 and failed["lines"][-2:] == ["first", "error: too bad"]
    s.behave("")
    assert s() == 0 and s.calls == [2.0] and not (s.folder(2.0) / "FAILED").exists()
    assert (s.folder(2.0) / "log.txt").read_text().count("$ ") == 2  # both attempts
    monkeypatch.setattr(local, "RUN", ("/nonexistent/python",))
    assert s("--config.seeds=(5,)") == 1 and s.states() == "failed failed failed" and not list(s.work.glob("*/RUNNING"))


SIGNAL = "if value == 2: os.kill(os.getppid(), signal.SIGTERM)\nif value < 3: time.sleep(60)"
TOGETHER = "pathlib.Path(f'at{value}').touch()\nwhile not pathlib.Path('at2.0').exists(): time.sleep(0.01)"
BEATS = """beats = set()
while len(beats) < 3:  # several, beside its own number
    data = json.loads((folder / 'RUNNING').read_text() or '{}')
    beats |= {data['heartbeat']} if data.get('pid') == os.getpid() else set()"""
SHARE = f"""again = lambda: pathlib.Path('calls.txt').read_text().count('2.0') > 1
while value == 1 and not (again() or list(folder.parent.glob('*-value2.0/FAILED'))):
    time.sleep(0.01)
if value == 2 and not again():
    code, said = 2, 'error: {local.BUSY}; valid: wait'"""
# What a run does (of value 1, 2, ...) -> exit code, states and words of the command with two points at a time.
ENDS = {
    "if value == 1: complete = False": (1, "failed done done", "it ended without complete results"),
    "if value == 1: os.kill(os.getpid(), signal.SIGKILL)": (1, "failed done done", "exit code -9"),
    "if value == 1: os.kill(os.getpid(), signal.SIGTERM)": (1, "interrupted done done", "interrupted"),
    "if value == 1: said = 'terminated: step 5 is saved'": (1, "interrupted done done", "interrupted"),
    "if value == 1: code = 130": (1, "interrupted done done", "interrupted"),
    SIGNAL: (130, "interrupted interrupted new", "interrupted; finished points are kept"),
    TOGETHER: (0, "done done done", "done"),
    BEATS: (0, "done done done", "done"),
    SHARE: (0, "done done done", "waits for a training that another point has begun"),
}


@pytest.mark.parametrize("behaviour", ENDS)
def test_ends_of_runs(s: Sweeps, behaviour: str) -> None:
    code, states, said = ENDS[behaviour]
    s.behave(f"pathlib.Path(f'pid{{value}}').write_text(str(os.getpid()))\n{behaviour}")
    assert s("--parallel=2") == code and s.states() == states and said in s.err
    assert not list(s.work.glob("*/RUNNING"))
    for pid in filter(None, (f.read_text() for f in s.root.glob("pid*"))):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    s.behave("")
    left = [v for v, state in zip((1.0, 2.0, 3.0), states.split(), strict=True) if state != "done"]
    assert s() == 0 and s.calls == left


# This very process lives: one whose sweep is gone works on, and a number may come to belong to another process.
# A record of this very job's earlier life is of a process that is gone, wherever it was.
JOB = {"host": "elsewhere", "job": "7_1", "starts": 1}
LIVE: list[Any] = [{}, {"heartbeat": 0.0}, {"host": "elsewhere"}, {**JOB, "starts": 2}, {**JOB, "job": "7_2"}]
DEAD: list[Any] = [None, {"born": "1"}, {"pid": 2**22 + 1}, {"pid": "x"}, {"host": "elsewhere", "heartbeat": 0.0}, JOB]


@pytest.mark.parametrize("change", LIVE + DEAD)
def test_who_works_on_a_point(s: Sweeps, change: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1", "JOB_ID": "8", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert s() == 0
    folder = s.folder(2.0)
    (folder / "DONE").unlink()
    record = "{" if change is None else json.dumps({**points.new_record(os.getpid()), **change})
    (folder / "RUNNING").write_text(record)
    assert s() == (1 if change in LIVE else 0)
    if change in LIVE:
        assert s.calls == [] and s.states() == "done running done"
        assert f"[2/3] {folder.name}: left alone, process {os.getpid()} on " in s.err
        assert (folder / "RUNNING").read_text() == record
    else:
        assert s.calls == [2.0] and not (folder / "RUNNING").exists()


def test_slurm(s: Sweeps, submitit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (s.root / "lost").touch()
    args = ["--engine=slurm", "--slurm=partition=x,timeout_min=60", "--slurm=mem_gb=4,cluster=local", "--parallel=5"]
    assert s(*args) == 1 and s.calls == [1.0, 3.0] and s.states() == "done failed done"
    wanted = {"slurm_array_parallelism": 5, "slurm_partition": "x", "timeout_min": 60, "mem_gb": 4, "name": "values"}
    wanted |= {"slurm_additional_parameters": {"requeue": True}, "slurm_max_num_timeout": slurm.REQUEUES}
    assert Cluster.settings == {"cluster": "local", **wanted}
    assert "submitted as job 7_1" in s.err and "exit code -1: job 7_2 ended before its point: node failed" in s.err
    (s.root / "lost").unlink()
    assert s("--engine=slurm", "--slurm=cluster=local") == 0 and s.calls == [2.0]
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert s("--engine=slurm", "--config.seeds=(7,)") == 2 and s.calls == []
    assert "submitit is not installed; valid: pip install 'decoder-lab[slurm]'" in s.err


def test_a_job_waits_for_a_training_that_another_job_has(
    s: Sweeps, submitit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "WAIT", 0.01)
    s.behave(
        f"if value == 2 and pathlib.Path('calls.txt').read_text().count('2.0') < 3:\n"
        f"    code, said = 2, 'error: {local.BUSY}; valid: wait'"
    )
    assert s("--engine=slurm", "--slurm=cluster=local") == 0 and s.calls == [1.0, 2.0, 2.0, 2.0, 3.0]


def test_a_preempted_job(s: Sweeps, submitit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit calls `checkpoint` in a signal handler, in the middle of the task, and then ends the process."""
    source, settings = registry.find(f"{s.config}:smoke")
    shared = sweeps.Shared(source, settings, f"{s.config}:smoke", [], None, s.work)
    [point] = sweeps.points(shared, "values", [{"seeds": (1,)}])
    point.begin()
    s.behave("time.sleep(20)")
    task = slurm.Task(point.bare(), 1)

    def preempt(attempt: local.Attempt) -> None:
        assert task.checkpoint()[1].point == point and attempt.process.poll() is not None
        raise SystemExit

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(local.Attempt, "beat", preempt)
        task()
    assert points.look(point).name == "interrupted" and not (point.folder / "RUNNING").exists()
    s.behave("")
    assert [slurm.Task(point.bare(), 1)() for _ in range(2)] == ["done", "done"]
    assert (point.folder / "log.txt").read_text().count("$ ") == 2  # not a third time


def test_end_to_end(lab: Lab) -> None:
    real = '{"arms.window.model.pattern.window": (4, 8), "paper.title": ("None", "(1,)")}'
    text = lab.config.read_text() + TAIL + f"def sweep_real():\n    return zip_({real})\n"
    for toy in ('"toy", "value": 1.0', '"toy", "value": 5.0, "n": 1'):
        text = text.replace(toy, '"decode_cost", "lengths": (8,), "steps": 1')
    lab.config.write_text(text.replace('"measures.toy.value": 2.0', '"only": ("toy",)'))
    args = ["--config=toy.py:smoke", "--workdir=work", "--parallel=2", "--config.seeds=(0,)", "--arms=zero,window"]
    command = [sys.executable, "-m", "experiments.sweep", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "DECODER_LAB_CACHE": "cache"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 done of 2 points" in done.stdout, done.stderr
    made = json.loads(Path("work/sweep.json").read_text())["points"]
    for point, window, title in zip(made, (4, 8), ("None", "(1,)"), strict=True):
        assert point["arms"]["window"]["toy/ms@8"]["mean"] > 0
        config = json.loads((Path("work") / point["folder"] / "config.json").read_text())
        assert config["config"]["paper"]["title"] == title
        assert config["resolved"]["window"]["model"]["pattern"]["window"] == window
    assert sweep.main(args) == 0
