"""`kernels_pallas.flash` for Hopper: interpreted, equal to its reference, no races; lowered for CUDA at real sizes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import assert_as_good, exact, how, rms_ratio, without_races

from kernels_pallas import common
from kernels_pallas.flash import bench, gpu, gpu_forward, gpu_tile, table
from kernels_pallas.flash.api import flash
from kernels_pallas.flash.problem import Problem
from lm import compat
from lm.attention.masks import Causal, Chunked, EarlyQueries, Mask, NearChunks, Prefix, Sinks, Window
from lm.attention.tiles import Grid, visit
from lm.errors import UserError

LAMBDA = Causal() & (Window(70) | Sinks(3))
FAR = Sinks(3) & ~Window(100)


def listing(mask: Mask, offset: int = 0) -> Any:
    return lambda T, S, bq, bk: visit(mask, Grid(T, S, bq, bk, offset))


def arrays(T: int, S: int, H: int, K: int, d: int, B: int = 1) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, n, h, d)), jnp.bfloat16) for n, h in ((T, H), (S, K), (S, K)))


def pull(implementation: str, problem: Problem, x: tuple[Any, ...], heads: dict[str, Any]) -> Any:
    """Output and log-sum-exp, gradients to q, k, v, and to the numbers per head."""

    def loss(x: tuple[Any, ...], heads: dict[str, Any]) -> Any:
        out, lse = flash(*x, dataclasses.replace(problem, **heads), how(implementation))
        found = jnp.where(lse > common.NEG / 2, jnp.cos(lse), 0.0).sum()
        return jnp.sin(3 * out.astype(jnp.float32)).sum() + found, (out, lse)

    (_, result), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, heads)
    return result, *grads


def _packed(T: int, S: int) -> dict[str, Any]:
    """Queries are the last of the keys: two documents in a row, then padding."""
    at = np.arange(S)
    index = np.where(at < 75, at, at - 75)
    index[-4:] = -1
    pair = lambda x: (jnp.asarray(x[None, S - T :], jnp.int32), jnp.asarray(x[None], jnp.int32))  # noqa: E731
    return {"index": pair(index), "segments": pair(at >= 75)}


PER_HEAD = {"slopes_H": jnp.array([0.3, 0.05, 1.0, 0.0]), "sinks_H": jnp.array([0.5, -1.0, 2.0, -40.0])}
PLACES = tuple(jnp.arange(float(a), 190)[None] * 0.7 for a in (90, 0))
BENT = {"positions": PLACES, "offset": 90, "softcap": 20.0, "tiles": listing(Causal(), 90)}
GRID: dict[str, tuple[Mask, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "lambda, grouped": (LAMBDA, (150, 150, 2, 1, 64), {}, {"tiles": listing(LAMBDA)}),
    "slopes, sinks, soft-cap, last queries": (Causal(), (100, 190, 4, 2, 80), PER_HEAD, BENT),
    "rows without keys, wide": (FAR, (130, 130, 1, 1, 256), {}, {"tiles": listing(FAR), "scale": 0.1}),
    "packed, padded, few queries": (Causal() | Sinks(2), (70, 130, 2, 1, 96), {}, _packed(70, 130)),
}


@pytest.mark.parametrize("name", GRID)
def test_equals_the_reference_forward_and_gradient(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Against float32 on the same rounded inputs, with no more than twice the error of XLA's own form; and no race."""
    mask, shape, heads, settings = GRID[name]
    x, problem = arrays(*shape), Problem(mask, **settings)
    found = without_races(lambda: pull("interpret_gpu", problem, x, heads), capfd)
    truth, xla = pull("xla", problem, exact(x), heads), pull("xla", problem, x, heads)
    (out, lse), dx, d_heads = found
    empty = np.asarray(truth[0][1]) == common.NEG
    assert empty.any() == (name[:4] in ("rows", "pack"))
    np.testing.assert_array_equal(np.asarray(lse) == common.NEG, empty)
    np.testing.assert_allclose(np.asarray(lse)[~empty], np.asarray(truth[0][1])[~empty], rtol=0, atol=5e-6)
    assert not np.asarray(out, np.float32)[empty].any()
    assert out.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in dx)
    for a, b, c in zip((out, *dx), (xla[0][0], *xla[1]), (truth[0][0], *truth[1]), strict=True):
        assert_as_good(a, b, c, jnp.bfloat16)
    for key in d_heads:
        assert rms_ratio(d_heads[key], truth[2][key]) <= 2 * rms_ratio(xla[2][key], truth[2][key])


def test_a_barrier_nobody_waits_for_is_a_race(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The interpreter sees that queries may be read before they are there."""
    original, wait = gpu_forward._forward, gpu_forward.plgpu.barrier_wait
    forgotten: list[Any] = []

    def forward(o: Any, spec: Any, place: Any, x: Any, outs: Any, scratch: Any) -> None:
        forgotten[:] = [scratch["q_full"]]
        original(o, spec, place, x, outs, scratch)

    monkeypatch.setattr(gpu_forward, "_forward", forward)
    skip = lambda b: None if getattr(b, "ref", b) is forgotten[0] else wait(b)  # noqa: E731
    monkeypatch.setattr(gpu_forward.plgpu, "barrier_wait", skip)
    run = jax.jit(functools.partial(flash, problem=Problem(Causal(), listing(Causal())), how=how("interpret_gpu")))
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        without_races(lambda: run(*arrays(64, 64, 1, 1, 32)), capfd)
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    reset_gpu_interpret_mode_state()


@pytest.mark.parametrize("major", [0, 1])
def test_runs_are_the_listed_tiles(major: int) -> None:
    mask = (Causal() & (Window(40) | Sinks(20))) | (FAR & ~Chunked(64))
    tiles = visit(mask, Grid(384, 256, 32, 16, 0))
    starts, runs, kinds = table.runs(tiles, (12, 16)[major], major)
    found = [
        (block, j, whole)
        for block, *edges in starts
        for whole, a, b in ((1, *edges[:2]), (0, *edges[1:]))
        for first, end in runs[a:b]
        for j in range(first, end)
    ]
    assert sorted(found) == sorted((t[major], t[1 - major], t[2]) for t in tiles.tolist()) and kinds == (True, True)
    assert sorted(starts[:, 0]) == list(range((12, 16)[major])) and len(runs) < len(tiles)
    count = np.bincount([f[0] for f in found], minlength=len(starts))[starts[:, 0]]
    assert (np.diff(count) <= 0).all()


def lowered(f: Any, *args: Any) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_lowers_for_cuda_at_real_sizes() -> None:
    """Layouts and shared memory are checked; every width, every feature, 128k tokens."""
    cases = {c.name: c for c in bench.gpu_cases() if c.name.endswith(("gpu forward", "gpu backward"))}
    assert len(cases) == 20 and all(0 < c.tile_bytes < common.GPUS["h100"].smem for c in cases.values())
    for name, n in {
        "window + sinks 128k, gpu backward": 3,
        "slopes, soft-cap, sinks 8k, gpu backward": 3,
        "packed 8k, gpu backward": 3,
        "width 96 8k, gpu forward": 1,
        "width 256 8k, gpu backward": 4,
    }.items():
        assert lowered(cases[name].fn, *cases[name].args).count("@mosaic_gpu_v2") == n, name


def test_every_mask_lowers() -> None:
    mask = (LAMBDA | (Prefix(9) & ~Chunked(64))) & (NearChunks(64, 3) | EarlyQueries(100))
    run = functools.partial(flash, problem=Problem(mask, listing(mask)), how=how("gpu"))
    assert "@mosaic_gpu_v2" in lowered(run, *arrays(256, 256, 1, 1, 64))


def test_auto_is_the_kernel_on_a_chip_it_is_written_for() -> None:
    x = arrays(200, 200, 2, 1, 64)
    run = functools.partial(flash, problem=Problem(Causal()))
    assert "@mosaic_gpu_v2" in lowered(functools.partial(run, how=how(chip="h100")), *x)
    assert "mosaic_gpu" not in lowered(run, *x)
    assert "mosaic_gpu" not in lowered(functools.partial(run, how=how(chip="h100")), *exact(x))


def test_lowers_inside_shard_map_on_8_devices() -> None:
    """Rows over 4 devices and heads over 2. Interpreted, their 24 warpgroups want more threads than XLA has."""
    mesh = compat.auto_mesh((4, 2), ("data", "tensor"))
    problem = Problem(LAMBDA, listing(LAMBDA), sinks_H=PER_HEAD["sinks_H"])
    run = functools.partial(flash, problem=problem, how=how("gpu", mesh=mesh))
    text = lowered(run, *arrays(64, 64, 4, 2, 32, B=4))
    call = next(line for line in text.splitlines() if "@mosaic_gpu_v2" in line)
    assert "tensor<1x128x2x32xbf16>" in call  # a row of the batch, two heads, padded to a block


def test_refusals() -> None:
    x = arrays(128, 128, 2, 1, 64)
    plain = Problem(Causal())
    for reason, call in {
        "dtype float32": lambda f: flash(*exact(x), plain, how(f)),
        "heads wider than 256": lambda f: flash(*arrays(64, 64, 1, 1, 288), plain, how(f)),
        "fewer than 64 queries": lambda f: flash(x[0][:, :1], *x[1:], Problem(Causal(), offset=127), how(f)),
        "on a GPU 64 or 128": lambda f: flash(*x, plain, how(f, block_q=96)),
    }.items():
        for form in ("gpu", "interpret_gpu"):
            with pytest.raises(UserError, match=f"'{form}' cannot serve this call: .*{reason}.*; use 'auto'"):
                call(form)


def test_shared_memory_decides_the_tiles() -> None:
    """Two slots at least, four at most; half the rows where a wide head leaves no room."""
    assert gpu_tile.fit(64, 128, 128, 1) == gpu_tile.Shape(2, 128, 4)
    assert gpu_tile.fit(256, 128, 64, 2) == gpu_tile.Shape(1, 64, 2)
    for d in range(32, gpu.WIDEST + 1, 32):
        for rows in (64, 128):
            assert max(gpu.memory(d, {"block_q": rows, "block_k": rows})) <= common.GPUS["h100"].smem - 2048
