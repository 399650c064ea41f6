"""LoRA adapters out, as the folder that Hugging Face's PEFT loads: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.files import new_folder, write_json
from lm.interop.families import FAMILIES
from lm.interop.readers.base import HUB
from lm.interop.readers.hub import Name
from lm.interop.slots import slots
from lm.model import params as params_lib
from lm.surgery.lora import LoRA

# Where transformers 5 keeps what is no linear layer there, but a parameter of a layer.
ROUTER, EXPERTS = "model.layers.{i}.mlp.gate", "model.layers.{i}.mlp.experts"
MATRICES = ("gate", "up", "down")  # of an expert; the first two are one parameter there, gate_up_proj


@dataclass
class Written:
    """PEFT's tensors by name, the modules and parameters they adapt, and ranks that differ from the others'."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    modules: dict[str, None] = field(default_factory=dict)
    parameters: dict[str, None] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def add(self, place: str, a_rI: np.ndarray, b_Or: np.ndarray) -> None:
        """The two factors of one place. PEFT keeps both as linear layers do, outputs first, also where the layer itself
        does not."""
        self.tensors[f"base_model.model.{place}.lora_A.weight"] = np.ascontiguousarray(a_rI)
        self.tensors[f"base_model.model.{place}.lora_B.weight"] = np.ascontiguousarray(b_Or)


def tensors(cfg: ModelConfig, trained: Mapping[str, object], family: str) -> Written:
    """What PEFT keeps of `trained`. Raises `UserError` for adapters that it keeps otherwise."""
    kind, places, out = FAMILIES[family], slots(cfg), Written()
    experts: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}  # layer -> matrix -> all experts' factors
    leaves = params_lib.names(trained)
    for name, leaf in leaves.items():
        weight, _, part = name.rpartition("/")
        if part == "lora_b":
            continue
        short = places[weight][0][0][0] if weight in places else ""
        if part != "lora_a" or not short.endswith("/kernel"):
            raise UserError(
                f"--as=peft: {name} has no place in a PEFT adapter of linear layers and experts; valid: "
                "--as=huggingface, which merges"
            )
        if kind.fuses(short) is not None:
            raise UserError(f"--as=peft: {family} fuses {weight} with others; valid: --as=huggingface, which merges")
        a, b = np.asarray(leaf), np.asarray(leaves[f"{weight}/lora_b"])
        for (_, i, e), at in places[weight]:
            if short.startswith("ffn/experts/"):
                assert i is not None
                experts.setdefault(i, {})[short.split("/")[2]] = (a[at[:-1]], b[at[:-1]])
                continue
            module = (ROUTER if short == "ffn/router/kernel" else kind.table[short][0].removesuffix(".weight")).format(
                i=i, e=e
            )
            out.add(module, a[at].T, b[at].T)
            if short == "ffn/router/kernel":
                out.parameters["mlp.gate.weight"] = None
            else:
                out.modules[module] = None
    for i, found in experts.items():
        _experts(out, EXPERTS.format(i=i), found)
    return out


def _experts(out: Written, container: str, found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The experts' factors of one layer, ``[E, in, r]`` and ``[E, r, out]`` of each matrix, as PEFT has them of a
    parameter: experts before ranks in A, behind them in B."""
    first = [found[n] for n in MATRICES[:2] if n in found]
    if first:
        a_EDr = np.concatenate([a for a, _ in first], axis=-1)
        E, _, rank = a_EDr.shape
        width = first[0][1].shape[-1]
        b_ErF = np.zeros((E, rank, 2 * width), a_EDr.dtype)  # a block for each of the two
        at = 0
        for half, name in enumerate(MATRICES[:2]):
            if name in found:
                b = found[name][1]
                b_ErF[:, at : at + b.shape[1], half * width : (half + 1) * width] = b
                at += b.shape[1]
        _parameter(out, container, "gate_up_proj", a_EDr, b_ErF, inner="down" in found)
    if "down" in found:
        _parameter(out, container, "down_proj", *found["down"], inner=False)


def _parameter(out: Written, container: str, name: str, a: np.ndarray, b: np.ndarray, inner: bool) -> None:
    """One parameter of the experts; `inner`: another of the same module is adapted, and wrapped around it."""
    place = f"{container}.base_layer" if inner else container
    out.add(place, a.swapaxes(1, 2).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1))
    out.parameters[f"mlp.experts.{name}"] = None
    out.ranks[f"mlp.experts.{name}"] = a.shape[2]


def write(folder: Path, lora: LoRA, cfg: ModelConfig, trained: Mapping[str, object], family: str, base: str) -> None:
    """Writes the adapter; the folder appears whole or not at all, and must not exist.

    `base`: where PEFT finds the adapter's model. Raises `UserError` as `tensors` does, and for a place that cannot be
    written.
    """
    from safetensors.numpy import save

    made = tensors(cfg, trained, family)
    other = {name: rank for name, rank in made.ranks.items() if rank != lora.rank}
    root = lora.rank_stabilized
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_base(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": root,
        "target_modules": sorted({_suffix(m) for m in made.modules}),
        "fan_in_fan_out": FAMILIES[family].inputs_first,
        "bias": "none",
        "inference_mode": True,
    }
    if made.parameters:
        settings["target_parameters"] = sorted(made.parameters)
    if other:  # two matrices in one parameter: twice the rank, scaled as each of them
        times = {name: rank / lora.rank for name, rank in other.items()}
        settings["rank_pattern"] = other
        settings["alpha_pattern"] = {n: lora.alpha * (math.sqrt(t) if root else t) for n, t in times.items()}
    with new_folder(folder) as swap:
        data = save(made.tensors, metadata={"format": "pt"})  # `save_file` makes files that their owner alone can read
        (swap / "adapter_model.safetensors").write_bytes(data)
        write_json(swap / "adapter_config.json", settings)


def _base(place: str) -> dict[str, str]:
    """A checkpoint as PEFT names it: a path, or a repository and its commit."""
    if not place.startswith(HUB):
        return {"base_model_name_or_path": place}
    name = Name.of(place)
    return {"base_model_name_or_path": name.repo, **({"revision": name.revision} if name.revision else {})}


def _suffix(module: str) -> str:
    """The module's name within its layer: all layers are adapted alike."""
    return re.split(r"\.\d+\.", module)[-1]
