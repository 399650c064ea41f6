"""Arms that start from another arm's training, and arms that are not trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

from experiments import run
from lm import interop
from lm.model import params as params_lib

CONFIG = '''
"""Hypothesis: none. Cost: seconds."""

from ml_collections import ConfigDict

SCALES = ("smoke",)


def get_config(scale="smoke"):
    c = ConfigDict(convert_dict=False)
    c.name = "stages"
    c.scale = scale
    c.checkpoint = "random"
    c.seeds = (0, 1)
    c.model = {"vocab_size": 258, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "max_positions": 16}
    c.train = {
        "steps": 4, "batch": 8, "eval_every": 0, "final_rows": 8, "save_every": 4,
        "data": {"texts": ("TEXTS",), "tokenizer": "bytes", "seq_len": 16, "held_out": 0.3},
    }
    c.baseline = "base"
    c.measures = {"training": {"name": "train_log"}}
    more = {"starts_from": "base", "train.steps": 3}
    c.arms = {
        "base": {},
        "more": more,
        "adapters": {**more, "train.surgery.name": "lora", "train.surgery.rank": 2},
        "third": {**more, "starts_from": "more", "train.augmentation.name": "e2_llm"},
    }
    return c


def claims(r):
    return []
'''


@pytest.fixture
def config(experiment: Callable[..., Path]) -> Path:
    return experiment("stages", CONFIG, [topics[name] for name in sorted(topics)[:6]])


def about(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.json").read_text())


def test_a_training_starts_where_another_ended(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the last stage alone: the ones before it are trained because it needs them
    assert run.main([f"--config={config}", "--arms=third", "--workdir=first", "--config.seeds=(0,)"]) == 0
    assert run.main([f"--config={config}", "--workdir=all"]) == 0
    capsys.readouterr()
    folders = [p for p in Path("cache/trained").iterdir() if (p / "run.json").is_file()]
    assert len(folders) == 8  # four arms, two seeds
    ones = {str(p.resolve()): p for p in folders}
    for folder in folders:
        now = about(folder)
        if not now["start_source"]:
            assert now["start"] == "random" and now["train"]["steps"] == 4  # type: ignore[index]
            continue
        start = ones[str(Path(str(now["start_source"])).resolve())]
        assert now["start"] == start.name and about(start)["seed"] == now["seed"]
        assert now["train"]["steps"] == 3  # type: ignore[index]
        if "surgery" not in now["train"]:  # type: ignore[operator]
            continue
        # adapters alone are in the folder, and merge into the start's parameters
        base, merged = interop.load(str(start)).params, interop.load(str(folder)).params
        for name, leaf in params_lib.names(merged).items():
            touched = name.endswith(("q/kernel", "v/kernel"))
            assert np.array_equal(leaf, params_lib.names(base)[name]) != touched
        saved = interop.reader(str(folder)).trained(interop.config(str(folder)))
        assert all(n.endswith(("lora_a", "lora_b")) for n in params_lib.names(saved))


def test_an_untrained_arm_measures_the_checkpoint(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text()
    text = text.replace('{"name": "train_log"}', '{"name": "nll_by_position", "texts": ("python-docs",), "tokens": 16}')
    config.write_text(text.replace('"more": more,', '"raw": {"untrained": True}, "more": more,'))
    assert run.main([f"--config={config}", "--arms=raw,base", "--config.seeds=(0,)"]) == 0
    capsys.readouterr()
    made = json.loads(Path("runs/stages-smoke/results.json").read_text())["arms"]
    raw, base = (made[a]["training/bits_per_byte"]["mean"] for a in ("raw", "base"))
    # the first of the 16 bytes is not scored
    assert raw == pytest.approx(np.log2(258) * 15 / 16, abs=0.05) and base < raw - 0.01
    assert len(list(Path("cache/trained").iterdir())) == 1
    assert jax.device_count() == 8  # what this file was run on


MISTAKES = {
    "nobody": ("--config.arms.more.starts_from=nobody", "arms.more.starts_from: unknown name 'nobody'"),
    "circle": ("--config.arms.base.starts_from=third", "starts from this arm in turn"),
    "shapes": ("--config.arms.base.model.d_ff=24", "arms.more.starts_from: 'base' has parameters of other shapes"),
    "both": ("--config.arms.more.untrained=True", "untrained: goes with no key of training"),
    "a word": ("--config.arms.base.untrained=yes", "untrained: expected True or False, found 'yes'"),
    "offset": ("--config.arms.third.train.augmentation.max_offset=999", "max_offset: 999 moves tokens beyond"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(config: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    argument, words = MISTAKES[case]
    assert run.main([f"--config={config}", argument]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not Path("cache/trained").exists()
