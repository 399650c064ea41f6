"""results.json of schema 1: points of all arms and seeds as means, curves, notes and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.running.cache import Point
from experiments.spec.claims import Claim, Results
from experiments.spec.settings import Experiment
from lm.config import is_mapping, to_dict

SCHEMA = 1

Points = Mapping[str, Mapping[str, Sequence[Point]]]  # arm -> label -> one per seed
Claims = Callable[[Results], Sequence[Claim]]


def statistics(samples: Sequence[float]) -> dict[str, Any]:
    """``mean``, ``std`` (of the sample, n - 1; None for one) and ``n``."""
    values = np.asarray(samples, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is what a broken model gives; it is shown as such
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        return {"mean": float(values.mean()), "std": std, "n": len(values)}


def metrics(points: Points) -> dict[str, dict[str, dict[str, Any]]]:
    """arm -> ``<label>/<metric>`` -> statistics over all seeds and samples, and, of several seeds, each one's mean
    (``by_seed``, in their order: what is independent); metrics without samples are left out."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, labels in points.items():
        out[arm] = {}
        for label, seeds in labels.items():
            for name in dict.fromkeys(n for point in seeds for n in point.samples):
                samples = [x for point in seeds for x in point.samples.get(name, ())]
                if samples:
                    out[arm][f"{label}/{name}"] = statistics(samples)
                if len(seeds) > 1 and all(point.samples.get(name) for point in seeds):
                    each = [statistics(point.samples[name])["mean"] for point in seeds]
                    out[arm][f"{label}/{name}"]["by_seed"] = each
    return out


def average(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One curve for several seeds: the mean of ``y`` (or of a grid's ``z``); samples side by side."""
    first = dict(curves[0])
    mean = "z" if first.get("kind") == "grid" else "y"
    if len(curves) == 1 or any(np.shape(c[mean]) != np.shape(first[mean]) for c in curves):
        return first
    first[mean] = np.mean([np.asarray(c[mean], np.float64) for c in curves], axis=0).tolist()
    for key in ("y_by_sample", "names"):
        if key in first:
            first[key] = [x for c in curves for x in c.get(key, ())]
    return first


def assemble(
    exp: Experiment, claims: Claims, points: Points, environment: Mapping[str, Any], complete: bool
) -> dict[str, Any]:
    """The whole of results.json. Claims are judged by full numbers; in the file, numbers that JSON lacks are None in
    statistics and curves, and a word (``"NaN"``) among a claim's measured values."""
    arms = metrics(points)
    judged = [c.to_dict() for c in claims(Results(arms, exp.baseline))]
    for claim in judged:
        claim["measured"] = clean(claim["measured"], words=True)
    names = {
        arm: {label: [n for n in seeds[0].curves] for label, seeds in labels.items() if seeds}
        for arm, labels in points.items()
    }
    return {
        "schema": SCHEMA,
        "experiment": exp.name,
        "scale": exp.scale,
        "complete": complete,
        "paper": to_dict(exp.paper),
        "baseline": exp.baseline,
        "arms": clean(arms),
        "claims": judged,
        "curves": {
            arm: {
                f"{label}/{n}": clean(average([p.curves[n] for p in points[arm][label] if n in p.curves]))
                for label, found in by_label.items()
                for n in found
            }
            for arm, by_label in names.items()
        },
        "notes": {
            arm: {label: clean(seeds[0].notes) for label, seeds in labels.items() if seeds}
            for arm, labels in points.items()
        },
        "environment": dict(environment),
        "config": clean(exp.to_dict(), words=True),
    }


def clean(value: object, words: bool = False) -> Any:
    """`value` as strict JSON: numbers of NumPy as plain ones, tuples as lists, NaN and infinities as None or words."""
    if is_mapping(value):
        return {str(k): clean(v, words) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v, words) for v in value]
    if isinstance(value, np.ndarray):
        return clean(value.tolist(), words)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return ("NaN" if math.isnan(value) else "infinite" if value > 0 else "-infinite") if words else None
    return value
