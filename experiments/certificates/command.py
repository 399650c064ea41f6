"""One step of one arm, asked for by command line: which it is, and what it costs on a slice of TPUs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.certificates.text import estimated, text, verdict
from experiments.running.plan import Plan, prepare
from experiments.spec import registry
from experiments.spec.arms import Arm
from lm.aot import advice, certificate, chips, serving
from lm.aot.estimate import estimate
from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.sharding.layout import AXES, Layout
from lm.train.config import TrainConfig

PROG = "python -m experiments.compile"
STEPS = ("train", *serving.STEPS)
TRIES = 8
WEIGHTS = {"bfloat16": "bfloat16", "float32": "float32", "config": None}


def parse(rest: Sequence[str], doc: str | None = None) -> argparse.Namespace:
    """The arguments of `experiments.compile`, whose text is `doc`."""
    parser = cli.Parser(PROG, doc)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="configs/NAME.py[:scale], or the config.json of a run")
    parser.add_argument("--file", type=Path, help="the config file of a config.json, where it is not in the checkout")
    what.add_argument("--base", help="configs/bases/NAME.py")
    what.add_argument("--all", action="store_true", help="every certificate that configs and bases name")
    parser.add_argument("--topology", help="v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, …; a base names its own")
    parser.add_argument("--step", help=f"{' | '.join(STEPS)} (default: train where the config trains, else decode)")
    parser.add_argument("--arm", help="the arm to compile (default: the first that can)")
    parser.add_argument("--batch", type=int, help="texts at once, decode and prefill (default 1)")
    parser.add_argument("--length", type=int, help="tokens of a text, answer included, decode and prefill")
    parser.add_argument("--quantize", help="int8: of the cache")
    parser.add_argument("--weights", help="bfloat16 | float32 | config, decode and prefill (default: bfloat16)")
    parser.add_argument("--mesh", help="AXIS=N,… , -1 for what is left (default: the config's; else tensor=-1)")
    parser.add_argument("--out", type=Path, help="JSON file to write; one that is there stays")
    parser.add_argument("--search", action="store_true", help="try layouts, remat and parts; rank those that fit")
    parser.add_argument("--tries", type=int, help="how many of them are compiled at most (default: 8)")
    parser.add_argument("--estimate", action="store_true", help="memory by arithmetic, without the compiler")
    parser.add_argument("--missing", action="store_true", help="with --all: those absent or of another config")
    parser.add_argument("--only", help="with --all: configs and bases by name")
    args, strange = parser.parse_known_args(rest)
    parser.refuse(strange)
    if args.estimate and args.search:
        raise UserError("--estimate: found --search too; valid: one of them")
    if args.tries is not None and (args.tries < 1 or not args.search):
        raise UserError(f"--tries: found {args.tries}; valid: 1 or more, with --search")
    if args.all:
        cli.refuse_given(args, _ALONE, "with --all", "--only and --missing, with --all")
    else:
        cli.refuse_given(args, _TOGETHER, "without --all", "with --all")
    return args


_ALONE = (
    "topology", "step", "arm", "batch", "length", "quantize", "weights", "mesh", "out", "search", "tries", "estimate",
)  # fmt: skip
_TOGETHER = ("missing", "only")
_GENERATION = ("batch", "length", "quantize", "weights")


def report(
    raw: Mapping[str, Any], overrides: Sequence[tuple[str, Any]], args: argparse.Namespace
) -> tuple[dict[str, Any], bool]:
    """What `args` ask for, printed and as JSON-ready content; and whether anything fits."""
    chips.split(args.topology)
    step, name, arm, said = subject(raw, overrides, args.arm, args.step)
    about = {"config": said, "arm": name}
    content: dict[str, Any]
    if step != "train":
        if args.search or args.estimate:
            raise UserError(f"--step: {step} goes without --search and --estimate; valid: train")
        one = serving.certify(arm.config, serve(args, arm), args.topology, step)
        todo = [] if one["fits"] else advice.serving(one, one["hbm"])
        print("\n".join(text(one, about, todo)))
        return {**about, **one}, bool(one["fits"])
    cli.refuse_given(args, _GENERATION, "for a training step", f"with {' or '.join(serving.STEPS)}")
    cfg, train = trained(arm, args.mesh)
    if args.estimate:
        content = {**about, **estimate(cfg, train, args.topology)}
        print("\n".join(estimated(content, about)))
        return content, bool(content["fits"])
    if args.search:
        found = search(cfg, train, args.topology, args.tries or TRIES)
        return {**about, "topology": args.topology, "tried": found}, any(row.get("fits") for row in found)
    one = certificate.certify(cfg, train, args.topology)
    todo = [] if one["fits"] else advice.advice(cfg, train, args.topology, one["memory"].get("peak"))
    print("\n".join(text(one, about, todo)))
    return {**about, **one}, bool(one["fits"])


def base(name: str) -> tuple[dict[str, Any], str]:
    """Settings of an experiment that trains an architecture of ``configs/bases``, and the slice it is certified for."""
    module = registry.base(name, "--base")
    settings = {
        "name": name,
        "scale": "base",
        "checkpoint": "random",
        "baseline": "base",
        "seeds": (0,),
        "paper": {"title": name, "arxiv": "", "claim": ""},
        "model": module.model(),
        "train": module.train(),
        "measures": {"training": {"name": "train_log"}},
        "arms": {"base": {}},
    }
    return settings, module.POD


def subject(
    settings: Mapping[str, Any], overrides: Sequence[tuple[str, Any]], arm: str | None, step: str | None
) -> tuple[str, str, Arm, str]:
    """The step, the arm's name and the arm, and what to call the config. Weights and texts are not needed."""
    return picked(prepare(settings, overrides, None, absent_is_fine=True), arm, step)


def picked(plan: Plan, arm: str | None, step: str | None) -> tuple[str, str, Arm, str]:
    """`subject` of a plan."""
    said = f"{plan.exp.name}:{plan.exp.scale}"
    training = {name: a for name, a in plan.arms.items() if a.train is not None}
    if step is not None and step not in STEPS:
        raise unknown("--step", step, STEPS)
    if step == "train" and not training:
        raise UserError(
            f"--step: {said}: no arm trains anything; valid: decode, prefill, or a config with config.train"
        )
    step = step or ("train" if training else "decode")
    arms = training if step == "train" else plan.arms
    name = next(iter(arms)) if arm is None else arm
    if name not in arms:
        raise unknown("--arm", name, arms)
    found = arms[name]
    if (found.trained if step == "train" else found.model) is None:
        raise UserError(
            f"--config: {said}: the model follows from a checkpoint that is not here ({plan.absent}); valid: a config "
            "that names its config.architecture"
        )
    return step, name, found, said


def trained(arm: Arm, mesh: str | None) -> tuple[ModelConfig, TrainConfig]:
    """What a training arm trains, and how."""
    assert arm.trained is not None and arm.train is not None
    if mesh is None:
        return arm.trained, arm.train
    sizes = dict.fromkeys(AXES, 1) | cli.axes(mesh, AXES)
    return arm.trained, dataclasses.replace(arm.train, mesh=arm.train.mesh.resized(sizes))


def serve(args: argparse.Namespace, arm: Arm) -> serving.Serve:
    """How generation is asked for; the length is by default the longest text that the arm's measures read."""
    weights = args.weights or "bfloat16"
    if weights not in WEIGHTS:
        raise unknown("--weights", weights, WEIGHTS)
    if args.quantize not in (None, "int8"):
        raise unknown("--quantize", args.quantize, ("int8",))
    longest = [arm.config.max_positions, *(measure.longest for measure in arm.measures.values())]
    mesh = {"data": 1, "tensor": -1} if args.mesh is None else {"data": 1, **cli.axes(args.mesh, AXES)}
    length = args.length if args.length is not None else max(longest)
    batch = 1 if args.batch is None else args.batch
    return serving.Serve(batch, length, args.quantize, WEIGHTS[weights], Layout().resized(mesh))


def search(cfg: ModelConfig, train: TrainConfig, topology: str, tries: int) -> list[dict[str, Any]]:
    """Certificates of the most promising variants, those that fit first, by the seconds a step takes at least; prints
    as it goes."""
    chips.devices(topology)
    good, bad = advice.promising(train, cfg, topology)
    print(f"{len(good) + len(bad)} variants; {len(bad)} hopeless by the estimate, {min(tries, len(good))} compiled")
    found = []
    for model, settings, said in good[:tries]:
        try:
            one = {"variant": said, **certificate.certify(model, settings, topology)}
        except UserError as e:
            one = {"variant": said, "fits": False, "refused": str(e)}
        found.append(one)
        print(f"{said}: {verdict(one)}", flush=True)
    found.sort(key=lambda c: (not c["fits"], max(c["seconds"].values()) if "seconds" in c else 0.0))
    print("\nbest first:")
    for one in [c for c in found if c["fits"]]:
        print(f"  {one['variant']}: {verdict(one)}")
    return [*found, *({"variant": said, "fits": False, "skipped": why} for said, why in bad)]
