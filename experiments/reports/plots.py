"""Plots of a run: one picture per curve name, all arms in it, every arm in one colour throughout.

Lines: thin for each document, thick for the mean; vertical marks; colours that stay apart for the colour-blind, and
dash and marker differ too. On a linear axis an arm that blows up is cut off where it would flatten the others, and the
title says so. Grids (length by depth) are heat maps, a panel per arm, with the number in every cell.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.reports.tables import Tables
from lm.files import write_bytes

# Okabe and Ito's palette without its yellow, which is hard to see on white.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#E69F00", "#CC79A7")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
MARKERS = "osD^vPX*<>"
CUT = 1.5  # an axis that is cut goes on above the calmest arm for this many times that arm's own range …
BLOWN = 2.0  # … and is cut only when the highest arm would stretch it more than so many times
_LOOK: dict[str, Any] = {
    "font.size": 10,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
}
Curve = Mapping[str, Any]


def file_name(curve: str) -> str:
    """The picture's file name; the curve's name with anything unusual in a path replaced."""
    name = re.sub(r"[^\w.@+-]+", "_", curve).strip("._") or "curve"
    return name.encode()[:200].decode(errors="ignore") + ".png"  # as long as file systems take


def save(figure: Figure, path: Path) -> None:
    """The picture as PNG, whole or not at all. Raises ``OSError`` as the disk does."""
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=130, metadata={"Software": None}, facecolor="white")
    write_bytes(path, made.getvalue())


def write(run: Tables, folder: Path) -> dict[str, Path]:
    """Draws every curve name of `run` into `folder`; gives curve name -> file."""
    order = list(run.arms)
    out, taken = {}, set()
    for name, by_arm in run.curves.items():
        path = folder / file_name(name)
        while path in taken:  # two curve names may differ only in characters a path cannot hold
            path = path.with_stem(path.stem + "_")
        taken.add(path)
        with matplotlib.rc_context(_LOOK):
            if any(c.get("kind") == "grid" for c in by_arm.values()):
                figure = _grids(name, {a: c for a, c in by_arm.items() if c.get("kind") == "grid"})
            else:
                figure = _lines(name, by_arm, order)
        FigureCanvasAgg(figure)
        save(figure, path)
        out[name] = path
    return out


def _style(order: list[str], arm: str) -> dict[str, Any]:
    i = order.index(arm)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def _values(numbers: Iterable[float | None], log: bool) -> np.ndarray:
    """Floats with NaN for what the axis cannot show."""
    y = np.array([np.nan if v is None else float(v) for v in numbers], np.float64)
    y[~np.isfinite(y) | ((y <= 0) if log else False)] = np.nan
    return y


def _geometric(x: Sequence[float]) -> bool:
    """Whether points are spaced by factors rather than by steps: lengths of 1k, 2k, 4k, …"""
    return len(x) >= 3 and min(x) > 0 and (x[-1] - x[-2]) > 3 * (x[1] - x[0]) > 0


def _log_y(by_arm: Mapping[str, Curve], log_x: bool) -> bool:
    if any(c.get("log") for c in by_arm.values()):
        return True
    y = np.concatenate([_values(c["y"], False) for c in by_arm.values()])
    y = y[np.isfinite(y)]
    return bool(log_x and y.size and y.min() > 0 and y.max() > 20 * y.min())


def _lines(name: str, by_arm: Mapping[str, Curve], order: list[str]) -> Figure:
    log_x = all(_geometric(c["x"]) for c in by_arm.values())
    log_y = _log_y(by_arm, log_x)
    means = {arm: _values(c["y"], log_y) for arm, c in by_arm.items()}
    wide = len(by_arm) > 4
    figure = Figure(figsize=(8.6 if wide else 7.0, 4.3), layout="constrained")
    axes = figure.add_subplot()
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({float(x) for c in by_arm.values() for x in c["x"]})
        axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    lost = []
    for k, (arm, curve) in enumerate(by_arm.items()):
        style = _style(order, arm)
        thin = {"color": style["color"], "linestyle": style["linestyle"], "lw": 0.6, "alpha": 0.35}
        samples = curve.get("y_by_sample") or []
        for sample in samples if len(samples) > 1 else []:
            axes.plot(curve["x"], _values(sample, log_y), zorder=2, **thin)
        step = max(1, len(curve["x"]) // 7)
        every = (k % step, step) if step > 1 else 1  # markers of different arms fall on different points
        top = 3 + (len(by_arm) - k) / 100  # where arms agree the first one, the baseline, stays visible
        axes.plot(curve["x"], means[arm], lw=2, ms=5, markevery=every, label=arm, zorder=top, **style)
        n = int(np.isnan(means[arm]).sum())
        if n:
            lost.append(f"{arm}: {n} of {len(means[arm])} points are not finite{' or not positive' if log_y else ''}")
    cut = [] if log_x or log_y else _cut(axes, by_arm, means, order)
    _marks(axes, by_arm)
    some = next(iter(by_arm.values()))
    axes.set_xlabel(some.get("xlabel") or "x")
    axes.set_ylabel((some.get("ylabel") or name) + (" (log scale)" if log_y else " (axis cut)" if cut else ""))
    axes.grid(True, lw=0.4, alpha=0.5)
    _title(axes, name, [_documents(by_arm), *cut, *lost])
    if wide:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    else:
        axes.legend(frameon=False)
    return figure


def _documents(by_arm: Mapping[str, Curve]) -> str:
    """What the lines are of: `names` are the documents of a curve."""
    names = list(dict.fromkeys(n for c in by_arm.values() for n in c.get("names") or ()))
    if len(names) < 2:
        return f"document: {names[0]}" if names else ""
    thin = any(len(c.get("y_by_sample") or ()) > 1 for c in by_arm.values())
    listed = ", ".join(names) if len(names) <= 6 else f"{len(names)} documents"
    return f"mean of {listed}" + ("; thin: each of them" if thin else "")


def _title(axes: Axes, name: str, notes: list[str]) -> None:
    axes.set_title(name, loc="left", fontweight="bold", pad=6 + 11.5 * sum(1 for n in notes if n))
    shown = "\n".join(n if len(n) <= 110 else n[:107] + "..." for n in notes if n)
    axes.annotate(shown, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=8.5, color="#444444")


def _cut(axes: Axes, by_arm: Mapping[str, Curve], means: Mapping[str, np.ndarray], order: list[str]) -> list[str]:
    """Sets the limits of a linear axis from the means; says which arms leave it, and how high they go."""
    finite = {arm: y[np.isfinite(y)] for arm, y in means.items()}
    finite = {arm: y for arm, y in finite.items() if y.size}
    if not finite:
        return []
    low, high = min(y.min() for y in finite.values()), max(y.max() for y in finite.values())
    calmest = min(finite, key=lambda arm: finite[arm].max())  # the arm whose highest point is lowest
    samples = [_values(row, False) for row in by_arm[calmest].get("y_by_sample") or ()]
    seen = np.concatenate([finite[calmest], *samples])
    low, calm = min(low, float(np.nanmin(seen))), float(np.nanmax(seen))
    end = calm + CUT * max(calm - low, 0.5 * abs(calm))
    high = max(high, calm)
    flat = end <= low  # zero throughout gives no scale to cut by
    room = 0.05 * ((high if flat else min(end, high)) - low) or 0.5
    if flat or high - low <= BLOWN * (end - low):
        axes.set_ylim(low - room, high + room)
        return []
    axes.set_ylim(low - room, end)
    gone = {arm: y.max() for arm, y in finite.items() if y.max() > end}
    for arm in gone:
        x, y = by_arm[arm]["x"], means[arm]
        i = int(np.argmax(np.nan_to_num(y, nan=-math.inf) > end))
        share = (end - y[i - 1]) / (y[i] - y[i - 1]) if i and np.isfinite(y[i - 1]) else 1.0
        leaves = x[i - 1] + share * (x[i] - x[i - 1]) if i else x[0]
        axes.plot([leaves], [end], marker="^", ms=8, color=_style(order, arm)["color"], clip_on=False, zorder=5)
    return ["axis cut; beyond it: " + ", ".join(f"{arm} (up to {top:,.4g})" for arm, top in gone.items())]


def _marks(axes: Axes, by_arm: Mapping[str, Curve]) -> None:
    marks = {(float(m["x"]), str(m.get("text", ""))) for c in by_arm.values() for m in c.get("marks") or ()}
    for x, text in sorted(marks):
        axes.axvline(x, color="#555555", lw=1, ls=":", zorder=1)
        axes.annotate(
            f"{text} {x:,.0f}".strip(),
            (x, 0.985),
            (3, 0),
            ("data", "axes fraction"),
            "offset points",
            va="top",
            fontsize=8.5,
            color="#444444",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            zorder=6,
        )


def _grids(name: str, by_arm: Mapping[str, Curve]) -> Figure:
    columns = len(by_arm) if len(by_arm) <= 3 else math.ceil(math.sqrt(len(by_arm)))
    rows = -(-len(by_arm) // columns)
    z_all = np.concatenate([_values(row, False) for c in by_arm.values() for row in c["z"]])
    z_all = z_all[np.isfinite(z_all)]
    low, high = (float(z_all.min()), float(z_all.max())) if z_all.size else (0.0, 1.0)
    if 0 <= low and 0.5 < high <= 1:  # rates, alike from plot to plot; small ones keep their contrast
        low, high = 0.0, 1.0
    some = next(iter(by_arm.values()))
    size = (1.2 + columns * max(1.7, 0.62 * len(some["x"])), 1.2 + rows * max(1.5, 0.36 * len(some["y"]) + 0.8))
    figure = Figure(figsize=(max(size[0], 5.0), size[1]), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for ax, (arm, curve) in zip(axes.flat, by_arm.items(), strict=False):
        z = np.stack([_values(row, False) for row in curve["z"]])
        image = ax.imshow(z, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        ax.set_title(arm, fontsize=10)
        ax.set_xticks(range(len(curve["x"])), [_short(x) for x in curve["x"]])
        ax.set_yticks(range(len(curve["y"])), [f"{y:g}" for y in curve["y"]])
        ax.tick_params(length=0, labelsize=8.5)
        for i, j in np.ndindex(*z.shape):
            shown = "—" if np.isnan(z[i, j]) else f"{z[i, j]:.2f}".rstrip("0").rstrip(".")
            dark = np.isnan(z[i, j]) or (z[i, j] - low) > 0.55 * (high - low)
            ax.text(j, i, shown, ha="center", va="center", fontsize=8.5, color="black" if dark else "white")
    for ax in axes.flat[len(by_arm) :]:
        ax.set_axis_off()
    figure.supxlabel(some.get("xlabel") or "x", fontsize=10)
    figure.supylabel(some.get("ylabel") or "y", fontsize=10)
    figure.suptitle(name, x=0.01, ha="left", fontweight="bold", fontsize=12)
    if image is not None:
        figure.colorbar(image, ax=axes.ravel().tolist(), label=some.get("zlabel") or name, shrink=0.9)
    return figure


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 and x % 512 == 0 else f"{x:g}"
