"""``python -m kernels_pallas.check``: what passes, what fails, and what it says."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

import jax.numpy as jnp
import pytest

from kernels_pallas import check, common


@pytest.mark.parametrize("kernel", check.KERNELS)
def test_every_kernel_has_cases_for_every_platform(kernel: str) -> None:
    bench = importlib.import_module(f"kernels_pallas.{kernel}.bench")
    assert bench.gpu_cases() and all(c.reference is not None for c in bench.small_cases())
    for chip in common.CHIPS:
        names = [c.name for c in bench.cases(chip)]
        assert len(set(names)) == len(names) > 3
        assert all(0 < c.tile_bytes < common.CHIPS[chip].vmem for c in bench.cases(chip))


def test_a_wrong_result_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bench = importlib.import_module("kernels_pallas.flash.bench")
    good = bench.small_cases()[2]

    def nan(*args: Any) -> Any:
        return tuple(jnp.full_like(x, jnp.nan) for x in good.fn(*args))

    monkeypatch.setattr(bench, "small_cases", lambda: [good])
    assert check.main(["--platform", "interpret", "--kernel", "flash"]) == 0
    assert "equal, RMS ratio" in capsys.readouterr().out
    monkeypatch.setattr(bench, "small_cases", lambda: [good, dataclasses.replace(good, fn=nan)])
    assert check.main(["--platform", "interpret", "--kernel", "flash"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: AssertionError: RMS ratio inf" in out and "1 of 2 passed" in out


def test_gpu_without_a_gpu_is_lowered(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--platform", "gpu", "--kernel", "flash"]) == 0
    assert capsys.readouterr().out.count("lowered") == 4


def test_tpu_needs_its_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    assert check.main(["--platform", "tpu"]) == 2
    assert "libtpu is not installed" in capsys.readouterr().err


def test_sizes_given_win_over_the_table_of_a_chip() -> None:
    assert common.blocks("flash", "v5e", block_q=128, block_k=None) == {"block_q": 128, "block_k": 1024}
    assert common.blocks("flash", "a new one") == common.blocks("flash")
    with pytest.raises(KeyError):
        common.blocks("flash", block_z=1)
