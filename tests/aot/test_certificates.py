"""What a program's text says of its collectives, what a chip holds, and the command that certifies a config."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments import cli
from experiments import compile as command
from experiments.certificates import command as step
from lm import compat
from lm.aot import advice, certificate, chips
from lm.aot.estimate import estimate
from lm.aot.hlo import collectives
from lm.config import build, model_config
from lm.errors import UserError
from lm.model import params
from lm.train.config import TrainConfig

MODEL = {"vocab_size": 256, "d_model": 128, "n_layers": 2, "n_heads": 4, "d_ff": 256, "max_positions": 128}


def compiled(fn: Any, *args: Any, mesh: Any, specs: Any, out: Any) -> str:
    run = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))
    return run.lower(*args).compile().as_text()


def test_collectives_are_counted_with_their_loops() -> None:
    """Five sums in a loop over groups of four, one gather of all eight, one permute: kinds, runs, groups, bytes."""
    mesh = compat.auto_mesh((2, 4), ("data", "tensor"))

    def program(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def body(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.psum(jnp.sin(c), "tensor"), None

        total = jax.lax.scan(body, x, None, length=5)[0]
        whole = jax.lax.all_gather(y, ("data", "tensor"), tiled=True)
        return total, whole, jax.lax.ppermute(y, "data", [(0, 1), (1, 0)])

    x, y = jnp.ones((32, 64)), jnp.ones((16, 64))
    text = compiled(program, x, y, mesh=mesh, specs=(P(), P(("data", "tensor"))), out=(P(), P(), P(("data", "tensor"))))
    found = {c.kind: c for c in collectives(text, 8)}
    assert set(found) == {"all-reduce", "all-gather", "collective-permute"}
    reduce, gather, permute = found["all-reduce"], found["all-gather"], found["collective-permute"]
    assert (reduce.times, reduce.group, reduce.sent) == (5, 4, 2 * 32 * 64 * 4 * 3 / 4)
    assert (gather.times, gather.group, gather.sent) == (1, 8, 16 * 64 * 4 * 7 / 8)
    assert (permute.times, permute.sent) == (1, 2 * 64 * 4)


TPU_TEXT = """
%step (p: bf16[4,8]) -> bf16[4,64] {
  %all-gather.7 = bf16[4,64]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['a'=8] {'a'}, dimensions={1}
}
%cond (p: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  ROOT %compare.1 = pred[] compare(%p, %constant.1), direction=LT
}
%inner_body (p: (s32[])) -> (s32[]) {
  %fusion.2 = bf16[4,64] fusion(%p), kind=kCustom, calls=%step
}
%body (p: (s32[])) -> (s32[]) {
  %all-gather.8 = bf16[4,64]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['a'=8] {'a'}, dimensions={1}
  %while.2 = (s32[]) while(%p), condition=%cond, body=%inner_body
  %all-reduce.1 = (f32[16]{0}, f32[8]{0}) all-reduce(%a, %b), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}
ENTRY %main (p: s32[]) -> s32[] {
  %while.1 = (s32[]) while(%p), condition=%cond, body=%body
  %reduce-scatter.4 = f32[2,4]{1,0} reduce-scatter(%x), channel_id=5, replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""


def test_a_split_collective_counts_once_and_loops_by_their_condition() -> None:
    found = {c.kind: c for c in collectives(TPU_TEXT, 8)}
    assert (found["all-gather"].times, found["all-gather"].sent) == (32, 4 * 64 * 2 * 7 / 8)
    assert (found["all-reduce"].times, found["all-reduce"].group) == (32, 4)
    assert found["all-reduce"].sent == 2 * 24 * 4 * 3 / 4
    assert (found["reduce-scatter"].times, found["reduce-scatter"].sent) == (1, 2 * 8 * 4 / 2)


BETWEEN_SLICES = """
%all-reduce-scatter (input: f32[8,4]) -> f32[2,4] {
  %all-reduce.3 = f32[8,4]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %fusion = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
  %send = (f32[2,4]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%fusion, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
}
""".replace("\\\n", "")


def test_what_crosses_slices_is_told_apart_and_a_fused_scatter_from_a_sum() -> None:
    found = {c.kind: c for c in collectives(BETWEEN_SLICES, 8)}
    assert set(found) == {"reduce-scatter", "dcn-all-reduce"}
    assert (found["reduce-scatter"].group, found["reduce-scatter"].sent) == (4, 8 * 4 * 4 * 3 / 4)
    assert (found["dcn-all-reduce"].group, found["dcn-all-reduce"].sent) == (2, 2 * 4 * 4)
    assert chips.slices("2xv5e:16x16") == (2, "v5e:16x16") and chips.split("2xv5e:16x16") == ("v5e", "16x16")
    assert chips.count("2xv5e:16x16") == 512 and chips.count("v5p:4x20x28") == 2240


def test_what_a_chip_holds() -> None:
    """Against the arithmetic: parameters and two moments over fsdp x tensor, no norm over tensor."""
    cfg = model_config(MODEL)
    train = build(
        TrainConfig, {"batch": 8, "data": {"seq_len": 128}, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, "train"
    )
    _, state, batch, base = certificate.abstract(cfg, train, jax.devices())
    matrices = 256 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 256)
    norms = 5 * 128
    assert certificate.bytes_on_device(state["params"]) == 4 * (matrices / 4 + norms / 2)
    assert certificate.bytes_on_device(batch) == 3 * 8 * 128 * 4 / 4
    assert base is None and certificate.bytes_on_device(None) == 0
    rows = certificate.largest(state)
    assert [r["bytes"] for r in rows] == sorted((r["bytes"] for r in rows), reverse=True)
    assert rows[0]["name"].endswith("ffn/down/kernel") and rows[0]["bytes"] == 2 * 128 * 256 * 4 / 4


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v7:4x4", r"--topology: unknown name 'v7' .did you mean 'v4'.*; valid: v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", r"--topology: v5e:4x4x4: v5e slices have 2 sides; valid: v5e:4x4, say"),
        ("v5p:4x4", r"v5p slices have 3 sides; valid: v5p:2x2x1, say"),
        ("v5e", r"v5e slices have 2 sides"),
    ],
)
def test_slices_that_there_are_not(topology: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chips.split(topology)


def test_variants_divide() -> None:
    """All axes that apply, and no layout whose rows, tensors or tokens do not divide."""
    train = build(TrainConfig, {"batch": 32, "data": {"seq_len": 128}}, "train")
    dense = advice.variants(train, model_config(MODEL), 16)
    assert len(dense) == len({said for _, _, said in dense}) > 10
    assert {v.mesh.expert for _, v, _ in dense} == {1} == {v.mesh.sequence for _, v, _ in dense}
    assert {v.mesh.tensor for _, v, _ in dense} == {1, 2, 4}  # there are 4 heads
    moe = model_config({**MODEL, "ffn": {"name": "moe", "experts": 4, "router": {"name": "topk", "k": 2}}})
    few = dataclasses.replace(train, batch=8)
    long = advice.variants(few, moe, 16)
    assert {v.mesh.expert for _, v, _ in long} == {1, 2, 4} and {v.mesh.sequence for _, v, _ in long} >= {2, 4}
    for found, batch in ((dense, 32), (long, 8)):
        for _, settings, _ in found:
            sizes = settings.mesh.sizes(16)
            assert batch % (settings.accumulate * settings.mesh.parts("batch", sizes)) == 0
    assert {(cfg.remat, v.accumulate) for cfg, v, _ in dense} >= {(True, 1), (False, 2)}


def test_promising_before_hopeless() -> None:
    """Without remat a long step holds too much: those variants are not compiled; of others the quickest is first."""
    cfg = model_config({**MODEL, "d_model": 1024, "d_ff": 4096, "n_layers": 24, "dtype": "bfloat16"})
    train = build(TrainConfig, {"batch": 64, "data": {"seq_len": 2048}}, "train")
    good, bad = advice.promising(train, cfg, "v5e:2x2")
    assert good and bad and all("by the estimate" in why for _, why in bad)
    times = [advice.quick(model, settings, "v5e:2x2") for model, settings, _ in good]
    assert times == sorted(times) and times[0] < times[-1]


def test_what_to_change() -> None:
    """A step far too large for four chips fits by changes that the estimate then says fit; one line for each kind."""
    cfg = model_config({**MODEL, "d_model": 1024, "d_ff": 4096, "n_layers": 24, "dtype": "bfloat16"})
    train = build(TrainConfig, {"batch": 512, "data": {"seq_len": 2048}}, "train")
    said = advice.advice(cfg, train, "v5e:2x2", None)
    assert any(line.startswith("model.remat=True") for line in said) or any("accumulate" in line for line in said)
    parts = next(line for line in said if line.startswith("train.accumulate="))
    n = int(parts.split("=")[1].split(":")[0])
    hbm = chips.CHIPS["v5e"].hbm
    assert estimate(cfg, dataclasses.replace(train, accumulate=n), "v5e:2x2")["memory"]["peak"] <= hbm
    smaller = [k for k in range(2, n) if 128 % k == 0]
    assert all(
        estimate(cfg, dataclasses.replace(train, accumulate=k), "v5e:2x2")["memory"]["peak"] > hbm for k in smaller
    )
    # What the compiler asked for beyond the estimate is asked of the others, too.
    now = estimate(cfg, train, "v5e:2x2")["memory"]["peak"]
    assert advice.advice(cfg, train, "v5e:2x2", 1000 * now) == []
    one = {"state": {"parameters": 8e9, "cache": 16e9}, "serve": {"batch": 4, "quantize": None}, "mesh": {"tensor": 4}}
    rows = advice.serving({**one, "topology": "v5e:2x2", "chips": 4}, 16e9)
    assert [r.split(":")[0] for r in rows] == ["--batch=2", "--topology=v5e"] and "v5e:2x4 --mesh=tensor=8" in rows[1]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2_7b", 6_738_415_616),
        ("llama3_70b", 70_553_706_496),
        ("mixtral_8x7b", 46_702_792_704),
        ("openmoe_34b", 35_399_076_864),
        ("salamandra_40b", 40_433_885_184),
        ("geb_1_3b", 1_348_044_800),
        ("mt_nlg_530b", 529_600_819_200),
        ("mt_nlg_530b_pipeline", 529_600_819_200),
    ],
)
def test_a_base_has_its_parameters_and_lies_on_its_slice(name: str, parameters: int) -> None:
    settings, pod = step.base(name)
    kind, _, arm, said = step.subject(settings, [], None, None)
    cfg, train = step.trained(arm, None)
    assert params.count(params.abstract(cfg)) == parameters and (kind, said) == ("train", f"{name}:base")
    chip, shape = chips.split(pod)
    n = math.prod(int(side) for side in shape.split("x"))
    sizes = train.mesh.sizes(n)
    assert (train.batch // train.accumulate) % train.mesh.parts("batch", sizes) == 0
    shapes = {k: (v.shape, params.logical_of(k)) for k, v in params.names(params.abstract(cfg)).items()}
    train.mesh.check(shapes, sizes)
    assert 12 * parameters / n < chips.CHIPS[chip].hbm  # float32 parameters and AdamW's moments


def test_mistakes_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.json").write_text("{}")
    for argv, said in (
        (
            ["--config=configs/pretrain.py:smoke", "--topology=v5e:2x2", f"--out={tmp_path}/there.json"],
            "is there already",
        ),
        (["--config=configs/pretrain.py:smoke", "--topology=v5e:2x2", "--arm=bse"], "did you mean 'base'?"),
        (["--config=configs/longheads.py:smoke", "--topology=v5e:2x2", "--step=train"], "no arm trains anything"),
        (["--config=configs/longheads.py:smoke", "--topology=v5e:2x2", "--step=decod"], "did you mean 'decode'?"),
        (["--config=configs/longheads.py:smoke", "--topology=v5e:2x2", "--search"], "decode goes without --search"),
        (["--config=configs/longheads.py:smoke", "--topology=v5e:2x2", "--mesh=tensr=2"], "did you mean 'tensor'?"),
        (["--config=configs/longheads.py:smoke", "--topology=v5e:2x2", "--mesh=tensor=x"], "--mesh: tensor: found 'x'"),
        (["--config=configs/longheads.py:smoke", "--topology=v5e:2x2", "--weights=int4"], "--weights: unknown name"),
        (["--config=configs/longheads.py:smoke", "--topology=v5e:2x2", "--batch=0"], "--batch: must be at least 1"),
        (["--all", "--only=pretrian"], "did you mean 'pretrain'?"),
        (["--config=configs/pretrain.py:smoke", "--topologi=v5e:2x2"], "--topology"),
        (
            ["--config=configs/lora.py:paper", "--topology=v5e:2x2", "--config.architecture=''"],
            "the model follows from a checkpoint that is not here",
        ),
        (
            ["--config=configs/lora.py:paper", "--topology=v5e:2x2", "--config.architecture=llama_7b"],
            "did you mean 'llama2_7b'?",
        ),
        (["--config=configs/pretrain.py:smoke"], "--topology: not given"),
        (["--base=llama_70b"], "did you mean 'llama3_70b'?"),
    ):
        assert cli.main(command.run, argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert (tmp_path / "there.json").read_text() == "{}"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_a_certificate_by_the_tpu_compiler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "certificate.json"
    mesh = ["--config.train.mesh.data=1", "--config.train.mesh.fsdp=-1"]
    argv = ["--config=configs/pretrain.py:smoke", "--topology=v5e:2x2", f"--out={out}", *mesh]
    assert cli.main(command.run, argv) == 0
    said, one = capsys.readouterr().out, json.loads(out.read_text())
    assert one["fits"] and one["chips"] == 4 and "MFU at most" in said
    assert one["memory"]["arguments"] >= one["state"]["parameters"] + one["state"]["optimizer"]
    assert {"all-gather", "all-reduce"} & set(one["collectives"])
    assert 0 < one["mfu_ceiling"] <= 1 and one["bound"] in one["seconds"] and one["largest_temporaries"]
    assert 0.9 < one["flops"]["ratio"] < 1.6 and one["flops"]["kernels"] == 0 and one["step"] == "train"
