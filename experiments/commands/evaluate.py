"""Tasks of the lm-evaluation-harness on a checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.commands import source
from experiments.commands.generate import model_of, parsed
from experiments.reports.results import clean
from experiments.running.cache import write_json
from lm import interop
from lm.config import ModelConfig
from lm.errors import UserError, nearest
from lm.files import user_path
from lm.interop.readers.tensors import check

PROG = "python -m experiments.evaluate"


def run(argv: Sequence[str], doc: str | None = None) -> int:
    p = cli.Parser(PROG, doc)
    source.add(p)
    source.add_dtype(p)
    p.add_argument("--tasks", required=True, help="names of the harness, separated by commas")
    p.add_argument("--include", help="a folder with task files of your own")
    p.add_argument("--pattern", help="attention pattern, for example lm_infinite")
    p.add_argument("--limit", type=int, help="documents per task")
    p.add_argument("--shots", type=int, help="examples before each question")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--max-length", type=int, help="tokens of context (default: the trained length)")
    p.add_argument("--chat", action="store_true", help="through the checkpoint's chat template")
    p.add_argument("--out", type=Path, help="write results as JSON; must not exist")
    args, overrides = parsed(p, argv)
    if args.out is not None and args.out.exists():
        raise UserError(f"--out: {args.out} exists already; valid: a new file")
    if args.shots is not None and args.shots < 0:
        raise UserError(f"--shots: must be at least 0, found {args.shots}")
    if args.include is not None and not user_path(args.include, "--include").is_dir():
        raise UserError(f"--include: {args.include} is no folder; valid: a folder with task files")
    for name in ("limit", "batch_size", "max_length"):
        if (found := vars(args)[name]) is not None and found < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {found}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluate needs the lm-evaluation-harness; get it with: pip install 'decoder-lab[eval]'")
    dtype = source.dtype(args)
    source.spread(args)
    header = interop.load(source.name(args), load_params=False, dtype=dtype)
    cfg = model_of(header.config, args.pattern, overrides)
    made = evaluate(args, cfg, header.source)
    if args.out is not None:
        write_json(args.out, clean(made))
    return 0


def evaluate(args: argparse.Namespace, cfg: ModelConfig, place: str) -> dict[str, Any]:
    """The harness's results; raises `UserError` for tasks that it does not have."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from lm.interop.harness import DecoderLM

    manager = TaskManager(include_path=args.include)
    tasks = [t.strip() for t in args.tasks.split(",")]
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(
                f"--tasks: unknown name {task!r}{nearest(task, manager.all_tasks)}; valid: lm_eval --tasks list"
            )
    spread = source.spread(args)
    checkpoint = interop.load(place, dtype=source.dtype(args), where=None if spread is None else spread.where)
    check(cfg, checkpoint.params, args.checkpoint)
    model = DecoderLM(checkpoint, cfg, max_length=args.max_length, batch_size=args.batch_size, spread=spread)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        limit=args.limit,
        num_fewshot=args.shots,
        apply_chat_template=args.chat,
        bootstrap_iters=1000,
        log_samples=False,
    )
    print(make_table(found))
    kept = {k: found[k] for k in ("results", "versions", "n-shot", "n-samples") if k in found}
    return json.loads(
        json.dumps({**kept, "checkpoint": source.name(args), "identity": checkpoint.identity}, default=str)
    )
