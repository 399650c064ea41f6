"""A folder with a little of everything that commands read, all of it good, and beside it what no command can read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from cases import tiny_llama

CONFIG = '''
"""A toy: it trains a little and reads a little."""

from ml_collections import ConfigDict

SCALES = ("smoke", "laptop")


def get_config(scale="laptop"):
    c = ConfigDict(convert_dict=False)
    c.name = "toy"
    c.scale = scale
    c.paper = {"title": "A Toy", "arxiv": "0000.00000", "claim": "it reads", "numbers": {"two": 2.0}}
    c.checkpoint = "random"
    c.model = {"vocab_size": 258, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 8, "max_positions": 32}
    c.train = {"steps": 2, "batch": 2, "data": {"texts": ("texts",), "tokenizer": "bytes", "seq_len": 16}}
    c.seeds = (0, 1)
    c.baseline = "zero"
    c.measures = {
        "nll": {"name": "nll_by_position", "texts": ("texts/a.txt",), "tokens": 16, "bin": 4},
        "training": {"name": "train_log"},
    }
    c.arms = {
        "zero": {},
        "window": {"model.pattern.name": "sliding_window", "model.pattern.window": 4},
        "also": {"model.pattern": "lm_infinite", "only": ("nll",)},
    }
    return c


def sweep_windows():
    yield {"arms.window.model.pattern.window": 4}
    yield {"arms.window.model.pattern.window": 8}


def claims(r):
    return []
'''
SETTINGS: dict[str, Any] = {
    "name": "toy",
    "scale": "laptop",
    "paper": {"title": "A Toy", "arxiv": "0000.00000", "claim": "it reads", "numbers": {"two": 2.0}},
    "checkpoint": "random",
    "model": {"vocab_size": 258, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 8, "max_positions": 32},
    "train": {
        "steps": 2,
        "batch": 2,
        "data": {"texts": ["texts"], "tokenizer": "bytes", "seq_len": 16},
        "mesh": {"data": 1},
    },
    "seeds": [0, 1],
    "baseline": "zero",
    "measures": {
        "nll": {"name": "nll_by_position", "texts": ["texts/a.txt"], "tokens": 16, "bin": 4},
        "training": {"name": "train_log"},
    },
    "arms": {
        "zero": {},
        "window": {"model.pattern.name": "sliding_window", "model.pattern.window": 4},
        "also": {"model.pattern": "lm_infinite", "only": ["nll"]},
    },
}
RESULTS: dict[str, Any] = {
    "schema": 1,
    "experiment": "toy",
    "scale": "laptop",
    "paper": {"title": "A Toy", "arxiv": "0000.00000", "claim": "it reads", "numbers": {"two": 2.0}},
    "arms": {
        "zero": {"nll/nll": {"mean": 1.5, "std": 0.5, "n": 2, "by_seed": [1.0, 2.0]}, "nll/plain": 3.0},
        "window": {"nll/nll": {"mean": 2.5, "std": 0.5, "n": 2, "by_seed": [2.0, 3.0]}},
    },
    "curves": {"zero": {"nll/line": {"x": [1.0, 2.0], "y": [1.0, 2.0], "y_by_sample": [[0.0, 1.0]]}}},
    "claims": [{"text": "two is more than one", "holds": True, "measured": {"two": 2.0}, "paper": "2"}],
    "environment": {"python": "3.11", "jax": "0", "device": "cpu", "commit": None, "dirty": None, "seconds": 1.0},
    "config": {**SETTINGS},
    "complete": True,
}
SWEEP: dict[str, Any] = {
    "file": "toy.py",
    "scale": "laptop",
    "sweep": "windows",
    "points": [
        {
            "folder": f"{i}-point",
            "state": "done",
            "overrides": {"arms.window.model.pattern.window": str(4 * (i + 1)), "seeds": "(0, 1)"},
            "arms": {"window": {"nll/nll": {"mean": 1.0 + i, "std": 0.1, "n": 2, "by_seed": [0.9 + i, 1.1 + i]}}},
        }
        for i in range(2)
    ],
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def checkpoint(folder: Path) -> None:
    """A tiny Llama with a tokenizer of bytes and a chat template."""
    folder.mkdir()
    tiny_llama.write(folder, rows=300, vocab_size=300)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def _odd(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    (folder / "folder").mkdir()
    files = {
        "empty": b"",
        "latin1": "caf\xe9".encode("latin-1"),
        "nul": b"a\0b",
        "deep.json": b"[" * 100_000 + b"]" * 100_000,
        "deeper.json": b'{"a":' * 100_000,
        "digits.json": b"1" * 5_000,
        "digits-in.json": b'{"schema": ' + b"1" * 5_000 + b"}",
        "nan.json": b"NaN",
        "list.json": b"[1, 2]",
        "text.json": b'"text"',
        "half.json": b'{"a": "\\ud800"}',
        "mark.json": b'\xef\xbb\xbf{"a": 1}',
        "latin1.json": b'{"a": "\xe9"}',
        "cut.json": b'{"a": [1, 2',
        "twice.json": b'{"schema": 1, "schema": 2}',
        "latin1.jinja": b"{{ '\xe9' }}",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)


def build(folder: Path) -> None:
    """The folder as it is at the beginning of every case."""
    folder.mkdir(parents=True)
    (folder / "toy.py").write_text(CONFIG)
    settings = {"schema": 1, "file": str(folder / "toy.py"), "config": SETTINGS}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "texts").mkdir()
    for name in "abcdef":
        (folder / "texts" / f"{name}.txt").write_text(f"{name} little text of a few words. " * 8)
    (folder / "prompts.txt").write_text("one\ntwo\n")
    (folder / "objects.json").write_text('[{"name": "x"}]')
    (folder / "done").mkdir()
    (folder / "done" / "results.json").write_text(json.dumps(RESULTS))
    (folder / "swept").mkdir()
    (folder / "swept" / "sweep.json").write_text(json.dumps(SWEEP))
    checkpoint(folder / "model")
    _odd(folder / "odd")


def look(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change."""
    out = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            with contextlib.suppress(OSError):
                seen = os.lstat(path)
                is_folder = name in folders  # what was made there and removed again moves its time alone
                out[os.path.relpath(path, folder)] = (0, 0) if is_folder else (seen.st_size, seen.st_mtime_ns)
        folders[:] = [name for name in folders if name != "__pycache__"]
    return {name: seen for name, seen in out.items() if "__pycache__" not in name and seen is not None}


def again(folder: Path) -> None:
    """`build` over whatever is there."""
    shutil.rmtree(folder, ignore_errors=True)
    build(folder)
