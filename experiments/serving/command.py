"""The server's arguments, and its beginning and end."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.commands.generate import headed, model_arguments, opened, parsed
from lm.config import ModelConfig
from lm.data.chat import choose
from lm.errors import UserError
from lm.interop import Checkpoint
from lm.model.language_model import DecoderModel

if TYPE_CHECKING:
    from experiments.serving.app import Api

PROG = "python -m experiments.serve"
NEEDS = ("starlette", "uvicorn")
PATIENCE = 5  # seconds that answers have to end in


def arguments(doc: str | None) -> cli.Parser:
    p = cli.Parser(PROG, doc)
    model_arguments(p)
    p.add_argument("--template", help="which of the checkpoint's chat templates, by name")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 is every one")
    p.add_argument("--port", type=int, default=8000, help="0 = any that is free")
    p.add_argument("--model-name", help="what requests call the model (default: the checkpoint's own name)")
    p.add_argument("--max-length", type=int, help="tokens of prompt and answer (default: the trained length)")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of a chat's answer where a request says none")
    p.add_argument("--max-batch", type=int, default=8, help="answers that are made together")
    p.add_argument("--max-wait-ms", type=float, default=10.0, help="how long the first waits for others")
    p.add_argument("--max-queue", type=int, default=64, help="answers that wait; more are refused (429)")
    p.add_argument("--max-body", type=int, default=4 * 2**20, help="bytes of a request")
    return p


def check(args: argparse.Namespace) -> None:
    """Refuses what the numbers cannot be."""
    for name in ("max_length", "max_new_tokens", "max_batch", "max_queue", "max_body"):
        if (found := vars(args)[name]) is not None and found < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {found}")
    if not 0 <= args.max_wait_ms <= 10_000:
        raise UserError(f"--max-wait-ms: found {args.max_wait_ms:g}; valid: 0 to 10000")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port: found {args.port}; valid: 0 to 65535")
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {' and '.join(missing)}; get it with: pip install 'decoder-lab[serve]'")


def api(args: argparse.Namespace, header: Checkpoint, cfg: ModelConfig) -> Api:
    """The model, its engine, which runs from now on, and the routes."""
    from experiments.serving.app import Api
    from experiments.serving.asked import Limits, Reader
    from experiments.serving.engine import Engine

    model = opened(args, header, cfg)
    most = DecoderModel(cfg).limit or cfg.max_positions
    limits = Limits(args.max_length or min(cfg.max_positions, most), args.max_new_tokens, args.max_queue)
    engine = Engine(model, args.max_batch, args.max_wait_ms / 1000, args.max_queue)
    name = args.model_name or Path(args.checkpoint).name
    return Api(engine, Reader(model, name, limits, args.template), int(time.time()), args.max_body)


def run(argv: Sequence[str], doc: str | None = None) -> int:
    args, overrides = parsed(arguments(doc), argv)
    check(args)
    header, cfg = headed(args, overrides)
    if args.template is not None:
        choose(header.text.templates, args.template, False, args.checkpoint)
    most = DecoderModel(cfg).limit
    if most and (args.max_length or 0) > most:
        raise UserError(f"--max-length: found {args.max_length}, the model has {most} positions; valid: at most {most}")
    listening = _socket(args.host, args.port)
    import uvicorn

    made = api(args, header, cfg)
    config = uvicorn.Config(made.app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=PATIENCE)
    place = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{made.reader.name} at http://{place}:{listening.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends by itself, and then raises them again
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        made.engine.close()
    print("ended", file=sys.stderr)
    return 0


def _socket(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as e:
        raise UserError(f"--host, --port: cannot listen at {host}:{port} ({e.strerror or e})") from None
