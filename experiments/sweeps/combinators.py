"""Combinators to write the sweeps of a config file with.

A sweep is a function ``sweep_NAME()`` in a config file that gives dicts from dotted keys to values, the keys being
those of ``--config.KEY`` of `experiments.run`::

    from experiments.sweeps import grid, product

    def sweep_windows():
        yield {}  # the config as it is
        yield from product(grid({"arms.window.model.pattern.window": (64, 256)}), grid(seeds=[(0,), (1,)]))

The combinators take any iterables of such dicts and give lists. They raise `UserError` where a key would be set twice
in one point, or where the same point would come twice.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.sweeps.points import Changes, literal, shown
from lm.errors import UserError


def grid(values: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]) -> list[Changes]:
    """Every combination of the values of each key, the last key changing fastest."""
    columns = _columns("grid", values, more)
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]


def zip_(values: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]) -> list[Changes]:
    """The first values of all keys, then the second ones, and so on; all keys need as many values."""
    columns = _columns("zip_", values, more, repeats=True)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{n} for {name}" for name, n in lengths.items())
        raise UserError(f"zip_: found {found}; valid: the same number of values for every key")
    return _distinct("zip_", [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def chain(*sweeps: Iterable[Mapping[str, Any]]) -> list[Changes]:
    """The points of one sweep after those of the other."""
    return _distinct("chain", [dict(p) for sweep in sweeps for p in sweep])


def product(*sweeps: Iterable[Mapping[str, Any]]) -> list[Changes]:
    """Every point of one sweep with every point of the others, the last sweep changing fastest."""
    return _distinct("product", [union("product", row) for row in itertools.product(*sweeps)])


def prefix(points: Iterable[Mapping[str, Any]], head: str) -> list[Changes]:
    """The points with ``head.`` before every key, for example ``arms.window``."""
    return [{f"{head}.{name}": value for name, value in p.items()} for p in points]


def subsample(points: Iterable[Mapping[str, Any]], n: int, seed: int = 0) -> list[Changes]:
    """`n` of the points, drawn without replacement and kept in their order; the seed determines which."""
    every = _distinct("subsample", [dict(p) for p in points])
    if not 1 <= n <= len(every):
        raise UserError(f"subsample: n: found {n}; valid: 1 to {len(every)}, the number of points")
    return [every[i] for i in sorted(random.Random(seed).sample(range(len(every)), n))]


def _columns(
    what: str, values: Mapping[str, Iterable[Any]] | None, more: Mapping[str, Iterable[Any]], repeats: bool = False
) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for name, column in union(what, [values or {}, more]).items():
        if isinstance(column, (str, Mapping)) or not isinstance(column, Iterable):
            raise UserError(f"{what}: {name}: found {column!r}; valid: a tuple or list of values")
        out[name] = list(column)
        if not out[name]:
            raise UserError(f"{what}: {name}: has no values; valid: at least one")
        texts = [literal(v, f"{what}: {name}") for v in out[name]]
        twice = next((t for i, t in enumerate(texts) if t in texts[:i]), None)
        if twice is not None and not repeats:
            raise UserError(f"{what}: {name}: found {twice} twice; valid: different values")
    if not out:
        raise UserError(f"{what}: has no keys; valid: at least one")
    return out


def union(what: str, parts: Iterable[Mapping[str, Any]]) -> Changes:
    out: Changes = {}
    for part in parts:
        for name, value in part.items():
            if any(same_plug(name) == same_plug(other) for other in out):
                raise UserError(f"{what}: {name}: is set twice in one point; valid: every key once")
            out[name] = value
    return out


def same_plug(name: str) -> str:
    """``model.pattern`` and ``model.pattern.name`` are one key."""
    return str(name).removesuffix(".name")


def _distinct(what: str, points: list[Changes]) -> list[Changes]:
    seen: dict[frozenset[tuple[str, str]], int] = {}
    for i, point in enumerate(points, 1):
        at = frozenset((same_plug(name), literal(value, f"{what}: {name}")) for name, value in point.items())
        if seen.setdefault(at, i) != i:
            raise UserError(f"{what}: point {i} is point {seen[at]} again ({shown(point)}); valid: different points")
    return points
