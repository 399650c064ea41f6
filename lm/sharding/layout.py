"""The mesh's axes, the rules from logical axes to them, and what follows for every array.

Axis types are Auto: shardings of inputs, outputs and the residual stream are stated, what lies between is propagated by
the compiler, which inserts the collectives (GSPMD, arXiv 2105.04663).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm import compat
from lm.errors import UserError, nearest, shown, unknown

# Slowest first: neighbours on the last axis are neighbours in the machine, and `tensor` talks most.
AXES = ("data", "stage", "fsdp", "expert", "sequence", "tensor")

Where = Callable[[str], NamedSharding]  # a parameter's name -> its devices

ATTENTION = ("ring", "zigzag", "gather")

# Logical axis -> mesh axes, as many as apply; none: whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "slots": ("sequence",),  # of a cache
    "stream": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": ("stage",),
}


@dataclass(frozen=True)
class Layout:
    """Devices along each mesh axis; one of them may be -1, which takes what the others leave.

    `data`: rows of the batch, parameters on every device. `fsdp`: rows too, and parameters and optimizer state cut
    along the model width, gathered layer by layer when they are needed (ZeRO-3, arXiv 1910.02054). `tensor`: heads,
    feed-forward channels and vocabulary (Megatron, arXiv 1909.08053). `sequence`: tokens of a row. `expert`: experts,
    and rows elsewhere. `stage`: layers. `rules` changes single rows of `RULES`: a logical axis to a mesh axis, to
    several, or to None. ``stream`` is the length of what goes from layer to layer, cut as ``length`` is unless a rule
    says otherwise: ``("sequence", "tensor")`` is Megatron's sequence parallelism (arXiv 2205.05198), the same bytes on
    the links, and layer inputs that `tensor` divides too.

    `microbatches`: how many the rows of a part are cut into on their way through the stages, None = as many as stages
    (`lm.sharding.pipeline`). `attention`, where tokens of a row are cut: ``ring`` sends keys round
    (`lm.attention.backends.ring`); ``zigzag`` first gives every device an early and a late half of a part, which a
    causal mask makes equal work; ``gather`` brings all of them to every device. `exchange`: how many rows at most a
    device sends to each device with other experts, as a multiple of an even share (`lm.ffn.moe.exchange`). What does
    not fit is dropped, so this one setting can change a result; None = all fit.
    """

    data: int = -1
    stage: int = 1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    microbatches: int | None = None
    attention: str = "ring"
    exchange: float | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = self._given()
        for name, n in sizes.items():
            if n < 1 and n != -1:
                raise UserError(f"train.mesh.{name}: must be at least 1, or -1 for what is left, found {n}")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(
                f"train.mesh: {', '.join(n for n, s in sizes.items() if s == -1)} are -1; valid: one axis at most"
            )
        if self.microbatches is not None and self.microbatches < 1:
            raise UserError(f"train.mesh.microbatches: must be at least 1 or None, found {self.microbatches}")
        if self.exchange is not None and not self.exchange > 0:
            raise UserError(f"train.mesh.exchange: must be positive, or None for no limit, found {self.exchange}")
        if self.attention not in ATTENTION:
            raise unknown("train.mesh.attention", self.attention, ATTENTION)
        rules = {}
        for logical, to in dict(self.rules).items():
            if to is not None and not isinstance(to, (str, list, tuple)):
                valid = f"an axis, several, or None: {', '.join(AXES)}"
                raise UserError(f"train.mesh.rules.{logical}: found {shown(to)}; valid: {valid}")
            axes = () if to is None or to == "" else (to,) if isinstance(to, str) else tuple(to)
            for axis in axes:
                if axis not in AXES:
                    valid = f"{', '.join(AXES)}, or None"
                    raise UserError(
                        f"train.mesh.rules.{logical}: found {shown(axis)}{nearest(shown(axis), AXES)}; valid: {valid}"
                    )
            rules[logical] = axes
        object.__setattr__(self, "rules", _Rules(rules))

    def check_rules(self, declared: Iterable[str]) -> None:
        """Raises `UserError` for a rule about an axis that neither the table nor the model's parameters name
        (`declared`)."""
        valid = {*RULES, *declared}
        for logical in self.rules:
            if logical not in valid:
                raise unknown(f"train.mesh.rules.{logical}", logical, valid)

    def resized(self, sizes: Mapping[str, int]) -> Layout:
        """The same with other numbers of devices along some axes."""
        changes: dict[str, Any] = dict(sizes)
        return dataclasses.replace(self, **changes)

    def _given(self) -> dict[str, int]:
        return {name: vars(self)[name] for name in AXES}

    def sizes(self, n_devices: int) -> dict[str, int]:
        """Devices along every axis. Raises `UserError` unless they multiply to `n_devices`."""
        sizes = self._given()
        given = math.prod(n for n in sizes.values() if n != -1)
        free = next((name for name, n in sizes.items() if n == -1), None)
        if n_devices % given or (free is None and given != n_devices):
            said = " x ".join(f"{name} {n}" for name, n in sizes.items() if n != 1)
            raise UserError(f"train.mesh: {said} does not fit {n_devices} devices; valid: a product of {n_devices}")
        return {**sizes, free: n_devices // given} if free else sizes

    def mesh(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices`, None = all there are."""
        devices = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(devices))
        return compat.auto_mesh(tuple(sizes.values()), tuple(sizes), devices)

    def axes_of(self, logical: str) -> tuple[str, ...]:
        """The mesh axes of a logical axis; none for one without a rule."""
        if logical == "stream" and logical not in self.rules:
            logical = "length"
        return tuple(self.rules.get(logical, RULES.get(logical, ())))

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The spec of an array by its logical axes. Where two want one mesh axis, the first has it."""
        used: set[str] = set()
        parts = []
        for name in names:
            axes = tuple(a for a in self.axes_of(name) if a not in used) if name else ()
            used.update(axes)
            parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
        return PartitionSpec(*parts)

    def parts(self, logical: str, sizes: Mapping[str, int]) -> int:
        """Into how many parts an axis is cut."""
        return math.prod(sizes[a] for a in self.axes_of(logical))

    def in_flight(self, stages: int) -> int:
        """Microbatches of a pipeline."""
        return self.microbatches or stages

    def layout_around_stages(self, sizes: Mapping[str, int]) -> Layout:
        """The layout outside the stages of a pipeline, where stages share the rows too (embeddings and the loss are
        not computed by all of them), if they can: microbatches in a multiple of the stages."""
        stages, taken = self.parts("layers", sizes), self.axes_of("batch")
        extra = tuple(a for a in self.axes_of("layers") if a not in taken)
        if stages == 1 or self.in_flight(stages) % stages or not extra:
            return self
        return dataclasses.replace(self, rules={**self.rules, "batch": (*taken, *extra)})

    def layout_in_stage(self) -> Layout:
        """The layout inside a stage."""
        taken = tuple(a for a in self.axes_of("batch") if a not in self.axes_of("layers"))
        return dataclasses.replace(self, rules={**self.rules, "batch": taken})

    def check(self, shapes: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]], sizes: Mapping[str, int]) -> None:
        """Raises `UserError` for the first tensor (``{name: (shape, logical axes)}``) that does not divide."""
        for name, (shape, names) in shapes.items():
            for at, (n, logical) in enumerate(zip(shape, names, strict=False)):
                spec = self.spec(names)[at]
                axes = () if spec is None else (spec,) if isinstance(spec, str) else spec
                parts = math.prod(sizes[a] for a in axes)
                if n % parts:
                    by = " x ".join(f"{a} {sizes[a]}" for a in axes if sizes[a] > 1)
                    valid = ", ".join(str(m) for m in range(1, min(n, 64) + 1) if n % m == 0)
                    raise UserError(
                        f"train.mesh: axis {at} of {name} ({logical}, {n}) does not divide by {parts} ({by}); valid: "
                        f"{valid} devices, or train.mesh.rules.{logical}=None to keep it whole"
                    )


class _Rules(dict[str, tuple[str, ...]]):
    """A mapping that can be hashed, so that a layout can."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


_CURRENT: contextvars.ContextVar[tuple[Layout, jax.sharding.Mesh] | None] = contextvars.ContextVar("layout")


@contextlib.contextmanager
def using(layout: Layout, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """While programs are traced in it, `constrain` speaks of `mesh`."""
    token = _CURRENT.set((layout, mesh))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> tuple[Layout, jax.sharding.Mesh] | None:
    """The layout and mesh that a program is traced for, None outside `using`."""
    return _CURRENT.get(None)


def parts(logical: str) -> int:
    """Into how many parts the current layout cuts a logical axis; 1 outside a layout."""
    found = current()
    return 1 if found is None else found[0].parts(logical, dict(found[1].shape))


def shard_stream(x: Any, inside: bool = False) -> Any:
    """``[B, T, D]`` as it goes from layer to layer, or `inside` one, where the rule ``stream`` cuts its length further:
    without a word about every such place the compiler takes the finer cut into a layer's loops."""
    found = current()
    if found is None or found[0].axes_of("stream") == found[0].axes_of("length"):
        return x
    return constrain(x, "batch", "length" if inside else "stream", None)


def gather_after(tree: Any, x: Any) -> Any:
    """`tree`, parameters of a layer, not before `x` is there, where a layout gathers them for use. Layers that are not
    stacked are one long program, in which the compiler gathers early while there is room: all layers at once."""
    if parts("embed") == 1:
        return tree
    return _barrier(tree, x)


def _together(tree: Any, x: Any) -> Any:
    return jax.lax.optimization_barrier((tree, x))[0]


_barrier = jax.custom_vjp(_together)
_barrier.defvjp(
    lambda tree, x: (_together(tree, x), None), lambda _, cotangent: (cotangent, None)
)  # the gradient passes


def constrain(x: Any, *names: str | None) -> Any:
    """`x` with its axes over the mesh axes of their logical names; x itself outside a layout, and where an axis of x
    does not divide (a single row that only shapes are taken from)."""
    found = current()
    if found is None or math.prod(found[1].shape.values()) == 1:
        return x
    layout, mesh = found
    for n, name in zip(x.shape, names, strict=True):
        if name and n % layout.parts(name, dict(mesh.shape)):
            return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout.spec(names)))
