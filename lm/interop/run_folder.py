"""Training runs of this library as checkpoints: ``run.json``, the newest Orbax checkpoint, the tokenizer beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

import lm.interop.tensors as tensors
import lm.params as params_lib
from lm.config import ModelConfig
from lm.data.tokenizers import ByteTokenizer, Tokenizer, from_directory
from lm.errors import UserError

FILE = "run.json"


class Run:
    """The folder of a training run. Nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
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

    def params(self, cfg: ModelConfig, step: int | None = None) -> Any:
        """The parameters alone, of the newest checkpoint or that of `step`; the optimizer's state is not read."""
        import orbax.checkpoint as ocp

        step = self.step() if step is None else step
        want = {"params": params_lib.abstract(cfg)}
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
        tensors.check(cfg, found["params"], str(self.path))
        return jax.tree.map(jax.numpy.asarray, found["params"])

    def tokenizer(self) -> Tokenizer | None:
        known = self.about.get("tokenizer") or {}
        if known.get("kind") == "bytes":
            return ByteTokenizer(known.get("bos_id"), known.get("eos_id"))
        return from_directory(self.path, known.get("bos_id"), known.get("eos_id"))

    def special(self) -> tuple[int | None, int | None]:
        """(eos, bos) ids."""
        known = self.about.get("tokenizer") or {}
        return known.get("eos_id"), known.get("bos_id")

    def chat_template(self) -> str | None:
        """Jinja source, if the checkpoint that training started from had one and it was converted."""
        from lm.interop.huggingface import chat_template

        return chat_template(self.path)

    def identity(self) -> str:
        files = sorted(p for p in (self.path / "checkpoints" / str(self.step())).rglob("*") if p.is_file())
        return tensors.content_hash([self.path / FILE, *files])


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What `Run.tokenizer` needs beside the tokenizer's own file."""
    kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "file"
    return {"kind": kind, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}


def write(folder: Path, checkpoint: Any) -> None:
    """`checkpoint` (`lm.interop.Checkpoint`) as a run of no steps; the folder appears whole or not at all."""
    import shutil
    import tempfile

    from lm.config import to_dict
    from lm.interop.to_huggingface import save_tokenizer
    from lm.train.checkpoint import Checkpoints

    if folder.exists():
        raise UserError(f"{folder}: exists already; valid: a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        swap = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None
    try:
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
        swap.chmod(0o755)
        swap.rename(folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None
    finally:
        shutil.rmtree(swap, ignore_errors=True)
