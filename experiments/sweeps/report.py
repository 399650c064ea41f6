"""The report of a sweep: a table and a plot per measure, with 95 % confidence intervals over seeds.

``python -m experiments.report SWEEP_FOLDER`` writes ``report.md``, ``report.html``, ``report.csv`` and pictures into
it, also while the sweep is under way. What is compared is a *setting* of an arm: the swept keys that bear on it (a key
``arms.A.…`` bears on arm A alone) without the seeds. A point with several seeds counts one observation per seed, the
mean of that seed's samples; the same seed of the same setting in two points is one observation. The interval is
Student's, mean ± t(0.975, n - 1) · s / √n of n seeds; one seed has none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.reports import markdown, tables
from experiments.reports.html import sections_page
from experiments.sweeps import plots as plots_sweep
from experiments.sweeps.swept import Row, Setting, Sweep, counted, load
from lm.errors import UserError
from lm.files import write_text


def text_of(value: object) -> str:
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


def _number(value: object) -> bool:
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


def write(folder: Path, out: Path) -> list[Path]:
    """Writes the report of the sweep in `folder` into `out`; gives the paths. Raises `UserError`."""
    sweep = load(folder)
    name = sweep.head.get("sweep") or sweep.head.get("search")
    title = f"{Path(str(sweep.head.get('file'))).stem} ({sweep.head.get('scale')}), {name}"
    said = [f"Points: {counted(sweep.counts)} of {sum(sweep.counts.values())}."]
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
        escaped = markdown.escaped
        parts = [f"# {escaped(title)}", *map(escaped, said)]
        parts += [f"![{escaped(n)}]({p.name})" for n, p in pictures.items()]
        parts += [f"## {escaped(t.title)}\n\n{markdown.table(t)}" for t in found]
        write_text(out / "report.md", "\n\n".join(parts) + "\n")
        write_text(out / "report.html", sections_page(title, said, pictures, found))
        write_text(out / "report.csv", table_csv(sweep))
    except OSError as e:
        raise UserError(f"{out}: the report cannot be written ({e.strerror or e})") from None
    return [out / "report.md", out / "report.html", out / "report.csv", *pictures.values()]
