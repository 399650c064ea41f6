"""Sockets and plugs: a *socket* is a table ``NAME -> frozen dataclass``, a *plug* one of its rows.

A table names its rows by place (``"streaming": "lm.patterns.streaming:Streaming"``) and imports a row when it is asked
for, so that a program loads the plugs that it uses and no others.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import field
from typing import Any


class Table(MutableMapping[str, type[Any]]):
    """The explicit table of a socket. Rows are classes, or places ``"module:Class"`` that are imported on first use."""

    def __init__(self, rows: Mapping[str, str | type[Any]]) -> None:
        self._rows: dict[str, str | type[Any]] = dict(rows)

    def __getitem__(self, name: str) -> type[Any]:
        row = self._rows[name]
        if isinstance(row, str):
            module, _, attribute = row.partition(":")
            row = getattr(importlib.import_module(module), attribute)
            assert isinstance(row, type)
            self._rows[name] = row
        return row

    def __setitem__(self, name: str, row: str | type[Any]) -> None:
        self._rows[name] = row

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def name_of(self, cls: type[Any]) -> str | None:
        """The row that is `cls`, None where there is none; imports nothing."""
        place = f"{cls.__module__}:{cls.__qualname__}"
        return next((name for name, row in self._rows.items() if row is cls or row == place), None)


def table(module: str) -> Table:
    """The table of the socket ``module``."""
    found = importlib.import_module(module).TABLE
    assert isinstance(found, Table)
    return found


def socket(module: str, default: str, **metadata: Any) -> Any:
    """A dataclass field that holds a plug of ``module.TABLE``; `default` is a plug name with its own defaults.

    `metadata`: ``saved``, the name under which the field is written and may also be given (an older one, by which
    results and checkpoints are addressed).
    """
    return field(
        default_factory=lambda: table(module)[default](), metadata={"socket": module, "default": default, **metadata}
    )
