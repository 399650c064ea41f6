"""Where the time of a run went (goodput), and the log of its metrics."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.files import write_json, write_text
from lm.train.folder import GOODPUT, METRICS

KINDS = ("init", "compile", "step", "data", "eval", "save", "idle")


class Ledger:
    """Seconds by kind of work; what no kind claims is idle. Kinds do not nest."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - begin

    def summary(self) -> dict[str, float]:
        """Seconds by kind with the total, and ``goodput``, the share of training steps."""
        total = time.perf_counter() - self.start
        done = {k: v for k, v in self.seconds.items() if k != "idle"}
        done["idle"] = max(total - sum(done.values()), 0.0)
        return {**{k: round(v, 3) for k, v in done.items()}, "total": round(total, 3), "goodput": done["step"] / total}

    def write(self, folder: Path) -> None:
        """Adds the summary to ``goodput.json``, which has an entry for every session of the run in `folder`."""
        path = folder / GOODPUT
        sessions = json.loads(path.read_text()) if path.is_file() else []
        write_json(path, [*sessions, self.summary()])


class Log:
    """``metrics.jsonl``: one object per line, in the order of steps, and TensorBoard files beside it when asked."""

    def __init__(self, folder: Path, after: int | None, tensorboard: bool) -> None:
        """Keeps the lines of steps up to `after` (None = none): a resumed run's log is that of an unbroken one."""
        self.path = folder / METRICS
        before = [] if after is None else [line for line in read(self.path) if line["step"] <= after]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in before))
        self.file = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError(
                    "train.tensorboard: needs a package that is not here; get it with: pip install "
                    "'decoder-lab[tensorboard]', or set train.tensorboard = False"
                ) from None
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=None if after is None else after + 1)

    def write(self, step: int, **values: Any) -> None:
        """One line: `step` and `values` (numbers)."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


class NoLog:
    """What the other processes of a run write: nothing."""

    def write(self, step: int, **values: Any) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return out
