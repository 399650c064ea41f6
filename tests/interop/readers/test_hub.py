"""Checkpoints of the Hugging Face Hub, from a hub on this machine: the same as from a folder, known by their commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from cases.hub import FakeHub, serving, used

from experiments import convert, generate
from lm import interop
from lm.config import model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib

MODEL = {"vocab_size": 258, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16, "max_positions": 32}
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = model_config(MODEL)
    path = tmp_path_factory.mktemp("model") / "hf"
    to_huggingface.write(path, cfg, params_lib.init(cfg, jax.random.key(3)), TextRecord.of(ByteTokenizer(), "{{ x }}"))
    (path / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (path / "original").mkdir()
    (path / "original" / "other.safetensors").write_bytes(b"not read")
    return path


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving() as made:
        used(made.url, tmp_path / "cache", monkeypatch)
        made.add("ann/model", folder)
        yield made


def same(a: object, b: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_is_read_as_from_a_folder_and_only_what_is_needed(hub: FakeHub, folder: Path) -> None:
    commit = hub.repos["ann/model"].refs["main"]
    header = interop.load("hf:ann/model", load_params=False)
    assert hub.got() == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert (header.identity, header.source) == (f"hf:ann/model@{commit}",) * 2
    assert header.text.templates == {"default": "{{ x }}"}
    found, want = interop.load(header.source), interop.load(str(folder))
    assert hub.got() >= {"model.safetensors"} and not hub.got() & {"pytorch_model.bin", "other.safetensors"}
    same(found.params, want.params)
    assert found.config == want.config and interop.reader("hf:ann/model").licence() == "mit"


def test_shards_of_an_index_and_shards_without_one(
    hub: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    cut = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, those in cut.items():
        save_file({n: tensors[n] for n in those}, str(tmp_path / "cut" / file))
    (tmp_path / "cut" / "model.safetensors").unlink()
    hub.add("ann/bare", tmp_path / "cut")
    index = {"weight_map": {n: file for file, those in cut.items() for n in those}}
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "cut" / "more.safetensors").write_bytes(b"not in the index")
    hub.add("ann/cut", tmp_path / "cut")
    want = interop.load(str(folder)).params
    for name in ("ann/bare", "ann/cut"):
        same(interop.load(f"hf:{name}").params, want)
    assert "more.safetensors" not in hub.got()
    used(hub.url, tmp_path / "cache", monkeypatch, offline=True)
    same(interop.load("hf:ann/cut").params, want)


def test_a_branch_moves_and_a_commit_does_not(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    first = interop.load("hf:ann/model")
    cfg = model_config(MODEL)
    to_huggingface.write(tmp_path / "new", cfg, params_lib.init(cfg, jax.random.key(4)))
    commit = hub.add("ann/model", tmp_path / "new")
    hub.repos["ann/model"].refs["old"] = first.identity.partition("@")[2]
    moved = interop.load("hf:ann/model")
    assert moved.identity == f"hf:ann/model@{commit}" != first.identity
    for name in (first.source, "hf:ann/model@old"):
        again = interop.load(name)
        assert again.identity == first.identity
        same(again.params, first.params)
    assert not np.array_equal(moved.params["embed"], first.params["embed"])


def test_a_gguf_file_and_its_parts(hub: FakeHub, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    (tmp_path / "repo" / "sub").mkdir(parents=True)
    for name in ("m-00001-of-00002.gguf", "sub/one.gguf"):
        writer = gguf.GGUFWriter(str(tmp_path / "repo" / name), "none")
        writer.add_uint16("split.count", 2 if "of" in name else 0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    rest = (tmp_path / "repo" / "sub" / "one.gguf").read_bytes() + b"\0"  # equal files would be downloaded once
    (tmp_path / "repo" / "m-00002-of-00002.gguf").write_bytes(rest)
    hub.add("ann/quants", tmp_path / "repo")
    for name in ("sub/one.gguf", "m-00001-of-00002.gguf"):
        with pytest.raises(UserError, match=r"general\.architecture"):  # read, and told apart by what it holds
            interop.load(f"hf:ann/quants/{name}")
    assert hub.got() == {"one.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"}
    for wrong, words in (
        ("hf:ann/quants/sub/on.gguf", "did you mean 'sub/one.gguf'?"),
        ("hf:ann/quants", "has no config.json; valid: hf:ann/quants/m-00001-of-00002.gguf"),
    ):
        with pytest.raises(UserError) as e:
            interop.load(wrong)
        assert words in str(e.value)


def refused(words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: str) -> None:
    for command, args in (
        (generate.main, ("--prompt=a", "--max-new-tokens=1")),
        (convert.main, (f"--to={tmp_path}/to",)),
    ):
        assert command([f"--checkpoint={checkpoint}", *args]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not (tmp_path / "to").exists()


def test_mistakes_in_one_line(
    hub: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("ann/gated", folder)
    hub.repos["ann/gated"].gated = True
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "adapter_config.json").write_text("{}")
    hub.add("ann/adapter", empty)
    cases = {
        "hf:ann/nothing": "hf:ann/nothing: no such repository at http://127.0.0.1",
        "hf:ann/model@man": "has no revision 'man' (did you mean 'main'?); valid: main, or a commit",
        "hf:ann/gated": "is gated; valid: accept its terms",
        "hf:model": "found 'hf:model'; valid: hf:OWNER/NAME",
        "hf:ann/model/x.bin": "found the file 'x.bin'",
        "hf:ann/adapter": "valid: --adapter=hf:ann/adapter",
        "hf:ann/-model": "is no name of a repository",
    }
    for checkpoint, words in cases.items():
        refused(words, capsys, tmp_path, checkpoint)
    interop.load("hf:ann/model", load_params=False)  # all but the weights are in the cache
    used(hub.url, tmp_path / "cache", monkeypatch, offline=True)
    refused("HF_HUB_OFFLINE is set", capsys, tmp_path, "hf:ann/model")
    refused("HF_HUB_OFFLINE is set", capsys, tmp_path, "hf:ann/other")


def test_no_network(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as made:
        made.add("ann/model", folder)
        used(made.url, tmp_path / "cache", monkeypatch)
        want = interop.load("hf:ann/model")
    refused("cannot be reached", capsys, tmp_path, "hf:ann/other")
    found = interop.load("hf:ann/model")  # what the cache has is used
    assert found.identity == want.identity
    same(found.params, want.params)


def test_the_environment_says_where_the_hub_is(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env = {k: v for k, v in env.items() if k not in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    args = [sys.executable, "-m", "experiments.convert", "--checkpoint=hf:ann/model", f"--to={tmp_path}/out"]
    made = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert list((home / "hub").glob("models--ann--model/snapshots/*/model.safetensors"))
    assert (tmp_path / "out" / "config.json").is_file()
