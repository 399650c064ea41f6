"""Files and folders: one reader of what a user names, of text and of JSON; what is written appears whole or not at
all, with sums that tell what was changed since."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm.errors import UserError, shown

DEEPEST = 100  # levels of lists and objects in JSON

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


def user_path(text: str | Path, key: str) -> Path:
    """The path that a user names, ``~`` expanded. `key` is who asks. Raises `UserError` for a home that there is not,
    and for a name that no file can have."""
    try:
        path = Path(text).expanduser()
        str(path).encode()
        os.lstat(path)
    except RuntimeError:
        raise UserError(f"{key}: {shown(str(text))}: no such home; valid: a path, ~ for your own home") from None
    except ValueError as e:  # a NUL, half of a surrogate pair
        raise UserError(f"{key}: {shown(str(text))}: no file has such a name ({e}); valid: a path") from None
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise UserError(f"{key}: {text}: {e.strerror or e}; valid: a path that can be followed") from None
    return path


def exists(text: str) -> bool:
    """Whether there is a file or folder of that name, ``~`` expanded; False for what cannot be a name."""
    try:
        return user_path(text, "").exists()
    except UserError:
        return False


def read_bytes(path: Path, what: str = "") -> bytes:
    """The contents of a regular file. `what`, in front of its name in messages: who asks.

    Raises ``FileNotFoundError`` for none, and `UserError` for a folder, a pipe, a device, and what cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise UserError(f"{what}{path}: is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; valid: a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{what}{path}: cannot be read ({why}); valid: a readable file") from None


_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFSOCK: "a socket"}


def read_text(path: Path, what: str = "") -> str:
    """A file of UTF-8 text. Raises as `read_bytes`, and `UserError` for other bytes."""
    data = read_bytes(path, what)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{what}{path}: byte offset {e.start} is not UTF-8; valid: UTF-8 text") from None


def read_json(path: Path, what: str = "") -> Any:
    """The contents of a JSON file. Raises as `read_text`, and `UserError` for a file that `parse_json` refuses."""
    return parse_json(read_text(path, what), f"{what}{path}")


def read_object(path: Path, what: str = "") -> dict[str, Any]:
    """`read_json` of a file that holds an object."""
    found = read_json(path, what)
    if not isinstance(found, dict):
        raise UserError(f"{what}{path}: expected an object, found {type(found).__name__}; valid: a JSON object")
    return found


def parse_json(text: str, where: str) -> Any:
    """What JSON `text` says. Raises `UserError` that begins with `where` for text that does not parse, integers of
    thousands of digits, values nested deeper than `DEEPEST`, and half a surrogate pair in a string."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not valid JSON ({e.msg} at line {e.lineno} column {e.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deep); valid: at most {DEEPEST} levels") from None
    except ValueError as e:
        raise UserError(f"{where}: not valid JSON ({e})") from None
    _check_depth(found, where)
    if "\\ud" in text or "\\uD" in text:  # only an escape can make half a character
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: not valid JSON (half of a surrogate pair in a string)") from None
    return found


def _check_depth(found: Any, where: str) -> None:
    level: list[Any] = [found]
    for _ in range(DEEPEST + 1):
        nodes = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [x for node in nodes for x in node]
        if not level:
            return
    raise UserError(f"{where}: not valid JSON (nested too deep); valid: at most {DEEPEST} levels")


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
