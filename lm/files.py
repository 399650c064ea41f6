"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 `text` to a file beside `path`, then renames it to `path`. Raises ``OSError`` as the disk does."""
    handle, swap = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # a name of its own for every writer
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(swap, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(swap, path)
    finally:
        Path(swap).unlink(missing_ok=True)


def write_json(path: Path, data: object, *, indent: int = 1, ascii_only: bool = True) -> None:
    """`data` as JSON with a newline at its end, as `write_text` writes it."""
    write_text(path, json.dumps(data, indent=indent, ensure_ascii=ascii_only) + "\n")


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises `UserError` naming one that does not parse, `FileNotFoundError` for none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block ends well and removed when it does not.

    Raises `UserError` when `folder` exists, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; valid: a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        swap = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None
    try:
        yield swap
        os.chmod(swap, 0o755)  # mkdtemp makes folders that only their owner can enter
        os.replace(swap, folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None
    finally:
        shutil.rmtree(swap, ignore_errors=True)
