"""A generation over several devices: where parameters and caches live, and what its programs are traced for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm import caches
from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import params
from lm.sharding.layout import Layout, Where, using

SERVING = ("data", "fsdp", "expert", "tensor")  # axes that generation and scoring are cut along


@dataclass(frozen=True)
class Spread:
    """`layout` over the devices of `mesh`; hashable, because compiled programs depend on it."""

    layout: Layout
    mesh: jax.sharding.Mesh

    @staticmethod
    def of(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Spread:
        """So many devices along each axis, -1 along one for what is left. Raises `UserError` for axes that only train,
        and for a product that is not the number of devices."""
        for axis, n in sizes.items():
            if axis not in SERVING and n != 1:
                raise UserError(f"--mesh: {axis} only trains; valid: {', '.join(SERVING)}")
        try:
            layout = Layout().resized({"data": 1, **sizes})
            return Spread(layout, layout.mesh(devices))
        except UserError as e:
            raise UserError(str(e).replace("train.mesh", "--mesh")) from None

    def where(self, cfg: ModelConfig) -> Where:
        """The devices of every parameter of `cfg`. Raises `UserError` for an axis that does not divide."""
        axes, sizes = params.axes(cfg), dict(self.mesh.shape)
        shapes = {name: (leaf.shape, axes[name]) for name, leaf in params.names(params.abstract(cfg)).items()}
        try:
            self.layout.check(shapes, sizes)
        except UserError as e:
            raise UserError(str(e).replace("train.mesh", "--mesh").partition(", or ")[0]) from None
        return lambda name: NamedSharding(self.mesh, self.layout.spec(axes[name]))

    def placed(self, cache: Any) -> Any:
        """An empty cache on its devices; an axis that does not divide is whole on all of them."""

        def where(x: jax.Array, names: Sequence[str | None]) -> NamedSharding:
            spec = self.layout.spec(names)
            return NamedSharding(self.mesh, PartitionSpec(*map(self._divides, x.shape, spec)))

        found: list[Sequence[str | None]] = []
        caches.axes(cache, found.append)
        names = iter(found)
        return jax.tree.map(lambda x: jax.device_put(x, where(x, next(names))), cache)

    def _divides(self, n: int, part: Any) -> Any:
        axes = () if part is None else (part,) if isinstance(part, str) else part
        return None if n % math.prod(self.mesh.shape[a] for a in axes) else part


@contextlib.contextmanager
def traced_for(spread: Spread | None) -> Iterator[None]:
    """While a program is traced in it, `lm.sharding.constrain` speaks of the mesh; nothing changes for None."""
    with contextlib.nullcontext() if spread is None else using(spread.layout, spread.mesh):
        yield
