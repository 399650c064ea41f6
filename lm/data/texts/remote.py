"""Files elsewhere, by address: ``s3://``, ``gs://``, ``https://``, ``hf://`` and whatever else fsspec reaches.

Keys and other settings are the library's own: its variables (``FSSPEC_S3_ANON=true``), files, those of each service.
``simplecache::s3://…`` keeps a copy on this machine while the program runs, ``filecache::`` for longer.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from lm.data.texts.stored import Stored
from lm.errors import UserError, nearest

_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.\-]*::)*[a-z][a-z0-9+.\-]*://", re.I)


def is_address(spec: str) -> bool:
    """Whether it begins as an address does; a path never does."""
    return _ADDRESS.match(spec) is not None


def find(address: str, suffixes: Sequence[str], field: str | None) -> tuple[list[Stored], str | None]:
    """The files of an address, sorted, and the folder that they lie in; None for the address of one file.

    Of a folder those with one of `suffixes`, but for hidden ones. Raises `UserError` for a kind of address that is
    none or whose package is missing, for one that cannot be reached, and for one that has no files.
    """
    system, at = _system(address)
    with _told(address):
        paged = "://" in at  # of a web page: a question mark begins a query, not a pattern
        if "*" in at if paged else glob.has_magic(at):
            found = sorted(p for p, about in system.glob(at, detail=True).items() if about["type"] == "file")
            parts = at.split("/")
            first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            root, empty = "/".join(parts[:first]), f"texts: the glob {address!r} matches no file"
            if "/." not in at:  # as a shell does
                found = [p for p in found if not _hidden(p[len(root) :])]
        elif system.isfile(at):
            name = at.partition("?")[0] if paged else at
            return [_stored(system, at, name.rpartition("/")[2], address)], None
        elif system.isdir(at):
            if field is not None:
                raise UserError(
                    f"{address}: '#{field}' names a field; for JSON lines in a folder write {address}/*.jsonl#{field}"
                )
            root = at.rstrip("/")
            below = {p: p[len(root) :].lstrip("/") for p in sorted(system.find(at))}
            found = [p for p, name in below.items() if name.lower().endswith(tuple(suffixes)) and not _hidden(name)]
            empty = f"{address}: the folder holds no text file; valid suffixes: {' '.join(suffixes)}"
        else:
            raise UserError(f"{address}: no such file or folder")
        if not found:
            raise UserError(empty)
        return [_stored(system, p, p[len(root) :].lstrip("/"), system.unstrip_protocol(p)) for p in found], root


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _system(address: str) -> tuple[Any, str]:
    """The library's file system, and the path in it."""
    if importlib.util.find_spec("fsspec") is None:
        raise UserError(f"{address}: reading it needs the library fsspec; get it with: pip install fsspec")
    import fsspec

    for kind in (part.partition("://")[0] for part in address.split("::")):
        if kind not in fsspec.available_protocols():
            close = nearest(kind, fsspec.available_protocols())
            raise UserError(f"{address}: unknown kind of address {kind!r}{close}; valid: s3, gs, https, hf and others")
        try:
            fsspec.get_filesystem_class(kind)
        except ImportError as e:
            package = e.__cause__.name if isinstance(e.__cause__, ImportError) else None
            how = f"the package {package}; get it with: pip install {package}" if package else f"a package ({e})"
            raise UserError(f"{address}: reading it needs {how}") from None
    with _told(address):
        system, at = fsspec.core.url_to_fs(address)
        return system, str(at)


def _stored(system: Any, path: str, name: str, where: str) -> Stored:
    open_: Callable[[], BinaryIO] = lambda: cast(BinaryIO, system.open(path, "rb"))  # noqa: E731
    return Stored(where, name, open_, (Exception,))


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """Raises `UserError` for whatever the library of a service ends in."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        said = (str(e).strip().splitlines() or [""])[0]
        raise UserError(f"{address}: cannot be reached ({type(e).__name__}: {said})") from None
