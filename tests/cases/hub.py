"""A Hugging Face Hub on this machine: what `huggingface_hub` asks of one, over files in memory."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's hash: forty hexadecimal digits that follow from its files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Repo:
    """`commits`: hash -> files; `refs`: branch -> hash; `gated`: files are refused."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        made = commit_of(files)
        self.commits[made], self.refs[branch] = files, made
        return made


class FakeHub:
    """The repositories of a server, and every request that it got as ``METHOD PATH``."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.url = ""

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """A commit of the files in `folder`."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.repos.setdefault(name, Repo()).commit(files, branch)

    def got(self) -> set[str]:
        """The names of the files that were downloaded."""
        return {line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line}

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append(f"{method} {path}")
        parts = urllib.parse.urlsplit(path).path.strip("/").split("/")
        parts = [urllib.parse.unquote(p) for p in parts]
        api = parts[:2] == ["api", "models"]
        name, *rest = ["/".join(parts[2:4]), *parts[4:]] if api else ["/".join(parts[:2]), *parts[2:]]
        if name not in self.repos:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        repo = self.repos[name]
        if rest[:1] == ["refs"]:
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
            return self._json({"branches": refs, "tags": [], "converts": []})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = repo.commits[commit]
        if api and rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            return self._json(listed)
        if api:
            siblings = [{"rfilename": p} for p in files]
            return self._json({"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": siblings})
        if repo.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        data = files.get("/".join(rest[2:]))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data

    @staticmethod
    def _json(data: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub

    def _send(self) -> None:
        status, headers, body = self.hub.answer(self.command, self.path)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = _send

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub without repositories at ``hub.url``."""
    hub = FakeHub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def used(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, *, offline: bool = False) -> None:
    """This process speaks to the hub at `url` from now on; what `huggingface_hub` read of the environment is said
    again."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
