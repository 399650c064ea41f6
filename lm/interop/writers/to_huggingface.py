"""Checkpoints out: a Hugging Face directory that `transformers` loads to the same logits.

What a family can say is tested by saying it and reading it back: whatever of the model's configuration does not survive
is named, and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import lm.model.params as params_lib
from lm.config import ModelConfig, build, saved_names, to_dict
from lm.data.record import TextRecord
from lm.errors import UserError, unknown
from lm.files import new_folder, write_json
from lm.interop.families import FAMILIES
from lm.interop.families.table import flip
from lm.nested import flat

# How a model is computed, not what it computes: not part of a checkpoint.
_COMPUTED = "dtype param_dtype remat scan_layers init_std mixer.backend mixer.block_q mixer.block_k".split()
# Of a mixture of experts, what matters in training alone.
_TRAINING = (
    "capacity capacity_counts_k min_capacity priority group balance_over dispatch implementation load_balance_loss "
    "router_z_loss router.jitter router.bias_rate router.centre"
).split()


def family_of(cfg: ModelConfig, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """The family that can express `cfg` and its config.json; `name` asks for one.

    Raises `UserError` naming the first setting that the family (or the nearest one) has no place for.
    """
    if name is not None and name not in FAMILIES:
        raise unknown("--family", name, FAMILIES)
    lost: dict[str, list[str]] = {}
    for family in [name] if name else FAMILIES:
        hf = FAMILIES[family].write(cfg)
        lost[family] = _differences(cfg, hf, family)
        if not lost[family]:
            return family, hf
    nearest = min(lost, key=lambda f: (not lost[f][0].startswith("model."), len(lost[f])))  # one that refuses is far
    valid = ", ".join(FAMILIES)
    raise UserError(f"export: {lost[nearest][0]}, which {nearest} cannot express; valid families: {valid}")


def _differences(cfg: ModelConfig, hf: Mapping[str, Any], family: str) -> list[str]:
    """``model.KEY = VALUE`` of everything that config.json does not bring back."""
    try:
        back = build(ModelConfig, FAMILIES[family].read(json.loads(json.dumps(hf))), "model")
    except UserError as e:
        return [f"the model ({e})"]

    def order(key: str) -> tuple[bool, str]:
        return not key.endswith(".name"), key  # another plug says more than its fields

    ours, theirs, out = _settings(cfg), _settings(back), []
    for key in sorted({key for layer in (*ours, *theirs) for key in layer}, key=order):
        wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a.get(key) != b.get(key)]
        if wrong:
            value = ours[wrong[0]].get(key)
            where = "" if all(layer.get(key) == value for layer in ours) else f"layer {wrong[0]} "
            out.append(f"model.{where}{key} = {value!r}")
    return out


def _settings(cfg: ModelConfig) -> list[dict[str, Any]]:
    """Everything that each layer of a model computes by, flat."""
    apart, out = (*_COMPUTED, *(f"ffn.{name}" for name in _TRAINING)), []
    for layer in cfg.layers():
        found = {k: v for k, v in flat(_to_dict(layer)).items() if k not in apart}
        if found.get("positions.trained") is None:
            found["positions.trained"] = cfg.max_positions
        out.append(found)
    return out


def _to_dict(cfg: ModelConfig) -> dict[str, Any]:
    """The fields under the names that a user writes."""
    names = saved_names(ModelConfig)
    return {names.get(k, k): v for k, v in to_dict(cfg, whole=True).items()}


def tensors(cfg: ModelConfig, params: Mapping[str, object], family: str) -> dict[str, np.ndarray]:
    """The file's tensors by name, float32 or as stored: the import's tables, backwards."""
    kind = FAMILIES[family]
    out: dict[str, np.ndarray] = {}
    fused: dict[str, dict[str, np.ndarray]] = {}  # of each tensor that holds several
    for place, leaf in params_lib.names(params).items():
        for i, ours, stored in _by_layer(cfg, place, leaf):
            name, turn = kind.table[ours]
            if "{e}" in name:
                out |= {name.format(i=i, e=e): matrix.T for e, matrix in enumerate(stored)}
                continue
            file, value = name.format(i=i), _flat_heads(ours, stored)
            if kind.fuses(ours) is not None:
                fused.setdefault(file, {})[ours] = value
            else:
                out[file] = value.T if turn is flip else value
    for file, found in fused.items():
        one = next(iter(found))
        together, part = kind.fuses(one), one.rpartition("/")[2]
        assert together is not None
        out[file] = together.join(cfg, [found[f"{layer}/{part}"] for layer in together.parts])
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


def _by_layer(cfg: ModelConfig, place: str, leaf: np.ndarray) -> Iterator[tuple[int | None, str, np.ndarray]]:
    """(layer, name within the layer, array) of a parameter; (None, name, array) outside of layers."""
    block, _, rest = place.partition("/")
    if block == "blocks":
        for i in range(cfg.n_layers):
            yield i, rest, np.asarray(leaf[i])
    elif block.startswith("blocks_"):
        yield int(block.removeprefix("blocks_")), rest, np.asarray(leaf)
    else:
        yield None, place, np.asarray(leaf)


def _flat_heads(ours: str, value: np.ndarray) -> np.ndarray:
    """A linear layer's arrays without the axes of heads: matrices ``[in, out]``, biases ``[out]``."""
    if not ours.startswith("attn/") or not ours.endswith(("/bias", "/kernel")):
        return value
    if ours.endswith("/bias"):
        return value.reshape(-1)
    return value.reshape(-1, value.shape[-1]) if "/o/" in ours else value.reshape(value.shape[0], -1)


def write(
    folder: Path,
    cfg: ModelConfig,
    params: Mapping[str, object],
    text: TextRecord | None = None,
    *,
    family: str | None = None,
    dtype: str | None = None,
) -> str:
    """Writes config.json, model.safetensors and all that `text` says; gives the family's name.

    `dtype`: ``float32``, ``float16`` or ``bfloat16``; None = that of `params`. The folder appears whole or not at all,
    and must not exist. Raises `UserError` for a model that the family cannot express, and for a place that cannot be
    written.
    """
    from safetensors.numpy import save_file

    kind, hf = family_of(cfg, family)
    text = TextRecord() if text is None else text
    arrays = tensors(cfg, params, kind)
    if dtype is None:
        dtypes = {str(array.dtype) for array in arrays.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    nobody = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # not the default of the family's class
    hf |= {"dtype": dtype, "torch_dtype": dtype, **nobody, **text.config}
    with new_folder(folder) as swap:
        write_json(swap / "config.json", hf, indent=2, ascii_only=False)
        arrays = {name: array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
        save_file(arrays, str(swap / "model.safetensors"), {"format": "pt"})
        text.save(swap)
    return kind
