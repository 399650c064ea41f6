"""Tokenizing in pieces: the ids of one document at a time, in memory that does not grow with the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.data import corpus
from lm.data.texts.document import Document
from lm.data.tokenizers import HFTokenizer, bpe
from lm.errors import UserError

MEASURED = """
import resource, sys
from collections.abc import Sequence
from pathlib import Path
from lm.data import corpus
from lm.data.texts.document import Document
from lm.data.tokenizers import ByteTokenizer

SIZE, N = 2**20, int(sys.argv[2])

class Lazy(Sequence):
    def __len__(self): return N
    def __getitem__(self, i):
        if i >= N: raise IndexError(i)
        return Document(str(i), f"{i:08}" * (SIZE // 8), "test", "none")

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

few = corpus.tokenize([Lazy()[0]], ByteTokenizer(), Path(sys.argv[1]))
before = peak()
made = corpus.tokenize(Lazy(), ByteTokenizer(), Path(sys.argv[1]))
print(made.n_tokens, peak() - before)
"""


def documents(n: int) -> list[Document]:
    words = "the cat sat on the mat é 東京 \n\n and then  some"
    return [Document(f"d{i}", words[i % 7 :] * (i % 5), "test", "none") for i in range(n)]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path), "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, grown = done.stdout.split()
    assert int(tokens) == 100 * (2**20 + 1)
    assert float(grown) < 64  # MiB, of 100 MiB of text and 200 MiB of ids


def test_pieces_and_batches_give_the_ids_of_single_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(40)
    tokenizer = bpe.trained(documents(7), 280, tmp_path)
    assert isinstance(tokenizer, HFTokenizer)
    want = [tokenizer.encode_document(d.text) for d in docs]
    identities = set()
    for piece in (1, 100, 2**20):
        monkeypatch.setattr(corpus, "_PIECE", piece)
        made = corpus.tokenize(docs, tokenizer, tmp_path / str(piece))
        assert [made.tokens[a:b].tolist() for a, b in zip(made.offsets[:-1], made.offsets[1:], strict=True)] == want
        identities.add(made.identity)
    assert len(identities) == 1
    assert made.n_bytes.tolist() == [len(d.text.encode()) for d in docs]


def test_a_damaged_name_makes_the_copy_invalid(tmp_path: Path) -> None:
    docs = documents(3)
    tokenizer = bpe.trained(docs, 270, tmp_path)
    corpus.tokenize(docs, tokenizer, tmp_path)
    (path,) = (tmp_path / "tokens").glob("*/about.json")
    whole = path.read_text()
    path.write_text(whole.replace('"d1"', '"dX"'))
    assert corpus.tokenize(docs, tokenizer, tmp_path).names == ("d0", "d1", "d2")
    assert path.read_text() == whole and json.loads(whole)["sums"]["names"]


def test_progress_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(corpus, "_PIECE", 1)
    monkeypatch.setattr(corpus, "_PATIENCE", -1.0)
    docs = documents(3)
    made = corpus.tokenize(docs, bpe.trained(docs, 270, tmp_path), tmp_path)
    assert "tokenizing: 2 of 3 documents" in capsys.readouterr().err
    assert isinstance(made.tokens, np.ndarray)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tokenizer = bpe.trained(documents(3), 270, tmp_path)
    (tmp_path / "tokens").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        corpus.tokenize(documents(3), tokenizer, tmp_path)
