"""`kernels_pallas.flash`, interpreted: equal to its reference, forward and gradient; tiles counted; no races."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import rms_ratio
from kernel_checks import STRICT, how, without_races

from kernels_pallas import common
from kernels_pallas.flash import bench, cudnn, table
from kernels_pallas.flash.api import flash
from kernels_pallas.flash.problem import Problem
from lm import compat
from lm.attention.masks import Causal, Chunked, Mask, Sinks, Window
from lm.attention.tiles import Grid, visit
from lm.errors import UserError

LAMBDA = Causal() & (Window(20) | Sinks(3))
FAR = Sinks(3) & ~Window(40)


def listing(mask: Mask, offset: int = 0) -> Any:
    return lambda T, S, bq, bk: visit(mask, Grid(T, S, bq, bk, offset))


def arrays(T: int, S: int, H: int, K: int, d: int, B: int = 2, seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, n, h, d)), jnp.float32) for n, h in ((T, H), (S, K), (S, K)))


def loss(out: jax.Array, lse: jax.Array) -> jax.Array:
    """Weighs every output unevenly; rows without keys have no part in the second term."""
    return jnp.sin(3 * out.astype(jnp.float32)).sum() + jnp.where(lse > common.NEG / 2, jnp.cos(lse), 0.0).sum()


def pull(how: common.How, problem: Problem, x: tuple[Any, ...], heads: dict[str, Any]) -> Any:
    """``((loss, (out, lse)), gradients)`` to q, k, v and the numbers per head."""

    def f(x: tuple[Any, ...], heads: dict[str, Any]) -> Any:
        out, lse = flash(*x, dataclasses.replace(problem, **heads), how)
        return loss(out, lse), (out, lse)

    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, heads)


def _packed(T: int, S: int) -> dict[str, Any]:
    """Queries are the last of the keys: two documents in a row, then padding."""
    at = np.arange(S)
    index = np.where(at < 25, at, at - 25)
    index[-4:] = -1
    pair = lambda x: (jnp.asarray(x[None, S - T :], jnp.int32), jnp.asarray(x[None], jnp.int32))  # noqa: E731
    return {"index": pair(index), "segments": pair(at >= 25)}


PER_HEAD = {"slopes_H": jnp.array([0.3, 0.05, 1.0, 0.0]), "sinks_H": jnp.array([0.5, -1.0, 2.0, -40.0])}
PLACES = (jnp.arange(50.0)[None] * 0.7, jnp.arange(50.0)[None] * 0.7)
GRID: dict[str, tuple[Mask, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "lambda, soft-cap, grouped": (LAMBDA, (50, 50, 4, 2, 64), {}, {"tiles": listing(LAMBDA), "softcap": 2.0}),
    "slopes, sinks": (Causal(), (50, 50, 4, 1, 96), PER_HEAD, {"positions": PLACES, "tiles": listing(Causal())}),
    "rows without keys": (FAR, (60, 60, 2, 2, 128), {}, {"tiles": listing(FAR)}),
    "packed, padded, few queries": (Causal() | Sinks(2), (19, 45, 2, 1, 256), {}, _packed(19, 45)),
    "chunks, last queries": (
        Chunked(16) & Causal(),
        (21, 53, 2, 2, 8),
        {},
        {"offset": 32, "tiles": listing(Chunked(16) & Causal(), 32), "scale": 0.7},
    ),
}


@pytest.mark.parametrize("name", GRID)
def test_equals_the_reference_forward_and_gradient(name: str) -> None:
    mask, shape, heads, settings = GRID[name]
    x, problem = arrays(*shape), Problem(mask, **settings)
    (_, (out, lse)), grads = pull(how("interpret", block_q=16, block_k=8), problem, x, heads)
    (_, (want, want_lse)), wanted = pull(how("xla"), problem, x, heads)
    assert rms_ratio(out, want) <= 1e-6
    empty = np.asarray(want_lse) == common.NEG
    np.testing.assert_array_equal(np.asarray(lse) == common.NEG, empty)
    np.testing.assert_allclose(np.asarray(lse)[~empty], np.asarray(want_lse)[~empty], rtol=0, atol=5e-6)
    assert empty.any() == (name in ("rows without keys", "packed, padded, few queries"))
    assert not np.asarray(out)[empty].any()
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert rms_ratio(a, b) <= 5e-6


def test_reference_against_numpy() -> None:
    """The truth itself, in float64, pair by pair."""
    x = arrays(7, 9, 2, 1, 4, B=1)
    q, k, v = (np.asarray(a, np.float64)[0] for a in x)
    slopes, sinks = (0.3, 0.1), (0.5, -1.0)
    heads = {"slopes_H": jnp.array(slopes), "sinks_H": jnp.array(sinks)}
    places = (jnp.arange(7.0)[None] + 2, jnp.arange(9.0)[None])
    out, lse = flash(*x, Problem(Causal(), positions=places, offset=2, softcap=1.5, **heads), how("xla"))
    for h in range(2):
        for t in range(7):
            s = [1.5 * np.tanh((q[t, h] @ k[j, 0] / 2 - slopes[h] * (t + 2 - j)) / 1.5) for j in range(t + 3)]
            total = np.exp(s).sum() + np.exp(sinks[h])
            np.testing.assert_allclose(lse[0, t, h], np.log(total), atol=1e-6)
            np.testing.assert_allclose(out[0, t, h], np.exp(s) @ v[: t + 3, 0] / total, atol=1e-6)


@pytest.mark.parametrize("per_head", [False, True])
def test_bfloat16_errs_no_more_than_twice_what_xla_does(per_head: bool) -> None:
    """Against float32 on the same rounded inputs, output and every gradient, those to slopes and sinks included."""
    H = 16 if per_head else 2  # the error of a gradient with one number per head is that of a sample of H
    rounded = tuple(a.astype(jnp.bfloat16) for a in arrays(64, 64, H, H // 2, 64))
    heads = {"slopes_H": 2.0 ** -jnp.arange(1.0, H + 1), "sinks_H": jnp.linspace(-1.0, 1.0, H)} if per_head else {}
    settings: dict[str, Any] = {"tiles": listing(Causal())}
    if per_head:
        settings["positions"] = (jnp.arange(64.0)[None], jnp.arange(64.0)[None])
    problem = Problem(Causal(), **settings)
    (_, (want, _)), wanted = pull(how("xla"), problem, tuple(a.astype(jnp.float32) for a in rounded), heads)
    (_, (xla, _)), of_xla = pull(how("xla"), problem, rounded, heads)
    (_, (out, _)), grads = pull(how("interpret", block_q=32, block_k=16), problem, rounded, heads)
    assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in grads[0])
    found, of_others, truth = (jax.tree.leaves(each) for each in ((out, grads), (xla, of_xla), (want, wanted)))
    assert len(found) == 4 + len(heads)
    for a, b, c in zip(found, of_others, truth, strict=True):
        assert 0 < rms_ratio(a, c) <= 2 * rms_ratio(b, c)


def _grids(f: Any, *args: Any) -> list[tuple[int, ...]]:
    def walk(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield tuple(equation.params["grid_mapping"].grid)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    yield from walk(getattr(value, "jaxpr", value))

    return list(walk(jax.make_jaxpr(f)(*args).jaxpr))


def test_empty_tiles_are_not_visited() -> None:
    """Grid sizes are the listed tiles; and what lies in a tile nobody lists, be it NaN, reaches no result."""
    x = arrays(64, 64, 2, 1, 8)
    run = functools.partial(
        flash, problem=Problem(LAMBDA, listing(LAMBDA)), how=how("interpret", block_q=16, block_k=8)
    )

    def f(*x: Any) -> Any:
        return loss(*run(*x))

    n = len(visit(LAMBDA, Grid(64, 64, 16, 8)))
    assert n == 2 + 4 + (1 + 5) + (1 + 5)  # of 32 tiles, of which a causal mask leaves 20
    assert _grids(jax.grad(f, (0, 1, 2)), *x) == [(2, 2, n), (2, 2, n), (2, 1, n, 2)]
    # Keys 8 ... 23 are in no tile of the last 16 queries (whose window starts at 29); keys 0 ... 7 hold the sinks.
    k, v = (a.at[:, 8:24].set(jnp.nan) for a in x[1:])
    out = run(x[0], k, v)[0]
    assert bool(jnp.isfinite(out[:, 48:]).all()) and bool(jnp.isnan(out[:, 16:32]).any())


@pytest.mark.parametrize("major", [0, 1])
def test_the_table_lists_every_tile_once_and_fills_the_gaps(major: int) -> None:
    mask = FAR & ~Chunked(32)
    tiles = visit(mask, Grid(96, 96, 16, 8))
    words = table.pack(tiles, (6, 12)[major], major)
    q, k, flags = words >> 17, (words >> 4) & 8191, words & 15
    run = (flags & table.RUN) > 0
    assert sorted(zip(q[run], k[run], (flags[run] & table.WHOLE) > 0, strict=True)) == sorted(map(tuple, tiles))
    lead = (q, k)[major]
    assert (np.diff(lead) >= 0).all() and set(lead) == set(range((6, 12)[major]))
    assert ((flags & table.FIRST) > 0).sum() == ((flags & table.LAST) > 0).sum() == (6, 12)[major]
    assert (~run).sum() == (6, 12)[major] - len(set(tiles[:, major])) > 0
    with pytest.raises(ValueError, match="use larger blocks"):
        table.pack(np.array([[8192, 0, 0]]), 1, 0)


def test_strict_interpreter_finds_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Two cores, no memory read that nobody wrote, no read outside a buffer."""
    x = arrays(20, 20, 2, 1, 8, B=1)
    heads = {"slopes_H": jnp.array([0.3, 0.1]), "sinks_H": jnp.array([0.5, -1.0])}
    mask, places = FAR | (Causal() & Window(5)), (jnp.arange(20.0)[None],) * 2
    problem = Problem(mask, listing(mask), positions=places)
    call = functools.partial(pull, how("interpret", interpret=STRICT, block_q=16, block_k=8), problem, x, heads)
    got, want = without_races(call, capfd), pull(how("xla"), problem, x, heads)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_ratio(a, b) <= 5e-6


def test_lowers_for_tpu_without_its_compiler() -> None:
    """Forward and backward of every feature at a real size."""
    cases = [c for c in bench.cases("v5e") if " 8k" in c.name or "1 query" in c.name]
    assert {c.name.split()[-1] for c in cases} == {"forward", "backward"} and len(cases) == 16
    for case in cases:
        text = jax.jit(case.fn).trace(*case.args).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") >= (3 if "backward" in case.name else 1), case.name


def test_inside_shard_map_on_8_devices() -> None:
    """Rows over 4 devices and heads over 2, indices and numbers per head spread with them."""
    mesh = compat.auto_mesh((4, 2), ("data", "tensor"))
    x = arrays(24, 24, 4, 2, 8, B=4)
    problem = Problem(LAMBDA, listing(LAMBDA), positions=(PLACES[0][:, :24], PLACES[0][:, :24]))
    want = pull(how("xla"), problem, x, PER_HEAD)
    got = pull(how("interpret", mesh=mesh, block_q=8, block_k=8), problem, x, PER_HEAD)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_ratio(a, b) <= 5e-6
    assert got[0][1][0].sharding.spec[0] == "data"


def test_cudnn_gets_what_it_can_and_a_reason_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = tuple(a.astype(jnp.bfloat16) for a in arrays(16, 16, 2, 1, 8))

    def run(*x: Any, mask: Mask = Causal(), causal: bool = True, **more: Any) -> Any:  # noqa: B008
        return flash(*x, Problem(mask, causal=causal, **more), how("cudnn"))

    for reason, call in {
        "not plain causal": lambda: run(*x, mask=LAMBDA, causal=False),
        "not the same rows": lambda: run(x[0][:, 8:], *x[1:], offset=8),
        "segments or padding": lambda: run(*x, **_packed(16, 16)),
        "dtype float32": lambda: run(*arrays(16, 16, 2, 1, 8)),
        "sinks": lambda: run(*x, sinks_H=jnp.zeros(2)),
        "a soft-cap": lambda: run(*x, softcap=2.0),
        "heads wider": lambda: run(*(jnp.zeros((1, 16, 1, 256), jnp.bfloat16),) * 3),
    }.items():
        with pytest.raises(UserError, match=f"'cudnn' cannot serve this call: .*{reason}.*; use 'auto'"):
            call()
    monkeypatch.undo()
    with pytest.raises(UserError, match="no GPU here"):
        run(*x)


def test_gradient_through_the_log_sum_exp_that_cudnn_drops() -> None:
    """The rule of cudnn.py, around XLA's form of the same library function, which drops that gradient as cuDNN does."""
    x = arrays(24, 24, 4, 2, 8)
    problem = Problem(Causal(), scale=0.3)
    form = functools.partial(cudnn.attention, scores=problem.scores(*x[:2]), library="xla")
    truth = functools.partial(flash, problem=problem, how=how("reference"))
    for weigh in (loss, lambda out, lse: jnp.sin(3 * out).sum()):
        got, want = (jax.jit(jax.grad(lambda x, f=f, w=weigh: w(*f(*x))))(x) for f in (form, truth))
        for a, b in zip(got, want, strict=True):
            assert rms_ratio(a, b) <= 5e-6


def test_auto_is_the_kernel_for_a_tpu_and_xla_elsewhere() -> None:
    """By what the program is lowered for, not by the machine; a call the kernel cannot serve goes to XLA."""
    x = arrays(200, 200, 2, 1, 64, B=1)
    run = functools.partial(flash, problem=Problem(Causal()))

    def gradient(*x: Any) -> Any:
        return jax.grad(lambda *x: loss(*run(*x)), (0, 1, 2))(*x)

    tpu = jax.jit(gradient).trace(*x).lower(lowering_platforms=("tpu",)).as_text()
    assert tpu.count("@tpu_custom_call") == 3
    assert "custom_call" not in jax.jit(run).trace(*x).lower(lowering_platforms=("cuda",)).as_text()
    text = jax.jit(functools.partial(run, how=how(block_q=96))).trace(*x).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text
    xla = jax.jit(jax.grad(lambda *x: loss(*run(*x, how=how("xla"))), (0, 1, 2)))
    for a, b in zip(jax.jit(gradient)(*x), xla(*x), strict=True):
        assert rms_ratio(a, b) <= 1e-6


def test_mistakes_are_said_in_one_line() -> None:
    x = arrays(16, 16, 3, 2, 8)
    plain = Problem(Causal())
    for message, (problem, kind) in {
        "3 query heads and 2 key heads": (plain, how()),
        "implementation: unknown name 'cuda'": (plain, how("cuda")),
        "chip: unknown name 'v7'": (plain, how(chip="v7")),
        "sizes: unknown name 'block_z'": (plain, how(block_z=1)),
        "slopes_H without positions": (Problem(Causal(), slopes_H=jnp.zeros(2)), how()),
        "multiples of 128; use 'auto'": (plain, how("tpu", block_q=96)),
    }.items():
        q = x[0] if "3 query" in message else jnp.zeros((2, 256, 2, 8))
        with pytest.raises(UserError, match=f"^flash: .*{message}"):
            flash(q, *x[1:], problem, kind)
