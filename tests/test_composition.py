"""Every pattern with every behaviour of positions, every pair of the other sockets: finite, blocked equals dense."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from cases import model, plugs
from cases.plugs import BEHAVIOURS, FFN, HEADS, PATTERNS, POSITIONS, SOCKETS, Row, behaviour, kind, name

from lm.config import model_config
from lm.errors import UserError
from lm.plug import table

BASE = model_config(
    {"vocab_size": 23, "d_model": 24, "n_layers": 1, "n_heads": 3, "n_kv_heads": 1, "d_ff": 16, "max_positions": 12}
)
TOKENS = np.random.default_rng(0).integers(0, 23, (1, 20))
ROWS = plugs.covering_rows()
PRODUCT = plugs.product_rows()


def test_the_tables_name_every_plug() -> None:
    assert {p["name"] for p in PATTERNS} == set(table("lm.patterns"))
    assert {p["name"] for p in FFN} | {plugs.EXPERT} == set(table("lm.ffn"))
    assert {p["name"] for p in HEADS} == set(table("lm.heads"))
    assert {p["name"] for p in POSITIONS} == set(table("lm.positions"))
    assert {p["scaling"]["name"] for p in POSITIONS if "scaling" in p} == set(table("lm.positions.scaling"))


def test_the_rows_meet_every_pair() -> None:
    """All patterns with all behaviours; rows that run name every option, and meet every pair but of these two."""
    met = {(p, behaviour(POSITIONS[s])) for p, s, *_ in ROWS}
    assert met == set(itertools.product(range(len(PATTERNS)), BEHAVIOURS))
    running = [row for row in ROWS if not plugs.refused(row[0], row[1])]
    for i, socket in enumerate(SOCKETS):
        assert {row[i] for row in running} == set(range(len(socket))), i
    for a, b in itertools.combinations(range(2, 6), 2):
        want = set(itertools.product(range(len(SOCKETS[a])), range(len(SOCKETS[b]))))
        assert {(row[a], row[b]) for row in running} == want, (a, b)
    assert len(running) <= len(PATTERNS) * len(BEHAVIOURS)


def test_the_product_meets_every_pair() -> None:
    for a, b in itertools.combinations(range(6), 2):
        met = {(row[a], row[b]) for row in PRODUCT.values()}
        assert met == set(itertools.product(range(len(SOCKETS[a])), range(len(SOCKETS[b])))), (a, b)


def _id(row: Row) -> str:
    return f"{name(PATTERNS[row[0]])}-{name(POSITIONS[row[1]])}"


SMOKE = sorted(row for row in ROWS if not plugs.refused(row[0], row[1]))[::4][:10]


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.smoke] if row in SMOKE else []) for row in ROWS], ids=_id
)
def test_a_row_runs(row: Row) -> None:
    _runs(row)


@pytest.mark.nightly
@pytest.mark.parametrize("p", range(len(PATTERNS)), ids=lambda p: name(PATTERNS[p]))
@pytest.mark.parametrize("s", range(len(POSITIONS)), ids=lambda s: name(POSITIONS[s]))
def test_a_pair_runs(p: int, s: int) -> None:
    _runs(PRODUCT[p, s])


def _runs(row: Row) -> None:
    if (PATTERNS[row[0]]["name"], kind(POSITIONS[row[1]])) in plugs.REFUSED:
        with pytest.raises(UserError, match=r"^model\.pattern: \w+ (renumbers|does not go with)"):
            model.changed(BASE, plugs.changes(row))
        return
    cfg = model.changed(BASE, plugs.changes(row))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), model.abstract(cfg))
    dense, blocked = (np.asarray(x) for x in model.both_backends(cfg)(params, TOKENS))
    assert dense.shape == (1, 20, 23) and np.isfinite(dense).all()
    assert dense.std() > 0.05
    np.testing.assert_allclose(blocked, dense, rtol=0, atol=2e-5 * max(1.0, np.abs(dense).max()))
