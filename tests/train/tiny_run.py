"""A tiny training run for tests: as a function, and as a program that is killed again and again.

``python tiny_run.py FOLDER TEXTS KILLS SEED`` imports once and forks a child per attempt, so that an attempt takes
seconds; every attempt but the last is killed (SIGKILL) after a random time. Programs are kept where
``JAX_COMPILATION_CACHE_DIR`` says, which is to be no place of other tests: a death may leave half a file there.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lm.config import build, model_config
from lm.train import loop
from lm.train.config import TrainConfig
from lm.train.data import prepare

MODEL = {"vocab_size": 258, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_positions": 32}
TRAIN = {
    "steps": 60,
    "batch": 8,
    "eval_every": 20,
    "eval_rows": 8,
    "final_rows": 8,
    "save_every": 3,
    "data": {"tokenizer": "bytes", "seq_len": 16, "held_out": 0.3},
    "optimizer": {"name": "adamw", "learning_rate": 0.01},
    "schedule": {"name": "cosine", "warmup": 0.1},
}

LONG = {"steps": 200, "save_every": 5}  # of the run that is killed: more than fits between the kills


def settings(texts: Path, **change: Any) -> TrainConfig:
    """`TRAIN` with changes; ``data`` is merged."""
    data = {**TRAIN["data"], "texts": (str(texts),), **change.pop("data", {})}  # type: ignore[dict-item]
    return build(TrainConfig, {**TRAIN, **change, "data": data}, "train")


def train(folder: Path, texts: Path, told: list[str] | None = None, seed: int = 0, **change: Any) -> loop.Trained:
    """One run in `folder`; what a user is told ends up in `told`."""
    chosen = settings(texts, **change)
    data = prepare(chosen, folder.parent / "data")
    tell = (lambda text: None) if told is None else told.append
    return loop.run(model_config(MODEL), chosen, data, folder, seed=seed, tell=tell)


def attempts(folder: Path, texts: Path, kills: int, seed: int) -> None:
    """Runs to the end over `kills` violent deaths at random moments."""
    rng = random.Random(seed)
    done = 0
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(folder, texts, **LONG)
                code = 0
            finally:
                os._exit(code)
        if done < kills:
            time.sleep(rng.uniform(0.3, 3.0))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
            continue
        if os.WEXITSTATUS(status) != 0:
            sys.exit(f"attempt {done} failed by itself")
        print(f"finished after {done} kills")
        return


if __name__ == "__main__":
    attempts(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
