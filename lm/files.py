"""Files and folders that appear whole or not at all, and sums that tell what was changed since."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm.errors import UserError

SUM = "sum"  # the key of a JSON object's own sum


def _beside(path: Path) -> Path:
    """A name of its own for every writer."""
    return path.with_name(f".{path.name[:64]}.{secrets.token_hex(6)}")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to a file beside `path`, then renames it to `path`. Its mode is what the user's umask leaves.
    Raises ``OSError`` as the disk does."""
    swap = _beside(path)
    try:
        with swap.open("xb") as f:
            f.write(data)
        os.replace(swap, path)
    finally:
        swap.unlink(missing_ok=True)


def claim_text(path: Path, text: str) -> bool:
    """Writes `text` as `write_text` does where there is no `path` yet; False where there is. Of several processes that
    come at once, one gets True."""
    swap = _beside(path)
    try:
        write_text(swap, text)
        os.link(swap, path)  # fails where there is one, also over a network
    except FileExistsError:
        return False
    finally:
        swap.unlink(missing_ok=True)
    return True


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, as `write_bytes` writes it."""
    write_bytes(path, text.encode())


def json_text(data: object, *, indent: int = 1, ascii_only: bool = True) -> str:
    """`data` as JSON with a newline at its end."""
    return json.dumps(data, indent=indent, ensure_ascii=ascii_only) + "\n"


def write_json(path: Path, data: object, *, indent: int = 1, ascii_only: bool = True) -> None:
    """`data` as JSON with a newline at its end, as `write_text` writes it."""
    write_text(path, json_text(data, indent=indent, ascii_only=ascii_only))


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises `UserError` naming one that does not parse, `FileNotFoundError` for none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None


def summed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object `data` with the entry ``sum``, a hash of all others that no change of layout changes."""
    bare = {key: value for key, value in data.items() if key != SUM}
    return {**bare, SUM: sum_of(bare)}


def sum_of(data: Mapping[str, Any]) -> str:
    """32 hexadecimal digits. Keys count as JSON has them, their order does not."""
    text = json.dumps(json.loads(json.dumps(data)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def without_sum(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """`data` without its sum; None where the sum is another. What has no sum, as older files, is taken as it is."""
    bare = {key: value for key, value in data.items() if key != SUM}
    return bare if SUM not in data or data[SUM] == sum_of(bare) else None


def sum_of_file(path: Path) -> str:
    """Of its bytes, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block ends well and removed when it does not.

    Raises `UserError` when `folder` exists, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; valid: a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        swap = _beside(folder)
        swap.mkdir()
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None
    try:
        yield swap
        os.replace(swap, folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from None
    finally:
        shutil.rmtree(swap, ignore_errors=True)
