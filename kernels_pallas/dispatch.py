"""What the kernels share: the choice of an implementation, the chips, and the cases that are compiled ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from lm.errors import UserError, unknown

IMPLEMENTATIONS = ("auto", "reference", "xla", "tpu", "interpret")
CHIPS = ("v4", "v5e", "v5p", "v6e")


@dataclass(frozen=True)
class Case:
    """One call at a real size, compiled for every chip without the chip.

    ``function(*arguments, **static, chip=chip)`` with `arguments` pytrees of ShapeDtypeStructs.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: int  # bytes of fast memory (VMEM) one grid step occupies, both buffers of every block counted
    static: Mapping[str, Any] = field(default_factory=dict)

    def bound(self, chip: str) -> Callable[..., Any]:
        """The function of the arrays alone."""
        return functools.partial(self.function, **self.static, chip=chip)


def check_chip(kernel: str, chip: str | None) -> None:
    """The chip's name selects tile sizes; it is said, never looked up, because programs are compiled elsewhere."""
    if chip is not None and chip not in CHIPS:
        raise unknown(f"{kernel}: chip", chip, CHIPS)


def run(
    kernel: str,
    implementation: str,
    forms: Mapping[str, Callable[..., Any]],
    refusal: str | None,
    *args: Any,
) -> Any:
    """Calls the implementation named, or for 'auto' the best one that serves the call.

    `forms` maps 'reference', 'xla', 'tpu', 'interpret' and 'gpu' to functions of `args`; `refusal` says why the TPU
    kernel cannot serve the call, if it cannot. 'auto' becomes the TPU kernel where the program is lowered for a TPU,
    whatever the machine that lowers it, and XLA operations elsewhere.
    Raises UserError for an unknown name, or a kernel asked for by name that cannot serve the call.
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown(f"{kernel}: implementation", implementation, IMPLEMENTATIONS)
    if implementation in ("tpu", "interpret") and refusal:
        raise UserError(f"{kernel}: implementation {implementation!r} cannot serve this call: {refusal}; use 'auto'")
    if implementation != "auto":
        return forms[implementation](*args)
    if refusal:
        return forms["xla"](*args)
    return jax.lax.platform_dependent(*args, tpu=forms["tpu"], cuda=forms["gpu"], default=forms["xla"])


def known_dtype(kernel: str, **arrays: Any) -> None:
    """Every array is bfloat16 or float32, all of them the same."""
    kinds = {name: str(a.dtype) for name, a in arrays.items()}
    if len(set(kinds.values())) > 1 or not set(kinds.values()) <= {"bfloat16", "float32"}:
        found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise UserError(f"{kernel}: found {found}; valid: all bfloat16 or all float32")


def precision(dtype: Any) -> jax.lax.Precision:
    """Products of float32 arrays are float32 products, on a TPU too."""
    return jax.lax.Precision.HIGHEST if dtype == jax.numpy.float32 else jax.lax.Precision.DEFAULT
