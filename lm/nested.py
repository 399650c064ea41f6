"""Nested dicts: where two of them differ, and their leaves under keys that name the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def difference(a: object, b: object, key: str, absent: object = None) -> tuple[str, object, object]:
    """The first place where `a` and `b` differ, as a dotted key below `key`, and the two values there.

    Keys are compared in the order of `a`, then of `b`; `absent` stands for a key that one of them lacks.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(n for n in b if n not in a)]:
            ours, theirs = a.get(name, absent), b.get(name, absent)
            if ours != theirs:
                return difference(ours, theirs, f"{key}.{name}", absent)
    return key, a, b


def flat(tree: Mapping[str, object], head: str = "") -> dict[str, object]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``, every key behind `head`."""
    out: dict[str, object] = {}
    for k, v in tree.items():
        out |= flat(v, f"{head}{k}.") if isinstance(v, dict) else {f"{head}{k}": v}
    return out


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a/b": leaf}`` -> ``{"a": {"b": leaf}}``: a tree of parameters by their names."""
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return out
