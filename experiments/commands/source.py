"""The checkpoint that a command reads: its name, an adapter on it, in which type, over which devices."""

from __future__ import annotations

import argparse

from experiments import cli
from lm import interop
from lm.decoding.spread import SERVING, Spread
from lm.errors import unknown

CHECKPOINTS = "a name, a Hugging Face folder, hf:OWNER/NAME[@REVISION], a GGUF file, a run's folder"
DTYPES = ("float32", "float16", "bfloat16")


def add(parser: cli.Parser) -> None:
    """``--checkpoint``, ``--adapter`` and ``--mesh``."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINTS)
    parser.add_argument("--adapter", help="a folder of PEFT's with LoRA for it, or hf:OWNER/NAME[@REVISION]")
    parser.add_argument("--mesh", help=f"AXIS=N,… over devices, -1 for what is left: {', '.join(SERVING)}")


def add_dtype(parser: cli.Parser) -> None:
    """``--dtype`` of parameters and arithmetic."""
    parser.add_argument("--dtype", help=f"of weights and arithmetic (default: float32): {', '.join(DTYPES)}, or stored")


def name(args: argparse.Namespace) -> str:
    """The checkpoint with its adapter."""
    return f"{args.checkpoint}{interop.PLUS}{args.adapter}" if args.adapter else str(args.checkpoint)


def dtype(args: argparse.Namespace) -> str | None:
    """None where nothing is said."""
    if args.dtype is not None and args.dtype not in (*DTYPES, "stored"):
        raise unknown("--dtype", args.dtype, (*DTYPES, "stored"))
    return None if args.dtype is None else str(args.dtype)


def spread(args: argparse.Namespace) -> Spread | None:
    """The devices of ``--mesh``; None without it. Raises `UserError` for axes that there are not, and numbers that do
    not fit."""
    if args.mesh is None:
        return None
    return Spread.of(cli.axes(args.mesh, SERVING))
