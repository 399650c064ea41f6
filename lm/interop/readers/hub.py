"""Repositories of the Hugging Face Hub as checkpoints, downloaded when they are asked for.

Cache, tokens, endpoint and offline rules are those of `huggingface_hub` (``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``). A checkpoint is known by its repository and commit, not by the place of its files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.data.record import FILES as TEXT_FILES
from lm.errors import UserError, nearest, shown
from lm.interop.readers.base import HUB
from lm.interop.readers.gguf_file import File
from lm.interop.readers.huggingface import INDEX, WHOLE, Directory

VALID = "valid: hf:OWNER/NAME, hf:OWNER/NAME/FILE.gguf, either with @REVISION"
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@\s]+))?")
HEADER = ("config.json", INDEX, "README.md", *TEXT_FILES)  # all but weights


@dataclass(frozen=True)
class Name:
    """``hf:OWNER/NAME[/FILE][@REVISION]``; `revision`: a branch, a tag or a commit, None = the main branch."""

    repo: str
    file: str | None = None
    revision: str | None = None

    @staticmethod
    def of(source: str) -> Name:
        """Raises `UserError` for what does not name a repository."""
        found = _NAME.fullmatch(source)
        if found is None:
            raise UserError(f"found {shown(source)}; {VALID}")
        return Name(found["repo"], found["file"], found["revision"])

    def __str__(self) -> str:
        file = "" if self.file is None else f"/{self.file}"
        return f"{HUB}{self.repo}{file}" + ("" if self.revision is None else f"@{self.revision}")

    def fetch(self, *files: str, quiet: bool = True) -> tuple[Name, Path]:
        """The name with its commit, and the folder that holds those of `files` (names or patterns) that there are."""
        from huggingface_hub import snapshot_download
        from tqdm.auto import tqdm

        class Bar(tqdm):  # type: ignore[type-arg]
            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(*args, **{**settings, "disable": quiet})

        with self._told():
            folder = Path(
                snapshot_download(self.repo, revision=self.revision, allow_patterns=list(files), tqdm_class=Bar)
            )
        return dataclasses.replace(self, revision=folder.name), folder

    def has(self, file: str) -> bool:
        """Whether there is a file of that name, which is downloaded if so."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with self._told():
            try:
                hf_hub_download(self.repo, file, revision=self.revision)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return False
        return True

    def listed(self) -> list[str]:
        """Every file of the repository."""
        from huggingface_hub import HfApi

        with self._told():
            return HfApi().list_repo_files(self.repo, revision=self.revision)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the Hub as `UserError`s of one line."""
        try:
            yield
        except Exception as e:  # beside its own, the library raises what its HTTP client does
            raise UserError(f"checkpoint {self}: {self._why(e)}") from None

    def _why(self, e: Exception) -> str:
        from huggingface_hub import constants, errors

        if isinstance(e, errors.GatedRepoError):
            return (
                "is gated; valid: accept its terms on its page, then give a token of that account (HF_TOKEN, or `hf "
                "auth login`)"
            )
        if isinstance(e, errors.RepositoryNotFoundError):
            return (
                f"no such repository at {constants.ENDPOINT}, or a private one; valid: the name of a public one, or a "
                "token that may read it (HF_TOKEN)"
            )
        if isinstance(e, errors.RevisionNotFoundError):
            names = self._revisions()
            valid = f"{', '.join(names)}, or a commit" if names else "a branch, a tag or a commit"
            return f"has no revision {self.revision!r}{nearest(self.revision or '', names)}; valid: {valid}"
        if isinstance(e, errors.LocalEntryNotFoundError):
            if constants.HF_HUB_OFFLINE:
                why = "HF_HUB_OFFLINE is set; valid: what was downloaded before, or unset it"
            else:
                why = f"{constants.ENDPOINT} cannot be reached; valid: what was downloaded before, or a connection"
            return f"is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and {why}"
        if isinstance(e, errors.EntryNotFoundError):
            return f"has no file {self.file!r}; {VALID}"
        if isinstance(e, errors.HFValidationError):
            return f"is no name of a repository; {VALID}"
        first = (str(e).strip().splitlines() or [""])[0]
        return f"{constants.ENDPOINT} answers with an error ({type(e).__name__}: {first})"

    def _revisions(self) -> list[str]:
        from huggingface_hub import HfApi

        try:
            refs = HfApi().list_repo_refs(self.repo)
        except Exception:  # whoever asks has an error to tell already
            return []
        return [ref.name for ref in (*refs.branches, *refs.tags)]


class Folder(Directory):
    """A repository with config.json and safetensors. The weights are downloaded when they are read."""

    def __init__(self, name: Name) -> None:
        self.name, folder = name.fetch(*HEADER)
        if not (folder / "config.json").is_file():
            raise UserError(f"checkpoint {name}: has no config.json; {_other(self.name)}")
        super().__init__(folder)

    def _files(self) -> list[Path]:
        if not (self.path / WHOLE).is_file():
            self._download()
        return super()._files()

    def _download(self) -> None:
        """What `Directory._files` takes of this repository: one file whole, else the shards of the index, else all."""
        index = self.path / INDEX
        shards = self._shards(index) if index.is_file() else []
        if shards and all((self.path / name).is_file() for name in shards):
            return
        if self.name.has(WHOLE):
            return
        found = shards or [n for n in self.name.listed() if n.endswith(".safetensors") and "/" not in n]
        if found:
            self.name.fetch(*found, quiet=False)

    def identity(self) -> str:
        return str(self.name)

    def place(self) -> str:
        return str(self.name)


class OneFile(File):
    """A GGUF file of a repository, or the first of several parts."""

    def __init__(self, name: Name) -> None:
        assert name.file is not None
        found = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", name.file)
        parts = [f"{found[1]}-{i:05}-of-{found[2]}.gguf" for i in range(2, int(found[2]) + 1)] if found else []
        self.name, folder = name.fetch(name.file, *parts, quiet=False)
        if not (folder / name.file).is_file():
            raise UserError(f"checkpoint {name}: has no file {name.file!r}; {_other(self.name, name.file)}")
        super().__init__(folder / name.file)

    def identity(self) -> str:
        return str(self.name)

    def place(self) -> str:
        return str(self.name)


def _other(name: Name, wanted: str = "") -> str:
    """What of the repository could be meant instead."""
    listed = name.listed()
    files = [n for n in listed if n.endswith(".gguf")]
    if "adapter_config.json" in listed:
        return f"valid: --adapter={HUB}{name.repo}, for it holds an adapter"
    if not files:
        return "valid: a repository with config.json and safetensors, or with a .gguf file"
    close = nearest(wanted, files).strip()
    said = f"{close}; " if close else ""
    return f"{said}valid: {', '.join(f'{HUB}{name.repo}/{n}' for n in files)}"


def open_(source: str) -> Folder | OneFile:
    """Who reads a checkpoint of the Hub. Raises `UserError` for a name that is none, and for whatever the Hub says."""
    name = Name.of(source)
    if name.file is None:
        return Folder(name)
    if not name.file.endswith(".gguf"):
        raise UserError(f"checkpoint {name}: found the file {name.file!r}; {VALID}")
    return OneFile(name)
