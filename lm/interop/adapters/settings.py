"""adapter_config.json: which modules PEFT adapts, and by which factor. What cannot be obeyed is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.errors import UserError, shown

# What PEFT does at initialisation to the base's weights, which the adapter then belongs to.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Read here, or of no consequence once training is over.
KNOWN = {
    *"r lora_alpha rank_pattern alpha_pattern use_rslora use_dora target_modules target_parameters".split(),
    *"exclude_modules modules_to_save bias fan_in_fan_out layers_to_transform layers_pattern".split(),
    *"ensure_weight_tying init_lora_weights peft_type".split(),
    *"lora_dropout inference_mode task_type base_model_name_or_path revision auto_mapping peft_version".split(),
    *"loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size runtime_config".split(),
    *"velora_config monteclora_config".split(),
}
KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "target_modules": (list, str),
    "target_parameters": (list,),
    "exclude_modules": (list, str),
    "modules_to_save": (list,),
    "bias": (str,),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "ensure_weight_tying": (bool,),
}


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says, under PEFT's names; `file` for messages."""

    file: Path
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    ensure_weight_tying: bool = False

    @staticmethod
    def of(file: Path, given: Mapping[str, Any]) -> Settings:
        """Raises `UserError` naming the key that has another type, or asks for what is not done here."""
        kind = given.get("peft_type")
        if kind != "LORA":
            raise UserError(
                f"{file} peft_type: found {shown(kind)}; valid: LORA (DoRA and rank-stabilised LoRA included)"
            )
        start = given.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            raise UserError(
                f"{file} init_lora_weights: {start!r} changes the base's weights too; valid: an adapter that PEFT "
                "converted to plain LoRA (path_initial_model_for_weight_conversion)"
            )
        for key, value in given.items():
            if key not in KNOWN and value:
                raise UserError(
                    f"{file} {key}: found {shown(value)}, which is not supported; valid: an adapter without it"
                )
        found: dict[str, Any] = {}
        for key, kinds in KINDS.items():
            value = given.get(key)
            if value is None:
                continue
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                names = " or ".join(k.__name__ for k in kinds)
                raise UserError(f"{file} {key}: expected {names}, found {shown(value)}")
            found[key] = value
        return Settings(file, **found)

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` (arXiv 2312.03732)."""
        alpha, rank = float(_by_pattern(self.alpha_pattern, module, self.lora_alpha)), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether the module is saved whole."""
        return any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in self.modules_to_save or ())

    def targets(self, module: str, head: str) -> bool:
        """Whether the module is adapted; `head` is the one that ``all-linear`` leaves out."""
        if _named(self.exclude_modules, module) or self.saves(module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module != head
            return re.fullmatch(self.target_modules, module) is not None
        return _named(self.target_modules, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """Whether ``layers_to_transform`` takes the module's layer."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        tries = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns or ()] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for m in (re.match(t, module) for t in tries) if m), None)
        return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)

    def parameters(self, container: str, names: Iterable[str]) -> list[str]:
        """Which parameters of a module ``target_parameters`` adapts, in their order."""
        full = {name: f"{container}.{name}" for name in names}
        wanted = self.target_parameters or ()
        return [n for n, f in full.items() if any(f == w or f.endswith(f".{w}") for w in wanted)]


def _named(names: list[str] | str | None, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == n or module.endswith(f".{n}") for n in names or ())


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first pattern that fits the end of the module's name."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)
