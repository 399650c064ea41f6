"""Training runs of this library as checkpoints: ``run.json``, the newest Orbax checkpoint, the tokenizer beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import lm.interop.tensors as tensors
import lm.model.params as params_lib
from lm.config import ModelConfig, plug
from lm.data.tokenizers import ByteTokenizer, Tokenizer, from_directory, values
from lm.errors import UserError
from lm.interop.files import new_folder

FILE = "run.json"


class Run:
    """The folder of a training run. Nothing is read before it is asked for."""

    def __init__(self, path: Path, reader: Callable[[str], Any]) -> None:
        """`reader` finds who reads the checkpoint that training started from (`lm.interop.reader`)."""
        self.path, self.reader = path, reader
        try:
            self.about = json.loads((path / FILE).read_text(encoding="utf-8"))
            self._model = dict(self.about["model"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path / FILE}: not the description of a training run; valid: one that training wrote"
            ) from None

    def model(self) -> dict[str, Any]:
        return self._model

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first; `UserError` when there is none."""
        kept = sorted(int(p.name) for p in (self.path / "checkpoints").glob("*") if p.name.isdigit())
        if not kept:
            raise UserError(f"{self.path}: no complete checkpoint yet; valid: a run that has saved one")
        return kept

    def step(self) -> int:
        """The newest complete checkpoint's step."""
        return self.steps()[-1]

    def surgery(self) -> Any:
        """The plug that says what was trained (`lm.surgery`)."""
        settings = self.about.get("train", {}).get("surgery", "none")
        return plug("lm.surgery", settings, f"{self.path / FILE} train.surgery")

    def start(self) -> Any:
        """Reader of the checkpoint that training started from; None for random parameters. Raises `UserError` when it
        is not where it was, or not what it was."""
        source = self.about.get("start_source", "")
        if not source:
            return None
        try:
            found = self.reader(source)
            same = self.about.get("start_content") in ("", found.identity())
        except UserError as e:
            raise UserError(f"{self.path}: holds adapters to {source!r}, which cannot be read: {e}") from None
        if not same:
            raise UserError(f"{self.path}: holds adapters to {source!r}, which is not the checkpoint it was then")
        return found

    def params(self, cfg: ModelConfig, step: int | None = None) -> Any:
        """The parameters alone, of the newest checkpoint or that of `step`, adapters merged into the checkpoint they
        belong to; the optimizer's state is not read."""
        surgery = self.surgery()
        if not surgery.adds:
            return self.trained(cfg, step)
        start = self.start()
        rng = jax.random.key(int(self.about["seed"]))
        base = params_lib.init(cfg, rng) if start is None else start.params(cfg)
        return surgery.merge(cfg, base, self.trained(cfg, step))

    def trained(self, cfg: ModelConfig, step: int | None = None) -> Any:
        """What training changed: all parameters, or the adapters alone."""
        import orbax.checkpoint as ocp

        surgery = self.surgery()
        step = self.step() if step is None else step
        whole = params_lib.abstract(cfg)
        want = {"params": jax.eval_shape(lambda p: surgery.init(cfg, p, jax.random.key(0)), whole)}
        try:
            with ocp.PyTreeCheckpointer() as reader:
                here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
                placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), want)
                how = ocp.checkpoint_utils.construct_restore_args(placed)
                args = ocp.args.PyTreeRestore(item=placed, restore_args=how, partial_restore=True)
                found = reader.restore((self.path / "checkpoints" / str(step) / "state").absolute(), args=args)
        except Exception as e:  # the library raises a dozen types for damaged files
            line = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            raise UserError(f"{self.path}: the checkpoint of step {step} cannot be read ({line})") from None
        if not surgery.adds:
            tensors.check(cfg, found["params"], str(self.path))
        return jax.tree.map(jax.numpy.asarray, found["params"])

    def tokenizer(self) -> Tokenizer | None:
        known = self.about.get("tokenizer") or {}
        if known.get("kind") == "values":
            return values.from_description(known)
        if known.get("kind") == "bytes":
            return ByteTokenizer(known.get("bos_id"), known.get("eos_id"))
        return from_directory(self.path, known.get("bos_id"), known.get("eos_id"))

    def special(self) -> tuple[int | None, int | None]:
        """(eos, bos) ids."""
        known = self.about.get("tokenizer") or {}
        return known.get("eos_id"), known.get("bos_id")

    def chat_template(self) -> str | None:
        """Jinja source, if the checkpoint that training started from had one."""
        from lm.interop.huggingface import chat_template

        own = chat_template(self.path)
        if own is not None or not self.about.get("start_source"):
            return own
        try:
            start = self.start()
        except UserError:  # the start is gone: the weights do not need it, unless they are adapters
            return None
        return None if start is None else start.chat_template()

    def identity(self) -> str:
        files = sorted(p for p in (self.path / "checkpoints" / str(self.step())).rglob("*") if p.is_file())
        return tensors.content_hash([self.path / FILE, *files])


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What `Run.tokenizer` needs beside the tokenizer's own file."""
    if isinstance(tokenizer, values.ValueTokenizer):
        return tokenizer.describe()
    kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "file"
    return {"kind": kind, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}


def write(folder: Path, checkpoint: Any) -> None:
    """`checkpoint` (`lm.interop.Checkpoint`) as a run of no steps; the folder appears whole or not at all."""
    from lm.config import to_dict
    from lm.interop.to_huggingface import save_tokenizer
    from lm.train.checkpoint import Checkpoints

    with new_folder(folder) as swap:
        about: dict[str, Any] = {"model": to_dict(checkpoint.config), "start": checkpoint.identity}
        if checkpoint.tokenizer is not None:
            save_tokenizer(swap, checkpoint.tokenizer, checkpoint.chat_template)
            about["tokenizer"] = {
                **describe_tokenizer(checkpoint.tokenizer),
                "eos_id": checkpoint.eos_id,
                "bos_id": checkpoint.bos_id,
            }
        kept = Checkpoints(swap / "checkpoints")
        kept.save(0, {"params": checkpoint.params}, about)
        kept.wait()
        kept.close()
        (swap / FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
