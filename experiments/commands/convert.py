"""Checkpoints from one form to another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.commands import source
from lm import interop
from lm.config import ModelConfig, build
from lm.errors import UserError, unknown
from lm.interop import card
from lm.interop.families import FAMILIES
from lm.interop.readers.run_folder import Run
from lm.interop.writers import peft_folder, run_folder, to_huggingface
from lm.interop.writers.shards import LARGEST, largest
from lm.surgery.lora import LoRA

PROG = "python -m experiments.convert"
FORMS = ("huggingface", "run", "peft")


def run(argv: Sequence[str], doc: str | None = None) -> int:
    parser = cli.Parser(PROG, doc)
    source.add(parser)
    parser.add_argument("--to", required=True, type=Path, help="the folder to write; must not exist")
    parser.add_argument("--family", help=f"what to write it as (default: what fits): {', '.join(FAMILIES)}")
    parser.add_argument("--as", dest="form", default="huggingface", help="huggingface, run or peft (adapters alone)")
    parser.add_argument("--dtype", help=f"of the weights (default: as they are stored): {', '.join(source.DTYPES)}")
    parser.add_argument("--max-shard-size", help=f"of one file of weights (default: {LARGEST})")
    args, rest = parser.parse_known_args(list(argv))
    parser.refuse(rest)
    _check(args)
    if args.form == "peft":
        return _adapters(args)
    name, spread = source.name(args), source.spread(args)
    reader = interop.reader(name)
    if args.form == "huggingface":  # said before gigabytes are read
        to_huggingface.family_of(build(ModelConfig, reader.model(), "model"), args.family)
    dtype = None if args.form == "run" else args.dtype or reader.dtype()
    found = interop.load(name, dtype=dtype, where=None if spread is None else spread.where)
    if args.form == "run":
        run_folder.write(args.to, found)
        print(f"{name}: written to {args.to}, a folder for --checkpoint")
        return 0
    kind = to_huggingface.write(
        args.to,
        found.config,
        found.params,
        found.text,
        family=args.family,
        dtype=dtype,
        max_shard_size=args.max_shard_size or LARGEST,
        card=lambda family: _card(args, found, f"written as {family} in {dtype} by `experiments.convert`"),
    )
    print(f"{name}: written to {args.to} as {kind}; transformers.AutoModelForCausalLM.from_pretrained loads it")
    return 0


_FOR = {"dtype": ("huggingface",), "max_shard_size": ("huggingface",), "mesh": ("huggingface", "run")}


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for arguments that do not go together."""
    if args.form not in FORMS:
        raise unknown("--as", args.form, FORMS)
    if args.form == "run" and args.family is not None:
        raise UserError("--family: a run's folder has none; valid: with --as=huggingface")
    if args.form == "peft" and args.adapter is not None:
        raise UserError("--adapter: is one of PEFT's already; valid: with --as=huggingface or --as=run, which merge it")
    if args.dtype is not None and args.dtype not in source.DTYPES:
        raise unknown("--dtype", args.dtype, source.DTYPES)
    for flag, forms in _FOR.items():
        if args.form not in forms:
            valid = " or ".join(f"--as={form}" for form in forms)
            cli.refuse_given(args, [flag], f"with --as={args.form}", f"with {valid}")
    largest(args.max_shard_size or LARGEST)
    if args.to.exists():
        raise UserError(f"--to: {args.to} exists already; valid: a new folder")


def _card(args: argparse.Namespace, found: interop.Checkpoint, last: str) -> str:
    """README.md of what is written."""
    base = str(args.checkpoint)
    merged = [f"the adapter `{args.adapter}` merged into its weights"] if args.adapter else []
    hub = base.removeprefix(interop.HUB).partition("@")[0] if base.startswith(interop.HUB) else None
    return card.written(
        args.to.name,
        found.config,
        base=base,
        identity=found.identity,
        licence=interop.licence(base),
        done=[*merged, last],
        hub=None if hub is None else "/".join(hub.split("/")[:2]),
    )


def _adapters(args: argparse.Namespace) -> int:
    reader = interop.reader(args.checkpoint)
    lora = reader.surgery() if isinstance(reader, Run) else None
    if not isinstance(reader, Run) or not isinstance(lora, LoRA):
        raise UserError(
            f"--as=peft: {args.checkpoint} has no adapters; valid: the folder of a training with train.surgery=lora"
        )
    cfg = interop.config(args.checkpoint)
    kind, _ = to_huggingface.family_of(cfg, args.family)
    base = str(reader.about.get("start_source", ""))
    if interop.PLUS in base:
        raise UserError(
            f"--as=peft: {args.checkpoint} was trained from {base!r}, which has an adapter itself; valid: "
            "--as=huggingface, which merges both"
        )
    peft_folder.write(args.to, lora, cfg, reader.trained(cfg), kind, base)
    print(f"{args.checkpoint}: adapters written to {args.to} for {base or 'its start'} as {kind}; peft loads them")
    return 0
