"""The log of a training: lines that are changed or lost are told, and a run that goes on keeps the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lm.config import model_config
from lm.errors import UserError
from lm.measures import Subject
from lm.measures.cost.train_log import TrainLog
from lm.model.language_model import DecoderModel
from lm.train.log import Log, read


def written(folder: Path, n: int = 6) -> str:
    """A log of `n` steps; gives its mark."""
    log = Log(folder, None, (), {})
    for step in range(n):
        log.write(step, loss=1.0 / (step + 1))
    log.close()
    return log.mark


def going_on(folder: Path, after: int, mark: str | None) -> list[str]:
    """What is told when a run goes on behind step `after`."""
    told: list[str] = []
    Log(folder, after, (), {}, told.append, mark).close()
    return told


def test_a_sound_log_goes_on_and_nothing_is_told(tmp_path: Path) -> None:
    mark = written(tmp_path)
    file = tmp_path / "metrics.jsonl"
    assert read(file, until=5) == [{"step": i, "loss": 1.0 / (i + 1)} for i in range(6)]
    before = file.read_text()
    with file.open("a") as more:
        more.write('{"step": 6, "lo')  # torn, as a death leaves it
    assert [line["step"] for line in read(file)] == [0, 1, 2, 3, 4, 5]
    assert going_on(tmp_path, 5, mark) == [] and file.read_text() == before
    assert going_on(tmp_path, 2, None) == [] and [line["step"] for line in read(file)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "why", "left"),
    [
        (lambda lines: [*lines[:2], lines[2].replace("0.3", "0.4"), *lines[3:]], "line 3 is not what", [0, 1, 3, 4, 5]),
        (lambda lines: [*lines[:2], *lines[3:]], "lines before line 3 are lost", [0, 1, 3, 4, 5]),
        (lambda lines: lines[:4], "lines at its end are lost", [0, 1, 2, 3]),
        (lambda lines: [], "lines at its end are lost", []),
        (lambda lines: ["\x00\n", *lines], "line 1 is not what", [0, 1, 2, 3, 4, 5]),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "lines before line 1 are lost", [1, 0, 2, 3, 4, 5]),
    ],
    ids=["changed", "lost", "end", "all", "zeros", "exchanged"],
)
def test_a_run_that_goes_on_tells_what_is_lost_and_keeps_the_rest(
    tmp_path: Path, change: object, why: str, left: list[int]
) -> None:
    mark, file = written(tmp_path), tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(change(lines)))  # type: ignore[operator]
    (told,) = going_on(tmp_path, 5, mark)
    assert why in told and str(file) in told and "\n" not in told
    kept = read(file, until=5)  # sound again, and it says what is lost
    assert [line["step"] for line in kept if "loss" in line] == left
    assert [line for line in kept if "lost" in line] == [{"step": 5, "lost": told.split("(")[1].split(")")[0]}]


def test_a_log_that_is_gone_is_told(tmp_path: Path) -> None:
    mark = written(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert "lines at its end are lost" in going_on(tmp_path, 5, mark)[0]


def test_a_log_from_before_there_were_sums(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "loss": float(i)} for i in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(file, until=2) == lines
    assert going_on(tmp_path, 2, None) == [] and read(file, until=2) == lines
    file.write_text(file.read_text().replace("1.0", "1.5"))
    with pytest.raises(UserError, match="line 2 is not what was written"):  # it has them now
        read(file)


def test_the_measure_refuses_a_damaged_log(tmp_path: Path, trained_run: Path) -> None:
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    file = tmp_path / "run" / "metrics.jsonl"
    subject = Subject(DecoderModel(model_config({})), {}, None, 0, tmp_path / "run")
    assert TrainLog().run(subject, lambda fraction, text: None).samples["skipped"] == [0.0]
    lines = file.read_text().splitlines(keepends=True)
    for changed, why in (
        ([*lines[:-5], lines[-5].replace('"nll": ', '"nll": 1'), *lines[-4:]], "is not what was written"),
        (lines[:30], "it does not reach step 59"),
        ([], "it does not reach step 59"),
    ):
        file.write_text("".join(changed))
        with pytest.raises(UserError) as e:
            TrainLog().run(subject, lambda fraction, text: None)
        assert why in str(e.value) and str(file) in str(e.value)
