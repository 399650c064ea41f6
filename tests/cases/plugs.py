"""The plugs of every socket as configurations, small ones; and rows of them in which all meet that may."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from lm.config import to_dict
from lm.plug import table

Plug = dict[str, Any]
Row = tuple[int, int, int, int, int, int]  # indices into SOCKETS


def rest_of(socket: str, named: list[Plug], plug: Callable[[str], Plug] = lambda name: {"name": name}) -> list[Plug]:
    """The plugs of a socket that `named` leaves out, as `plug` gives them: a new one is tried without being named."""
    return [plug(name) for name in table(socket) if name not in {p["name"] for p in named}]


def small_pattern(name: str) -> Plug:
    """A pattern for models that were trained at five tokens."""
    options = table("lm.patterns")
    return dict(to_dict(options[name].trained_at(5), options))


FOUR = [1.0, 1.5, 2.0, 4.0]
PATTERNS: list[Plug] = [
    {"name": "causal"},
    {"name": "causal", "prefix": 3},
    {"name": "bidirectional"},
    {"name": "streaming", "window": 5, "sinks": 2},
    {"name": "lm_infinite", "window": 6, "sinks": 2, "ceiling": 6.0},
    {"name": "lm_infinite", "window": 6, "sinks": 2, "ceiling": 6.0, "top_k": 3, "top_k_from_layer": 0},
    {"name": "longheads", "chunk": 2, "attention_length": 10},
]
PATTERNS += rest_of("lm.patterns", PATTERNS, small_pattern)
POSITIONS: list[Plug] = [
    {"name": "nope"},
    {"name": "alibi"},
    {"name": "alibi", "style": "mpt"},
    {"name": "learned", "size": 16},
    {"name": "rope", "scaling": {"name": "default"}},
    {"name": "rope", "fraction": 0.5, "scaling": {"name": "linear", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "ntk", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "yarn", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "longrope", "short_factor": FOUR, "long_factor": FOUR[::-1], "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "llama3", "factor": 2.0}},
]
POSITIONS += rest_of("lm.positions", POSITIONS)
EXPERT = "clamped_swiglu"  # as experts alone: a row for every feed-forward layer is more than there are patterns
FFN: list[Plug] = [
    *({"name": name, "bias": i % 2 == 0} for i, name in enumerate(sorted(set(table("lm.ffn")) - {"moe", EXPERT}))),
    {
        "name": "moe",
        "experts": 3,
        "expert": EXPERT,
        "expert_settings": {"bias": True},
        "d_expert": 8,
        "shared": 8,
        "router": {"name": "topk", "k": 2, "offset": True},
    },
]
HEADS: list[Plug] = [
    {"name": "linear", "tie": True},
    {"name": "linear", "tie": False, "bias": True},
    {"name": "linear", "tie": True, "softcap": 10.0},
    {"name": "fourier", "frequencies": 4},
]
HEADS += rest_of("lm.heads", HEADS)
ATTENTION: list[Plug] = [
    {},
    {"softcap": 5.0, "qk_norm": True, "qk_norm_over": "width"},
    {"qkv_bias": True, "out_bias": True, "sink_logits": True},
]
REST: list[Plug] = [
    {"norm": "layernorm", "parallel_residual": False},
    {"norm": "layernorm", "parallel_residual": True, "norm_place": "output"},
    {"norm": {"name": "rmsnorm", "unit_offset": True}, "parallel_residual": False, "norm_place": "both"},
    {"norm": "rmsnorm", "parallel_residual": True},
]
SOCKETS = (PATTERNS, POSITIONS, FFN, HEADS, ATTENTION, REST)


def name(plug: Plug) -> str:
    values = {**plug, **plug.get("scaling", {})}
    short = [str(v) for k, v in values.items() if k not in ("scaling", "name") and not isinstance(v, list)]
    return "-".join([values["name"], *short])


def kind(positions: Plug) -> str:
    return str(positions.get("scaling", positions)["name"])


LENGTH_DEPENDENT = ("dynamic", "longrope")


def behaviour(positions: Plug) -> str:
    """How positions enter: not at all, as a bias, as a table, as rotations that are fixed or that follow the length."""
    if positions["name"] == "rope":
        return "rotary, by length" if kind(positions) in LENGTH_DEPENDENT else "rotary"
    return {"nope": "none", "alibi": "bias", "learned": "table"}.get(positions["name"], positions["name"])


BEHAVIOURS = tuple(dict.fromkeys(map(behaviour, POSITIONS)))
# Pairs that cannot work: renumbering needs rotary positions whose frequencies stay the same.
REFUSED = {("longheads", positions) for positions in ("nope", "alibi", "learned", "dynamic", "longrope")}


def refused(p: int, s: int) -> bool:
    return (PATTERNS[p]["name"], kind(POSITIONS[s])) in REFUSED


def changes(row: Row) -> Mapping[str, object]:
    """The configuration of a row, as changes of a baseline."""
    pattern, positions, ffn, head, attention, rest = (socket[i] for socket, i in zip(SOCKETS, row, strict=True))
    mixer = {**attention, "block_q": 8, "block_k": 8}
    return {"pattern": pattern, "positions": positions, "ffn": ffn, "head": head, "mixer": mixer, **rest}


def behaviour_rows() -> list[tuple[int, int]]:
    """Every pattern with every behaviour of positions; the positions of one behaviour take turns, and all of them come
    with a pattern that goes with only one behaviour."""
    out = []
    for p, (b, how) in itertools.product(range(len(PATTERNS)), enumerate(BEHAVIOURS)):
        members = [s for s, positions in enumerate(POSITIONS) if behaviour(positions) == how]
        out.append((p, members[(p + b) % len(members)]))
    for p in range(len(PATTERNS)):
        good = [s for s in range(len(POSITIONS)) if not refused(p, s)]
        if len({behaviour(POSITIONS[s]) for s in good}) == 1:
            out += [(p, s) for s in good if (p, s) not in out]
    return out


def covering_rows() -> list[Row]:
    """`behaviour_rows` with options of the other sockets, such that rows that run meet every pair of those; more rows
    of the first pattern where they are too few."""
    pairs = itertools.cycle(_diagonal(len(FFN), len(HEADS)))
    met: set[tuple[int, int, int, int]] = set()
    out: list[Row] = []
    wanted = {
        (a, b, i, j)
        for a, b in itertools.combinations(range(2, 6), 2)
        for i, j in itertools.product(range(len(SOCKETS[a])), range(len(SOCKETS[b])))
    }
    rows = behaviour_rows()
    default = next(s for s, positions in enumerate(POSITIONS) if kind(positions) == "default")
    while rows or wanted - met:
        p, s = rows.pop(0) if rows else (0, default)
        if refused(p, s):
            out.append((p, s, 0, 0, 0, 0))
            continue
        ffn, head = next(pairs)
        options = itertools.product(range(len(ATTENTION)), range(len(REST)))
        every: list[Row] = [(p, s, ffn, head, attention, rest) for attention, rest in options]
        new = [{(a, b, r[a], r[b]) for a, b in itertools.combinations(range(6), 2)} for r in every]
        best = max(range(len(every)), key=lambda i: (len((new[i] & wanted) - met), len(new[i] - met)))
        met |= new[best]
        out.append(every[best])
    return out


def _diagonal(n: int, m: int) -> list[tuple[int, int]]:
    """All pairs, each step to another of both where that is possible."""
    return [(i, (i + k) % m) for k in range(m) for i in range(n)]


def product_rows() -> dict[tuple[int, int], Row]:
    """For every pattern and position the options of the other sockets: those that meet most others for the first
    time."""
    met: set[tuple[int, int, int, int]] = set()
    out = {}
    for p, s in itertools.product(range(len(PATTERNS)), range(len(POSITIONS))):
        rest = itertools.product(*(range(len(x)) for x in (HEADS, ATTENTION, REST)))
        every: list[Row] = [(p, s, (p + s) % len(FFN), *others) for others in rest]
        new = [{(a, b, r[a], r[b]) for a, b in itertools.combinations(range(6), 2)} for r in every]
        best = max(range(len(every)), key=lambda i: len(new[i] - met))
        met |= new[best]
        out[p, s] = every[best]
    return out
