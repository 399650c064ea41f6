"""The results of a sweep as data: rows per setting and arm, means and 95 % confidence intervals over seeds."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from experiments.reports import results_file
from lm.errors import UserError, shown
from lm.files import read_object, without_sum

SEEDS = "seeds"
LEVEL = 0.95
Setting = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """One metric of one arm in one setting: `values` by seed. `half`: of the interval, None for one seed."""

    arm: str
    setting: Setting
    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float | None:
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def half(self) -> float | None:
        return interval(self.values)


def interval(values: Sequence[float]) -> float | None:
    """Half the width of Student's interval for the mean of independent `values`; None where there is only one."""
    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / math.sqrt(n))


@dataclass(frozen=True)
class Sweep:
    """A sweep's points as rows. `same`: swept keys with one value; `keys`: those with several, of any arm."""

    head: Mapping[str, Any]
    rows: tuple[Row, ...]
    keys: tuple[str, ...]
    same: tuple[tuple[str, Any], ...]
    counts: Mapping[str, int]


def load(folder: Path) -> Sweep:
    """Reads ``sweep.json`` and what its points have measured by now; raises `UserError` where that is not possible."""
    head, points = _read(folder / "sweep.json")
    found: dict[tuple[str, Setting, str], dict[Any, float]] = {}
    counts: dict[str, int] = {}
    every = [changes for _, changes, _, _ in points]
    for name, changes, arms, state in points:
        seeds = changes.get(SEEDS)
        try:
            results, _ = results_file.load(folder / name)
            arms, seeds = results["arms"], results.get("config", {}).get("seeds", seeds)
            state = "done" if results.get("complete") and state != "done" else state
        except UserError as e:  # what sweep.json has of it
            if (folder / name / results_file.NAME).is_file():
                print(f"note: {e}; shown is what sweep.json has of the point", file=sys.stderr)
        counts[state] = counts.get(state, 0) + 1
        for arm, metrics in arms.items():
            setting = _setting(changes, arm)
            for metric, stat in metrics.items():
                for seed, value in _by_seed(stat, seeds).items():
                    found.setdefault((arm, setting, metric), {})[seed] = value
    if not found:
        raise UserError(f"{folder}: no point has results yet ({counted(counts)}); valid: a sweep with finished points")
    names = list(dict.fromkeys(_bare(k) for changes in every for k in changes if k != SEEDS))
    values = {k: {repr(dict(s).get(k)) for _, s, _ in found if k in dict(s)} for k in names}
    same = {k: dict(s)[k] for _, s, _ in found for k in names if k in dict(s) and len(values[k]) == 1}
    partly = {k for k in names if not all(k in dict(s) for _, s, _ in found)}
    keys = tuple(k for k in names if k not in same or k in partly)
    rows = tuple(
        Row(arm, tuple((k, v) for k, v in setting if k in keys), metric, tuple(by_seed.values()))
        for (arm, setting, metric), by_seed in found.items()
    )
    rest = tuple((k, v) for k, v in same.items() if k not in keys)
    return Sweep({k: v for k, v in head.items() if k != "points"}, rows, keys, rest, counts)


def _read(file: Path) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any], dict[str, Any], str]]]:
    """What a ``sweep.json`` says of the sweep, and folder, changes, arms and state of every point."""
    valid = "valid: a sweep.json that experiments.sweep wrote"
    try:
        head = without_sum(read_object(file))
        if head is None:
            raise ValueError("it was changed since, by its sum")
        listed = [(p["folder"], dict(p["overrides"]), p["arms"], p["state"]) for p in head["points"]]
    except UserError as e:
        raise UserError(f"{e}; {valid}") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: cannot be read ({e}); {valid}") from None
    for i, (name, changes, arms, state) in enumerate(listed):
        if not isinstance(name, str) or Path(name).name != name or not isinstance(state, str):
            raise UserError(f"{file}: points[{i}]: found the folder {shown(name)} in state {shown(state)}; {valid}")
        results_file.check_arms(arms, str(file), f"points[{i}].arms")
        try:
            hash(tuple(_hashable(value) for value in changes.values()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(f"{file}: points[{i}].overrides: found {shown(changes)}; {valid}") from None
    best = head.get("best")
    if best is not None and not (
        isinstance(best, dict)
        and isinstance(best.get("value"), int | float)
        and {"trial", "folder"} <= set(best)
        and isinstance(head.get("trials"), list)
        and isinstance(head.get("objective"), str)
    ):
        raise UserError(f"{file}: best: found {shown(best)}; {valid}")
    return head, listed


def _setting(changes: Mapping[str, Any], arm: str) -> Setting:
    """The swept keys that bear on `arm`, without the head ``arms.ARM.`` that says so."""
    own = f"arms.{arm}."
    theirs = [(k, v) for k, v in changes.items() if k != SEEDS and (k.startswith(own) or not k.startswith("arms."))]
    return tuple((k.removeprefix(own), _hashable(v)) for k, v in theirs)


def _bare(key: str) -> str:
    return key.split(".", 2)[2] if key.startswith("arms.") and key.count(".") > 1 else key


def _hashable(value: Any) -> Any:
    value = ast.literal_eval(value) if isinstance(value, str) and value[:1] in "([{" else value
    if isinstance(value, dict | set):
        return repr(value)
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _by_seed(stat: Any, seeds: Any) -> dict[Any, float]:
    """Observations by seed: what the results say of each, else the mean as one observation of all seeds together."""
    mean = stat.get("mean") if isinstance(stat, Mapping) else stat
    each = stat.get("by_seed") if isinstance(stat, Mapping) else None
    seeds = _hashable(seeds) or ()
    seeds = seeds if isinstance(seeds, tuple) else (seeds,)
    if each and len(each) == len(seeds):
        return {s: float(v) for s, v in zip(seeds, each, strict=True) if v is not None}
    if mean is None:
        return {}
    return {seeds[0] if len(seeds) == 1 else seeds: float(mean)}


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in counts.items())
