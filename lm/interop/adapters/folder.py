"""The folder that PEFT saves an adapter in, and what its tensors do to the parameters of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors

from lm.config import ModelConfig
from lm.errors import UserError, nearest
from lm.files import read_object
from lm.interop.adapters.change import Change
from lm.interop.adapters.settings import Settings
from lm.interop.families import FAMILIES, Family
from lm.interop.slots import Slot, flat_shape, slots
from lm.model import params as params_lib

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLOATS = ("float32", "float16", "bfloat16", "float64")
FUSED = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", None)}  # of experts, in memory
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:modules_to_save\.(?:default\.)?)?(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|"
    r"lora_embedding_B|lora_magnitude_vector(?:\.weight)?|weight|bias)"
)


@dataclass
class _Edit:
    """What happens to one module of the file's library: factors, and tensors in the place of its own."""

    a: np.ndarray | None = None  # [r, in]
    b: np.ndarray | None = None  # [out, r]
    magnitude: np.ndarray | None = None  # [out]
    whole: dict[str, np.ndarray] = field(default_factory=dict)  # weight, bias


class Adapter:
    """One adapter on disk: its settings and its tensors, all read at once.

    Raises `UserError` for a folder without one, for pickles, damaged files, and settings that are not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        if not (folder / CONFIG).is_file():
            raise UserError(f"--adapter: {folder}: no {CONFIG}; valid: a folder that PEFT saved an adapter in")
        self.settings = Settings.of(folder / CONFIG, read_object(folder / CONFIG))
        self.file = folder / WEIGHTS
        if not self.file.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            found = "found only adapter_model.bin, a pickle" if pickled else "found none"
            raise UserError(f"{folder}: no {WEIGHTS}, {found}; valid: an adapter saved as safetensors")
        self.tensors = self._read()

    def _read(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        try:
            found = load_file(self.file)
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"{self.file}: not a complete safetensors file ({e})") from None
        for key, value in found.items():
            if value.dtype.name not in FLOATS:
                raise UserError(f"{self.file}: tensor {key!r} is stored as {value.dtype}; valid: {', '.join(FLOATS)}")
            with np.errstate(over="ignore"):
                found[key] = np.asarray(value, np.float32)
            if not np.isfinite(found[key]).all():
                raise UserError(f"{self.file}: tensor {key!r} has numbers that are not finite; valid: finite weights")
        return {k.removeprefix("base_model.model."): v for k, v in found.items()}

    def edits(self) -> dict[str, _Edit]:
        """By module, ``.base_layer`` included. Raises `UserError` for a tensor of another kind."""
        out: dict[str, _Edit] = {}
        for key, value in self.tensors.items():
            found = _KEY.fullmatch(key)
            if found is None:
                raise UserError(
                    f"{self.file}: tensor {key!r} is none of LoRA's; valid: factors, magnitudes, and modules and "
                    "biases that were saved whole"
                )
            edit, part = out.setdefault(found["module"], _Edit()), found["part"].removesuffix(".weight")
            if part in ("lora_A", "lora_embedding_A"):
                edit.a = value
            elif part in ("lora_B", "lora_embedding_B"):
                edit.b = value
            elif part == "lora_magnitude_vector":
                edit.magnitude = value
            else:
                edit.whole[part] = value
        return out

    def onto(self, cfg: ModelConfig, family: str) -> Change:
        """The change of a model of that family. Raises `UserError` naming the module or tensor that does not fit it."""
        return _Applied(self, cfg, FAMILIES[family], family)


@dataclass(frozen=True)
class _Factors:
    """``scale * B A``, of the file's matrix ``[out, in]``."""

    a_rI: np.ndarray
    b_Or: np.ndarray
    scale: float

    def product(self) -> np.ndarray:
        return (self.b_Or * np.float32(self.scale)) @ self.a_rI


class _Applied(Change):
    """An adapter on the parameters of one model."""

    def __init__(self, adapter: Adapter, cfg: ModelConfig, family: Family, name: str) -> None:
        self.adapter, self.cfg, self.family, self.name = adapter, cfg, family, name
        self.settings = adapter.settings
        self.inputs = {_short(k): n for k, n in params_lib.inputs(cfg).items()}
        self.places: dict[str, list[Slot]] = {}  # tensor of the file -> what of ours it is, or is part of
        self.matrices: set[str] = set()  # modules that are linear layers there
        for found in slots(cfg).values():
            for slot, _ in found:
                self._place(slot)
        self.low: dict[Slot, list[_Factors]] = {}
        self.magnitudes: dict[Slot, np.ndarray] = {}
        self.whole: dict[Slot, np.ndarray] = {}
        self._read(adapter.edits())

    def _place(self, slot: Slot) -> None:
        short, i, e = slot
        tensor = self.family.table[short][0].format(i=i, e=e)
        self.places.setdefault(tensor, []).append(slot)
        if short.endswith("/kernel") and not short.startswith(("ffn/router/", "ffn/experts/")):
            self.matrices.add(tensor.removesuffix(".weight"))

    def _read(self, edits: Mapping[str, _Edit]) -> None:
        adapted = set()
        for module, edit in edits.items():
            plain = module.removesuffix(".base_layer")
            if edit.a is not None or edit.b is not None:
                if edit.a is None or edit.b is None:
                    raise self._error(module, "has one factor of two")
                if plain.endswith(".experts"):
                    self._experts(module, plain, edit.a, edit.b)
                else:
                    self._linear(module, edit, edit.a, edit.b)
                    adapted.add(module)
            for part, value in edit.whole.items():
                self._whole(plain, part, value)
        head = self.family.head.removesuffix(".weight")
        for module in sorted(self.matrices - adapted):
            if self.settings.targets(module, head):
                raise self._error(module, f"is a target of {self.settings.file.name}, but has no factors here")
        self._check_tied()

    def _error(self, module: str, what: str) -> UserError:
        return UserError(f"{self.adapter.file}: module {module!r} {what}")

    def _of(self, module: str, part: str) -> list[Slot]:
        """Our tensors for one of the file; `UserError` where the model has none."""
        older = module.replace(".mlp.gate", ".block_sparse_moe.gate")  # as Mixtral's router is named in files
        found = self.places.get(f"{module}.{part}") or self.places.get(f"{older}.{part}")
        if found is None:
            names = [name.rpartition(".")[0] for name in self.places]
            raise self._error(module, f"has no {part} in this model, read as {self.name}{nearest(module, names)}")
        return found

    def _linear(self, module: str, edit: _Edit, a: np.ndarray, b: np.ndarray) -> None:
        at, head = self._of(module, "weight"), self.family.head.removesuffix(".weight")
        by_parameter = self.settings.parameters(module, ("weight",))
        if not by_parameter and not self.settings.targets(module, head):
            raise self._error(module, f"has factors, but is no target of {self.settings.file.name}")
        factors = self._factors(module, a, b, 1)[0]
        for slot in at:
            self.low.setdefault(slot, []).append(factors)
            if edit.magnitude is not None:
                if not self.settings.use_dora or slot[0] == "embed":
                    raise self._error(module, "has magnitudes, which only linear layers under use_dora have")
                self.magnitudes[slot] = edit.magnitude
            elif self.settings.use_dora:
                raise self._error(module, "has no magnitudes, though use_dora is true")

    def _factors(self, module: str, a: np.ndarray, b: np.ndarray, experts: int) -> list[_Factors]:
        rank, scale = self.settings.rank(module), self.settings.scale(module)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank * experts or b.shape[1] != rank * experts:
            raise self._error(
                module, f"has factors of shape {a.shape} and {b.shape}; valid: a rank of {rank}, as its config says"
            )
        each = b.reshape(len(b), rank, experts)
        return [_Factors(a[e * rank : (e + 1) * rank], each[..., e], scale) for e in range(experts)]

    def _experts(self, module: str, container: str, a: np.ndarray, b: np.ndarray) -> None:
        """Factors of all experts' matrices in one parameter (``target_parameters``). Where two parameters of a module
        are adapted, the first one's are kept below ``base_layer``."""
        named = self.settings.parameters(container, ("gate_up_proj", "down_proj"))
        inner = module != container
        if not named or (inner and len(named) < 2):
            raise self._error(module, f"has factors, but is no parameter that {self.settings.file.name} names")
        parameter = named[0] if inner else named[-1]
        layer = re.search(r"\.(\d+)\.", container)
        moe = self.cfg.ffn
        mine = [s for s in self.places_of_experts() if layer is not None and s[1] == int(layer[1])]
        experts = 1 + max((s[2] for s in mine if s[2] is not None), default=-1)
        if not mine:
            raise self._error(module, f"has no experts in this model ({type(moe).__name__})")
        made = self._factors(f"{container}.{parameter}", a, b, experts)
        for slot in mine:
            matrix = slot[0].split("/")[2]
            stored, half = FUSED[matrix]
            if stored != parameter or slot[2] is None:
                continue
            factors = made[slot[2]]
            rows = factors.b_Or if half is None else np.split(factors.b_Or, 2)[half]
            self.low.setdefault(slot, []).append(_Factors(factors.a_rI, rows, factors.scale))

    def places_of_experts(self) -> list[Slot]:
        return [s for found in self.places.values() for s in found if s[0].startswith("ffn/experts/")]

    def _whole(self, module: str, part: str, value: np.ndarray) -> None:
        saved = self.settings.saves(module)
        if part == "bias" and self.settings.bias == "none" and not saved:
            raise self._error(module, f"has a bias, though {self.settings.file.name} says bias: none")
        for slot in self._of(module, part):
            self.whole[slot] = value

    def _check_tied(self) -> None:
        """A head that reads the embedding table changes with it; PEFT changes one of the two, unless told to tie."""
        if not self.cfg.head.reads_embedding or self.settings.ensure_weight_tying:
            return
        table = ("embed", None, None)
        if table in self.low or table in self.whole:
            raise self._error(
                self.family.table["embed"][0].removesuffix(".weight"),
                "is adapted, but this model's head is the same table, which stays as it was there; valid: an adapter "
                "with ensure_weight_tying, or a checkpoint whose head is a matrix of its own",
            )

    def touches(self, slot: Slot) -> bool:
        return slot in self.low or slot in self.whole

    def apply(self, slot: Slot, value: np.ndarray) -> np.ndarray:
        turn, shape = self.family.table[slot[0]][1], value.shape
        if slot in self.whole:
            value = self._fitted(slot, turn(self.whole[slot], self.cfg), shape)
        for factors in self.low.get(slot, ()):
            delta = factors.product()
            stored = delta.T if self.family.inputs_first or slot[0] in ("embed", "pos_embed") else delta
            value = value + self._fitted(slot, turn(stored, self.cfg), shape)
        if slot in self.magnitudes:
            rows = self.family.table.get(slot[0].removesuffix("kernel") + "bias")
            size = self.magnitudes[slot] if rows is None else rows[1](self.magnitudes[slot], self.cfg)
            n_in = self.inputs.get(slot[0], 1)
            flat = value.reshape(int(np.prod(shape[:n_in])), -1)
            if np.size(size) != flat.shape[1]:
                raise self._error(
                    self.family.table[slot[0]][0].format(i=slot[1], e=slot[2]).removesuffix(".weight"),
                    f"has {np.size(size)} magnitudes; valid: {flat.shape[1]}, one a row",
                )
            value = (flat * (np.reshape(size, (1, -1)) / np.linalg.norm(flat, axis=0))).reshape(shape)
        return value

    def _fitted(self, slot: Slot, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if np.shape(value) not in (flat_shape(slot[0], shape), shape):
            name = self.family.table[slot[0]][0].format(i=slot[1], e=slot[2])
            raise UserError(
                f"{self.adapter.file}: what changes {name!r} has shape {np.shape(value)}, which does not give "
                f"{slot[0]} of shape {shape}"
            )
        return np.asarray(value).reshape(shape)


def _short(name: str) -> str:
    """The name within a layer."""
    block, _, rest = name.partition("/")
    return rest if block.startswith("blocks") else name
