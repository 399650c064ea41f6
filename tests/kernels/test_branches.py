"""`kernels_pallas.branches`: the union of branches is one softmax over the logits of all, forward and gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import rms_ratio
from kernel_checks import STRICT, assert_as_good, how, lowered_for_tpu, without_races

from kernels_pallas import common
from kernels_pallas.branches import bench
from kernels_pallas.branches.api import branches
from kernels_pallas.branches.bench import Between, Shape, attend, shapes
from kernels_pallas.branches.part import Part, Problem
from kernels_pallas.flash.bench import gradient
from lm import compat
from lm.errors import UserError

LAMBDA, GROUPS = Shape(13, sinks=3), Shape(12, group=4)
SMALL = {"block_q": 16, "block_k": 8}


def arrays(T: int, S: int, H: int, K: int, d: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    rng = np.random.default_rng(T)
    return tuple(jnp.asarray(rng.normal(size=(2, n, h, d)), dtype) for n, h in ((T, H), (S, K), (S, K)))


@pytest.mark.parametrize("shape", [LAMBDA, GROUPS], ids=str)
@pytest.mark.parametrize(("T", "S", "d"), [(45, 45, 64), (21, 45, 96)])
def test_equals_the_dense_union(shape: Shape, T: int, S: int, d: int) -> None:
    x = arrays(T, S, 4, 2, d)
    got = functools.partial(attend, shape, how("interpret", **SMALL))
    want = functools.partial(attend, shape, how("reference"))
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(*x)) for f in (got, want)), strict=True):
        assert rms_ratio(a, b) <= 1e-5
    for a, b in zip(*(jax.jit(functools.partial(gradient, f))(*x) for f in (got, want)), strict=True):
        assert rms_ratio(a, b) <= 1e-5


def test_the_union_by_hand() -> None:
    """NumPy, pair by pair: the distances that each pattern takes, and one softmax."""
    T, d, cap, sink = 29, 8, 7.0, np.array([0.4, -1.0])
    q, k, v = (np.float64(a) for a in arrays(T, T, 2, 1, d))
    for shape in (LAMBDA, GROUPS):
        x = tuple(jnp.asarray(a, jnp.float32) for a in (q, k, v))
        out, lse = branches(shape.parts(*x[:2]), x[2], Problem(softcap=cap, sinks_H=jnp.asarray(sink)), how("xla"))
        for h in range(2):
            for t in range(T):
                logits, seen = [], [s for s in range(t + 1) if t - s < shape.window or s < shape.sinks or shape.group]
                for s in seen:
                    if t - s < shape.window:
                        away = t - s
                    elif shape.sinks:
                        away = shape.window
                    else:
                        g, w = shape.group, shape.window
                        away = t // g + w - w // g - s // g
                    angle = away * 1e4 ** (-np.arange(0, d, 2) / d)
                    qa, qb, ka, kb = *np.split(q[1, t, h], 2), *np.split(k[1, s, 0], 2)
                    dot = (np.cos(angle) * (qa * ka + qb * kb) + np.sin(angle) * (qa * kb - qb * ka)).sum()
                    logits.append(cap * np.tanh(dot * d**-0.5 / cap))
                p = np.exp([*logits, sink[h]])
                np.testing.assert_allclose(out[1, t, h], p[:-1] @ v[1, seen, 0] / p.sum(), rtol=2e-4, atol=2e-5)
                np.testing.assert_allclose(lse[1, t, h], np.log(p.sum()), rtol=2e-5)


def test_parts_of_some_queries_sinks_slopes_and_documents() -> None:
    T, x = 30, arrays(30, 30, 4, 2, 16)
    at = jnp.arange(T, dtype=jnp.float32)[None]
    index = jnp.asarray(np.r_[np.arange(17), np.arange(11), -1, -1])[None]
    document = jnp.asarray(np.repeat([0, 1], [17, 13]))[None]

    def run(implementation: str, q: Any, k: Any, v: Any) -> Any:
        def part(mask: Between, rows: int) -> Part:
            tail = lambda a: (a[:, T - rows :], a)  # noqa: E731
            return Part(q[:, T - rows :], k, mask, None, tail(index), tail(document), tail(at), T - rows)

        parts = [part(Between(5), 20), part(Between(most=5), T)]
        slopes, sinks = jnp.array([0.3, 0.05, 1.0, 0.0]), jnp.array([0.5, -1.0, 2.0, -40.0])
        return branches(parts, v, Problem(slopes_H=slopes, sinks_H=sinks), how(implementation, **SMALL))

    def both(name: str, *x: Any) -> Any:
        return run(name, *x), gradient(functools.partial(run, name), *x)

    got, want = (jax.jit(functools.partial(both, name))(*x) for name in ("interpret", "reference"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_ratio(a, b) <= 1e-5


def test_one_part_is_flash_and_bfloat16_errs_like_xla() -> None:
    x = arrays(40, 40, 2, 1, 64, jnp.bfloat16)
    exact = tuple(a.astype(jnp.float32) for a in x)
    runs = [
        jax.jit(functools.partial(attend, LAMBDA, how(name, **more)))(*arrays_)[0]
        for name, arrays_, more in (("interpret", x, SMALL), ("xla", x, {}), ("reference", exact, {}))
    ]
    assert_as_good(runs[0], runs[1], runs[2], jnp.bfloat16)


def test_strict_interpreter_finds_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    x = arrays(24, 24, 2, 1, 8)
    call = functools.partial(attend, LAMBDA, how("interpret", interpret=STRICT, **SMALL), *x)
    out, _ = without_races(call, capfd)
    assert rms_ratio(out, attend(LAMBDA, how("reference"), *x)[0]) <= 1e-5


def test_inside_shard_map_on_8_devices() -> None:
    mesh = compat.auto_mesh((2, 4), ("data", "tensor"))
    x = arrays(20, 20, 8, 4, 8)
    call = functools.partial(attend, LAMBDA, how("interpret", mesh=mesh, **SMALL))
    for a, b in zip(jax.jit(call)(*x), attend(LAMBDA, how("reference"), *x), strict=True):
        assert rms_ratio(a, b) <= 1e-5


def test_tiles_of_a_branch_are_those_that_hold_its_pairs() -> None:
    q, k = np.arange(70)[:, None], np.arange(70)[None]
    for mask in (Between(most=13), Between(13, first=3, only_first=True), Between(12), Between(9, 40, first=11)):
        seen = mask(q, k)
        found = {(i, j): bool(whole) for i, j, whole in mask.tiles(70, 70, 16, 8)}
        for i in range(5):
            for j in range(9):
                tile = seen[16 * i : 16 * i + 16, 8 * j : 8 * j + 8]
                assert ((i, j) in found) == tile.any()
                assert not found.get((i, j)) or tile.all()
        assert any(found.values()) == any(
            seen[16 * i : 16 * i + 16, 8 * j : 8 * j + 8].all() for i in range(4) for j in range(8)
        )


def test_real_sizes_lower_for_a_tpu() -> None:
    text = lowered_for_tpu(functools.partial(attend, bench.REAL[0], how("tpu", "v5e")), *shapes(32768))
    assert text.count("@tpu_custom_call") == 2


def test_mistakes_are_said_in_one_line() -> None:
    q, k, v = arrays(8, 8, 2, 1, 8)
    part = Part(q, k, Between())
    for said, call in {
        "no parts": lambda: branches([], v),
        "part 1 has queries": lambda: branches([part, Part(q[:, :, :1], k, Between())], v),
        "no part has all 8 queries": lambda: branches(
            [Part(q[:, 4:], k, Between(), offset=4)], v, Problem(n_queries=8, sinks_H=jnp.zeros(2))
        ),
    }.items():
        with pytest.raises(UserError, match=f"^branches: .*{said}.*valid: "):
            call()
    assert common.NEG == -1e30
