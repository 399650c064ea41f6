"""A change of parameters while they are read: one matrix, bias or table at a time, so that no second model exists."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lm.config import ModelConfig
from lm.interop.slots import Slot, slots


class Change(abc.ABC):
    """What happens to single tensors of a model."""

    @abc.abstractmethod
    def touches(self, slot: Slot) -> bool:
        """Whether that tensor changes."""

    @abc.abstractmethod
    def apply(self, slot: Slot, value: np.ndarray) -> np.ndarray:
        """The tensor of `slot` as it is in the parameter tree (without stacking axes), changed; float32."""


@dataclass(frozen=True)
class Changes(Change):
    """Several, one after the other."""

    parts: Sequence[Change]

    def touches(self, slot: Slot) -> bool:
        return any(part.touches(slot) for part in self.parts)

    def apply(self, slot: Slot, value: np.ndarray) -> np.ndarray:
        for part in self.parts:
            if part.touches(slot):
                value = part.apply(slot, value)
        return value


def changed(cfg: ModelConfig, params: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """`params`, arrays on one device, with `change` done to them."""
    places = slots(cfg)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        mine = places["/".join(str(k.key) for k in path)]
        if not any(change.touches(slot) for slot, _ in mine):
            return leaf
        value = np.array(leaf)
        for slot, at in mine:
            if change.touches(slot):
                value[at] = change.apply(slot, value[at].astype(np.float32)).astype(value.dtype)
        return jax.numpy.asarray(value)

    return dict(jax.tree_util.tree_map_with_path(one, dict(params)))
