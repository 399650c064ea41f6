"""Checkpoints from one form to another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from lm import interop
from lm.errors import UserError, unknown
from lm.interop.families import FAMILIES
from lm.interop.readers.run_folder import Run
from lm.interop.writers import peft_folder, run_folder, to_huggingface
from lm.surgery.lora import LoRA

PROG = "python -m experiments.convert"
DTYPES = ("float32", "float16", "bfloat16")
FORMS = ("huggingface", "run", "peft")


def run(argv: Sequence[str], doc: str | None = None) -> int:
    parser = cli.Parser(PROG, doc)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's folder, a Hugging Face folder, a GGUF file or a name"
    )
    parser.add_argument("--to", required=True, type=Path, help="the folder to write; must not exist")
    parser.add_argument("--family", help=f"what to write it as (default: what fits): {', '.join(FAMILIES)}")
    parser.add_argument("--as", dest="form", default="huggingface", help="huggingface, run or peft (adapters alone)")
    parser.add_argument("--dtype", help=f"of the weights (default: as they are stored): {', '.join(DTYPES)}")
    args, rest = parser.parse_known_args(list(argv))
    parser.refuse(rest)
    if args.form not in FORMS:
        raise unknown("--as", args.form, FORMS)
    if args.form == "run" and args.family is not None:
        raise UserError("--family: a run's folder has none; valid: with --as=huggingface")
    if args.dtype is not None and args.dtype not in DTYPES:
        raise unknown("--dtype", args.dtype, DTYPES)
    if args.to.exists():
        raise UserError(f"--to: {args.to} exists already; valid: a new folder")
    if args.form == "peft":
        return _adapters(args)
    if args.form == "huggingface":  # said before gigabytes are read
        to_huggingface.family_of(interop.config(args.checkpoint), args.family)
    dtype = args.dtype or interop.reader(args.checkpoint).dtype()
    found = interop.load(args.checkpoint)
    if args.form == "run":
        run_folder.write(args.to, found)
        print(f"{args.checkpoint}: written to {args.to}, a folder for --checkpoint")
        return 0
    kind = to_huggingface.write(args.to, found.config, found.params, found.text, family=args.family, dtype=dtype)
    print(
        f"{args.checkpoint}: written to {args.to} as {kind}; transformers.AutoModelForCausalLM.from_pretrained loads it"
    )
    return 0


def _adapters(args: argparse.Namespace) -> int:
    source = interop.reader(args.checkpoint)
    lora = source.surgery() if isinstance(source, Run) else None
    if not isinstance(source, Run) or not isinstance(lora, LoRA):
        raise UserError(
            f"--as=peft: {args.checkpoint} has no adapters; valid: the folder of a training with train.surgery=lora"
        )
    cfg = interop.config(args.checkpoint)
    kind, _ = to_huggingface.family_of(cfg, args.family)
    base = str(source.about.get("start_source", ""))
    peft_folder.write(args.to, lora, source.trained(cfg), kind, base)
    print(f"{args.checkpoint}: adapters written to {args.to} for {base or 'its start'} as {kind}; peft loads them")
    return 0
