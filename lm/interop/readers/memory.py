"""The memory of one parameter while it is filled, tensor by tensor, in the type and on the devices it is for."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding

ALIGNED = 64  # bytes: what the CPU backend takes over without a copy


class Memory:
    """Host arrays, one for each part that a device of this process has of an array like `leaf`.

    They are allocated by the first `put`. On a CPU the finished array is these very bytes.
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None = None) -> None:
        self.shape, self.dtype, self.sharding = leaf.shape, leaf.dtype, sharding
        found = {} if sharding is None else sharding.addressable_devices_indices_map(leaf.shape)
        self.devices = {d: self._box(index or ()) for d, index in found.items()}
        self.boxes = sorted({*self.devices.values()} or {self._box(())})
        self.parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def _box(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        """(start, stop) along every axis."""
        full = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        return tuple(s.indices(n)[:2] for s, n in zip(full, self.shape, strict=True))

    def put(self, at: tuple[int, ...], value: np.ndarray, start: tuple[int, ...] = ()) -> None:
        """`value` at index `at` of the leading axes, from `start` (default zeros) along those behind them."""
        if not self.parts:
            self.parts = {box: _aligned(tuple(b - a for a, b in box), self.dtype) for box in self.boxes}
        start = start or (0,) * value.ndim
        given = (*((i, i + 1) for i in at), *((s, s + n) for s, n in zip(start, value.shape, strict=True)))
        for box, part in self.parts.items():
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, given, strict=True)]
            if all(a < b for a, b in both):
                to = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(both, box, strict=True))
                of = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(both, given, strict=True))
                part[to] = value[(None,) * len(at)][of]

    def array(self) -> jax.Array:
        """The parameter; nothing may be put into it afterwards."""
        parts, self.parts = self.parts, {}
        if self.sharding is None:
            return jax.block_until_ready(jax.device_put(parts[self.boxes[0]], may_alias=True))
        placed = [jax.device_put(parts[box], device, may_alias=True) for device, box in self.devices.items()]
        made = jax.make_array_from_single_device_arrays(self.shape, self.sharding, placed)
        return jax.block_until_ready(made)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of no particular contents."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)
