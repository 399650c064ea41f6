"""The socket ``train.objective``: what an objective is given, and what it gives."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lm.heads.base import Sums
from lm.objectives.forward import Forward
from lm.plug import Plug

Batch = dict[str, jax.Array]


class LossOut(NamedTuple):
    """`loss`: a float32 scalar, the *sum* over the batch's weighted targets; `sums`: float32 scalars that add up over
    batches and devices, ``weight`` (what to divide by for a mean) and ``nll`` among them."""

    loss: jax.Array
    sums: Sums


class Objective(Plug):
    """What training minimises: a frozen dataclass of settings.

    Sums rather than means, so that gradient accumulation and packed rows of any fill give the same gradient as one
    large batch. An objective runs models through `Forward` alone: what their layers report is added by the training
    step and cannot be forgotten.
    """

    KEY: ClassVar[str] = "train.objective"
    models: ClassVar[tuple[str, ...]] = ()  # frozen models that it asks for, by their names in ``train.models``

    def batch(self, rows: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays that it needs of every batch; the loader's rows are checked against them. Here: ``inputs`` and
        ``targets`` int32, ``weights`` float32 (0 = not counted). Where a row holds more than one document or padding,
        ``segments`` and ``index`` int32 come too, as `lm.model.inputs.Inputs` takes them."""
        shape = (rows, seq_len)
        kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}

    @property
    def logits_at_once(self) -> int:
        """Tokens of a batch whose logits exist at one time; 0 = of all."""
        return 0

    def loss(self, forward: Forward, batch: Batch) -> LossOut:
        """The loss of a batch and its sums; differentiated by ``forward.params``."""
        raise NotImplementedError
