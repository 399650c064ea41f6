"""The metadata of a GGUF file: values of the kinds that their keys ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UserError, shown, told


def _number(value: object) -> bool:
    good = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return good and math.isfinite(float(value))  # type: ignore[arg-type]


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _each(one: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(one, value))


Kind = tuple[str, Callable[[object], bool]]
TEXT: Kind = ("text", _text)
TEXTS: Kind = ("a list of texts", _each(_text))
# How keys end -> what their values are; all others are numbers, or lists of them where layers differ.
KINDS: dict[str, Kind] = {
    ".tokens": TEXTS,
    ".merges": TEXTS,
    ".chat_templates": TEXTS,
    ".token_type": ("a list of whole numbers", _each(_whole)),
    ".scores": ("a list of numbers", _each(_number)),
    "_token_id": ("a whole number", _whole),
    ".add_bos_token": ("true or false", lambda value: isinstance(value, (bool, np.bool_))),
    ".add_eos_token": ("true or false", lambda value: isinstance(value, (bool, np.bool_))),
    ".add_space_prefix": ("true or false", lambda value: isinstance(value, (bool, np.bool_))),
    "ggml.model": TEXT,
    "ggml.pre": TEXT,
    "general.architecture": TEXT,
    "general.license": TEXT,
    ".scaling.type": TEXT,
}


def contents(path: Path, key: str, field: Any) -> Any:
    """The value of a field of `gguf`. Raises `UserError` naming the key for one of another kind, and for text that is
    not UTF-8."""
    try:
        value = field.contents()
    except (ValueError, IndexError, TypeError, OverflowError) as e:
        raise UserError(f"{path}: metadata {key!r} cannot be read ({told(e)})") from None
    if "chat_template" in key and not key.endswith("templates"):
        said, good = TEXT
    else:
        numbers = ("a number", lambda v: _number(v) or _each(_number)(v))
        said, good = next((kind for end, kind in KINDS.items() if key.endswith(end)), numbers)
    if not good(value):
        raise UserError(f"{path}: metadata {key!r}: found {shown(value)}; valid: {said}")
    return value
