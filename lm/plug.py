"""Sockets and plugs: a *socket* is a base class and a table ``NAME -> frozen dataclass``, a *plug* one of its rows.

A table names its rows by place (``"streaming": "lm.patterns.streaming:Streaming"``) and imports a row when it is asked
for, so that a program loads the plugs that it uses and no others. Everything that others may ask of a plug is a method
of its base class, with the neutral answer as default.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lm.errors import UserError, shown

# What no model comes near to: beyond it, checking one would take as long as running it.
WIDEST = 2**24  # channels or heads
DEEPEST = 4096  # layers
INT32 = 2**31 - 1  # ids and positions
WHOLE = 2**30  # any other whole number of a setting


class Table(MutableMapping[str, type[Any]]):
    """The explicit table of a socket. Rows are classes, or places ``"module:Class"`` that are imported on first use."""

    def __init__(self, rows: Mapping[str, str | type[Any]]) -> None:
        self._rows: dict[str, str | type[Any]] = dict(rows)

    def __getitem__(self, name: str) -> type[Any]:
        row = self._rows[name]
        if isinstance(row, str):
            module, _, attribute = row.partition(":")
            row = vars(importlib.import_module(module))[attribute]
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
    results and checkpoints are addressed); ``later``: True for a field that came after results had been addressed, and
    is written only where it is not at its default.
    """
    return field(
        default_factory=lambda: table(module)[default](), metadata={"socket": module, "default": default, **metadata}
    )


SEEDS = 2**32  # how many there are: a key of more bits would be cut


def bounded(default: Any, *, at_least: float, at_most: float = math.inf, **metadata: Any) -> Any:
    """A dataclass field of a number that must not be below `at_least` or above `at_most`; None passes where the field
    allows None.

    The bounds are checked by `check_bounds`, which every `Plug` calls when it is made.
    """
    return field(default=default, metadata={"at_least": at_least, "at_most": at_most, **metadata})


def seed_field(default: int | None = 0) -> Any:
    """A dataclass field of a seed, 0 to 2^32 - 1."""
    return bounded(default, at_least=0, at_most=SEEDS - 1)


def later(default: Any, **metadata: Any) -> Any:
    """A dataclass field that came after results had been addressed: it is written only where it is not `default`."""
    return field(default=default, metadata={"later": True, **metadata})


class Settings(dict[str, Any]):
    """Fields of a plug that another plug names: a dict that can be hashed, because nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def check_bounds(settings: Any, key: str) -> None:
    """Raises `UserError` for the first field of a dataclass instance that is out of its bounds; `key` is its place.
    Whole numbers are at most `WHOLE` where nothing else is said: devices count in 32 bits, and two are added."""
    for f in dataclasses.fields(settings):
        value = settings.__dict__[f.name]
        least, most = f.metadata.get("at_least", -math.inf), f.metadata.get("at_most", math.inf)
        whole = math.inf if most < math.inf else WHOLE
        for one in value if isinstance(value, tuple) else (value,):
            if type(one) not in (int, float):
                continue
            if not one >= least:
                none = " or None" if "None" in str(f.type) else ""
                raise UserError(f"{key}.{f.name}: must be at least {least}{none}, found {shown(one)}")
            if not one <= most:
                raise UserError(f"{key}.{f.name}: found {shown(one)}; valid: {least} to {most}")
            if isinstance(one, int) and not one <= whole:
                raise UserError(f"{key}.{f.name}: must be at most {whole:,}, found {shown(one)}")


class Plug:
    """Base of every plug. A plug is a frozen dataclass whose fields are its settings: the keys of a config."""

    KEY: ClassVar[str] = ""  # where a config names such plugs

    def __post_init__(self) -> None:
        check_bounds(self, self.KEY)


@dataclass(frozen=True)
class Model:
    """What a plug may read of the model that it is part of: sizes, types, and the model's other plugs.

    Widths are numbers of channels, lengths are tokens. `lm.config.ModelConfig` is the model itself, with the table of
    every socket; plugs know no more than this of it, so that no socket depends on another one's.
    """

    vocab_size: int = bounded(256, at_least=1, at_most=INT32)
    d_model: int = bounded(64, at_least=1, at_most=WIDEST)
    n_layers: int = bounded(2, at_least=1, at_most=DEEPEST)
    n_heads: int = bounded(4, at_least=1, at_most=WIDEST)
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = bounded(256, at_least=1, at_most=WIDEST)
    max_positions: int = bounded(2048, at_least=1, at_most=INT32)
    norm: Any = None
    mixer: Any = None
    pattern: Any = None
    cache: Any = None
    positions: Any = None
    ffn: Any = None
    head: Any = None
    parallel_residual: bool = False
    norm_place: Literal["input", "output", "both"] = later("input")
    embed_scale: float = 1.0
    init_std: float = 0.02
    scan_layers: bool = True
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    layer_overrides: tuple[Any, ...] = ()

    def layers(self) -> tuple[Model, ...]:
        """The configuration of every layer."""
        return (self,) * self.n_layers

    @property
    def kv_heads(self) -> int:
        """`n_kv_heads`, or all heads where none are given."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """`head_dim`, or the model width over the heads where none is given."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim
