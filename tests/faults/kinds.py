"""The folders that the injector damages, tiny ones, and what the commands read of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
import tiny_run
from injector import Kind

from experiments.reports import results_file
from experiments.running.cache import Cache, Point
from lm import interop
from lm.config import model_config, to_dict
from lm.data import corpus
from lm.data.record import TextRecord
from lm.data.texts.document import Document
from lm.data.tokenizers import ByteTokenizer, bpe
from lm.files import summed
from lm.interop import Checkpoint
from lm.interop.writers import run_folder
from lm.model import params
from lm.surgery.lora import LoRA

DOCUMENTS = [Document(f"doc {name}", topics[name][:400], "here", "none") for name in sorted(topics)[:12]]
BIG = {**tiny_run.MODEL, "vocab_size": 300}


def _bytes(tree: Any) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in params.names(tree).items()}


def _loaded(folder: Path) -> object:
    """All that a command takes from a checkpoint."""
    found = interop.load(str(folder))
    text = found.text
    tokenizer = None if text.tokenizer is None else (text.tokenizer.identity, text.tokenizer.describe())
    said = (text.words, text.eos_ids, text.bos_id, text.pad_id, text.templates, text.generation)
    return to_dict(found.config), _bytes(found.params), tokenizer, said


def run(folder: Path) -> Kind:
    """A run folder: weights, what they belong to, the tokenizer beside them."""
    cfg = model_config(BIG)
    text = TextRecord.of(bpe.trained(DOCUMENTS, 300, folder / "cache"), chat_template="{{ messages[0].content }}")
    made = Checkpoint(cfg, params.init(cfg, jax.random.key(0)), text, "random", "")
    run_folder.write(folder / "run", made)
    return Kind(folder / "run", lambda: _loaded(folder / "run"))


def training(folder: Path) -> Kind:
    """A training's folder with adapters, read as `experiments.convert --as=peft` and merged, as everybody else does."""
    texts = folder / "texts"
    texts.mkdir()
    for doc in DOCUMENTS:
        (texts / f"{doc.name}.txt").write_text(doc.text)
    tiny_run.train(folder / "run", texts, steps=4, save_every=4, surgery={"name": "lora", "rank": 2})

    def read() -> object:
        from lm.interop.readers.run_folder import Run

        reader = interop.reader(str(folder / "run"))
        assert isinstance(reader, Run)
        surgery = reader.surgery()
        assert isinstance(surgery, LoRA)
        return to_dict(surgery), _bytes(reader.trained(interop.config(str(folder / "run")))), _loaded(folder / "run")

    spares = ("lock", "metrics.jsonl", "goodput.json", "parameters.txt", "samples.jsonl")
    return Kind(folder / "run", read, spares=spares)


def tokens(folder: Path) -> Kind:
    """The cache of tokens."""

    def read() -> object:
        made = corpus.tokenize(DOCUMENTS, ByteTokenizer(), folder)
        whole = made.names, made.identity, str(made.tokens.dtype)
        return *whole, *(np.asarray(x).tobytes() for x in (made.tokens, made.offsets, made.n_bytes))

    read()
    return Kind(folder, read)


def tokenizer(folder: Path) -> Kind:
    """The cache of trained tokenizers."""

    def read() -> object:
        return bpe.trained(DOCUMENTS, 280, folder).identity

    read()
    return Kind(folder, read)


def points(folder: Path) -> Kind:
    """Finished measurements; one that is refused is measured again."""
    point = Point(
        {"checkpoint": "random", "model": {"d_model": 16, "norm": {"eps": 1e-6}}, "seed": 3},
        {"nll": [2.25, 3.5], "accuracy": [0.5]},
        {"nll": {"x": [0, 1, 2], "y": [3.5, 2.25, 1.125]}},
        {"texts": ["kjv:Genesis"]},
        1.5,
        {"code": "0123456789abcdef"},
    )
    cache = Cache(folder, folder / "shared")
    cache.put(point)
    return Kind(folder / "points", lambda: found if (found := cache.get(point.what, own=True)) else point)


def log(folder: Path) -> Kind:
    """The log of a training."""
    from lm.train.log import Log, read

    written = Log(folder, None, (), {})
    for step in range(12):
        written.write(step, loss=3.0 / (step + 1), nll=3.0 / (step + 1), skipped=0)
    written.close()
    return Kind(folder, lambda: read(folder / "metrics.jsonl", until=11))


def results(folder: Path) -> Kind:
    """The results of a run."""
    from experiments.reports.results_file import SCHEMA
    from experiments.running.cache import write_json

    stat = {"mean": 2.25, "std": 0.5, "n": 2}
    made = {
        "schema": SCHEMA,
        "experiment": "toy",
        "complete": True,
        "baseline": "full",
        "arms": {"full": {"nll/nll": stat}, "window": {"nll/nll": stat}},
        "claims": [{"text": "a claim", "holds": True, "measured": {"full": 2.25}}],
        "curves": {"full": {"nll/nll": {"x": [0, 1, 2], "y": [3.0, 2.0, 1.0]}}},
        "environment": {"seconds": 1.5},
        "config": {"seeds": [0, 1]},
    }
    write_json(folder / "results.json", summed(made))
    return Kind(folder, lambda: results_file.load(folder)[0])


MAKERS: dict[str, Callable[[Path], Kind]] = {
    "run": run,
    "training": training,
    "tokens": tokens,
    "tokenizer": tokenizer,
    "points": points,
    "log": log,
    "results": results,
}
