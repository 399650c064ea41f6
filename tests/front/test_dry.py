"""A dry run refuses what the run would refuse before it computes, and writes nothing; options that would be ignored are
refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import sandbox

from experiments import chat, convert, evaluate, generate, list, sweep
from experiments import compile as compile_
from experiments import run as run_


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config that trains on texts of its own, and is not trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECODER_LAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.py").write_text(sandbox.CONFIG)
    (tmp_path / "texts").mkdir()
    for name in "abcdef":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} little text of a few words. " * 8)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("experiments.running.runner.Runner.all", lambda self: None)
    return tmp_path


TEXTS = "--config.train.data.texts"
REFUSED = {
    "text that is not there": (f"{TEXTS}=nowhere.txt", "nowhere.txt: no such file"),
    "text of one document": (f"{TEXTS}=short.txt", "train.data.held_out"),
    "text of a measure": ("--config.measures.nll.texts=nowhere.txt", "measures.nll"),
    "text too short for a measure": ("--config.measures.nll.texts=short.txt", "'short.txt' has 5"),
    "more tokens than there are": ("--config.measures.nll.tokens=4000", "4000 asked for"),
    "tokenizer that is not there": ("--config.train.data.tokenizer=nowhere.json", "no tokenizer 'nowhere.json'"),
    "tokenizer that is none": ("--config.train.data.tokenizer=no.json", "not a tokenizer"),
    "tokenizer too small": ("--config.train.data.tokenizer=bpe:3", "bpe:N with N from 258"),
    "vocabulary too small": ("--config.model.vocab_size=100", "model.vocab_size = 100"),
    "mesh of other devices": ("--config.train.mesh.tensor=7", "does not fit 8 devices"),
    "batch that does not divide": ("--config.train.batch=3", "train.batch"),
    "rows longer than positions": (
        "--config.model.positions=learned --config.model.positions.size=32 --config.train.data.seq_len=64",
        "32 rows",
    ),
    "target below a file": ("--workdir=file/run", "--workdir"),
    "measure of what is not trained": ("--config.arms.zero.untrained=True", "were not trained"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=[*REFUSED])
def test_a_dry_run_refuses_what_the_run_would(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    args = ["--config=toy.py", "--config.train.mesh.data=-1", "--config.train.batch=8", *words.split()]
    before = sandbox.look(folder)
    assert run_.main([*args, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert sandbox.look(folder) == before
    assert run_.main(args) == 2 and said in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_reads_what_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--config=toy.py", "--config.train.batch=8"]
    before = sandbox.look(folder)
    assert run_.main([*args, "--dry-run"]) == 0 and "nothing was measured" in capsys.readouterr().out
    assert sandbox.look(folder) == before
    assert run_.main(args) == 0
    kept = sandbox.look(folder / "cache")
    assert any("tokens" in name for name in kept)
    assert run_.main([*args, "--dry-run"]) == 0
    assert sandbox.look(folder / "cache") == kept
    assert sweep.main([*args, "--dry-run"]) == 0
    assert sweep.main([*args, "--dry-run", f"{TEXTS}=nowhere.txt"]) == 2
    assert "nowhere.txt: no such file" in capsys.readouterr().err


IGNORED = {
    "batch": (compile_, "--config=toy.py --topology=v5e:2x2 --batch=2", "--batch: has no meaning for a training step"),
    "weights": (compile_, "--config=toy.py --topology=v5e:2x2 --weights=float32", "--weights: has no meaning"),
    "tries": (compile_, "--config=toy.py --topology=v5e:2x2 --tries=2", "valid: 1 or more, with --search"),
    "all": (compile_, "--all --mesh=tensor=2", "--mesh: has no meaning with --all"),
    "missing": (compile_, "--config=toy.py --topology=v5e:2x2 --missing", "--missing: has no meaning without --all"),
    "no side": (compile_, "--config=toy.py --topology=v5e:0x4 --estimate", "there is no such slice; valid: v5e:SIDES"),
    "odd sides": (compile_, "--config=toy.py --topology=v5e:3x5 --estimate", "there is no such slice"),
    "too many chips": (compile_, "--config=toy.py --topology=v4:64x64x64 --estimate", "of at most 4,096 chips"),
    "no axis": (compile_, "--config=toy.py --topology=v5e:2x2 --mesh=fsdp=--5", "--mesh: fsdp: found '--5'"),
    "axis twice": (compile_, "--config=toy.py --topology=v5e:2x2 --mesh=fsdp=2,fsdp=2", "fsdp is given twice"),
    "no samples": (generate, "--checkpoint=x --prompt=a --samples=0", "--samples: must be at least 1"),
    "no tokens": (generate, "--checkpoint=x --prompt=a --max-new-tokens=0", "--max-new-tokens: must be at least 1"),
    "empty stop": (generate, "--checkpoint=x --prompt=a --stop=", "--stop: is empty"),
    "whole of no file": (generate, "--checkpoint=x --prompt=a --whole", "--whole: has no meaning without --file"),
    "not a number": (generate, "--checkpoint=x --prompt=a --temperature=nan", "--temperature: found nan"),
    "stop of a chat": (chat, "--checkpoint=x --stop=", "--stop: is empty"),
    "type of a run": (
        convert,
        "--checkpoint=x --to=y --as=run --dtype=float32",
        "--dtype: has no meaning with --as=run",
    ),
    "shards of adapters": (convert, "--checkpoint=x --to=y --as=peft --max-shard-size=1GB", "--max-shard-size: has no"),
    "shots": (evaluate, "--checkpoint=x --tasks=a --shots=-1", "--shots: must be at least 0"),
    "tasks' folder": (evaluate, "--checkpoint=x --tasks=a --include=nowhere", "--include: nowhere is no folder"),
    "configs of plugs": (list, "--plugs --configs=texts", "--configs: has no meaning with --plugs"),
    "parallel print": (sweep, "--config=toy.py --engine=print --parallel=2", "--parallel: has no meaning"),
    "seed of no search": (sweep, "--config=toy.py --search-seed=3", "--search-seed: has no meaning without --search"),
    "home of nobody": (run_, "--config=toy.py --workdir=~nosuchuser/x", "--workdir: '~nosuchuser/x': no such home"),
    "name that leaves": (run_, "--config=toy.py --config.name=../../x", "config.name: found '../../x'"),
}


@pytest.mark.parametrize(("command", "words", "said"), IGNORED.values(), ids=[*IGNORED])
def test_what_would_be_ignored_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], command: object, words: str, said: str
) -> None:
    before = sandbox.look(folder)
    assert vars(command)["main"](words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert sandbox.look(folder) == before


def test_a_tilde_is_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert run_.main(["--config=~/toy.py", "--config.train.batch=8", "--workdir=~/run", "--dry-run"]) == 0
    assert f"folder {folder / 'run'}" in capsys.readouterr().out
