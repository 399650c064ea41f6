"""``python -m kernels_pallas.check``: what passes, what fails, and what it says."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import bench as kernels_bench
from kernels_pallas import check, common
from kernels_pallas.tree_decode import bench as tree_bench
from kernels_pallas.tree_decode.api import tree_decode


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


def test_gpu_without_a_gpu_is_lowered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel, its first and last case (their own tests lower more); the table of what was done, with the versions
    it depends on; only the cases asked for."""
    for kernel in check.KERNELS:
        bench = importlib.import_module(f"kernels_pallas.{kernel}.bench")
        cases = bench.gpu_cases()
        monkeypatch.setattr(bench, "gpu_cases", functools.partial(list, (cases[0], cases[-1])))
    file = tmp_path / "new" / "table.json"
    assert check.main(["--platform", "gpu", "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert capsys.readouterr().out.count("lowered") == table["cases"] == table["passed"] == len(table["rows"])
    assert {row["kernel"] for row in table["rows"]} == set(check.KERNELS)
    assert all(row["passed"] and row["result"] == "lowered" for row in table["rows"])
    assert table["environment"]["jax"] == jax.__version__ and table["environment"]["device"] == "cpu"
    assert check.main(["--platform", "gpu", "--kernel", "flash", "--case", "xla forward"]) == 0
    assert "1 of 1 passed" in capsys.readouterr().out


# Of every kernel: forward and backward where it has one, what is ragged, packed, or large.
COMPILED = {
    "block_table": ("1/1q 65536/256 x16 1x32:8x128 16 turns", "1024/64q 32768/64 x64 1x32:8x128"),
    "branches": ("window 2048 + groups of 8 32k forward",),
    "flash": ("slopes, soft-cap, sinks 8k forward", "1 query, 32k keys backward"),
    "int4_matmul": ("int4g32z 8x4096x4096 forward", "int8g128z 8x4096x11008 forward"),
    "lightning": ("8000x32x128 forward", "8192x32x96 backward"),
    "tree_decode": ("16n 32768 1x32:8x128", "64n 32000 1x32:8x128"),
}


@pytest.mark.parametrize(
    "chip", ["v5e", *(pytest.param(c, marks=pytest.mark.nightly) for c in common.CHIPS if c != "v5e")]
)
def test_the_compiler_of_the_chip_takes_every_kernel(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="the compiler for TPUs (extra 'aot') is not installed")
    for name, value in check.COMPILER_ALONE.items():
        monkeypatch.setenv(name, value)
    assert set(COMPILED) == set(check.KERNELS)
    for kernel, names in COMPILED.items():
        cases = {c.name: c for c in importlib.import_module(f"kernels_pallas.{kernel}.bench").cases(chip)}
        for name in names:
            assert check.compile_for(cases[name], chip).startswith("compiled, "), name


def test_the_compiler_speaks_when_a_tile_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="the compiler for TPUs (extra 'aot') is not installed")
    for name, value in check.COMPILER_ALONE.items():
        monkeypatch.setenv(name, value)
    shapes = tree_bench.shapes(tree_bench.Size(1, 65536, H=1, K=1, d=256))
    whole = functools.partial(tree_decode, how=common.How("tpu", "v4", common.sized(tile_s=65536)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        check.compile_for(common.Case("64k slots at once", whole, shapes), "v4")


def test_the_table_in_the_repository_is_of_these_cases() -> None:
    """Every case of every kernel for every chip, all compiled."""
    table = json.loads((Path(check.__file__).parents[1] / "benchmarks/results/kernels_tpu_aot.json").read_text())
    modules = {name: importlib.import_module(f"kernels_pallas.{name}.bench") for name in check.KERNELS}
    want = {(k, c.name, chip) for chip in common.CHIPS for k, bench in modules.items() for c in bench.cases(chip)}
    assert {(row["kernel"], row["case"], row["chip"]) for row in table["rows"]} == want
    assert all(row["passed"] for row in table["rows"]) and table["cases"] == len(want)


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


def test_one_command_times_every_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU at small sizes; goals are met or missed by what was measured, and by nothing else."""
    file = tmp_path / "times.json"
    assert (
        kernels_bench.main(["--size", "small", "--repeats", "1", "--kernel", "int4_matmul", "--json", str(file)]) == 0
    )
    table = json.loads(file.read_text())
    assert table["kernels"]["int4_matmul"]["rows"] and not table["failures"]
    assert [g["met"] for g in table["goals"]] == [None] and "NOT MEASURED  int4" in capsys.readouterr().out
    goal = kernels_bench.GOALS[2]
    rows = [{"case": goal.case, "seconds": {"gpu": 1.0}}, {"case": goal.peer_case, "seconds": {"cudnn": 4.0}}]
    assert goal.verdict({"flash": {"rows": rows}}) == {"goal": goal.text, "measured": 4.0, "met": False}
    assert goal.verdict({"flash": {"rows": rows[:1]}})["met"] is None


def test_every_goal_is_of_a_case_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the bench on a GPU, without running anything there."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    source = {g.kernel: set() for g in kernels_bench.GOALS}  # type: dict[str, set[str]]
    flash = importlib.import_module("kernels_pallas.flash.bench")
    monkeypatch.setattr(flash, "_draw", lambda rng, shapes: shapes)
    source["flash"] = {name for name, _ in flash._forms(False, "h100")}
    matmul = importlib.import_module("kernels_pallas.int4_matmul.bench")
    source["int4_matmul"] = {f"{matmul._name(size)} x{matmul.CALLS}" for size in matmul.GPU}
    for goal in kernels_bench.GOALS:
        assert {goal.case, goal.peer_case or goal.case} <= source[goal.kernel]
