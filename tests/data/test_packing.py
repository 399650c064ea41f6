"""Rows against slow programs of a few lines, the bytes they stand for, and corpora on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import corpus, packing
from lm.data.corpus import Corpus
from lm.data.texts.document import Document
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)


def numbered(*lengths: int) -> Corpus:
    """Token i is i; a document has twice as many bytes as tokens."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = tuple(f"d{i}" for i in range(len(lengths)))
    return Corpus(np.arange(offsets[-1], dtype=np.uint32), offsets, 2 * np.array(lengths), names, f"{lengths}")


def fits(lengths: list[int], T: int) -> bool:
    return sum(lengths) >= T + 1


@given(LENGTHS, st.integers(1, 17))
@settings(max_examples=150, deadline=None)
def test_concat_is_the_stream_cut_every_T_tokens(lengths: list[int], T: int) -> None:
    if not fits(lengths, T):
        return
    stream, document = np.arange(sum(lengths)), np.repeat(np.arange(len(lengths)), lengths)
    packed = packing.Packed(numbered(*lengths), T, "concat")
    assert len(packed) == -(-(len(stream) - 1) // T)
    for i in range(len(packed)):
        row, part = packed[i], slice(i * T, (i + 1) * T + 1)
        n = len(stream[part])
        assert row["tokens"].dtype == row["segments"].dtype == np.int32
        assert row["tokens"].tolist() == [*stream[part].tolist(), *[0] * (T + 1 - n)]
        numbers = np.unique(document[part], return_inverse=True)[1] + 1
        assert row["segments"].tolist() == [*numbers.tolist(), *[0] * (T + 1 - n)]


def slow_best_fit(lengths: list[int], T: int) -> list[list[tuple[int, int]]]:
    """Best fit decreasing, by looking at every row for every piece."""
    pieces, start = [], 0
    for length in lengths:
        pieces += [(a, min(a + T + 1, start + length)) for a in range(start, start + length - 1, T)]
        start += length
    rows: list[list[tuple[int, int]]] = []
    for piece in sorted(pieces, key=lambda p: (p[0] - p[1], p[0])):
        room = [T + 1 - sum(b - a for a, b in r) - (piece[1] - piece[0]) for r in rows]
        best = min((x for x in room if x >= 0), default=None)
        if best is None:
            rows.append([piece])
        else:
            rows[len(room) - 1 - room[::-1].index(best)].append(piece)
    return rows


@given(LENGTHS, st.integers(1, 17))
@settings(max_examples=150, deadline=None)
def test_best_fit_is_best_fit_decreasing(lengths: list[int], T: int) -> None:
    if not fits(lengths, T):
        return
    packed, slow = packing.Packed(numbered(*lengths), T, "best_fit"), slow_best_fit(lengths, T)
    assert len(packed) == len(slow)
    found = [packed[i] for i in range(len(packed))]
    assert sorted((r["segments"] == 0).sum() for r in found) == sorted(T + 1 - sum(b - a for a, b in r) for r in slow)
    openings = [int(r["tokens"][0]) for r in found]
    assert openings == sorted(openings)  # the text's order


@given(LENGTHS, st.integers(1, 17), st.sampled_from(packing.MODES))
@settings(max_examples=150, deadline=None)
def test_targets_are_counted(lengths: list[int], T: int, mode: str) -> None:
    if not fits(lengths, T):
        return
    packed = packing.Packed(numbered(*lengths), T, mode)
    weights = sum(packing.split_row(packed[i])["weights"].sum() for i in range(len(packed)))
    assert packed.n_targets == weights and packed.n_bytes == pytest.approx(2 * weights)
    assert packed.fill == pytest.approx(np.mean([packed[i]["segments"] > 0 for i in range(len(packed))]))


def test_a_row_worked_by_hand() -> None:
    packed = packing.Packed(numbered(4, 1, 3), 6, "concat")
    row = packing.split_row(packed[0])
    assert row["inputs"].tolist() == [0, 1, 2, 3, 4, 5] and row["targets"].tolist() == [1, 2, 3, 4, 5, 6]
    assert row["segments"].tolist() == [1, 1, 1, 1, 2, 3] and row["index"].tolist() == [0, 1, 2, 3, 0, 0]
    assert row["weights"].tolist() == [1, 1, 1, 0, 0, 1] and row["weights"].dtype == np.float32
    row = packing.split_row(packed[1])
    assert row["inputs"].tolist() == [6, 7, 0, 0, 0, 0] and row["index"].tolist() == [0, 1, -1, -1, -1, -1]
    assert row["weights"].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("mode", packing.MODES)
def test_documents_without_targets_are_refused(mode: str) -> None:
    with pytest.raises(UserError, match=r"train\.data\.texts: none of the 9 documents is longer than one token"):
        packing.Packed(numbered(*[1] * 9), 4, mode)
    assert len(packing.Packed(numbered(*[1] * 9, 2), 4, mode)) == (3 if mode == "concat" else 1)


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{i}", t, "test", "none") for i, t in enumerate(texts)]


@pytest.mark.parametrize(
    "file", ["tokens.npy", "offsets.npy", "n_bytes.npy", "names.npy", "name_offsets.npy", "about.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_damaged_corpora_are_made_again(file: str, damage: str, tmp_path: Path) -> None:
    docs = documents("abc", "défg" * 20)
    before = corpus.tokenize(docs, ByteTokenizer(), tmp_path)
    tokens = before.tokens.tolist()
    (folder,) = (tmp_path / "tokens").iterdir()
    data = (folder / file).read_bytes()
    changed = {"flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "cut": data[:-3], "empty": b""}
    (folder / file).unlink()
    if damage != "missing":
        (folder / file).write_bytes(changed[damage])
    again = corpus.tokenize(docs, ByteTokenizer(), tmp_path)
    assert again.tokens.tolist() == tokens and again.names == ["d0", "d1"] and again.n_bytes.tolist() == [3, 100]
    assert (folder / file).read_bytes() == data
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == [folder.name]  # nothing is left lying about


def test_what_determines_the_tokens_is_in_the_name(tmp_path: Path) -> None:
    docs = documents("abc")
    ended = corpus.tokenize(docs, ByteTokenizer(), tmp_path)
    plain = corpus.tokenize(docs, ByteTokenizer(None, None), tmp_path)
    assert ended.tokens.tolist() == [97, 98, 99, 257] and plain.tokens.tolist() == [97, 98, 99]
    assert ended.identity != plain.identity
    assert isinstance(ended.tokens, np.memmap)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert corpus.tokenize(documents("a"), ByteTokenizer(None, 65_535), tmp_path).tokens.dtype == np.uint16
    large = corpus.tokenize(documents("a"), ByteTokenizer(None, 65_536), tmp_path)
    assert large.tokens.dtype == np.uint32 and large.tokens.tolist() == [97, 65_536]


def test_a_corpus_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(json.dumps("a file where the folder should be"))
    with pytest.raises(UserError, match=r"tokens.*cannot be written"):
        corpus.tokenize(documents("abc"), ByteTokenizer(), tmp_path)


@given(st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=30), st.integers(0, 5))
@settings(deadline=None)
def test_documents_keep_their_side_when_others_come(names: set[str], seed: int) -> None:
    def sides(chosen: list[str]) -> dict[str, bool]:
        n = len(chosen)
        c = Corpus(np.arange(2 * n), 2 * np.arange(n + 1), np.full(n, 2), tuple(chosen), f"{chosen}")
        train, held = corpus.split(c, 0.3, seed)
        assert held is not None and len(train) + len(held) == n and len(train) and len(held)
        return {name: side for side, part in ((False, train), (True, held)) for name in part.names}

    few, many = sides(sorted(names)), sides([*sorted(names), *(f"new {i}" for i in range(50))])
    moved = [name for name, side in few.items() if many[name] != side]
    # Only a side that would have been empty takes a document over.
    assert len(moved) <= 1 and (not moved or 1 in (sum(few.values()), len(few) - sum(few.values())))


def test_about_the_fraction_asked_for_is_held_out() -> None:
    c = numbered(*[2] * 2000)
    held = corpus.split(c, 0.1, 0)[1]
    assert held is not None and abs(len(held) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5  # five standard deviations
    with pytest.raises(UserError, match=r"train\.data\.held_out: must lie in \[0, 1\), found 1\.5"):
        corpus.split(c, 1.5, 0)


def test_joined_corpora_are_one_after_the_other() -> None:
    a, b = numbered(2, 3), numbered(4)
    both = corpus.join([a, b])
    assert both.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3] and both.offsets.tolist() == [0, 2, 5, 9]
    assert both.names == ("d0", "d1", "d0") and both.n_bytes.tolist() == [4, 6, 8]
    assert corpus.join([a]) is a and both.identity != corpus.join([b, a]).identity
