"""Where an experiment's parameters come from: the Hub, and adapters, both part of what is measured and trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.hub import serving, used
from safetensors.numpy import save_file
from toy_experiment import Lab

from experiments import run
from lm import interop


def identities(lab: Lab) -> set[str]:
    return {json.loads(p.read_text())["what"]["checkpoint"] for p in (lab.folder / "points").iterdir()}


def adapter(folder: Path, **settings: Any) -> Path:
    """Of rank 1, on the feed-forward layer of the tiny checkpoint."""
    folder.mkdir()
    at = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = np.full((1, 8), 0.5, np.float32), np.ones((8, 1), np.float32)
    save_file({f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_of_the_hub_is_known_by_its_commit(
    lab: Lab, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--arms=zero", "--config.seeds=(0,)", "--config.checkpoint=hf:ann/tiny")
    with serving() as hub:
        used(hub.url, lab.root / "hub", monkeypatch)
        commit = hub.add("ann/tiny", checkpoint())
        assert lab("--dry-run", *args) == 0
        assert "model.safetensors" not in hub.got()
        assert lab(*args) == 0
        assert identities(lab) == {f"hf:ann/tiny@{commit}"} and len(lab.calls) == 2
        again = lab.root / "again"
        assert lab(*args, config=str(lab.folder / "config.json"), workdir=again) == 0
        assert lab.calls == []  # the same commit: what was measured is kept
        hub.add("ann/tiny", checkpoint(lambda tensors: tensors.update({"model.norm.weight": np.ones(8, np.float32)})))
        assert lab(*args, workdir=lab.root / "moved") == 0 and len(lab.calls) == 2
        capsys.readouterr()
        assert lab("--config.checkpoint=hf:ann/tin", workdir=lab.root / "none") == 2
    err = capsys.readouterr().err
    assert "hf:ann/tin: no such repository" in err and err.count("\n") == 1


def test_an_adapter_is_part_of_the_plan(
    lab: Lab, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--arms=zero", "--config.seeds=(0,)", f"--config.checkpoint={checkpoint()}")
    folder = adapter(lab.root / "adapter")
    assert lab(*args) == 0
    (plain,), without = identities(lab), lab.results()["arms"]["zero"]["toy/up"]["mean"]
    assert lab(*args, f"--config.adapter={folder}") == 2  # another config than this folder's
    assert "config.adapter" in capsys.readouterr().err
    other = Lab(lab.root, lab.config, lab.root / "other", lab.calls)
    assert other(*args, f"--config.adapter={folder}") == 0
    (both,), made = identities(other), other.results()
    assert both.startswith(f"{plain} + ") and made["config"]["adapter"] == str(folder)
    params = interop.load(f"{checkpoint()} + {folder}").params
    assert made["arms"]["zero"]["toy/up"]["mean"] == pytest.approx(
        float(np.abs(params["blocks"]["ffn"]["up"]["kernel"]).sum()), rel=1e-6
    )
    assert made["arms"]["zero"]["toy/up"]["mean"] != without


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--config.adapter=x",), "config.adapter: found 'x' to random parameters"),
        (("--config.checkpoint=CHECKPOINT", "--config.adapter=x"), "--adapter: x: no adapter_config.json"),
        (("--config.checkpoint=CHECKPOINT", "--config.adapter=hf:x"), "found 'hf:x'; valid: hf:OWNER/NAME"),
    ],
)
def test_mistakes(
    args: tuple[str, ...],
    words: str,
    lab: Lab,
    checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lab(*(a.replace("CHECKPOINT", str(checkpoint())) for a in args)) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not lab.folder.exists()


TRAINS = '''
"""Hypothesis: none. Cost: seconds."""

from ml_collections import ConfigDict

SCALES = ("laptop",)


def get_config(scale="laptop"):
    c = ConfigDict(convert_dict=False)
    c.name, c.scale, c.checkpoint, c.baseline = "trains", scale, "hf:ann/tiny", "lora"
    c.train = {
        "steps": 2, "batch": 8, "eval_every": 2, "eval_rows": 8, "final_rows": 8, "save_every": 2,
        "surgery": {"name": "lora", "targets": ("*/attn/q/kernel",), "rank": 2},
        "data": {"texts": ("TEXTS",), "tokenizer": "bytes", "seq_len": 16, "held_out": 0.3},
    }
    c.measures = {"training": {"name": "train_log", "bin": 2}}
    c.arms = {"lora": {}}
    return c


def claims(r):
    return []
'''


def test_a_training_of_adapters_finds_its_start_again(
    experiment: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment("trains", TRAINS, [f"This is text number {i}. " * (10 + i) for i in range(8)])
    folder = adapter(tmp_path / "adapter")
    with serving() as hub:
        used(hub.url, tmp_path / "hub", monkeypatch)
        commit = hub.add("ann/tiny", checkpoint())
        assert run.main([f"--config={config}", "--workdir=run", f"--config.adapter={folder}"]) == 0
        hub.add("ann/tiny", checkpoint(lambda tensors: tensors.update({"model.norm.weight": np.ones(8, np.float32)})))
    (made,) = (tmp_path / "cache" / "trained").glob("*")
    about = json.loads((made / "run.json").read_text())
    start = f"hf:ann/tiny@{commit} + {folder}"
    assert about["start_source"] == start
    want, found = interop.load(start).params, interop.load(str(made)).params  # from the cache: the hub is gone
    np.testing.assert_array_equal(found["blocks"]["ffn"]["up"]["kernel"], want["blocks"]["ffn"]["up"]["kernel"])
    assert not np.array_equal(found["blocks"]["attn"]["q"]["kernel"], want["blocks"]["attn"]["q"]["kernel"])
