"""Memory by arithmetic: exact where it is exact, within 15 % of the compiler where it is an estimate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from benchmarks import memory
from experiments import cli
from experiments import compile as compile_command
from experiments.certificates import command as step
from experiments.certificates import kept
from lm.aot import certificate
from lm.aot.estimate import estimate
from lm.config import build, model_config
from lm.errors import UserError
from lm.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
BASES = {one.name: one for one in kept.wanted() if one.base}
MODEL = {"vocab_size": 256, "d_model": 128, "n_layers": 2, "n_heads": 4, "d_ff": 256, "max_positions": 128}


@pytest.mark.parametrize("surgery", ["none", "lora"])
def test_arguments_are_those_of_the_shardings(surgery: str) -> None:
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    cfg = model_config({**MODEL, "ffn": {"name": "moe", "experts": 4, "d_expert": 64}})
    targets = {"targets": ("*/attn/*/kernel",)} if surgery == "lora" else {}
    settings = {"batch": 8, "data": {"seq_len": 128}, "mesh": mesh, "surgery": {"name": surgery, **targets}}
    train = build(TrainConfig, settings, "train")
    _, state, batch, base = certificate.abstract(cfg, train, jax.devices())
    found = estimate(cfg, train, "v5e:2x4")
    assert found["chips"] == 8
    assert found["state"]["frozen"] == certificate.bytes_on_device(base)
    assert found["state"]["parameters"] == certificate.bytes_on_device(state["params"])
    assert found["memory"]["arguments"] == sum(certificate.bytes_on_device(x) for x in (state, batch, base))


@pytest.mark.parametrize("name", BASES)
def test_within_15_percent_of_the_compiler(name: str) -> None:
    one = BASES[name]
    [found] = kept.committed(one.file)
    _, _, arm, _ = step.subject(one.settings(), [], None, "train")
    guess = estimate(*step.trained(arm, None), one.entry["topology"])
    assert found["topology"] == one.entry["topology"] and found["fits"] and guess["fits"]
    assert guess["memory"]["arguments"] == pytest.approx(found["memory"]["arguments"], rel=0.01)
    assert guess["memory"]["peak"] == pytest.approx(found["memory"]["peak"], rel=0.15)


def test_every_base_has_a_certificate() -> None:
    names = {p.stem for p in (ROOT / "configs" / "bases").glob("*.py") if "\nPOD = " in p.read_text(encoding="utf-8")}
    assert names == set(BASES) and len(names) == 8


@pytest.mark.parametrize("name", memory.cases())
def test_within_15_percent_on_layouts_of_small_models(name: str) -> None:
    """fsdp, tensor, sequence, expert and stage axes, parts of a step, with and without remat, other chips."""
    assert set(memory.cases()) == set(memory.CASES)
    one = memory.cases()[name]["memory"]
    found = estimate(*memory.settings(name))["memory"]
    assert found["arguments"] == pytest.approx(one["arguments"], rel=0.01)
    assert found["peak"] == pytest.approx(one["peak"], rel=0.15)


def test_what_lowers_it() -> None:
    cfg, train = model_config(MODEL), build(TrainConfig, {"batch": 64, "data": {"seq_len": 128}}, "train")

    def temporaries(cfg: object = cfg, **changes: object) -> float:
        found = estimate(cfg, dataclasses.replace(train, **changes), "v5e:2x4")  # type: ignore[arg-type]
        return float(found["memory"]["temporaries"])

    assert temporaries(dataclasses.replace(cfg, remat=True)) < temporaries()
    assert temporaries(accumulate=4) < temporaries()
    with pytest.raises(UserError, match=r"--topology: unknown name 'v7'"):
        estimate(cfg, train, "v7:2x2")


def test_the_command_needs_no_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(compile_command.run, ["--base=geb_1_3b", "--estimate"]) == 0
    assert "estimate: fits, " in capsys.readouterr().out
    small = ["--config.train.mesh.fsdp=1", "--config.train.mesh.data=-1", "--config.model.remat=False"]
    assert cli.main(compile_command.run, ["--base=geb_1_3b", "--estimate", "--topology=v5e:2x2", *small]) == 1
    assert "estimate: does not fit" in capsys.readouterr().out
    assert cli.main(compile_command.run, ["--base=geb_1_3b", "--estimate", "--search"]) == 2
