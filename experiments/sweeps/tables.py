"""What a sweep has come to: `sweep.json`, `sweep.csv` and the table at the end of the command."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reports import tables
from experiments.running.cache import write_json
from experiments.sweeps.points import Point, literal, look, results_of, shown
from lm.files import summed, write_text

SCHEMA = 1  # of sweep.json
COLUMNS = 6  # of metrics in the table; sweep.csv has all


def collect(every: Sequence[Point], head: Mapping[str, Any], workdir: Path) -> list[dict[str, Any]]:
    """Writes sweep.json and sweep.csv, and gives the points as sweep.json has them."""
    out = []
    for point in every:
        state = look(point)
        result = results_of(point) or {}
        entry = {"point": point.number, "folder": point.folder.name, "state": state.name, "seconds": state.seconds}
        out.append({**entry, "detail": state.detail, "overrides": point.changes, "arms": result.get("arms", {})})
    write_json(workdir / "sweep.json", summed({"schema": SCHEMA, **head, "points": out}))
    changed = list(dict.fromkeys(k for e in out for k in e["overrides"]))
    names = list(dict.fromkeys((arm, m) for e in out for arm, values in e["arms"].items() for m in values))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["point", "folder", "state", "seconds", *changed, *(f"{arm} {metric}" for arm, metric in names)])
    for e in out:
        values = {k: v if isinstance(v, str) else literal(v, k) for k, v in e["overrides"].items()}
        row = [e["point"], e["folder"], e["state"], e["seconds"], *(values.get(k, "") for k in changed)]
        table.writerow([*row, *(_mean(e, *name) for name in names)])
    write_text(workdir / "sweep.csv", text.getvalue())
    return out


def _mean(entry: Mapping[str, Any], arm: str, metric: str) -> Any:
    value = entry["arms"].get(arm, {}).get(metric)
    return value.get("mean") if isinstance(value, Mapping) else value


def summary(entries: Sequence[Mapping[str, Any]], workdir: Path) -> str:
    """A row per point: changes that not all have, state, each measure's first metric for every arm, baseline first."""
    arms = dict.fromkeys(arm for e in entries for arm in e["arms"])
    first: dict[str, str] = {}
    for metric in (m for e in entries for values in e["arms"].values() for m in values):
        first.setdefault(metric.rpartition("/")[0], metric)
    names = [(arm, m) for m in first.values() for arm in arms if any(m in e["arms"].get(arm, {}) for e in entries)]
    rows = [("point", "changes", "state", "seconds", *(f"{arm} {m}" for arm, m in names[:COLUMNS]))]
    same = [k for k, v in entries[0]["overrides"].items() if all(e["overrides"].get(k) == v for e in entries[1:])]
    same = same if len(entries) > 1 else []
    for e in entries:
        changes = {k: v for k, v in e["overrides"].items() if k not in same}
        means = (tables.number(_mean(e, *name)) for name in names[:COLUMNS])
        rows.append((str(e["point"]), shown(changes, 60), e["state"], tables.number(e["seconds"]), *means))
    counts = {s: sum(e["state"] == s for e in entries) for s in dict.fromkeys(e["state"] for e in entries)}
    end = f"{', '.join(f'{n} {s}' for s, n in counts.items())} of {len(entries)} points"
    return f"{cli.aligned(rows)}\n\n{end}\nall numbers  {workdir / 'sweep.csv'}, {workdir / 'sweep.json'}"
