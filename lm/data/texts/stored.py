"""Files as streams of bytes, decompressed while they are read."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from lm.errors import UserError

COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Stored:
    """`where` is how errors call the file, `name` what it is called below the folder asked for; `open` its bytes.

    `faults`: what reading it may end in.
    """

    where: str
    name: str
    open: Callable[[], BinaryIO]
    faults: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)

    @property
    def base(self) -> str:
        """Its name without folders."""
        return PurePosixPath(self.name).name

    @property
    def _last(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def suffix(self) -> str:
        """What is in the file, whether compressed or not."""
        return PurePosixPath(PurePosixPath(self.name).stem).suffix.lower() if self.compressed else self._last

    @property
    def compressed(self) -> bool:
        return self._last in COMPRESSED

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The contents as a stream. Raises `UserError`, also for what reading ends in within the block."""
        try:
            with self.open() as raw:
                yield _decompressed(raw, self._last, self.where)
        except UserError:
            raise
        except self.faults as e:
            packed = isinstance(e, (EOFError, zlib.error)) or (isinstance(e, OSError) and e.errno is None)
            if self.compressed and packed:
                raise UserError(
                    f"{self.where}: cannot be decompressed ({e}); valid: a complete {self._last} file"
                ) from None
            why = (e.strerror if isinstance(e, OSError) else None) or f"{type(e).__name__}: {e}"
            raise UserError(f"{self.where}: cannot be read ({why}); valid: a readable file") from None


def local(path: Path, name: str) -> Stored:
    """A file of this machine."""
    return Stored(str(path), name, lambda: path.open("rb"))


def _decompressed(raw: BinaryIO, suffix: str, where: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    return _zstd(raw, where) if suffix == ".zst" else raw


def _zstd(raw: BinaryIO, where: str) -> BinaryIO:
    if importlib.util.find_spec("zstandard") is None:
        raise UserError(f"{where}: reading it needs the library zstandard; get it with: pip install zstandard")
    import zstandard

    class Frames(io.RawIOBase):
        """What the library decompresses; one that ends inside a frame is a fault, which its own reader passes over."""

        def __init__(self) -> None:
            self.engine, self.left = zstandard.ZstdDecompressor().decompressobj(), b""
            self.begun = False

        def readable(self) -> bool:
            return True

        def readinto(self, into: bytearray) -> int:  # type: ignore[override]
            while not self.left:
                data = (self.engine.unused_data if self.engine.eof else b"") or raw.read(2**15)
                if self.engine.eof and data:
                    self.engine, self.begun = zstandard.ZstdDecompressor().decompressobj(), False
                if not data:
                    if self.begun and not self.engine.eof:
                        raise EOFError("it ends within a frame")
                    return 0
                self.begun = True
                try:
                    self.left = self.engine.decompress(data)
                except zstandard.ZstdError as e:
                    raise OSError(str(e)) from None
            n = min(len(into), len(self.left))
            into[:n], self.left = self.left[:n], self.left[n:]
            return n

    return cast(BinaryIO, io.BufferedReader(Frames(), 2**20))
