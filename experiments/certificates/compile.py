"""What `experiments.compile` does with its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.certificates import command as step
from experiments.certificates import kept as certificates
from experiments.running.cache import claim_json
from experiments.spec import registry
from experiments.spec.settings import split_overrides
from lm.errors import UserError


def run(argv: Sequence[str], doc: str | None = None) -> int:
    """Raises `UserError` for any mistake in the input."""
    rest, overrides = split_overrides(argv)
    args = step.parse(rest, doc)
    if args.all:
        if overrides:
            raise UserError(f"--config.{overrides[0][0]}: has no meaning with --all; valid: with --config or --base")
        return certificates.make(args.only, args.missing)
    if args.out is not None and args.out.exists():
        raise UserError(f"--out: {args.out} is there already; valid: a new file")
    if args.base is not None:
        raw, pod = step.base(args.base)
        args.topology = args.topology or pod
    elif args.topology is None:
        raise UserError("--topology: not given; valid: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, …")
    else:
        raw = registry.find(args.config, args.file)[1]
    content, good = step.report(raw, overrides, args)
    if args.out is not None and not claim_json(args.out, content):
        raise UserError(f"--out: {args.out} was written by somebody else meanwhile; valid: a new file")
    return 0 if good else 1
