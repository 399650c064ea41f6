"""Where a generation's parameters, caches and rows live, and its programs lowered for that."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lm import caches
from lm.config import ModelConfig, merge
from lm.decoding.generator import Settings, State, initial_state, one_token, prefill
from lm.decoding.sampling import Sampling
from lm.errors import UserError
from lm.model import params
from lm.model.language_model import DecoderModel
from lm.sharding.layout import Layout, using

ROOM = 256  # tokens of an answer, the last ones of a cache


class Placement:
    """Arrays of a generation over the devices of `layout`: `batch` rows of at most `length` tokens.

    `quantize`: of the cache, None or ``int8``. Raises `UserError`, before any array exists, for devices that the layout
    does not fit, axes that do not divide, and models that cannot be decoded.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layout: Layout,
        batch: int,
        length: int,
        devices: Sequence[Any] | None = None,
        quantize: str | None = None,
    ) -> None:
        if quantize is not None:
            cfg = merge(cfg, {"cache": {"quantize": quantize}}, "model")
        self.cfg, self.layout, self.batch, self.length = cfg, layout, batch, length
        self.model = DecoderModel(cfg)
        self.mesh = layout.mesh(devices)
        sizes = dict(self.mesh.shape)
        if batch < 1 or length < 1:
            raise UserError(f"--batch, --length: must be at least 1, found {batch}, {length}")
        n = layout.parts("batch", sizes)
        if batch % n:
            raise UserError(f"--batch: {batch} rows are not divisible by {n} devices; valid: a multiple of {n}")
        if layout.parts("layers", sizes) > 1:
            raise UserError("--mesh: stages only train; valid: data, fsdp, expert, sequence and tensor")
        whole = jax.eval_shape(params.unstack, params.abstract(cfg))
        named = {name: leaf.shape for name, leaf in params.names(whole).items()}
        axes = params.axes(cfg)
        layout.check({name: (shape, axes[name]) for name, shape in named.items()}, sizes)
        cache = jax.eval_shape(lambda: caches.init(cfg, batch, length))
        for i, (leaf, names) in enumerate(zip(jax.tree.leaves(cache), self._names(cache), strict=True)):
            layout.check({f"the cache's array {i}": (leaf.shape, tuple(n or "one" for n in names))}, sizes)
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, x: self._placed(x, axes.at(path)),
            whole,
        )
        where = caches.axes(cache, lambda names: self.sharding(names))
        self.cache = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, where)

    @staticmethod
    def _names(cache: caches.Caches) -> list[tuple[str | None, ...]]:
        found: list[tuple[str | None, ...]] = []
        caches.axes(cache, found.append)
        return found

    def sharding(self, names: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.layout.spec(names))

    def _placed(self, x: jax.ShapeDtypeStruct, names: Sequence[str | None]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding(names))

    def _rows(self, shape: tuple[int, ...], kind: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=self.sharding(("batch", *(None,) * (len(shape) - 1))))

    def decode(self, sampling: Sampling | None = None) -> Any:
        """``(params, state) -> state``, one more token for every row (`lm.decoding.generator.one_token`), lowered; the
        state is donated."""
        settings = Settings(self.model, sampling or Sampling(), ())
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))
        shapes = jax.eval_shape(
            lambda h, c, k: initial_state(settings, h, c, k, ROOM), self._hidden(), self.cache, keys
        )
        rows = {
            f.name: jax.tree.map(lambda x: self._rows(x.shape, x.dtype), vars(shapes)[f.name]) for f in fields(shapes)
        }
        state = State(**{**rows, "cache": caches.begun(self.cache)})
        where = jax.tree.map(lambda x: x.sharding, state)
        run = jax.jit(lambda p, s: one_token(settings, p, s), out_shardings=where, donate_argnums=1)
        with using(self.layout, self.mesh):
            return run.lower(self.params, state)

    def _hidden(self) -> jax.ShapeDtypeStruct:
        return self._rows((self.batch, self.cfg.d_model), jnp.dtype(self.cfg.dtype))

    def read(self, tokens: int, fresh: bool) -> Any:
        """``(params, tokens, index, cache, hidden) -> (hidden, cache)``, a piece of a prompt
        (`lm.decoding.generator.prefill`), lowered: the first one where `fresh` (without `hidden`), else one after
        others; the cache is donated."""
        later = caches.begun(self.cache)
        rows = self._rows((self.batch, tokens), jnp.int32)
        where = (self.sharding(("batch", None)), jax.tree.map(lambda x: x.sharding, later))
        run = jax.jit(functools.partial(prefill, self.model), out_shardings=where, donate_argnums=3)
        with using(self.layout, self.mesh):
            if fresh:
                return run.lower(self.params, rows, rows, self.cache)
            return run.lower(self.params, rows, rows, later, self._hidden())
