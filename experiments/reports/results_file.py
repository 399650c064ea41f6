"""``results.json`` of schema 1: reading it, and refusing one that a report could not be written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.files import without_sum

SCHEMA = 1
NAME = "results.json"


def load(path: Path) -> tuple[dict[str, Any], Path]:
    """The checked results of a run folder (or of the file itself) and the folder they are in.

    Results from before there were sums are read as they are. Raises `UserError` when there is no such file, when it is
    not JSON, not results of schema 1, or not what was written, by its sum.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        what = f"the folder has no {NAME}; did the run finish?" if path.is_dir() else "no such file or folder"
        raise UserError(f"{path}: {what} valid: a folder that experiments.run wrote")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise UserError(f"{file}: malformed JSON ({e.msg} at line {e.lineno} column {e.colno})") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: cannot be read ({e})") from None
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
    _want(results.get("schema") == SCHEMA, where, "schema", results.get("schema"), f"the number {SCHEMA}")
    _want(isinstance(results.get("experiment"), str), where, "experiment", results.get("experiment"), "a name")
    for key in ("paper", "arms", "curves", "environment", "config"):
        _want(isinstance(results.get(key, {}), dict), where, key, results.get(key), "an object")
    for arm, metrics in results.get("arms", {}).items():
        _want(isinstance(metrics, dict), where, f"arms.{arm}", metrics, "an object")
        for name, value in metrics.items():
            mean = value.get("mean") if isinstance(value, dict) else value
            _want(_is_number(mean), where, f"arms.{arm}.{name}", value, "a number or {mean, std, n}")
    claims = results.get("claims", [])
    _want(isinstance(claims, list), where, "claims", claims, "a list")
    for i, claim in enumerate(claims):
        _want(isinstance(claim, dict) and "text" in claim, where, f"claims[{i}]", claim, "an object with text")
        holds = claim.get("holds")
        _want(holds in (True, False, None), where, f"claims[{i}].holds", holds, "true, false or null")
    for arm, curves in results.get("curves", {}).items():
        _want(isinstance(curves, dict), where, f"curves.{arm}", curves, "an object")
        for name, curve in curves.items():
            _check_curve(curve, where, f"curves.{arm}.{name}")


def _check_curve(curve: Any, where: str, key: str) -> None:
    _want(isinstance(curve, dict), where, key, curve, "an object")
    for axis in ("x", "y"):
        _want(isinstance(curve.get(axis), list), where, f"{key}.{axis}", curve.get(axis), "a list")
    n = len(curve["x"])
    if curve.get("kind") == "grid":
        z = curve.get("z")
        good = isinstance(z, list) and len(z) == len(curve["y"]) and all(len(row) == n for row in z)
        _want(good, where, f"{key}.z", z, f"{len(curve['y'])} rows of {n}")
        return
    for name, values in (("y", curve["y"]), *(("y_by_sample", row) for row in curve.get("y_by_sample") or ())):
        _want(len(values) == n, where, f"{key}.{name}", f"{len(values)} values", f"{n}, as many as x")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _want(good: bool, where: str, key: str, found: object, valid: str) -> None:
    if not good:
        shown = repr(found) if len(repr(found)) < 60 else repr(found)[:57] + "..."
        raise UserError(f"{where}: {key + ': ' if key else ''}found {shown}; valid: {valid}")
