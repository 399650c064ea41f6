"""The report of a sweep: a table and a plot per measure, with 95 % confidence intervals over seeds.

``python -m experiments.report SWEEP_FOLDER`` writes ``report.md``, ``report.html``, ``report.csv`` and pictures into
it, also while the sweep is under way. What is compared is a *setting* of an arm: the swept keys that bear on it (a key
``arms.A.…`` bears on arm A alone) without the seeds. A point with several seeds counts one observation per seed, the
mean of that seed's samples; the same seed of the same setting in two points is one observation. The interval is
Student's, mean ± t(0.975, n - 1) · s / √n of n seeds; one seed has none.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from experiments import plots_sweep, results_file, tables
from experiments.report_html import sections_page
from lm.errors import UserError

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
    file = folder / "sweep.json"
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
        points = [(p["folder"], dict(p["overrides"]), p["arms"], str(p["state"])) for p in head["points"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: cannot be read ({e}); valid: a sweep.json that experiments.sweep wrote") from None
    found: dict[tuple[str, Setting, str], dict[Any, float]] = {}
    counts: dict[str, int] = {}
    every = [changes for _, changes, _, _ in points]
    for name, changes, arms, state in points:
        seeds = changes.get(SEEDS)
        try:
            results, _ = results_file.load(folder / name)
            arms, seeds = results["arms"], results.get("config", {}).get("seeds", seeds)
            state = "done" if results.get("complete") and state != "done" else state
        except UserError:
            pass  # what sweep.json has of it
        counts[state] = counts.get(state, 0) + 1
        for arm, metrics in arms.items():
            setting = _setting(changes, arm)
            for metric, stat in metrics.items():
                for seed, value in _by_seed(stat, seeds).items():
                    found.setdefault((arm, setting, metric), {})[seed] = value
    if not found:
        raise UserError(f"{folder}: no point has results yet ({_counted(counts)}); valid: a sweep with finished points")
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


def _setting(changes: Mapping[str, Any], arm: str) -> Setting:
    """The swept keys that bear on `arm`, without the head ``arms.ARM.`` that says so."""
    own = f"arms.{arm}."
    theirs = [(k, v) for k, v in changes.items() if k != SEEDS and (k.startswith(own) or not k.startswith("arms."))]
    return tuple((k.removeprefix(own), _hashable(v)) for k, v in theirs)


def _bare(key: str) -> str:
    return key.split(".", 2)[2] if key.startswith("arms.") and key.count(".") > 1 else key


def _hashable(value: Any) -> Any:
    value = ast.literal_eval(value) if isinstance(value, str) and value[:1] in "([{" else value
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _by_seed(stat: Any, seeds: Any) -> dict[Any, float]:
    """Observations by seed: what the results say of each, else the mean as one observation of all seeds together."""
    mean = stat.get("mean") if isinstance(stat, Mapping) else stat
    each = stat.get("by_seed") if isinstance(stat, Mapping) else None
    seeds = _hashable(seeds) or ()
    if each and len(each) == len(seeds):
        return {s: float(v) for s, v in zip(seeds, each, strict=True) if v is not None}
    if mean is None:
        return {}
    return {seeds[0] if isinstance(seeds, tuple) and len(seeds) == 1 else seeds: float(mean)}


def text_of(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_tables(sweep: Sweep) -> list[tables.Table]:
    """One per metric: a row per setting, a column per arm."""
    out = []
    for metric in dict.fromkeys(r.metric for r in sweep.rows):
        rows = [r for r in sweep.rows if r.metric == metric]
        arms = list(dict.fromkeys(r.arm for r in rows))
        cells: dict[Setting, dict[str, str]] = {}
        for r in sorted(rows, key=lambda r: _order(sweep.keys, r.setting)):
            cells.setdefault(r.setting, {})[r.arm] = cell(r)
        keys = [k for k in sweep.keys if any(k in dict(s) for s in cells)]
        lines = [
            (
                *(text_of(dict(s)[k]) if k in dict(s) else tables.NOTHING for k in keys),
                *(by.get(a, tables.NOTHING) for a in arms),
            )
            for s, by in cells.items()
        ]
        out.append(tables.Table(metric, (*keys, *arms), tuple(lines)))
    return out


def _order(keys: Iterable[str], setting: Setting) -> tuple[Any, ...]:
    values = dict(setting)
    return tuple(
        (
            k not in values,
            not _number(values.get(k)),
            values.get(k, 0) if _number(values.get(k)) else 0,
            str(values.get(k)),
        )
        for k in keys
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(row: Row) -> str:
    half = row.half
    return tables.number(row.mean) + ("" if half is None else f" ± {tables.number(half)}") + f" ({len(row.values)})"


def table_csv(sweep: Sweep) -> str:
    """A row per arm, setting and metric."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["arm", *sweep.keys, "metric", "n", "mean", "std", "low", "high"])
    for r in sweep.rows:
        values, half = dict(r.setting), r.half
        ends = ("", "") if half is None else (r.mean - half, r.mean + half)
        keys = (text_of(values[k]) if k in values else "" for k in sweep.keys)
        table.writerow([r.arm, *keys, r.metric, len(r.values), r.mean, "" if r.std is None else r.std, *ends])
    return out.getvalue()


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in counts.items())


def write(folder: Path, out: Path) -> list[Path]:
    """Writes the report of the sweep in `folder` into `out`; gives the paths. Raises `UserError`."""
    sweep = load(folder)
    name = sweep.head.get("sweep") or sweep.head.get("search")
    title = f"{Path(str(sweep.head.get('file'))).stem} ({sweep.head.get('scale')}), {name}"
    said = [f"Points: {_counted(sweep.counts)} of {sum(sweep.counts.values())}."]
    if sweep.same:
        said.append("The same in all points: " + ", ".join(f"{k} = {text_of(v)}" for k, v in sweep.same) + ".")
    if best := sweep.head.get("best"):
        said.append(
            f"Best of {len(sweep.head['trials'])} trials ({sweep.head['objective']}): "
            f"{tables.number(best['value'])} in trial {best['trial']}, {best['folder']}."
        )
    said.append(
        "Mean ± half of the 95 % confidence interval over seeds, Student's t (number of seeds); one seed: none."
    )
    found = metric_tables(sweep)
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures, left = plots_sweep.write(sweep, out)
        said += left
        parts = [f"# {title}", *said, *(f"![{n}]({p.name})" for n, p in pictures.items())]
        parts += [f"## {t.title}\n\n{tables.markdown(t)}" for t in found]
        (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        (out / "report.html").write_text(sections_page(title, said, pictures, found), encoding="utf-8")
        (out / "report.csv").write_text(table_csv(sweep), encoding="utf-8")
    except OSError as e:
        raise UserError(f"{out}: the report cannot be written ({e.strerror or e})") from None
    return [out / "report.md", out / "report.html", out / "report.csv", *pictures.values()]
