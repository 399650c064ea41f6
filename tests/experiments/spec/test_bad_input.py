"""What a mistake gets: one line that names the place, exit code 2, and nothing written, through the public doors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_experiment import Lab

from experiments import list as list_
from experiments import run
from experiments.spec import registry
from lm import interop
from lm.data import texts
from lm.errors import UserError


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in root.rglob("*") if "__pycache__" not in str(p)}


def refused(lab: Lab, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], *args: str, **where: Any) -> None:
    """The command ends with exit code 2 and one line that has all of `names` in it; no file is new or changed."""
    before = snapshot(lab.root)
    code = lab(*args, **where)
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert err.count("\n") == 1 and err.startswith("error: ") and out == "", (out, err)
    assert "Traceback" not in err and len(err) < 600
    for name in names:
        assert name in err, err
    assert snapshot(lab.root) == before
    assert lab.calls == []


LINES = {
    "unknown key": (
        ("--config.modle=3",),
        ("config.modle: unknown key", "did you mean 'model'", "valid: adapter, architecture, arms,"),
    ),
    "unknown model key": (("--config.model.n_head=2",), ("model.n_head: unknown key", "'n_heads'")),
    "key below a number": (("--config.model.d_ff.x=2",), ("model.d_ff.x: unknown key",)),
    "empty part of a key": (("--config.model..d_ff=2",), ("config.model..d_ff",)),
    "section without a key": (("--config.model=3",), ("config.model: name the key",)),
    "unknown pattern": (("--config.model.pattern=lm_infinit",), ("model.pattern.name", "'lm_infinite'", "causal")),
    "pattern of a wrong type": (("--config.model.pattern=3",), ("model.pattern.name", "3")),
    "unknown positions": (("--config.model.positions.name=ropee",), ("model.positions.name", "'rope'")),
    "unknown scaling": (("--config.model.positions.scaling=yarm",), ("model.positions.scaling.name", "'yarn'")),
    "unknown feed-forward": (("--config.model.ffn=swigul",), ("model.ffn.name", "'swiglu'")),
    "unknown norm": (("--config.model.norm=batchnorm",), ("model.norm.name", "rmsnorm")),
    "unknown field of a plug": (("--config.model.pattern.widow=4",), ("model.pattern.widow", "unknown key")),
    "unknown field of a nested plug": (("--config.model.positions.scaling.factr=4",), ("scaling.factr",)),
    "unknown backend": (("--config.model.mixer.backend=dens",), ("mixer.backend", "'dense'")),
    "unknown measure label": (("--config.measures.toi.n=4",), ("measures.toi", "'toy'")),
    "unknown measure": (("--config.measures.toy.name=nll",), ("measures.toy.name", "nll_by_position")),
    "unknown field of a measure": (("--config.measures.toy.vlaue=1",), ("measures.toy.vlaue", "'value'")),
    "unknown arm to change": (("--config.arms.windw.only=('toy',)",), ("config.arms", "'window'")),
    "unknown arm to run": (("--arms=zero,windw",), ("--arms", "windw", "'window'")),
    "unknown arm as baseline": (("--config.baseline=none",), ("config.baseline", "window")),
    "unknown key in an arm": (("--config.arms.window.modle.d_ff=3",), ("arms.window", "modle.d_ff", "'model'")),
    "unknown label in only": (("--config.arms.also.only=('tao',)",), ("arms.also: only", "'toy'")),
    "only of a wrong type": (("--config.arms.also.only=toy",), ("arms.also: only", "tuple")),
    "unknown paper key": (("--config.paper.titel=x",), ("config.paper.titel", "'title'")),
    "unknown argument": (("--wrokdir=x",), ("--wrokdir: unknown argument", "'--workdir'")),
    "positional argument": (("configs/x.py",), ("configs/x.py: unknown argument",)),
    "scale as a key": (("--config.scale=smoke",), ("config.scale", ":SCALE")),
    "text for a number": (("--config.model.d_ff=wide",), ("model.d_ff: expected int", "'wide'")),
    "fraction for a whole number": (("--config.model.n_layers=1.5",), ("model.n_layers: expected int", "1.5")),
    "truth value for a number": (("--config.model.n_layers=True",), ("model.n_layers: expected int", "True")),
    "number for a truth value": (("--config.model.remat=1",), ("model.remat: expected bool", "1")),
    "number for a list": (("--config.seeds=3",), ("config.seeds", "3")),
    "texts for numbers": (("--config.seeds=('a',)",), ("config.seeds[0]: expected int", "'a'")),
    "a seed twice": (("--config.seeds=(1,1)",), ("config.seeds", "(1, 1)")),
    "no seed": (("--config.seeds=()",), ("config.seeds", "()")),
    "negative seed": (("--config.seeds=(-1,)",), ("config.seeds", "-1")),
    "text for a measure's number": (("--config.measures.toy.n=two",), ("measures.toy.n: expected int", "'two'")),
    "wrong type in an arm": (("--config.arms.window.model.pattern.window=x",), ("arms.window", "model.pattern.window")),
    "heads not divisible": (("--config.model.n_heads=4", "--config.model.n_kv_heads=3"), ("model.n_kv_heads: 3", "4")),
    "width not divisible": (("--config.model.n_heads=3",), ("model.d_model: 8", "model.n_heads = 3")),
    "odd rotary width": (("--config.model.positions.fraction=0.75",), ("model.positions.fraction", "= 3 must be even")),
    "negative window": (("--config.arms.window.model.pattern.window=-4",), ("arms.window", "pattern.window", "-4")),
    "window 0": (("--config.arms.window.model.pattern.window=0",), ("arms.window", "pattern.window", "0")),
    "negative sinks": (("--config.arms.also.model.pattern.sinks=-1",), ("arms.also", "pattern.sinks", "-1")),
    "block of 0": (("--config.model.mixer.block_q=0",), ("model.mixer.block_q", "0")),
    "negative block": (("--config.model.mixer.block_k=-8",), ("model.mixer.block_k", "-8")),
    "yarn factor below 1": (
        ("--config.model.positions.scaling=yarn", "--config.model.positions.scaling.factor=0.5"),
        ("model.positions.scaling.factor", "0.5"),
    ),
    "longrope lists too short": (
        ("--config.model.positions.scaling=longrope", "--config.model.positions.scaling.short_factor=(1.0,)"),
        ("model.positions.scaling.short_factor", "1 numbers", "2 needed"),
    ),
    "theta 0": (("--config.model.positions.theta=0",), ("model.positions.theta", "0")),
    "no layers": (("--config.model.n_layers=0",), ("model.n_layers", "0")),
    "unknown number type": (("--config.model.dtype=float8",), ("model.dtype", "float16")),
    "layer overrides: text": (("--config.model.layer_overrides=('x',)",), ("layer_overrides[0]", "'x'")),
    "layer overrides: no layers": (("--config.model.layer_overrides=({'d_ff':8},)",), ("layer_overrides[0]",)),
    "layer overrides: range": (
        ("--config.model.layer_overrides=({'layers':'a:b','d_ff':8},)",),
        ("layer_overrides[0].layers", "'a:b'"),
    ),
    "layer overrides: layer": (
        ("--config.model.layer_overrides=({'layers':'7','d_ff':8},)",),
        ("layer_overrides[0].layers", "'7'"),
    ),
    "layer overrides: key": (
        ("--config.model.layer_overrides=({'layers':'0','dff':8},)",),
        ("layer_overrides[0].dff", "'d_ff'"),
    ),
    "vocabulary smaller than bytes": (("--config.model.vocab_size=100",), ("258", "model.vocab_size = 100")),
    "absent checkpoint": (("--config.checkpoint=smolm2-135m",), ("checkpoint", "'smollm2-135m'")),
    "absent texts": (
        ("--config.measures.other=nll_by_position", "--config.measures.other.texts=absent.txt"),
        ("measures.other", "absent.txt", "no such file"),
    ),
    "unknown text source": (
        ("--config.measures.other=nll_by_position", "--config.measures.other.texts=kjb:Genesis"),
        ("measures.other", "kjb:Genesis"),
    ),
    "unknown member of a text source": (
        ("--config.measures.other=nll_by_position", "--config.measures.other.texts=python-docs:specialnams"),
        ("measures.other", "specialnams", "'specialnames'"),
    ),
}


@pytest.mark.parametrize(("args", "names"), LINES.values(), ids=list(LINES))
def test_command_line(
    lab: Lab, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], names: tuple[str, ...]
) -> None:
    refused(lab, capsys, names, *args)


FILES = {
    "unknown scale": ("", ":smok", ("scale", "'smok'", "'smoke'", "laptop")),
    "no such config": ("", "x", ("toy.pyx", "no such config file", "'toy.py'")),
    "syntax error": ("def get_config(:", "", ("toy.py", "SyntaxError")),
    "failing import": ("import absent_module", "", ("toy.py", "ModuleNotFoundError", "absent_module")),
    "no get_config": ("SCALES = ()\ndel get_config", "", ("toy.py", "has no get_config")),
    "no claims": ("del claims", "", ("toy.py", "has no claims")),
    "failing get_config": ("def get_config(scale):\n    return 1 / 0", "", ("toy.py", "ZeroDivisionError")),
    "no config": ("def get_config(scale):\n    pass", "", ("get_config", "NoneType")),
    "missing key": ("old = get_config\ndef get_config(s):\n    c = old(s); del c.arms; return c", "", ("config.arms",)),
    "no measures": (
        "old = get_config\ndef get_config(s):\n    c = old(s); c.measures = {}; return c",
        "",
        ("config.measures", "empty"),
    ),
    "measure without a name": (
        "old = get_config\ndef get_config(s):\n    c = old(s); c.measures = {'a': {'n': 1}}; return c",
        "",
        ("measures.a.name", "missing"),
    ),
    "arm that is a list": (
        "old = get_config\ndef get_config(s):\n    c = old(s); c.arms['zero'] = [1]; return c",
        "",
        ("arms.zero", "mapping", "[1]"),
    ),
    "arm with a slash": (
        "old = get_config\ndef get_config(s):\n    c = old(s); c.arms['a/b'] = {}; return c",
        "",
        ("config.arms", "'a/b'"),
    ),
}


@pytest.mark.parametrize(("code", "suffix", "names"), FILES.values(), ids=list(FILES))
def test_config_file(
    lab: Lab, capsys: pytest.CaptureFixture[str], code: str, suffix: str, names: tuple[str, ...]
) -> None:
    lab.config.write_text(lab.config.read_text() + "\n" + code + "\n")
    refused(lab, capsys, names, config=f"{lab.config}{suffix}")


def test_config_argument_is_missing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 2
    assert (
        capsys.readouterr().err == "error: python -m experiments.run: the following arguments are required: --config\n"
    )
    assert list_.main(["--jsn"]) == 2
    assert "--jsn: unknown argument (did you mean '--json'?)" in capsys.readouterr().err


def test_folder_of_another_config(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab("--arms=also") == 0
    capsys.readouterr()
    names = ("--workdir", str(lab.folder), "config.measures.toy.value is 1.0 there and 9.0 here")
    refused(lab, capsys, names, "--config.measures.toy.value=9")
    refused(lab, capsys, ("--workdir", "config.scale is 'laptop' there"), config=f"{lab.config}:smoke")
    (lab.folder / "config.json").write_text('{"schema": 99}')
    refused(lab, capsys, ("config.json", "99"))
    (lab.folder / "config.json").write_text("{")
    refused(lab, capsys, ("config.json", "cannot be read"))


def test_folder_of_somebody_else(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.folder.mkdir()
    (lab.folder / "report.html").write_text("mine")
    refused(lab, capsys, ("--workdir", str(lab.folder), "'report.html'"))
    refused(lab, capsys, ("--workdir", "toy.py is a file"), workdir=lab.config)


def test_config_json_of_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    refused(lab, capsys, ("absent/config.json", "no such file"), config="absent/config.json")
    path = lab.root / "results.json"
    path.write_text('{"schema": 1, "arms": {}}')
    refused(lab, capsys, (str(path), "config.json of schema 1"), config=str(path))
    path.write_text('{"schema": 1, "file": "absent.py", "config": {}}')
    refused(lab, capsys, ("absent.py", "no such config file"), config=str(path))


@pytest.mark.parametrize("place", ["absolute", "above", "no name"])
def test_config_json_of_a_file_that_nobody_gave(lab: Lab, capsys: pytest.CaptureFixture[str], place: str) -> None:
    """A file outside of the checkout is run where the user names it, and not where a run's folder does."""
    ran, mine = lab.root / "ran", lab.root / "mine.py"
    mine.write_text(f"open({str(ran)!r}, 'w')\n" + lab.config.read_text())
    above = f"configs/{'../' * 20}{mine.relative_to('/')}"
    named = {"absolute": str(mine), "above": above, "no name": "a\0b"}[place]
    path = lab.root / "theirs.json"
    config = registry.load(lab.config).settings("laptop")
    path.write_text(json.dumps({"schema": 1, "file": named, "config": config}))
    refused(lab, capsys, (repr(named), "not in the checkout", "--file="), config=str(path))
    assert not ran.exists()
    assert lab("--dry-run", f"--file={mine}", config=str(path)) == 0 and ran.exists()
    capsys.readouterr()
    refused(lab, capsys, ("--file", "valid: with the config.json of a run"), f"--file={mine}")


TEXTS: dict[str, tuple[str, bytes | None, tuple[str, ...]]] = {
    "missing": ("gone.txt", None, ("gone.txt", "no such file")),
    "empty": ("a.txt", b"", ("a.txt", "empty")),
    "binary": ("a.txt", b"ab\0cd", ("a.txt", "binary")),
    "undecodable": ("a.txt", b"abc\xff", ("a.txt", "byte offset 3", "UTF-8")),
    "malformed JSON line": ("a.jsonl", b'{"text": "a"}\n{"text"', ("a.jsonl line 2", "malformed")),
    "missing JSON field": ("a.jsonl#body", b'{"text": "a"}', ("a.jsonl line 1", "'body'", "text")),
    "JSON field of a wrong type": ("a.jsonl", b'{"text": 3}', ("a.jsonl line 1", "'text'", "int")),
    "glob without a match": ("*.nothing", None, ("*.nothing", "matches no file")),
}


@pytest.mark.parametrize(("spec", "data", "names"), TEXTS.values(), ids=list(TEXTS))
def test_text_file(
    lab: Lab, capsys: pytest.CaptureFixture[str], spec: str, data: bytes | None, names: tuple[str, ...]
) -> None:
    """By the function, and by the command: refused before the first point."""
    path = lab.root / "texts" / spec
    path.parent.mkdir()
    if data is not None:
        path.with_name(spec.partition("#")[0]).write_bytes(data)
    with pytest.raises(UserError) as caught:
        texts.documents(str(path))
    for name in names:
        assert name in str(caught.value)
    args = ("--config.measures.other=nll_by_position", f"--config.measures.other.texts={path}")
    refused(lab, capsys, ("measures.other", *names), *args)


def test_text_too_short(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before anything is measured, by a dry run too."""
    (lab.root / "short.txt").write_text("short")
    args = ("--config.measures.other=nll_by_position", "--config.measures.other.texts=short.txt", "--arms=zero")
    refused(lab, capsys, ("arms.zero: measures.other", "'short.txt' has 5"), *args)
    refused(lab, capsys, ("arms.zero: measures.other", "'short.txt' has 5"), *args, "--dry-run")


def test_claims_that_fail_are_told_before_work(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.config.write_text(lab.config.read_text() + "\ndef claims(r):\n    return 1 / 0\n")
    for more in ([], ["--dry-run"]):
        assert lab(*more) == 2 and lab.calls == []
        assert "toy.py: claims(results) failed: ZeroDivisionError" in capsys.readouterr().err


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _cut(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].copy()})


def _add(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.adapter.weight"] = np.zeros(3, np.float32)


Q = "model.layers.0.self_attn.q_proj.weight"
CHECKPOINTS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "missing tensor": (_drop(Q), {}, (Q, "missing")),
    "wrong shape": (_cut(Q), {}, (Q, "(7, 8)", "(8, 2, 4)")),
    "foreign tensor": (_add, {}, ("model.layers.0.adapter.weight",)),
    "other width than config.json": (lambda tensors: None, {"hidden_size": 16}, ("shape",)),
    "unknown family": (lambda tensors: None, {"model_type": "lama"}, ("model_type", "'llama'")),
    "unknown activation": (lambda tensors: None, {"hidden_act": "sine"}, ("hidden_act", "silu")),
    "heads not divisible": (lambda tensors: None, {"num_key_value_heads": 3}, ("n_kv_heads",)),
    "missing width": (lambda tensors: None, {"hidden_size": None}, ("hidden_size", "missing")),
}


@pytest.mark.parametrize(("change", "config", "names"), CHECKPOINTS.values(), ids=list(CHECKPOINTS))
def test_checkpoint(
    lab: Lab,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Callable[..., Path],
    change: Any,
    config: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    refused(
        lab, capsys, names, f"--config.checkpoint={checkpoint(change, **config)}", "--config.model.max_positions=64"
    )


def test_damaged_checkpoint(lab: Lab, capsys: pytest.CaptureFixture[str], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    args = (f"--config.checkpoint={folder}", "--config.model.max_positions=64")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:-100], whole[:4], b"", b"\xff" * len(whole)):
        weights.write_bytes(data)
        refused(lab, capsys, ("model.safetensors",), *args)
    weights.unlink()
    refused(lab, capsys, (str(folder), "safetensors"), *args)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(lab, capsys, ("pytorch_model.bin", "pickle"), *args)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(lab, capsys, ("model-1.safetensors", "no such file"), *args)
    (folder / "config.json").write_text("{")
    refused(lab, capsys, ("config.json", "JSON"), *args)
    (folder / "config.json").unlink()
    refused(lab, capsys, ("config.json", "no such file"), *args)


def test_foreign_vocabulary(lab: Lab, capsys: pytest.CaptureFixture[str], checkpoint: Callable[..., Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = checkpoint()
    words = {f"word{i}": i for i in range(300)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))
    refused(lab, capsys, ("300", "model.vocab_size = 258"), f"--config.checkpoint={folder}")
    (folder / "tokenizer.json").write_text("{}")
    refused(lab, capsys, ("tokenizer.json",), f"--config.checkpoint={folder}")


def test_arm_with_other_parameters_than_the_checkpoint(
    lab: Lab, capsys: pytest.CaptureFixture[str], checkpoint: Callable[..., Path]
) -> None:
    args = (f"--config.checkpoint={checkpoint()}", "--config.arms.window.model.d_ff=16")
    refused(lab, capsys, ("arms.window", "other parameters", "blocks/ffn/"), *args, "--config.model.max_positions=64")


@pytest.mark.parametrize("data", [b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40, b"", b"not a model"])
def test_damaged_gguf(lab: Lab, capsys: pytest.CaptureFixture[str], data: bytes) -> None:
    path = lab.root / "model.gguf"
    path.write_bytes(data)
    refused(lab, capsys, ("model.gguf",), f"--config.checkpoint={path}")
    with pytest.raises(UserError, match=r"model\.gguf"):
        interop.load(str(path))


def test_truncated_gguf(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Metadata and directory of tensors are whole, the weights stop early."""
    gguf = pytest.importorskip("gguf")
    path = lab.root / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((258, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:-4000])
    refused(lab, capsys, ("model.gguf",), f"--config.checkpoint={path}")


GGUF: dict[str, tuple[Callable[[Any], None], tuple[bytes, bytes], str]] = {
    "text for a number": (lambda w: w.add_string("llama.embedding_length", "wide"), (b"", b""), "embedding_length"),
    "no number": (
        lambda w: w.add_float32("llama.attention.layer_norm_rms_epsilon", float("nan")),
        (b"", b""),
        "epsilon",
    ),
    "a number for texts": (lambda w: w.add_uint32("tokenizer.ggml.tokens", 3), (b"", b""), "tokenizer.ggml.tokens"),
    "tokens of other bytes": (
        lambda w: w.add_array("tokenizer.ggml.tokens", ["abcdefgh"]),
        (b"abcdefgh", b"\xff" * 8),
        "tokenizer.ggml.tokens",
    ),
    "a text for an id": (
        lambda w: (w.add_array("tokenizer.ggml.tokens", ["a"]), w.add_string("tokenizer.ggml.bos_token_id", "a")),
        (b"", b""),
        "bos_token_id",
    ),
}


@pytest.mark.parametrize(("change", "bytes_", "key"), GGUF.values(), ids=list(GGUF))
def test_gguf_metadata_of_another_kind(
    tmp_path: Path, change: Callable[[Any], None], bytes_: tuple[bytes, bytes], key: str
) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    change(writer)
    sizes = {"block_count": 1, "attention.head_count": 2, "embedding_length": 8, "feed_forward_length": 8}
    known = {name for shard in writer.kv_data for name in shard}
    for name, size in {**sizes, "context_length": 32}.items():
        if f"llama.{name}" not in known:
            writer.add_uint32(f"llama.{name}", size)
    if "llama.attention.layer_norm_rms_epsilon" not in known:
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((258, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes().replace(*bytes_) if bytes_[0] else path.read_bytes())
    with pytest.raises(UserError, match=rf"model\.gguf: metadata '[a-z_.]*{key}'") as caught:
        interop.load(str(path), load_params=False)
    assert "\n" not in str(caught.value)


def test_a_mistake_on_resume_keeps_what_was_there(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab("--arms=also") == 0
    capsys.readouterr()
    refused(lab, capsys, ("--arms", "'also'"), "--arms=alsoo")
    assert json.loads((lab.folder / "results.json").read_text())["arms"]["also"]
