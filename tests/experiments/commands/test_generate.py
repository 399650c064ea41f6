"""The generate command: text as it comes, prompts from anywhere, another pattern, and mistakes in one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import jax
import pytest

from experiments import generate
from experiments.commands.generate import Stop
from lm.config import model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib

MODEL = {"vocab_size": 258, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16, "max_positions": 32}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = model_config(MODEL)
    weights = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params_lib.init(cfg, jax.random.key(3)))
    path = tmp_path_factory.mktemp("model") / "hf"
    to_huggingface.write(path, cfg, weights, TextRecord.of(ByteTokenizer(), CHAT))
    return path


def answers(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def call(folder: Path, *args: str) -> int:
    return generate.main([f"--checkpoint={folder}", "--max-new-tokens=6", *args])


def test_text_on_stdout_and_speed_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--prompt=ab") == 0
    out, err = capsys.readouterr()
    assert call(folder, "--prompt=ab", "--json") == 0
    (made,) = answers(capsys)
    assert out == made["text"] + "\n" and made["finish"] == "length" and made["logprob"] < 0
    assert err.startswith("6 tokens in ") and err.rstrip().endswith("tokens/s")


def test_prompts_from_a_file_and_from_standard_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("ab\n\ncd\n")
    assert call(folder, f"--file={tmp_path}/prompts.txt", "--prompt=xy", "--json") == 0
    made = answers(capsys)
    assert [m["prompt"] for m in made] == ["xy", "ab", "cd"]
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd"))
    assert call(folder, "--file=-", "--whole", "--json") == 0
    assert [m["prompt"] for m in answers(capsys)] == ["ab\ncd"]


def test_samples_differ_and_seeds_repeat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--prompt=ab", "--temperature=1.5", "--samples=3", "--json")
    assert call(folder, *args) == 0
    first = answers(capsys)
    assert call(folder, *args) == 0
    assert answers(capsys) == first and len({m["text"] for m in first}) > 1
    assert call(folder, *args, "--seed=1") == 0
    assert answers(capsys) != first


def test_an_answer_ends_at_its_stop_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--prompt=ab", "--json", "--max-new-tokens=24") == 0
    (whole,) = answers(capsys)
    word = whole["text"][3:5]
    assert call(folder, "--prompt=ab", "--json", "--max-new-tokens=24", f"--stop={word}") == 0
    (cut,) = answers(capsys)
    assert cut["text"] == whole["text"][: whole["text"].index(word)] and cut["finish"] == "stop"
    assert call(folder, "--prompt=ab", "--json", "--max-new-tokens=24", "--stop=never met") == 0
    assert answers(capsys) == [whole]


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    cut = Stop(ByteTokenizer(), ["END"])
    shown = [cut.add([ord(c)], False) for c in "abENcEN"]
    assert "".join(shown) == "abENc" and not cut.met
    assert cut.add([ord("D"), ord("x")], False) == "" and cut.met and cut.text == "abENc"
    letter = Stop(ByteTokenizer(), [])
    assert [letter.add([b], False) for b in "é".encode()] == ["", "é"]


def test_chat_goes_through_the_checkpoints_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folder, "--prompt=hi", "--chat", "--system=be brief", "--json") == 0
    (chat,) = answers(capsys)
    assert call(folder, "--prompt=<system>be brief<user>hi<assistant>", "--json") == 0
    (plain,) = answers(capsys)
    assert chat["text"] == plain["text"] and chat["logprob"] == plain["logprob"]


def test_another_pattern_reads_the_same_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "--prompt=" + "a long prompt, longer than what was trained"
    made = {}
    for args in (
        (),
        ("--pattern=lm_infinite",),
        ("--pattern=lm_infinite", "--model.pattern.sinks=0"),
        ("--cache=int8",),
    ):
        assert call(folder, long, "--json", *args) == 0
        made[args] = answers(capsys)[0]["logprob"]
    assert len(set(made.values())) == 4
    short = "--prompt=ab"
    for args in ((), ("--pattern=lm_infinite",)):
        assert call(folder, short, "--json", *args) == 0
        made[args] = answers(capsys)[0]["logprob"]
    assert made[()] == pytest.approx(made[("--pattern=lm_infinite",)], abs=1e-4)  # its window is the trained length


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--prompt: none given"),
        (("--prompt=",), "prompt 0: is empty"),
        (("--file=nowhere.txt",), "--file: nowhere.txt: no such file"),
        (("--prompt=a", "--pattern=lm_infinit"), "--pattern: unknown name 'lm_infinit' (did you mean 'lm_infinite'?)"),
        (("--prompt=a", "--model.pattern.widow=3"), "model.pattern.widow: unknown key"),
        (("--prompt=a", "--model.n_layers=3"), "overrides that leave the parameters as they are"),
        (("--prompt=a", "--temperature=-1"), "temperature: must be 0 (greedy) or more"),
        (("--prompt=a", "--temperature=warm"), "--temperature"),
        (("--prompt=a", f"--seed={2**32}"), "--seed: found 4294967296; valid: 0 to 4294967295"),
        (("--prompt=a", "--seed=20260921143000"), "--seed: found 20260921143000; valid: 0 to"),
        (("--prompt=a", "--bias=13:nan"), "bias: token 13: found nan"),
        (("--prompt=a", "--bias=x:1"), "--bias: found 'x:1'; valid: ID:VALUE"),
        (("--prompt=a", "--bias=999:1"), "bias: unknown token id 999"),
        (("--prompt=a", "--cache=int4"), "--cache: unknown name 'int4' (did you mean 'int8'?)"),
        (("--prompt=a", "--system=x"), "--system: needs --chat"),
        (("--prompt=a", "--promt=b"), "--promt: unknown argument (did you mean '--prompt'?)"),
        (("--prompt=a", "--max-new-tokens=0"), "--max-new-tokens: must be at least 1, found 0"),
    ],
)
def test_mistakes(folder: Path, args: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([f"--checkpoint={folder}", *args]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


def test_a_model_without_a_template_cannot_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = model_config(MODEL)
    to_huggingface.write(tmp_path / "hf", cfg, params_lib.init(cfg, jax.random.key(0)), TextRecord.of(ByteTokenizer()))
    assert generate.main([f"--checkpoint={tmp_path}/hf", "--prompt=a", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def edited(folder: Path, to: Path, **files: dict[str, Any]) -> Path:
    """A copy of the checkpoint with changed keys in the JSON files that `files` name."""
    shutil.copytree(folder, to)
    for name, change in files.items():
        path = to / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **change}))
    return to


def test_every_stop_token_ends_an_answer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An end that only the list of config.json, or generation_config.json, names."""
    for i, change in enumerate(
        ({"config": {"eos_token_id": [257, 65]}}, {"generation_config": {"eos_token_id": [65]}})
    ):
        other = edited(folder, tmp_path / str(i), **change)
        assert call(other, "--prompt=ab", "--bias=65:1000", "--json") == 0
        assert answers(capsys) == [{"prompt": "ab", "sample": 0, "text": "", "finish": "stop", "logprob": ANY}]
        assert call(other, "--prompt=ab", "--bias=65:1000", "--json", "--ignore-eos") == 0
        assert answers(capsys)[0]["text"] == "AAAAAA"


def test_the_score_of_an_answer_ends_where_the_answer_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was read ahead of a stop string counts for nothing."""
    assert call(folder, "--prompt=ab", "--json", "--max-new-tokens=24") == 0
    (whole,) = answers(capsys)
    for n in (1, 3, 7):
        word = whole["text"][n - 1]
        first = whole["text"].index(word) + 1
        assert call(folder, "--prompt=ab", "--json", "--max-new-tokens=24", f"--stop={word}") == 0
        (cut,) = answers(capsys)
        assert call(folder, "--prompt=ab", "--json", f"--max-new-tokens={first}") == 0
        (short,) = answers(capsys)
        assert cut["logprob"] == pytest.approx(short["logprob"], abs=1e-5) and cut["text"] == short["text"][:-1]


def test_answers_are_drawn_as_the_checkpoint_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = {"do_sample": True, "temperature": 1.7, "top_k": 50}
    drawn = edited(folder, tmp_path / "drawn", generation_config=warm)
    assert call(drawn, "--prompt=ab", "--json") == 0
    out, err = capsys.readouterr()
    assert "generation settings say: temperature 1.7, top_k 50" in err
    assert call(folder, "--prompt=ab", "--json", "--temperature=1.7", "--top-k=50") == 0
    assert json.loads(out) == answers(capsys)[0]
    assert call(drawn, "--prompt=ab", "--json", "--temperature=0") == 0
    greedy = answers(capsys)
    assert call(folder, "--prompt=ab", "--json") == 0
    assert answers(capsys) == greedy and greedy[0] != json.loads(out)
    still = edited(folder, tmp_path / "still", generation_config={"do_sample": False, "temperature": 1.7})
    assert call(still, "--prompt=ab", "--json") == 0
    assert answers(capsys) == greedy


def test_lines_of_a_file_end_at_newlines_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_bytes("a\u2028b\x0cc\r\nd\n".encode())
    assert call(folder, f"--file={tmp_path}/prompts.txt", "--json", "--max-new-tokens=1") == 0
    assert [m["prompt"] for m in answers(capsys)] == ["a\u2028b\x0cc", "d"]


def test_a_conversation_with_tools(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{{ tools | tojson }}{{ documents | length }}{{ messages[-1].content }}"
    other = edited(folder, tmp_path / "tools", tokenizer_config={"chat_template": template})
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    (tmp_path / "bad.json").write_text("{}")
    tools, documents = f"--tools={tmp_path}/tools.json", f"--documents={tmp_path}/tools.json"
    assert call(other, "--prompt=hi", "--chat", tools, documents, "--json") == 0
    (chat,) = answers(capsys)
    assert call(other, '--prompt=[{"name": "f"}]1hi', "--json") == 0
    assert answers(capsys)[0]["logprob"] == chat["logprob"]
    assert call(other, "--prompt=hi", "--chat", f"--tools={tmp_path}/bad.json") == 2
    assert "expected a list of objects, found dict" in capsys.readouterr().err
    assert call(other, "--prompt=hi", "--chat", "--template=rag") == 2
    assert "--template" in capsys.readouterr().err
    assert call(other, "--prompt=hi", tools) == 2
    assert "--tools: needs --chat" in capsys.readouterr().err


def test_large_seeds_are_seeds_of_their_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for seed in (0, 4295, 2**31, 2**32 - 1):
        assert call(folder, "--prompt=ab", "--temperature=1.5", "--json", f"--seed={seed}", "--max-new-tokens=24") == 0
        texts.add(answers(capsys)[0]["text"])
    assert len(texts) == 4


def test_other_types_and_several_devices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*args: str) -> dict[str, Any]:
        assert call(folder, "--prompt=ab", "--json", *args) == 0
        return answers(capsys)[0]

    one = said()
    assert said("--dtype=stored") == one == said("--dtype=float32")
    half = said("--dtype=bfloat16")
    assert half["logprob"] != one["logprob"] and half["logprob"] == pytest.approx(one["logprob"], rel=0.2)
    for mesh in ("tensor=2,data=4", "fsdp=8"):
        spread = said(f"--mesh={mesh}")
        assert spread["text"] == one["text"] and spread["logprob"] == pytest.approx(one["logprob"], rel=1e-4)
    assert said("--mesh=tensor=2,fsdp=4", "--surgery=int8")["text"] == said("--surgery=int8")["text"]
    for args, words in (
        (("--dtype=int8",), "--dtype: unknown name 'int8'; valid: bfloat16, float16, float32, stored"),
        (("--mesh=tensor=two",), "--mesh: tensor: found 'two'; valid: a number, or -1"),
        (("--mesh=tensor=8",), "does not divide by 8 (tensor 8)"),
    ):
        assert call(folder, "--prompt=ab", *args) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
