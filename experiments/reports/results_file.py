"""``results.json`` of schema 1: reading it, and refusing one that a report could not be written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm.errors import LONGEST, UserError, cut, shown
from lm.files import read_json, without_sum

SCHEMA = 1
NAME = "results.json"
HUGE = 1e150  # squares of what is measured are numbers too


def load(path: Path) -> tuple[dict[str, Any], Path]:
    """The checked results of a run folder (or of the file itself) and the folder they are in.

    Results from before there were sums are read as they are. Raises `UserError` when there is no such file, when it is
    not JSON, not results of schema 1, or not what was written, by its sum.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        what = f"the folder has no {NAME}; did the run finish?" if path.is_dir() else "no such file or folder"
        raise UserError(f"{path}: {what} valid: a folder that experiments.run wrote")
    results = read_json(file)
    check(results, str(file))
    bare = without_sum(results)
    if bare is None:
        raise UserError(
            f"{file}: was changed since it was written, by its sum; valid: the file as it was; the run's own "
            "command makes it again"
        )
    return bare, file.parent


def check(results: Any, where: str = NAME) -> None:
    """Raises `UserError` that names the place in the file when `results` is not of schema 1."""
    _want(isinstance(results, dict), where, "", results, "an object")
    schema = results.get("schema")
    _want(type(schema) is int and schema == SCHEMA, where, "schema", schema, f"the number {SCHEMA}")
    _want(_is_name(results.get("experiment")), where, "experiment", results.get("experiment"), "a name")
    _want(_is_text(results.get("scale")), where, "scale", results.get("scale"), "a name")
    for key in ("paper", "arms", "curves", "environment", "config"):
        _want(isinstance(results.get(key, {}), dict), where, key, results.get(key), "an object")
    for key in ("title", "arxiv", "claim"):
        found = results.get("paper", {}).get(key)
        _want(_is_text(found), where, f"paper.{key}", found, "text")
    seconds = results.get("environment", {}).get("seconds")
    _want(_is_number(seconds), where, "environment.seconds", seconds, "a number")
    seeds = results.get("config", {}).get("seeds") or []
    good = isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)
    _want(good, where, "config.seeds", seeds, "a list of numbers")
    check_arms(results.get("arms", {}), where)
    claims = results.get("claims", [])
    _want(isinstance(claims, list), where, "claims", claims, "a list")
    for i, claim in enumerate(claims):
        _want(isinstance(claim, dict) and "text" in claim, where, f"claims[{i}]", claim, "an object with text")
        holds, measured = claim.get("holds"), claim.get("measured")
        _want(holds is None or isinstance(holds, bool), where, f"claims[{i}].holds", holds, "true, false or null")
        for name, value in measured.items() if isinstance(measured, dict) else [("", measured)]:
            good = _is_number(value) or _is_stat(value) or _is_text(value)
            _want(good, where, f"claims[{i}].measured.{name}", value, "a number or {mean, std, n}")
    for arm, curves in results.get("curves", {}).items():
        _want(_is_name(arm) and isinstance(curves, dict), where, f"curves.{arm}", curves, "an object, by a short name")
        for name, curve in curves.items():
            _want(_is_name(name), where, f"curves.{arm}.{name}", name, f"a name of at most {LONGEST} characters")
            _check_curve(curve, where, f"curves.{arm}.{name}")


def check_arms(arms: Any, where: str, key: str = "arms") -> None:
    """Raises `UserError` unless `arms` maps arms to metrics, and these to numbers or to their mean and spread."""
    _want(isinstance(arms, dict), where, key, arms, "an object")
    for arm, metrics in arms.items():
        good = _is_name(arm) and isinstance(metrics, dict)
        _want(good, where, f"{key}.{arm}", metrics, "an object, by a short name")
        for name, value in metrics.items():
            good = _is_name(name) and (_is_number(value) or _is_stat(value))
            _want(good, where, f"{key}.{arm}.{name}", value, "a number or {mean, std, n}")


def _check_curve(curve: Any, where: str, key: str) -> None:
    _want(isinstance(curve, dict), where, key, curve, "an object")
    for axis in ("x", "y"):
        values = curve.get(axis)
        good = isinstance(values, list) and all(_is_number(v) and (axis == "y" or v is not None) for v in values)
        _want(good, where, f"{key}.{axis}", values, "a list of numbers")
    for name in ("kind", "xlabel", "ylabel", "zlabel"):
        _want(_is_text(curve.get(name)), where, f"{key}.{name}", curve.get(name), "text")
    names, marks = curve.get("names") or [], curve.get("marks") or []
    _want(isinstance(names, list) and all(map(_is_name, names)), where, f"{key}.names", names, "a list of names")
    good = isinstance(marks, list) and all(isinstance(m, dict) and _is_number(m.get("x", "")) for m in marks)
    _want(good and all(m["x"] is not None for m in marks), where, f"{key}.marks", marks, "a list of {x, text}")
    n = len(curve["x"])
    if curve.get("kind") == "grid":
        z = curve.get("z")
        good = isinstance(z, list) and len(z) == len(curve["y"]) and all(_is_row(row, n) for row in z)
        _want(good and n > 0 and len(z) > 0, where, f"{key}.z", z, f"{len(curve['y'])} rows of {n} numbers")
        return
    rows = curve.get("y_by_sample") or []
    _want(isinstance(rows, list), where, f"{key}.y_by_sample", rows, "a list of lists")
    for name, values in (("y", curve["y"]), *(("y_by_sample", row) for row in rows)):
        _want(_is_row(values, n), where, f"{key}.{name}", values, f"{n} numbers, as many as x")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < HUGE)


def _is_row(values: object, n: int) -> bool:
    return isinstance(values, list) and len(values) == n and all(map(_is_number, values))


def _is_stat(value: object) -> bool:
    """Whether it is the mean of observations, with what else is said of them."""
    if not isinstance(value, dict) or "mean" not in value:
        return False
    each = value.get("by_seed") or []
    numbers = [value.get(name) for name in ("mean", "std", "n")]
    return isinstance(each, list) and all(map(_is_number, [*numbers, *each]))


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST


def _want(good: bool, where: str, key: str, found: object, valid: str) -> None:
    if not good:
        said = shown(found)
        said = said if len(said) < 60 else said[:57] + "..."
        raise UserError(f"{where}: {cut(key) + ': ' if key else ''}found {said}; valid: {valid}")
