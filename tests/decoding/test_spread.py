"""Generation over eight devices: the tokens and log-probabilities of one, whatever is cut along which axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm import interop
from lm.config import merge, model_config
from lm.decoding import Generator, Sampling
from lm.decoding.generator import Generated
from lm.decoding.spread import Spread
from lm.errors import UserError
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib
from lm.model.language_model import DecoderModel

BASE = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "d_ff": 64, "max_positions": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "head": {"name": "linear", "tie": False}},
    "mixtral": {**BASE, "ffn": {"name": "moe", "experts": 4}},
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]]
CASES = {
    "tensor": ("llama", {"tensor": 4, "data": 2}, {}),
    "fsdp": ("llama", {"fsdp": -1}, {}),
    "both, an int8 cache": ("llama", {"tensor": 2, "fsdp": 4}, {"cache": {"quantize": "int8"}}),
    "a window of sinks": ("llama", {"tensor": 4, "fsdp": 2}, {"pattern": {"name": "lm_infinite", "window": 8}}),
    "experts": ("mixtral", {"expert": 4, "tensor": 2}, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        cfg = model_config(model)
        weights = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params_lib.init(cfg, jax.random.key(0)))
        to_huggingface.write(root / name, cfg, weights)
    return {name: root / name for name in MODELS}


def answers(folder: Path, spread: Spread | None, change: dict[str, Any], prompts: list[list[int]]) -> list[Generated]:
    where = None if spread is None else spread.where
    found = interop.load(str(folder), overrides={"scan_layers": False}, where=where)
    generator = Generator(DecoderModel(merge(found.config, change, "model")), found.params, spread)
    made = generator(prompts, Sampling(temperature=0.8), max_new_tokens=12, stop=[0])
    return [row[0] for row in made]


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_say_what_one_says(name: str, folders: dict[str, Path]) -> None:
    model, mesh, change = CASES[name]
    for prompts in (PROMPTS, PROMPTS[:1]):  # rows that divide over the devices, and one
        want = answers(folders[model], None, change, prompts)
        got = answers(folders[model], Spread.of(mesh), change, prompts)
        assert [g.tokens for g in got] == [w.tokens for w in want]
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g.logprobs, w.logprobs, atol=2e-5)


def test_parameters_are_read_to_their_devices(folders: dict[str, Path]) -> None:
    spread = Spread.of({"tensor": 4, "fsdp": 2})
    params = interop.load(str(folders["llama"]), where=spread.where).params
    q = params["blocks"]["attn"]["q"]["kernel"]
    assert {s.data.shape for s in q.addressable_shards} == {(2, 16, 2, 4)} and len(q.devices()) == 8
    whole = interop.load(str(folders["llama"])).params
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert sum(s.data.nbytes for s in params["embed"].addressable_shards) == whole["embed"].nbytes


def test_meshes_that_do_not_fit(folders: dict[str, Path]) -> None:
    for mesh, words in (
        ({"tensor": 3}, "--mesh: tensor 3 does not fit 8 devices; valid: a product of 8"),
        ({"tensor": -1, "fsdp": -1}, "--mesh: fsdp, tensor are -1"),
        ({"sequence": 8}, "--mesh: sequence only trains; valid: data, fsdp, expert, tensor"),
    ):
        with pytest.raises(UserError) as e:
            Spread.of(mesh)
        assert words in str(e.value)
    with pytest.raises(UserError, match=r"kv_heads, 4\) does not divide by 8 \(tensor 8\); valid: 1, 2, 4 devices$"):
        interop.load(str(folders["llama"]), where=Spread.of({"tensor": 8}).where)
