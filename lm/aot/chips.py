"""TPU generations: what one chip has, from Cloud TPU's public system pages, and slices a compiler can be asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError, unknown

GB = 1e9


@dataclass(frozen=True)
class Chip:
    """`flops`: bfloat16 FLOP/s; `hbm`: bytes of memory; `hbm_rate`, `ici_rate`: bytes/s of that memory, and of all
    links to other chips of the slice together, one way; `dcn_rate`: a chip's share of its host's network, bytes/s."""

    flops: float
    hbm: float
    hbm_rate: float
    ici_rate: float
    dcn_rate: float


# The pages give the links' rates in Gbit/s, both ways together: 2400, 1600, 4800 and 3584.
# The network: 6.4 Tbit/s for 256 v5e, 25.6 for 256 v6e; 200 Gbit/s a host of four v4 or v5p.
CHIPS = {
    "v4": Chip(275e12, 32 * GB, 1228 * GB, 2400 / 16 * GB, 6.25 * GB),
    "v5e": Chip(197e12, 16 * GB, 819 * GB, 1600 / 16 * GB, 3.125 * GB),
    "v5p": Chip(459e12, 95 * GB, 2765 * GB, 4800 / 16 * GB, 6.25 * GB),
    "v6e": Chip(918e12, 32 * GB, 1640 * GB, 3584 / 16 * GB, 12.5 * GB),
}


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # sides of slices in two dimensions
MOST = {"v4": 4096, "v5p": 8960}  # chips of a slice in three


def slices(topology: str) -> tuple[int, str]:
    """How many slices, and which: 2 and ``v5e:16x16`` of ``2xv5e:16x16``, 1 of a slice alone."""
    found = re.fullmatch(r"([1-9][0-9]{0,3})x(v\w+:.*)", topology)
    return (int(found[1]), found[2]) if found else (1, topology)


def count(topology: str) -> int:
    """Chips of all its slices."""
    n, one = slices(topology)
    return n * math.prod(int(side) for side in split(one)[1].split("x"))


def split(topology: str) -> tuple[str, str]:
    """``("v5e", "16x16")`` of ``"v5e:16x16"``, and of several such slices; `UserError` for anything else."""
    name, _, shape = slices(topology)[1].partition(":")
    if name not in CHIPS:
        raise unknown("--topology", name, CHIPS)
    sides = 3 if name in ("v4", "v5p") else 2
    if not re.fullmatch(r"[0-9]{1,4}" + (sides - 1) * r"x[0-9]{1,4}", shape):
        example = "2x2x1" if sides == 3 else "4x4"
        raise UserError(f"--topology: {topology}: {name} slices have {sides} sides; valid: {name}:{example}, say")
    lengths = [int(side) for side in shape.split("x")]
    if sides == 2 and tuple(sorted(lengths)) not in FLAT:
        valid = ", ".join(f"{a}x{b}" for a, b in FLAT)
        raise UserError(f"--topology: {topology}: there is no such slice; valid: {name}:SIDES of {valid}")
    if sides == 3 and (math.prod(lengths) > MOST[name] or any(n not in (1, 2) and (n < 1 or n % 4) for n in lengths)):
        raise UserError(
            f"--topology: {topology}: there is no such slice; valid: sides of 1, 2 or a multiple of 4, of at most "
            f"{MOST[name]:,} chips together"
        )
    return name, shape


def devices(topology: str) -> Sequence[Any]:
    """The devices of a slice that need not be here, to compile for; of several, slice by slice, so that the first axes
    of a mesh go between them. Needs libtpu (the extra ``aot``).

    Raises `UserError` where the compiler is missing or does not know the slice.
    """
    split(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: libtpu is not installed; valid: pip install 'decoder-lab[aot]'")
    # The compiler alone is loaded, which other processes may do at the same time.
    for name, value in (("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_SKIP_MDS_QUERY", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    with contextlib.redirect_stderr(None):
        try:
            n, one = slices(topology)
            several = {"num_slices": n} if n > 1 else {}
            return list(topologies.get_topology_desc(one, "tpu", **several).devices)
        except Exception as e:  # the compiler's own message is about its internals
            raise UserError(f"--topology: {topology}: {_first(e)}; valid: a slice that Cloud TPU offers") from None


def _first(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:160]
