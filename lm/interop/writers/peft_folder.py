"""LoRA adapters out, as the folder that Hugging Face's PEFT loads: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lm.errors import UserError
from lm.files import new_folder, write_json
from lm.interop.families import FAMILIES
from lm.model import params as params_lib
from lm.surgery.lora import LoRA

NO_LINEAR = ("ffn/router/", "ffn/experts/")  # what transformers 5 keeps as plain arrays, without a linear layer


def tensors(trained: Mapping[str, object], family: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """PEFT's tensors by name, and the modules they adapt. Raises `UserError` for adapters that PEFT keeps otherwise."""
    kind = FAMILIES[family]
    out: dict[str, np.ndarray] = {}
    modules: dict[str, None] = {}
    for ours, leaf in params_lib.names(trained).items():
        weight, _, part = ours.rpartition("/")
        short = weight.removeprefix("blocks/")
        layer = kind.table[short][0] if short in kind.table else ""
        if (
            part not in ("lora_a", "lora_b")
            or not weight.endswith("/kernel")
            or not layer
            or short.startswith(NO_LINEAR)
        ):
            raise UserError(
                f"--as=peft: {ours} has no place in a PEFT adapter of linear layers; valid: --as=huggingface, which "
                "merges"
            )
        if kind.fuses(short) is not None:
            raise UserError(f"--as=peft: {family} fuses {weight} with others; valid: --as=huggingface, which merges")
        letter = "A" if part == "lora_a" else "B"
        for i, value in enumerate(np.asarray(leaf)) if weight.startswith("blocks/") else [(None, np.asarray(leaf))]:
            module = layer.format(i=i).removesuffix(".weight")
            # PEFT keeps both factors as linear layers do, outputs first, also where the layer itself does not.
            out[f"base_model.model.{module}.lora_{letter}.weight"] = np.ascontiguousarray(value.T)
            modules[module] = None
    return out, list(modules)


def write(folder: Path, lora: LoRA, trained: Mapping[str, object], family: str, base: str) -> None:
    """Writes the adapter; the folder appears whole or not at all, and must not exist.

    `base`: where PEFT finds the adapter's model. Raises `UserError` as `tensors` does, and for a place that cannot be
    written.
    """
    from safetensors.numpy import save_file

    arrays, modules = tensors(trained, family)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted({_suffix(m) for m in modules}),
        "fan_in_fan_out": FAMILIES[family].inputs_first,
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(folder) as swap:
        save_file(arrays, swap / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(swap / "adapter_config.json", settings)


def _suffix(module: str) -> str:
    """The module's name within its layer: all layers are adapted alike."""
    return re.split(r"\.\d+\.", module)[-1]
