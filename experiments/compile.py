"""Compiles a config's training step for a slice of TPUs that need not be here, and says what it costs there.

``python -m experiments.compile --config=configs/X.py:paper --topology=v5e:8x8 [--arm=NAME] [--out=FILE] [--search]``
``python -m experiments.compile --base=llama3_70b [--topology=v5p:8x8x16] [--out=FILE] [--search]``

The second form takes an architecture of ``configs/bases`` with the slice and the batch that its file names.
Prints, and with ``--out`` writes as JSON: parameters, bytes per chip against the chip's memory, FLOPs, collectives, the
time that each resource needs at least, and the MFU that follows. Any key can be set as for experiments.run, the layout
with it: ``--config.train.mesh.fsdp=-1 --config.train.mesh.data=1 --config.train.batch=64``. ``--search`` tries layouts
of data, fsdp and tensor, with and without remat, in one to four parts, and ranks those that fit. The exit code is 1 for
a step that does not fit. Needs the extra ``aot``, except for ``--estimate``: memory by arithmetic, in seconds.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, registry
from experiments.arms import Draft
from experiments.plan import prepare
from experiments.run import split_overrides
from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.parallel import certificate, chips
from lm.parallel.estimate import estimate
from lm.train.config import TrainConfig

PROG = "python -m experiments.compile"
GIB = 2**30


def run(argv: Sequence[str]) -> int:
    """Raises `UserError` for any mistake in the input."""
    rest, overrides = split_overrides(argv)
    parser = cli.Parser(PROG, __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="configs/NAME.py[:scale], or the config.json of a run")
    what.add_argument("--base", help="configs/bases/NAME.py")
    parser.add_argument("--topology", help="v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, …; a base names its own")
    parser.add_argument("--arm", help="the arm to compile (default: the first that trains)")
    parser.add_argument("--out", type=Path, help="JSON file to write; one that is there stays")
    parser.add_argument("--search", action="store_true", help="try layouts, remat and parts; rank those that fit")
    parser.add_argument("--estimate", action="store_true", help="memory by arithmetic, without the compiler")
    args, strange = parser.parse_known_args(rest)
    parser.refuse(strange)
    if args.out is not None and args.out.exists():
        raise UserError(f"--out: {args.out} is there already; valid: a new file")
    if args.base is not None:
        raw, pod = base(args.base)
        args.topology = args.topology or pod
    elif args.topology is None:
        raise UserError("--topology: not given; valid: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, …")
    else:
        raw = registry.find(args.config)[1]
    chips.split(args.topology)
    content: dict[str, Any]
    cfg, train, about = subject(raw, overrides, args.arm)
    if args.estimate and args.search:
        raise UserError("--estimate: found --search too; valid: one of them")
    if args.estimate:
        content = {**about, **estimate(cfg, train, args.topology)}
        good = content["fits"]
        print("\n".join(estimated(content, about)))
    elif args.search:
        found = search(cfg, train, args.topology)
        content = {**about, "topology": args.topology, "tried": found}
        good = any(row.get("fits") for row in found)
    else:
        one = certificate.certify(cfg, train, args.topology)
        print("\n".join(text(one, about)))
        content, good = {**about, **one}, one["fits"]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


def base(name: str) -> tuple[dict[str, Any], str]:
    """Settings of an experiment that trains an architecture of ``configs/bases``, and the slice it is certified for."""
    names = [p.stem for p in registry.files(registry.CONFIGS / "bases")]
    valid = [n for n in names if hasattr(importlib.import_module(f"configs.bases.{n}"), "POD")]
    if name not in valid:
        raise unknown("--base", name, valid)
    module = importlib.import_module(f"configs.bases.{name}")
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
    settings: Mapping[str, Any], overrides: Sequence[tuple[str, Any]], arm: str | None
) -> tuple[ModelConfig, TrainConfig, dict[str, Any]]:
    """The model and training of one arm, and what to call it. Weights and texts are not needed."""
    plan = prepare(settings, overrides, None, absent_is_fine=True)
    said = f"{plan.exp.name}:{plan.exp.scale}"
    training = {name: a for name, a in plan.arms.items() if a.train is not None}
    if not training:
        raise UserError(f"--config: {said}: no arm trains anything; valid: a config with config.train")
    name = next(iter(training)) if arm is None else arm
    if name not in training:
        raise unknown("--arm", name, training)
    found = training[name]
    cfg, train = found.trained, found.train
    assert train is not None
    if cfg is None or isinstance(cfg, Draft):
        raise UserError(f"--config: {said}: the model follows from a checkpoint that is not here ({plan.absent})")
    return cfg, train, {"config": said, "arm": name}


def search(cfg: ModelConfig, train: TrainConfig, topology: str) -> list[dict[str, Any]]:
    """Certificates of all variants, those that fit first, by the seconds a step takes at least; prints as it goes."""
    n = len(chips.devices(topology))
    found = []
    for model, settings, said in certificate.variants(train, cfg, n):
        try:
            one = {"variant": said, **certificate.certify(model, settings, topology)}
        except UserError as e:
            one = {"variant": said, "fits": False, "refused": str(e)}
        found.append(one)
        print(f"{said}: {verdict(one)}", flush=True)
    found.sort(key=lambda c: (not c["fits"], max(c["seconds"].values()) if "seconds" in c else 0.0))
    print("\nbest first:")
    for one in [c for c in found if c["fits"]][:10]:
        print(f"  {one['variant']}: {verdict(one)}")
    return found


def estimated(one: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """An estimate for people."""
    mesh = " x ".join(f"{name} {n}" for name, n in one["mesh"].items() if n > 1) or "one chip"
    m, s = one["memory"], one["state"]
    return [
        f"{about['config']}, arm {about['arm']}, on {one['topology']} ({one['chips']} chips): {mesh}",
        f"a chip holds: parameters {s['parameters'] / GIB:.3f} GiB, optimizer {s['optimizer'] / GIB:.3f} GiB, frozen "
        f"{s['frozen'] / GIB:.3f} GiB",
        "temporaries: " + ", ".join(f"{name} {n / GIB:.3f} GiB" for name, n in one["temporaries"].items()),
        f"estimate: {'fits' if one['fits'] else 'does not fit'}, {m['peak'] / GIB:.2f} of {one['hbm'] / GIB:.1f} GiB",
    ]


def verdict(one: dict[str, Any]) -> str:
    """One line."""
    if "refused" in one:
        return str(one["refused"])
    if "memory" not in one:
        return f"does not fit: {one['compiler']}"
    fit = "fits" if one["fits"] else "does not fit"
    return (
        f"{fit}, {one['memory']['peak'] / GIB:.2f} of {one['hbm'] / GIB:.1f} GiB; at least "
        f"{max(one['seconds'].values()):.3f} s a step, MFU at most {one['mfu_ceiling']:.0%}"
    )


def text(one: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """The certificate for people."""
    mesh = " x ".join(f"{name} {n}" for name, n in one["mesh"].items() if n > 1) or "one chip"
    tokens = one["train"]["batch"] * one["train"]["seq_len"]
    out = [
        f"{about['config']}, arm {about['arm']}, on {one['topology']} ({one['chips']} chips): {mesh}",
        f"{one['parameters']:,} parameters; {one['train']['batch']} rows of {one['train']['seq_len']} tokens "
        f"({tokens:,}) a step in {one['train']['accumulate']} parts, remat {one['remat']}",
        f"a chip holds: parameters {one['state']['parameters'] / GIB:.3f} GiB, optimizer "
        f"{one['state']['optimizer'] / GIB:.3f} GiB, frozen {one['state']['frozen'] / GIB:.3f} GiB",
    ]
    if "memory" in one:
        m, s = one["memory"], one["seconds"]
        out += [
            f"compiled: arguments {m['arguments'] / GIB:.3f} GiB, temporaries {m['temporaries'] / GIB:.3f} GiB",
            *(
                f"{kind}: {row['sites']} in the program, {row['runs']} runs, {row['bytes'] / 1e9:.3f} GB leave a chip"
                for kind, row in one["collectives"].items()
            ),
            f"FLOPs a step: {one['flops']['analytic']:.4g} by formula",
            "seconds a step, at least: " + ", ".join(f"{name} {value:.4f}" for name, value in s.items()),
        ]
    out.append(verdict(one))
    if not one["fits"]:
        out.append("a chip's largest tensors:")
        out += [f"  {r['bytes'] / GIB:8.3f} GiB  {r['name']} {r['shape']} {r['spec']}" for r in one["largest"]]
        out.append(
            "to change: more train.mesh.fsdp or tensor, model.remat=True, a larger train.accumulate, a larger slice"
        )
    return out


if __name__ == "__main__":
    cli.enter(lambda: cli.main(run))
