"""A conversation: every answer is the one that generate gives to the same turns, and lines with a slash are obeyed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import chat, generate
from experiments.commands import chat as talk
from lm.config import model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib

MODEL = {"vocab_size": 258, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16, "max_positions": 256}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"


def written(path: Path, template: str | None) -> Path:
    cfg = model_config(MODEL)
    weights = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params_lib.init(cfg, jax.random.key(3)))
    to_huggingface.write(path, cfg, weights, TextRecord.of(ByteTokenizer(), template))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model") / "hf", CHAT)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert chat.main([f"--checkpoint={folder}", "--max-new-tokens=5", *flags]) == 0
    return capsys.readouterr()


def test_every_turn_is_answered_as_generate_answers_all_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--system=be brief", "--temperature=0")
    out, _ = said(folder, "hi\n\nand you?\n", monkeypatch, capsys, *flags, "--json")
    first, second = map(json.loads, out.splitlines())
    so_far = "<system>be brief<user>hi<assistant>"
    for made, prompt in ((first, so_far), (second, f"{so_far}{first['text']}<user>and you?<assistant>")):
        whole = ("--max-new-tokens=5", "--json", f"--prompt={prompt}")
        assert made["prompt"] in ("hi", "and you?") and "<assistant>" in made["text"] + prompt
        assert generate.main([f"--checkpoint={folder}", *whole]) == 0
        want = json.loads(capsys.readouterr().out)
        assert (want["text"], want["finish"]) == (made["text"], made["finish"])
        assert want["logprob"] == pytest.approx(made["logprob"], abs=1e-4)
    plain, _ = said(folder, "hi\nand you?\n", monkeypatch, capsys, *flags)
    assert plain == f"{first['text']}\n{second['text']}\n"


def test_reset_forgets_and_save_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    text = f"hi\n/save {file}\n/reset\nhi\n/quit\nnever read\n"
    out, _ = said(folder, text, monkeypatch, capsys, "--json", "--system=x")
    first, second = map(json.loads, out.splitlines())
    assert first["text"] == second["text"]
    turns = json.loads(file.read_text(encoding="utf-8"))
    assert turns == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first["text"]},
    ]


def test_a_mistake_in_a_terminal_does_not_end_the_conversation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").touch()
    words = iter(["/sav x", "/save", f"/save {tmp_path}/there", f"/save {tmp_path}/no/where", "hi"])

    def typed(prompt: str) -> str:
        assert prompt == talk.ASKS
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert chat.main([f"--checkpoint={folder}", "--max-new-tokens=3", "--json"]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "/sav: unknown command (did you mean '/save'?)" in lines[0] and "/save: no file given" in lines[1]
    assert "exists already; valid: a new file" in lines[2] and "cannot be written" in lines[3] and len(lines) == 4
    assert json.loads(out.splitlines()[0])["prompt"] == "hi" and "/reset forgets the conversation" in err


def test_an_answer_that_is_interrupted_takes_its_turn_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words: Any = iter(["stop me", "hi"])

    def typed(prompt: str) -> str:
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    answered = talk.answered

    def interrupted(model: Any, row: Any, *rest: Any) -> Any:
        if b"stop me" in bytes(t for t in row.prompt if t < 256):
            raise KeyboardInterrupt
        return answered(model, row, *rest)

    monkeypatch.setattr(talk, "answered", interrupted)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert chat.main([f"--checkpoint={folder}", "--max-new-tokens=3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "interrupted; the turn is taken back" in err and json.loads(out)["prompt"] == "hi"


def test_a_model_without_a_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([f"--checkpoint={written(tmp_path / 'hf', None)}"]) == 2
    out, err = capsys.readouterr()
    assert "has no chat template; valid: a model tuned to converse, or experiments.generate" in err
    assert err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("flags", "text", "words"),
    [
        (("--template=rag",), "", "--template"),
        (
            ("--tools=nowhere.json",),
            "",
            "--tools: nowhere.json: no such file; valid: a JSON file with a list of objects",
        ),
        (("--seed=-1",), "", "--seed: found -1"),
        (("--pattern=lm_infinit",), "", "--pattern: unknown name 'lm_infinit'"),
        (("--prompt=x",), "", "--prompt: unknown argument"),
        ((), "/rest\n", "/rest: unknown command (did you mean '/reset'?)"),
    ],
)
def test_mistakes(
    folder: Path,
    flags: tuple[str, ...],
    text: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert chat.main([f"--checkpoint={folder}", *flags]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""
