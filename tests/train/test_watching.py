"""Trackers, and what the model writes while it is being trained."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run

from lm.config import build, model_config
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import Generator, Sampling
from lm.errors import UserError
from lm.model.language_model import DecoderModel
from lm.train.config import TrainConfig
from lm.train.log import read

SHORT = {"steps": 6, "save_every": 3, "eval_every": 3}


class Library(types.ModuleType):
    """What `wandb` and `trackio` have in common, with a note of every call."""

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.fails_at = fails_at

    def init(self, **settings: Any) -> Library:
        self.calls.append(("init", settings))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise RuntimeError("the server is gone")
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def Html(self, text: str) -> str:
        return text

    def said(self, kind: str) -> list[Any]:
        return [what for call, what in self.calls if call == kind]


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return read(folder / name)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_told_what_the_log_says_and_goes_on_with_the_run(
    name: str, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, library := Library(name))
    tracker = {"name": name, "project": "mine"}
    tiny_run.train(tmp_path / "run", texts, tracker=tracker, **{**SHORT, "steps": 3})
    first, told = library.said("init"), library.said("log")
    assert len(first) == 1 and first[0]["project"] == "mine" and first[0]["config"]["model"]["d_model"] == 16
    assert first[0]["resume"] == "never" and first[0]["name"].startswith("run")
    assert [{"step": step - 1, **values} for step, values in told] == lines(tmp_path / "run")
    assert library.said("finish") == [None]


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", library := Library("wandb", fails_at=None))
    stop = {"n": 0}

    def told(values: dict[str, Any], step: int) -> None:
        library.calls.append(("log", (step, values)))
        if step == 5 and not stop["n"]:
            stop["n"] = 1
            raise KeyboardInterrupt

    monkeypatch.setattr(library, "log", told)
    with pytest.raises(KeyboardInterrupt):
        tiny_run.train(tmp_path / "run", texts, tracker="wandb", **SHORT)
    tiny_run.train(tmp_path / "run", texts, tracker="wandb", **SHORT)
    a, b = library.said("init")
    assert a["id"] == b["id"] and (a["resume"], b["resume"]) == ("never", "must")


def test_a_tracker_that_fails_does_not_end_the_training(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, trained_run: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", library := Library("wandb", fails_at=2))
    told: list[str] = []
    tiny_run.train(tmp_path / "run", texts, told, tracker="wandb", **SHORT)
    assert [t for t in told if "tracker" in t] == [
        "train.tracker: fails (RuntimeError: the server is gone); the training goes on without it"
    ]
    assert {step for step, _ in library.said("log")} <= {0, 1} and len(lines(tmp_path / "run")) > 5


def test_a_tracker_that_is_not_installed_is_named_before_the_training(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, extra in (("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "tensorboard")):
        monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX"}.get(name, name), None)
        with pytest.raises(UserError, match=rf"train\.tracker: .* pip install 'decoder-lab\[{extra}\]'"):
            tiny_run.train(tmp_path / name, texts, tracker=name, **SHORT)
        assert not (tmp_path / name / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=r"train\.tracker\.name: unknown name 'wandbb' \(did you mean 'wandb'\?\)"):
        tiny_run.settings(texts, tracker="wandbb")


def test_who_is_told_does_not_change_what_a_run_is() -> None:
    plain = build(TrainConfig, {}, "train").determines()
    asked = {"tracker": "trackio", "samples": {"prompts": ("a",)}, "tensorboard": True}
    assert build(TrainConfig, asked, "train").determines() == plain and "tracker" not in plain


def test_samples_are_written_and_change_nothing(tmp_path: Path, texts: Path) -> None:
    """Texts of steps 2, 4 and the last; the last are those of the trained parameters; these are the same to the bit."""
    samples = {"prompts": ("The ", "a"), "every": 2, "max_new_tokens": 5}
    plain = tiny_run.train(tmp_path / "plain", texts, **SHORT)
    made = tiny_run.train(tmp_path / "made", texts, samples=samples, **SHORT)
    jax.tree.map(np.testing.assert_array_equal, plain.params, made.params)
    assert not (tmp_path / "plain" / "samples.jsonl").exists()
    found = lines(tmp_path / "made", "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in found] == [(n, p) for n in (1, 3, 5) for p in samples["prompts"]]
    tokenizer, model = ByteTokenizer(), DecoderModel(model_config(tiny_run.MODEL))
    ids = [tokenizer.encode(prompt) for prompt in samples["prompts"]]
    answers = Generator(model, made.params)(ids, Sampling(temperature=0.0), max_new_tokens=5)
    for line, head, (answer,) in zip(found[-2:], ids, answers, strict=True):
        tokens = answer.tokens[: line["tokens"] - (line["finish"] == "stop")]
        assert line["text"] == tokenizer.continued(head, tokens)


def test_samples_that_cannot_be_written_are_refused(tmp_path: Path, texts: Path) -> None:
    for change, words in (
        ({"every": 0}, r"train\.samples\.every: must be at least 1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"prompts": ("",)}, "train.samples.prompts: '' is empty"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_run.train(tmp_path / "run", texts, samples={"prompts": ("a",), **change}, **SHORT)
