"""Checkpoints out: a Hugging Face directory that `transformers` loads to the same logits.

What a family can say is tested by saying it and reading it back: whatever of the model's configuration does not survive
is named, and nothing is written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lm.model.params as params_lib
from lm.config import ModelConfig, build, saved_names, to_dict
from lm.data.record import TextRecord
from lm.errors import UserError, unknown
from lm.files import new_folder, write_json, write_text
from lm.interop.families import FAMILIES, Family
from lm.interop.families.table import flip
from lm.interop.slots import Index, flat_shape, slots
from lm.interop.writers import shards
from lm.interop.writers.shards import Entry
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


def tensors(cfg: ModelConfig, params: Mapping[str, object], family: str) -> list[Entry]:
    """The file's tensors, none of them made yet: the import's tables, backwards."""
    kind = FAMILIES[family]
    out: list[Entry] = []
    fused: dict[str, dict[str, Entry]] = {}  # of each tensor that holds several
    places = slots(cfg, kind.table)
    for name, leaf in params_lib.names(params).items():
        for (ours, i, e), at in places[name]:
            stored, turn = kind.table[ours]
            file = stored.format(i=i, e=e)
            shape = flat_shape(ours, tuple(leaf.shape[len(at) :]))
            flat = functools.partial(_flat_heads, ours, leaf, at)
            if kind.fuses(ours) is not None:
                fused.setdefault(file, {})[ours] = Entry(file, shape, flat)
            elif turn is flip:
                out.append(Entry(file, shape[::-1], functools.partial(_flipped, flat)))
            else:
                out.append(Entry(file, shape, flat))
    return [*out, *(_fused(cfg, kind, file, parts) for file, parts in fused.items())]


def _fused(cfg: ModelConfig, kind: Family, file: str, found: Mapping[str, Entry]) -> Entry:
    """One tensor of several, given by our names."""
    one = next(iter(found))
    together, part = kind.fuses(one), one.rpartition("/")[2]
    assert together is not None
    join, entries = together.join, [found[f"{layer}/{part}"] for layer in together.parts]
    shape = join(cfg, [np.zeros(entry.shape, np.bool_) for entry in entries]).shape
    return Entry(file, shape, lambda: join(cfg, [entry.make() for entry in entries]))


def _flipped(make: Callable[[], np.ndarray]) -> np.ndarray:
    return make().T


def _flat_heads(ours: str, leaf: np.ndarray | jax.Array, at: Index) -> np.ndarray:
    """A tensor without the axes of heads, on the host: matrices ``[in, out]``, biases ``[out]``."""
    if isinstance(leaf, jax.Array) and not _here(leaf):
        leaf = leaf[at]  # this one alone is brought here
        at = ()
    value = np.asarray(leaf)[at]
    return value.reshape(flat_shape(ours, value.shape))


def _here(leaf: jax.Array) -> bool:
    """Whether the host reads the array where it is."""
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def write(
    folder: Path,
    cfg: ModelConfig,
    params: Mapping[str, object],
    text: TextRecord | None = None,
    *,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = shards.LARGEST,
    card: Callable[[str], str] | None = None,
) -> str:
    """Writes config.json, the weights and all that `text` says; gives the family's name.

    `dtype`: ``float32``, ``float16`` or ``bfloat16``; None = that of `params`. `max_shard_size`: what one file may
    hold. `card`: README.md, given the family. One tensor at a time is in memory beside `params`. The folder appears
    whole or not at all, and must not exist. Raises `UserError` for a model that the family cannot express, and for a
    place that cannot be written.
    """
    kind, hf = family_of(cfg, family)
    shards.largest(max_shard_size)
    text = TextRecord() if text is None else text
    if dtype is None:
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    nobody = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # not the default of the family's class
    hf |= {"dtype": dtype, "torch_dtype": dtype, **nobody, **text.config}
    with new_folder(folder) as swap:
        write_json(swap / "config.json", hf, indent=2, ascii_only=False)
        shards.write(swap, tensors(cfg, params, kind), dtype, max_shard_size)
        text.save(swap)
        if card is not None:
            write_text(swap / "README.md", card(kind))
    return kind
