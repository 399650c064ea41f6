"""A fork server for commands: everything is imported once, and commands run in its children.

``python tests/front/forks.py``: one JSON object a line asks, one a line answers. No backend of JAX starts in the
server, whose children therefore inherit no threads. What would take a model's time is left out (`_short`): the front is
what stands before it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[2]
REACHED = "the front lets it pass"
COMMANDS = "run sweep report list generate chat serve evaluate convert compile new_method results_page lab".split()
MOST = 60_000  # characters of output that are kept
MEMORY = 6 << 30  # bytes of address space of a command


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` None where it did not end in time."""

    code: int | None
    out: str
    err: str
    seconds: float


class Server:
    """The client's side; ``with Server() as ask``."""

    def __init__(self) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def __call__(self, command: str, argv: Sequence[str], folder: Path, seconds: float = 10.0, **more: Any) -> Ended:
        """`more`: ``stdin`` text, ``env`` variables, ``stdout`` = "ascii", "closed" or "full"."""
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"command": command, "argv": list(argv), "folder": str(folder), "seconds": seconds, **more}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


class Reached(Exception):
    """What comes next is no longer the front."""


def _short() -> None:
    """Cuts off what runs a model."""
    from experiments.certificates import command as certificates
    from experiments.commands import chat, evaluate, generate
    from experiments.running.runner import Runner
    from experiments.serving import command as serving
    from experiments.sweeps import command as sweeps

    def reached(*_: object, **__: object) -> Any:
        raise Reached

    for module in (generate, chat, serving):
        vars(module)["opened"] = reached
    vars(evaluate)["evaluate"] = reached
    vars(serving)["_socket"] = reached
    for name in ("certificate", "serving"):
        vars(vars(certificates)[name])["certify"] = reached
    vars(certificates)["search"] = reached
    vars(sweeps)["_engine"] = reached
    type.__setattr__(Runner, "all", reached)


def _run(asked: Mapping[str, Any], folder: str) -> int:
    """The command in this process; the exit code that an interpreter would end with."""
    for fd, name in ((1, "out"), (2, "err")):
        _become(fd, os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    Path(folder, "in").write_bytes(str(asked.get("stdin", "")).encode("utf-8", "surrogateescape"))
    _become(0, os.path.join(folder, "in"), os.O_RDONLY)
    os.environ.update(asked.get("env", {}))
    if "JAX_PLATFORMS" in asked.get("env", {}):
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # it was read when jax was imported
    os.chdir(asked["folder"])
    kind = asked.get("stdout")
    if kind == "full":
        _become(1, "/dev/full", os.O_WRONLY)
    encoding = "ascii" if kind == "ascii" else "utf-8"
    sys.stdin = open(0, encoding=encoding, errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, errors="strict", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    if kind == "closed":
        sys.stdout = None  # type: ignore[assignment]
    try:
        code = importlib.import_module(f"experiments.{asked['command']}").main(asked["argv"])
    except Reached:
        code = 0
        with contextlib.suppress(OSError):
            os.write(1, f"{REACHED}\n".encode())
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        traceback.print_exc(file=sys.stderr)
        code = 120
    return int(code or 0)


def _become(fd: int, path: str, flags: int) -> None:
    opened = os.open(path, flags, 0o600)
    os.dup2(opened, fd)
    os.close(opened)


class _Worker:
    """A child that runs commands one after the other, as long as each of them ends."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        asks, self.ask = os.pipe()
        self.answer, answers = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(asks)
            os.close(answers)
            return
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            with os.fdopen(asks) as lines:
                for line in lines:
                    code = _run(json.loads(line), folder)
                    os.write(answers, f"{code}\n".encode())
        finally:
            os._exit(125)

    def run(self, asked: Mapping[str, Any]) -> tuple[int | None, bool]:
        """The exit code, None for a command that did not end; and whether the worker still lives."""
        os.write(self.ask, (json.dumps(asked) + "\n").encode())
        if not select.select([self.answer], [], [], asked["seconds"])[0]:
            self.end()
            return None, False
        said = os.read(self.answer, 100)
        if said:
            return int(said), True
        return os.waitstatus_to_exitcode(self.end()), False

    def end(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for fd in (self.ask, self.answer):
            os.close(fd)
        return os.waitpid(self.pid, 0)[1]


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import matplotlib.pyplot  # noqa: F401

    from experiments.commands.listing import plugs

    plugs()  # imports every plug
    for name in COMMANDS:
        importlib.import_module(f"experiments.{name}")
    _short()
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # `lab` finds them imported
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized()
    worker: _Worker | None = None
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            asked, start = json.loads(line), time.monotonic()
            alone = bool({"env", "stdout"} & set(asked))  # what would outlast the command
            if worker is not None and alone:
                worker.end()
                worker = None
            worker = worker or _Worker(folder)
            code, lives = worker.run(asked)
            seconds = time.monotonic() - start
            if lives and alone:
                worker.end()
            worker = worker if lives and not alone else None
            out, err = (Path(folder, name).read_text("utf-8", errors="replace")[:MOST] for name in ("out", "err"))
            print(json.dumps(Ended(code, out, err, seconds).__dict__), file=answers, flush=True)
        if worker is not None:
            worker.end()


if __name__ == "__main__":
    serve()
