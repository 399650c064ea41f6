"""Where a training's state and batches live, and its step compiled for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import params
from lm.model.decoder import Decoder
from lm.sharding import pipeline
from lm.sharding.layout import using
from lm.train.config import TrainConfig
from lm.train.step import Batch, State, evaluator, step


class Placement:
    """Arrays of a training over the devices of ``train.mesh``.

    Raises `UserError`, before any array exists, for devices that the mesh does not fit and for axes that do not divide.
    """

    def __init__(self, cfg: ModelConfig, train: TrainConfig, devices: Sequence[Any] | None = None) -> None:
        self.cfg, self.train, self.layout = cfg, train, train.mesh
        self.mesh = self.layout.mesh(devices)
        sizes = dict(self.mesh.shape)
        n = self.layout.parts("batch", sizes)
        if (train.batch // train.accumulate) % n:
            raise UserError(
                f"train.batch: {train.batch} rows in {train.accumulate} parts are not divisible by {n} devices "
                f"({_said(self.layout.axes_of('batch'), sizes)}); valid: a multiple of {n * train.accumulate}"
            )
        n = self.layout.parts("length", sizes)
        if train.data.seq_len % n:
            raise UserError(
                f"train.data.seq_len: {train.data.seq_len} tokens are not divisible by {n} devices "
                f"({_said(self.layout.axes_of('length'), sizes)}); valid: a multiple of {n}"
            )
        n, stages = self.layout.parts("batch", sizes), self.layout.parts("layers", sizes)
        pipeline.check(
            cfg.layers(), stages, train.batch // train.accumulate, n, self.layout.in_flight(stages), cfg.scan_layers
        )
        whole = params.abstract(cfg)
        self.shapes = {name: leaf.shape for name, leaf in params.names(whole).items()}
        axes = {name: params.logical_of(name) for name in self.shapes}
        self.layout.check({name: (shape, axes[name]) for name, shape in self.shapes.items()}, sizes)
        self.outside = self.layout.layout_around_stages(sizes)
        self.rows = NamedSharding(self.mesh, self.outside.spec(("batch", "length")))
        if stages > 1 or self.layout.parts("length", sizes) > 1:  # what layers cannot do in parts is said now
            tokens = jax.ShapeDtypeStruct((train.batch // train.accumulate, train.data.seq_len), "int32")
            with using(self.outside, self.mesh):
                jax.eval_shape(lambda p, t: Decoder(cfg).apply({"params": p}, t, logits=False), whole, tokens)

    def _sharding(self, names: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.layout.spec(names))

    def shardings(self, tree: Any) -> Any:
        """A sharding for every leaf of a tree (arrays or shapes): a parameter's rule for parameters and for whatever of
        an optimizer's state has a parameter's name and shape, everywhere for the rest."""

        def one(path: Any, leaf: Any) -> NamedSharding:
            name = params.owner(path, np.shape(leaf), self.shapes)
            return (
                NamedSharding(self.mesh, PartitionSpec()) if name is None else self._sharding(params.logical_of(name))
            )

        return jax.tree_util.tree_map_with_path(one, tree)

    def batch(self, local: dict[str, np.ndarray]) -> Batch:
        """This process's rows as arrays over all devices."""
        return {k: jax.make_array_from_process_local_data(self.rows, v) for k, v in local.items()}

    def share(self) -> tuple[int, int]:
        """Which part of every batch's rows this process reads, and into how many parts they are cut: processes whose
        devices hold the same rows (the two halves of a head, say) read the same."""
        shape = (self.train.batch, self.train.data.seq_len)
        held: dict[int, set[int]] = {}
        held_by: dict[Any, Any] = dict(self.rows.devices_indices_map(shape))
        for device, (rows, _) in held_by.items():
            held.setdefault(device.process_index, set()).update(range(*rows.indices(shape[0])))
        mine = held[jax.process_index()]
        first, n = min(mine), len(mine)
        if any(len(h) != n or min(h) % n or max(h) - min(h) + 1 != n for h in held.values()):
            raise UserError(
                "train.mesh: processes do not hold equal blocks of rows; valid: data x fsdp x expert a multiple or a "
                f"divisor of the {jax.process_count()} processes"
            )
        return first // n, shape[0] // n

    def compile(self, state: State, batch: Batch, base: Any = None) -> Any:
        """The step ``(state, batch, base) -> (state, metrics)`` ahead of time; its state argument is donated. Arrays or
        `jax.ShapeDtypeStruct`."""
        return self.lower(state, batch, base).compile()

    def evaluator(self) -> Any:
        """``(trained, batch, base) -> sums`` of the objective: every process has the whole batch and computes with its
        own rows."""
        fn = evaluator(self.cfg, self.train, NamedSharding(self.mesh, PartitionSpec()))

        def evaluate(trained: Any, batch: dict[str, np.ndarray], base: Any = None) -> dict[str, Any]:
            cut = {k: jax.make_array_from_callback(v.shape, self.rows, v.__getitem__) for k, v in batch.items()}
            with using(self.outside, self.mesh):
                out: dict[str, Any] = fn(trained, cut, base)
            return out

        return evaluate

    def lower(self, state: State, batch: Batch, base: Any = None) -> Any:
        """`compile` without the last step."""
        cfg, train, where = self.cfg, self.train, self.shardings(state)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        fn = jax.jit(
            lambda s, b, base: step(cfg, train, s, b, base),
            in_shardings=(where, {k: self.rows for k in batch}, self.shardings(base)),
            out_shardings=(where, everywhere),
            donate_argnums=0,
        )
        with using(self.outside, self.mesh):
            return fn.lower(state, batch, base)


def _said(axes: Sequence[str], sizes: dict[str, int]) -> str:
    return " x ".join(f"{a} {sizes[a]}" for a in axes if sizes[a] > 1) or "no axis"
