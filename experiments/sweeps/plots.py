"""Plots of a sweep: a picture per measure and numeric key, a panel per metric, a curve per arm with error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.reports import plots

if TYPE_CHECKING:
    from experiments.sweeps.swept import Row, Sweep

MANY = 16  # curves in a panel, beyond which nothing can be told apart
PANELS = 9
WIDE = 30.0  # largest over smallest value, from which an axis is logarithmic
WIDTH = 58  # letters of a label


def write(sweep: Sweep, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Draws what can be drawn into `folder`; gives name -> file, and sentences on what could not."""
    out, left = {}, []
    for key in (k for k in sweep.keys if _numeric(sweep, k)):
        for measure in dict.fromkeys(r.metric.rpartition("/")[0] for r in sweep.rows):
            rows = [r for r in sweep.rows if r.metric.rpartition("/")[0] == measure]
            metrics = list(dict.fromkeys(r.metric for r in rows if key in dict(r.setting)))
            name = f"{measure} over {key}"
            curves = {m: _curves(rows, m, key, "trials" in sweep.head) for m in metrics[:PANELS]}
            most = max((len(c) for c in curves.values()), default=0)
            if most == 0:
                continue
            if most > MANY:
                left.append(f"Not drawn: {name}, {most} curves; the numbers are in the tables.")
                continue
            with matplotlib.rc_context(plots._LOOK):
                figure = _figure(name, key, curves, sweep)
            path = folder / plots.file_name(f"sweep {name}")
            FigureCanvasAgg(figure)
            plots.save(figure, path)
            out[name] = path
    if sweep.head.get("trials"):
        out["objective by trial"] = _trials(sweep, folder / "sweep_trials.png")
    return {n: p for n, p in out.items() if p is not None}, left


def _numeric(sweep: Sweep, key: str) -> bool:
    values = {dict(r.setting)[key] for r in sweep.rows if key in dict(r.setting)}
    return len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _curves(
    rows: Sequence[Row], metric: str, key: str, drawn: bool
) -> dict[tuple[str, str], list[tuple[float | None, Row]]]:
    """(arm, its other keys) -> (value of the key, row), by value; None for an arm that the key does not bear on. Where
    keys were `drawn` together, the others are not held."""
    found: dict[tuple[str, str], list[tuple[float | None, Row]]] = {}
    for row in (r for r in rows if r.metric == metric):
        values = dict(row.setting)
        rest = [] if drawn else [(k, v) for k, v in values.items() if k != key]
        others = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in rest)
        found.setdefault((row.arm, others), []).append((values.get(key), row))
    return {k: sorted(v, key=lambda p: (p[0] is None, p[0] or 0)) for k, v in found.items()}


def _figure(name: str, key: str, curves: dict[str, dict[tuple[str, str], list[Any]]], sweep: Sweep) -> Figure:
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3.0 + 3.9 * columns, 1.3 + 3.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    arms = list(dict.fromkeys(r.arm for r in sweep.rows))
    all_labels = list(dict.fromkeys(label for by in curves.values() for label in by))
    by_arm = len({arm for arm, _ in all_labels}) == len(all_labels)
    order = arms if by_arm else [" ".join(label) for label in all_labels]
    for axes, (metric, found) in zip(panels.flat, curves.items(), strict=False):
        xs = sorted({x for pairs in found.values() for x, _ in pairs if x is not None})
        log = xs[0] > 0 and xs[-1] >= WIDE * xs[0]
        if log:
            axes.set_xscale("log")
        if "trials" not in sweep.head:  # at the values themselves, as far as their labels have room
            shown = _apart([math.log(x) for x in xs] if log else xs)
            axes.set_xticks([xs[i] for i in shown], [f"{xs[i]:.3g}" for i in shown])
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
        for k, (label, pairs) in enumerate(found.items()):
            style = plots._style(order, label[0] if by_arm else " ".join(label))
            text = label[0] + (f", {label[1]}" if label[1] else "")
            if "trials" in sweep.head:
                style["linestyle"] = "none"
            _draw(axes, pairs, style, text if len(text) <= WIDTH else text[: WIDTH - 1] + "…", 3 + k / 100)
        axes.set_title(metric.rpartition("/")[2], loc="left", fontsize=10)
        axes.grid(True, lw=0.4, alpha=0.5)
    for axes in panels.flat[len(curves) :]:
        axes.set_axis_off()
    figure.supxlabel(key, fontsize=10)
    figure.suptitle(f"{name}; {_bars(curves)}", x=0.01, ha="left", fontweight="bold", fontsize=11)
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= {label: h for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    return figure


def _apart(places: Sequence[float]) -> list[int]:
    """Numbers of the ascending places whose labels do not run into each other; the last place is always among them."""
    room = 0.11 * (places[-1] - places[0])
    out = [len(places) - 1]
    for i in range(len(places) - 2, -1, -1):
        if places[out[-1]] - places[i] >= room:
            out.append(i)
    return out[::-1]


def _draw(axes: Any, pairs: list[tuple[float | None, Row]], style: dict[str, Any], label: str, order: float) -> None:
    level = [row for x, row in pairs if x is None]
    for row in level:  # an arm that the key does not bear on: a line across, its interval as a band
        axes.axhline(row.mean, color=style["color"], ls=style["linestyle"], lw=1.4, label=label, zorder=order)
        if row.half is not None:
            axes.axhspan(row.mean - row.half, row.mean + row.half, color=style["color"], alpha=0.12, lw=0)
    drawn = [(x, row) for x, row in pairs if x is not None and math.isfinite(row.mean)]
    if drawn:
        y = [row.mean for _, row in drawn]
        half = np.array([np.nan if row.half is None else row.half for _, row in drawn])
        bars = None if np.isnan(half).all() else half
        axes.errorbar([x for x, _ in drawn], y, yerr=bars, capsize=3, ms=5, lw=1.6, label=label, zorder=order, **style)


def _bars(curves: dict[str, dict[tuple[str, str], list[Any]]]) -> str:
    counts = {len(row.values) for found in curves.values() for pairs in found.values() for _, row in pairs}
    if counts == {1}:
        return "one seed"
    return f"mean and 95 % interval over {min(counts)}{f' to {max(counts)}' if len(counts) > 1 else ''} seeds"


def _trials(sweep: Sweep, path: Path) -> Path:
    """The objective by trial, and the best one so far."""
    done = [(t["trial"], t["value"]) for t in sweep.head["trials"] if t["value"] is not None]
    best = (np.minimum if str(sweep.head["objective"]).startswith("minimize") else np.maximum).accumulate
    with matplotlib.rc_context(plots._LOOK):
        figure = Figure(figsize=(7.0, 4.0), layout="constrained")
        axes = figure.add_subplot()
        if done:
            x, y = zip(*done, strict=True)
            axes.plot(x, y, "o", ms=5, color=plots.COLOURS[2], label="trial")
            axes.step(x, best(np.array(y)), where="post", color=plots.COLOURS[1], lw=2, label="best so far")
            axes.legend(frameon=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trial")
        axes.set_title(str(sweep.head["objective"]), loc="left", fontweight="bold")
        axes.grid(True, lw=0.4, alpha=0.5)
    FigureCanvasAgg(figure)
    plots.save(figure, path)
    return path
