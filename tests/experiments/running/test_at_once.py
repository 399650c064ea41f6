"""Two commands that take one new folder at once: one gets it, the other is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_experiment import Lab

from experiments.running import environment
from experiments.running.plan import Workdir, prepare
from experiments.spec import registry
from experiments.spec.settings import Text
from experiments.sweeps import command
from lm.errors import UserError


def workdir(lab: Lab, value: str) -> Workdir:
    source, raw = registry.find(str(lab.config))
    plan = prepare(raw, [("measures.toy.value", Text(value))], None)
    return Workdir(lab.folder, source.place, plan)


def test_the_second_of_two_runs_is_refused(lab: Lab) -> None:
    first, same, other = workdir(lab, "2"), workdir(lab, "2"), workdir(lab, "3")
    for one in (first, same, other):
        one.check()  # nobody is there yet
    first.start({})
    same.start({})
    before = {p: p.read_bytes() for p in lab.folder.iterdir()}
    with pytest.raises(UserError, match=r"--workdir: .* config\.measures\.toy\.value is 2\.0 there and 3\.0 here"):
        other.start({})
    assert {p: p.read_bytes() for p in lab.folder.iterdir()} == before
    assert json.loads((lab.folder / "config.json").read_text())["config"]["measures"]["toy"]["value"] == 2.0


def test_a_run_that_died_while_it_took_a_folder_does_not_keep_it(lab: Lab) -> None:
    lab.folder.mkdir()
    (lab.folder / ".config.json.0123456789ab").write_text("{")
    assert lab("--arms=zero") == 0


def test_the_second_of_two_sweeps_is_refused(tmp_path: Path) -> None:
    ours, theirs = ({"file": "a.py", "scale": "smoke", "sweep": name} for name in ("one", "two"))
    command._take(tmp_path / "new", ours)
    command._take(tmp_path / "new", ours)
    with pytest.raises(UserError, match="holds another sweep"):
        command._take(tmp_path / "new", theirs)


def test_git_is_asked_without_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, env, **how: asked.append(env) or _Done())
    environment.describe()
    assert len(asked) == 2 and all(env["GIT_OPTIONAL_LOCKS"] == "0" and env["PATH"] for env in asked)


class _Done:
    stdout = ""
