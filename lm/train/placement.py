"""Where a training's state and batches live, and its step compiled for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import params
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.objectives.base import Batch
from lm.objectives.forward import HIDDEN
from lm.sharding import pipeline
from lm.sharding.layout import using
from lm.train.config import TrainConfig
from lm.train.step import ALONE, Beside, State, evaluator, step


class Placement:
    """Arrays of a training over the devices of ``train.mesh``.

    Raises `UserError`, before any array exists, for devices that the mesh does not fit and for axes that do not divide.
    """

    def __init__(self, cfg: ModelConfig, train: TrainConfig, devices: Sequence[Any] | None = None) -> None:
        self.cfg, self.train, self.layout = cfg, train, train.mesh
        self._compiled: dict[Any, Any] = {}
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
        self.shapes, self.axes = {name: leaf.shape for name, leaf in params.names(whole).items()}, params.axes(cfg)
        self.layout.check_rules(self.axes.used())
        self.layout.check({name: (shape, self.axes[name]) for name, shape in self.shapes.items()}, sizes)
        self.layout_around_stages = self.layout.layout_around_stages(sizes)
        self.rows = NamedSharding(self.mesh, self.layout_around_stages.spec(("batch", "length")))
        if stages > 1 or self.layout.parts("length", sizes) > 1:  # what layers cannot do in parts is said now
            tokens = jax.ShapeDtypeStruct((train.batch // train.accumulate, train.data.seq_len), "int32")
            with using(self.layout_around_stages, self.mesh):
                jax.eval_shape(lambda p, t: DecoderModel(cfg).apply(p, Inputs(t), watch=HIDDEN), whole, tokens)

    def _sharding(self, names: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.layout.spec(names))

    def shardings(self, tree: Any) -> Any:
        """A sharding for every leaf of a tree (arrays or shapes): a parameter's rule for parameters and for whatever of
        an optimizer's state has a parameter's name and shape, everywhere for the rest."""

        def one(path: params.Path, leaf: Any) -> NamedSharding:
            name = params.owner(path, np.shape(leaf), self.shapes)
            return self._everywhere if name is None else self._sharding(self.axes[name])

        return jax.tree_util.tree_map_with_path(one, tree)

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def beside(self, beside: Beside) -> Beside:
        """A sharding for every leaf of what a step reads and never changes; a frozen model's parameters by its own
        axes, where it is a decoder."""
        found = {}
        for name, model in beside.models:
            tree = beside.params[name]
            if isinstance(model, DecoderModel):
                found[name] = jax.tree.map(self._sharding, params.axes(model.cfg).tree(tree), is_leaf=_is_axes)
            else:
                found[name] = jax.tree.map(lambda _: self._everywhere, tree)
        return Beside(self.shardings(beside.base), found, beside.models)

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raises `UserError` unless a batch has the arrays that the objective declares."""
        wanted = self.train.objective.batch(self.train.batch, self.train.data.seq_len)
        missing = [name for name in wanted if name not in batch]
        if missing:
            raise UserError(
                f"train.objective: needs {missing[0]!r} of every batch, the rows have {', '.join(sorted(batch))}; "
                "valid: an objective that fits the rows"
            )

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

    def compile(self, state: State, batch: Batch, beside: Beside = ALONE) -> Any:
        """The step ``(state, batch, beside) -> (state, metrics)`` ahead of time; its state argument is donated. Arrays
        or `jax.ShapeDtypeStruct`. Compiled once for every shape of a batch."""
        at = tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))
        if at not in self._compiled:
            self._compiled[at] = self.lower(state, batch, beside).compile()
        return self._compiled[at]

    def evaluator(self) -> Any:
        """``(trained, batch, beside) -> sums`` of the objective: every process has the whole batch and computes with
        its own rows."""
        fn = evaluator(self.cfg, self.train, self._everywhere)

        def evaluate(trained: Any, batch: dict[str, np.ndarray], beside: Beside = ALONE) -> dict[str, Any]:
            cut = {k: jax.make_array_from_callback(v.shape, self.rows, v.__getitem__) for k, v in batch.items()}
            with using(self.layout_around_stages, self.mesh):
                out: dict[str, Any] = fn(trained, cut, beside)
            return out

        return evaluate

    def lower(self, state: State, batch: Batch, beside: Beside = ALONE) -> Any:
        """`compile` without the last step."""
        cfg, train, where = self.cfg, self.train, self.shardings(state)
        fn = jax.jit(
            lambda s, b, beside: step(cfg, train, s, b, beside),
            in_shardings=(where, {k: self.rows for k in batch}, self.beside(beside)),
            out_shardings=(where, self._everywhere),
            donate_argnums=0,
        )
        with using(self.layout_around_stages, self.mesh):
            return fn.lower(state, batch, beside)


def _is_axes(x: object) -> bool:
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def _said(axes: Sequence[str], sizes: dict[str, int]) -> str:
    return " x ".join(f"{a} {sizes[a]}" for a in axes if sizes[a] > 1) or "no axis"
