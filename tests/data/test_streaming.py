"""Tokenizing in pieces: the ids of one document at a time, in memory that does not grow with the text."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.config import build
from lm.data import corpus, texts
from lm.data.texts import Documents, document
from lm.data.texts.document import Document
from lm.data.tokenizers import ByteTokenizer, HFTokenizer, bpe
from lm.errors import UserError
from lm.train.config import TrainConfig
from lm.train.data import prepare

MEASURED = """
import json, resource, sys
from pathlib import Path
import numpy as np
from lm.data import corpus, texts
from lm.data.corpus import Encoded
from lm.data.packing import Packed
from lm.data.texts import Documents

class Codes:
    identity, answers, vocab_size = "codes", False, 2**16
    def encode(self, documents):
        return [Encoded(np.frombuffer(d.text.encode(), np.uint8), len(d.text)) for d in documents]

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

def run(path):
    docs = Documents(lambda: texts.stream(path))
    made = corpus.tokenize(docs, Codes(), Path(sys.argv[1]) / "cache")
    train, held = corpus.split(made, 0.3, 0)
    both = Packed(corpus.join([train, held]), 64), Packed(train, 64)
    for packed in both:
        assert chr(packed[5]["tokens"][0]) in "0123456789"
    return made.n_tokens

few, many = sys.argv[2:]
run(few)
before = peak()
print(run(many), peak() - before)
"""


def documents(n: int) -> list[Document]:
    words = "the cat sat on the mat é 東京 \n\n and then  some"
    return [Document(f"d{i}", words[i % 7 :] * (i % 5), "test", "none") for i in range(n)]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Reading, tokenizing, splitting, joining and packing 64 MiB of JSON lines, 128 MiB of tokens."""
    paths = [tmp_path / "few.jsonl", tmp_path / "many.jsonl"]
    for path, n in zip(paths, (2, 1024), strict=True):
        with path.open("w") as file:
            file.writelines(json.dumps({"text": f"{i:08}" * 2**13}) + "\n" for i in range(n))
    command = [sys.executable, "-c", MEASURED, str(tmp_path), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, grown = done.stdout.split()
    assert int(tokens) == 2**26
    assert float(grown) < 40  # MiB, of which 16 are texts that would be kept if they were all


def test_what_was_read_keeps_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identities and rows as they were when whole lists of documents were read."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"row {i} é " * (i % 5 + 1)} for i in range(30)]
    Path("a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("b.txt").write_text("in the beginning " * 9)
    Path("c.txt").write_text("and the earth " * 7)
    talks = [[("user", f"q {i}"), ("assistant", "a " * i)] for i in range(1, 12)] + [[("user", "x")]]
    messages = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in talks]
    Path("t.jsonl").write_text("".join(json.dumps(m) + "\n" for m in messages))
    mixed = {"texts": ("a.jsonl", "*.txt")}
    chat = {"texts": ("t.jsonl",), "kind": "chat", "template": "chatml"}
    for data, identity, rows_of in (
        (mixed, "c4304f625de92e5f2799910e844ba63d", "05e0577eb4622a39"),
        (
            mixed | {"weights": (1.0, 2.0), "packing": "best_fit"},
            "86bbec4b27847f8f5dce72999c14cd61",
            "6b5a558fae311003",
        ),
        (chat, "590abe5458f2de3d8f8201f9f77098cd", "27e5225917b376ae"),
    ):
        given = {"tokenizer": "bytes", "seq_len": 32, "held_out": 0.3, **data}
        for kept in (0, 2**24):  # read again each time, or kept
            monkeypatch.setattr(document, "_KEPT", kept)
            made = prepare(build(TrainConfig, {"data": given}, "train"), tmp_path / f"cache{kept}")
            assert made.held_out is not None and made.identity == identity
            digest = hashlib.sha256()
            for part in (*made.train, made.held_out):
                for i in range(len(part)):
                    for _, value in sorted(part[i].items()):
                        digest.update(value.tobytes())
            assert digest.hexdigest()[:16] == rows_of


def test_copies_written_before_names_had_files_of_their_own_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = documents(5)
    made = corpus.tokenize(docs, ByteTokenizer(), tmp_path)
    (folder,) = (tmp_path / "tokens").iterdir()
    names = [d.name for d in docs]
    sums = {n: corpus._sum(folder / f"{n}.npy") for n in ("tokens", "offsets", "n_bytes")}
    (folder / "names.npy").unlink()
    (folder / "name_offsets.npy").unlink()
    about = {"names": names, "sums": {**sums, "names": corpus._sum_of(names)}}
    (folder / "about.json").write_text(json.dumps(about))
    monkeypatch.setattr(corpus, "_write", lambda *a: pytest.fail("made again"))
    again = corpus.tokenize(docs, ByteTokenizer(), tmp_path)
    assert again.names == names and again.identity == made.identity
    assert np.array_equal(again.tokens, made.tokens)


def test_files_that_change_between_two_readings_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "_KEPT", 0)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)]
    path.write_text("".join(lines))
    docs = Documents(lambda: texts.stream(str(path)))
    assert docs.known[1] == 9 and len(list(docs)) == 9
    for changed in (lines[:-1], [*lines, *lines], [*lines[:-1], lines[0]]):
        path.write_text("".join(changed))
        with pytest.raises(UserError, match="a file was changed while it was read"):
            corpus.tokenize(docs, ByteTokenizer(), tmp_path)
        assert not list((tmp_path / "tokens").iterdir())


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
    (path,) = (tmp_path / "tokens").glob("*/names.npy")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"d1", b"dX"))
    assert corpus.tokenize(docs, tokenizer, tmp_path).names == ["d0", "d1", "d2"]
    assert path.read_bytes() == whole


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
