"""Experiments by file: every ``configs/*.py``, found by listing the folder and loaded when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.spec.settings import plain
from lm import files as files_
from lm.config import ModelConfig, model_config
from lm.errors import UserError, nearest, shown, told, unknown

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SCHEMA = 1  # of config.json

if (CONFIGS / "bases").is_dir() and str(ROOT) not in sys.path:  # the repository, and `lab` was started elsewhere
    sys.path.append(str(ROOT))  # config files import `configs`, which no wheel claims


@dataclass(frozen=True)
class Source:
    """A loaded config file: its scales, ``get_config(scale)`` and ``claims(results)``."""

    path: Path
    module: ModuleType

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(self.module.SCALES)

    @property
    def claims(self) -> Callable[[Any], list[Any]]:
        return self.module.claims

    @property
    def certified(self) -> tuple[dict[str, Any], ...]:
        """What its ``:paper`` scale has certificates for (`experiments.certificates.kept`)."""
        return tuple(vars(self.module).get("CERTIFIED", ()))

    @property
    def place(self) -> str:
        """The path as config.json keeps it: relative to the repository when inside it."""
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else str(self.path)

    def settings(self, scale: str) -> dict[str, Any]:
        """The config at `scale` as plain nested dicts; raises `UserError` for an unknown scale or a failing config."""
        if scale not in self.scales:
            raise unknown(f"{self.path}: scale", scale, self.scales)
        try:
            return plain(self.module.get_config(scale))
        except UserError:
            raise
        except (Exception, SystemExit) as e:
            raise UserError(f"{self.path}: get_config({scale!r}) failed: {type(e).__name__}: {told(e)}") from e


def files(folder: Path = CONFIGS) -> list[Path]:
    """The config files of `folder`, sorted."""
    return sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))


def architecture(name: str) -> ModelConfig:
    """The model of ``configs/bases/NAME.py``, checked; raises `UserError` for another name."""
    return model_config(base(name, "config.architecture").model())


def base(name: str, key: str) -> ModuleType:
    """A file of ``configs/bases`` that describes a published model; `key` is who asked for it."""
    names = [p.stem for p in files(CONFIGS / "bases")]
    valid = [n for n in names if "POD" in vars(importlib.import_module(f"configs.bases.{n}"))]
    if name not in valid:
        raise unknown(key, name, valid)
    return importlib.import_module(f"configs.bases.{name}")


def load(path: Path) -> Source:
    """Runs one config file; raises `UserError` when it is absent, does not import, or lacks a part."""
    path = files_.user_path(path, "--config")
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else CONFIGS
        names = [p.name for p in files(folder)]
        what = "is a folder" if path.is_dir() else "no such config file"
        valid = f"; valid: {', '.join(names)} in {folder}" if names else ""
        raise UserError(f"--config: {path}: {what}{nearest(path.name, names)}{valid}")
    path = path.resolve()
    name = "configs." + path.stem if path.parent == CONFIGS else f"_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(
            f"--config: {path}: not a Python file; valid: configs/NAME.py[:scale] or RUN_FOLDER/config.json"
        )
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses in the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        raise UserError(f"{path}: cannot be imported: {type(e).__name__}: {told(e)}") from e
    finally:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
    for part in ("get_config", "SCALES", "claims"):
        if part not in vars(module):
            raise UserError(f"{path}: has no {part}; valid: get_config(scale), SCALES and claims(results)")
    scales = vars(module)["SCALES"]
    if not isinstance(scales, (list, tuple)) or not scales or not all(isinstance(s, str) for s in scales):
        raise UserError(f"{path}: SCALES: found {shown(scales)}; valid: a tuple of names")
    for part in ("get_config", "claims"):
        if not callable(vars(module)[part]):
            raise UserError(f"{path}: {part}: found {shown(vars(module)[part])}; valid: a function")
    return Source(path, module)


def find(text: str, file: Path | None = None) -> tuple[Source, dict[str, Any]]:
    """``PATH.py[:scale]`` or a run's ``config.json`` -> the config file and its settings, as plain nested dicts.

    The file that a ``config.json`` names is run, so it must lie below the checkout; one elsewhere is given as `file`.
    """
    path, colon, scale = text, "", ""
    if not files_.exists(text):
        path, colon, scale = text.rpartition(":") if ":" in text else (text, "", "")
    if path.endswith(".json"):
        if colon:
            raise UserError(f"--config: {text}: a config.json has no scales; valid: {path}")
        place, config = read_json(files_.user_path(path, "--config"))
        return load(_trusted(place, path) if file is None else file), config
    if file is not None:
        raise UserError(
            f"--file: {file}: --config={text} is a config file itself; valid: with the config.json of a run"
        )
    source = load(Path(path))
    if colon:
        return source, source.settings(scale)
    default = "laptop" if "laptop" in source.scales else source.scales[0]
    return source, source.settings(default)


def _trusted(place: str, named_by: str) -> Path:
    """The file at `place` in the checkout; `UserError` for one outside of it, which somebody else may have named."""
    try:
        path = (ROOT / place).resolve()
    except (OSError, RuntimeError, ValueError):  # loops of links, and names that no file can have
        path = Path("/")
    if not CONFIGS.is_dir() or not path.is_relative_to(ROOT):
        raise UserError(
            f"--config: {named_by}: names the file {place!r}, which is not in the checkout {ROOT} and would be run; "
            f"valid: --file={place}, where you trust it"
        )
    return path


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """The config file's place and the settings in a ``config.json``; `UserError` when it is none of ours."""
    valid = f"valid: a config.json of schema {SCHEMA}, which experiments.run writes"
    try:
        data = files_.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {valid}") from None
    except UserError as e:
        raise UserError(f"{path}: cannot be read ({str(e).removeprefix(f'{path}: ')}); {valid}") from None
    good = isinstance(data, dict) and data.get("schema") == SCHEMA
    if not (good and isinstance(data.get("config"), dict) and isinstance(data.get("file"), str)):
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path}: found schema {shown(found)}; {valid}")
    return data["file"], data["config"]
