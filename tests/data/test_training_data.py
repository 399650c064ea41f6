"""Rows for training: every token a target once, an order that only seed and step determine, errors before any work."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import build
from lm.data import corpus, packing, record
from lm.data.corpus import Corpus
from lm.data.loader import Loader, held_out_batches
from lm.data.texts.document import Document
from lm.data.tokenizers import ByteTokenizer, bpe
from lm.errors import UserError
from lm.train.config import TrainConfig
from lm.train.data import prepare


def tokenizer_of(spec: str, documents: Any, cache: Path) -> Any:
    """The tokenizer that the setting names."""
    return record.by_name(spec, documents, cache).tokenizer


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{i}", t, "test", "none") for i, t in enumerate(texts)]


def numbered(*lengths: int) -> Corpus:
    """A corpus whose token i is i, so that every token can be told from every other."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = tuple(f"d{i}" for i in range(len(lengths)))
    return Corpus(np.arange(offsets[-1], dtype=np.uint32), offsets, np.array(lengths), names, f"numbered {lengths}")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 17), st.sampled_from(packing.MODES))
@settings(max_examples=150, deadline=None)
def test_every_token_but_a_documents_first_is_a_target_once(lengths: list[int], T: int, mode: str) -> None:
    c = numbered(*lengths)
    if c.n_tokens < T + 1 or max(lengths) < 2:
        with pytest.raises(UserError, match=r"train\.data\."):
            packing.Packed(c, T, mode)
        return
    packed = packing.Packed(c, T, mode)
    document = np.repeat(np.arange(len(lengths)), lengths)
    targets: collections.Counter[int] = collections.Counter()
    for i in range(len(packed)):
        row = packing.split_row(packed[i])
        assert all(v.shape == (T,) for v in row.values())
        counted = row["weights"] > 0
        inputs, outputs = row["inputs"][counted], row["targets"][counted]
        assert (outputs == inputs + 1).all() and (document[inputs] == document[outputs]).all()
        targets.update(outputs.tolist())
        inside = row["segments"] > 0
        assert (row["index"][inside] >= 0).all() and (row["index"][~inside] == -1).all()
        same = row["segments"][1:] == row["segments"][:-1]
        step = np.diff(row["index"])
        assert (step[same & inside[1:]] == 1).all() and (row["index"][1:][~same & inside[1:]] == 0).all()
    first = set(c.offsets[:-1].tolist())
    assert targets == dict.fromkeys(set(range(c.n_tokens)) - first, 1)


def test_best_fit_keeps_pieces_whole_and_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 400)
    packed = packing.Packed(numbered(*lengths.tolist()), 127, "best_fit")
    assert packed.fill > 0.97
    starts = sum(1 for i in range(len(packed)) for n in np.unique(packed[i]["segments"]) if n)
    assert starts == sum(-(-(n - 1) // 127) for n in lengths)
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_a_corpus_is_tokenized_once_and_made_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Counting(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            calls.append(text)
            return super().encode(text)

    docs = documents("abc", "déf")
    first = corpus.tokenize(docs, Counting(), tmp_path)
    again = corpus.tokenize(docs, Counting(), tmp_path)
    assert len(calls) == 2 and first.identity == again.identity
    tokens = again.tokens.tolist()
    assert tokens == [97, 98, 99, 257, 100, 195, 169, 102, 257] and again.tokens.dtype == np.uint16
    assert again.offsets.tolist() == [0, 4, 9] and again.n_bytes.tolist() == [3, 4]
    (folder,) = (tmp_path / "tokens").iterdir()
    path = folder / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-5])
    assert corpus.tokenize(docs, Counting(), tmp_path).tokens.tolist() == tokens
    assert len(calls) == 4
    other = corpus.tokenize(documents("abc", "dxf"), Counting(), tmp_path)
    assert other.identity != first.identity


def test_whole_documents_are_held_out() -> None:
    c = numbered(*([3] * 40))
    train, held = corpus.split(c, 0.25, 0)
    assert held is not None and 4 <= len(held) <= 18 and len(train) + len(held) == 40
    assert set(train.names) | set(held.names) == set(c.names)
    tokens = np.concatenate([train.tokens, held.tokens])
    assert sorted(tokens.tolist()) == list(range(120)) and train.n_tokens == 3 * len(train)
    again = corpus.split(c, 0.25, 0)[1]
    other = corpus.split(c, 0.25, 1)[1]
    assert again is not None and other is not None
    assert again.names == held.names and again.identity == held.identity
    assert other.names != held.names and other.identity != held.identity
    assert corpus.split(c, 0.0, 0) == (c, None)
    tiny = corpus.split(numbered(5, 5), 0.01, 0)
    assert tiny[1] is not None and (len(tiny[0]), len(tiny[1])) == (1, 1)
    with pytest.raises(UserError, match=r"one document \(d0\), and whole documents are held out"):
        corpus.split(numbered(50), 0.1, 0)


def test_bpe_is_trained_once_for_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents("the cat sat on the mat " * 30, "the dog, the log " * 20)
    first = tokenizer_of("bpe:280", lambda: docs, tmp_path)
    assert 257 < first.vocab_size <= 280 and first.eos_id == 0 and first.bos_id is None
    text = "a cät on\tthe log\n"
    assert first.decode(first.encode(text)) == text and len(first.encode("the cat")) < 4
    monkeypatch.setattr(bpe, "_train", lambda *a: pytest.fail("trained again"))
    assert tokenizer_of("bpe:280", lambda: docs, tmp_path).identity == first.identity
    monkeypatch.undo()
    assert tokenizer_of("bpe:280", lambda: docs[:1], tmp_path).identity != first.identity
    (path, *_) = (tmp_path / "tokenizers").iterdir()
    for path in (tmp_path / "tokenizers").iterdir():
        path.write_text("{")
    assert tokenizer_of("bpe:280", lambda: docs, tmp_path).identity == first.identity


def test_a_tokenizer_does_not_see_what_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"document number {i} " * 30)
    seen: list[str] = []
    original = bpe._train
    monkeypatch.setattr(bpe, "_train", lambda docs, n: (seen.extend(d.text for d in docs), original(docs, n))[1])
    data = {"texts": (str(tmp_path / "*.txt"),), "tokenizer": "bpe:270", "seq_len": 16, "held_out": 0.4}
    made = prepare(build(TrainConfig, {"data": data}, "train"), tmp_path / "cache")
    assert made.held_out is not None
    assert len(seen) == len(made.train[0].corpus) == 8 - len(made.held_out.corpus)


def test_tokenizers_from_files(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    inner.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        found = tokenizer_of(str(spec), list, tmp_path)
        assert found.eos_id == 0 and found.encode("b") == [2]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bpe:16", "bpe:16: valid: bpe:N with N from 258 to"),
        ("bpe:many", "bpe:many: the size is not a number"),
        ("byte", "no tokenizer 'byte' (did you mean 'bytes'?)"),
        ("nowhere/tokenizer.json", "no tokenizer 'nowhere/tokenizer.json'"),
        ("nowhere.model", "no tokenizer 'nowhere.model'"),
    ],
)
def test_tokenizers_that_are_none(spec: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        tokenizer_of(spec, lambda: documents("x"), tmp_path)
    assert words in str(e.value)


def rows(batch: dict[str, np.ndarray]) -> list[int]:
    """The first token of every row: which row it is."""
    return [int(x) for x in batch["inputs"][:, 0]]


def source(n: int = 50, start: int = 0, T: int = 4) -> packing.Packed:
    """Rows 0 … n - 1 begin with tokens `start`, `start` + T, …"""
    c = numbered(n * T + 1)
    shifted = Corpus(c.tokens + start, c.offsets, c.n_bytes, c.names, f"{c.identity} {start}")
    return packing.Packed(shifted, T)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(processes: int) -> None:
    one = Loader([source()], None, 8, 3)
    many = [Loader([source()], None, 8, 3, i, processes) for i in range(processes)]
    for step in (0, 1, 17, 400):
        whole = one.at(step)
        parts = [loader.at(step) for loader in many]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order() -> None:
    loader = Loader([source(48)], None, 8, 0)
    epochs = [[r for s in range(6 * e, 6 * e + 6) for r in rows(loader.at(s))] for e in range(3)]
    assert all(sorted(e) == [4 * i for i in range(48)] for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows(Loader([source(48)], None, 8, 1).at(0)) != rows(loader.at(0))


def test_going_on_from_any_step_gives_the_same_batches() -> None:
    loader = Loader([source()], None, 8, 0)
    batches = loader.iterate(0)
    seen = [next(batches) for _ in range(9)]
    assert batches.state["step"] == 9
    batches.close()
    later = loader.iterate(5)
    for step in range(5, 9):
        batch = next(later)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, seen[step][name])
            np.testing.assert_array_equal(array, loader.at(step)[name])
    assert later.state == {"step": 9, "order": loader.identity}
    later.close()


def test_identity_is_the_order() -> None:
    same = Loader([source()], None, 8, 0).identity
    assert Loader([source()], None, 8, 0, 1, 2).identity == same  # other processes, same order
    for other in (
        Loader([source()], None, 8, 1),
        Loader([source()], None, 4, 0),
        Loader([source(49)], None, 8, 0),
        Loader([source()], [1.0], 8, 0),
    ):
        assert other.identity != same


def test_mixtures_keep_their_proportions() -> None:
    loader = Loader([source(50), source(30, start=10_000), source(20, start=20_000)], [3.0, 1.0, 0.0], 8, 0)
    drawn = collections.Counter(r // 10_000 for s in range(100) for r in rows(loader.at(s)))
    assert drawn[0] == pytest.approx(600, abs=2) and drawn[1] == pytest.approx(200, abs=2) and drawn[2] == 0
    first_epoch = [r for s in range(50) for r in rows(loader.at(s)) if r < 10_000][:50]
    assert sorted(first_epoch) == [4 * i for i in range(50)]  # every source still reads its rows once an epoch
    plain = Loader([source(50), source(30, start=10_000)], None, 8, 0)
    assert collections.Counter(r // 10_000 for s in range(10) for r in rows(plain.at(s))) == {0: 50, 1: 30}


def test_held_out_rows_come_in_order_and_the_last_batch_is_filled_up() -> None:
    found = list(held_out_batches(source(10), 4, 9))
    assert [rows(b) for b in found] == [[0, 4, 8, 12], [16, 20, 24, 28], [32, 0, 0, 0]]
    assert found[-1]["weights"].sum() == 4 and (found[-1]["index"][1:] == -1).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Loader([source(5)], None, 8, 0), "train.batch: 8 rows asked for, the text makes 5"),
        (lambda: Loader([source()], None, 8, 0, 0, 3), "train.batch: 8 rows are not divisible by 3 processes"),
        (
            lambda: packing.Packed(numbered(9), 4, "best"),
            "train.data.packing: unknown name 'best' (did you mean 'best_fit'?)",
        ),
        (lambda: packing.Packed(numbered(4), 4), "4 tokens asked for, the text has 4 in all"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError) as e:
        make()
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"texts": ()}}, "train.data.texts: is empty"),
        ({"data": {"text": "kjv"}}, "train.data.text: unknown key (did you mean 'texts'?)"),
        ({"data": {"seq_len": 1}}, "train.data.seq_len: must be at least 2"),
        ({"data": {"packing": "greedy"}}, "valid: best_fit, concat"),
        ({"data": {"held_out": 1.0}}, "train.data.held_out: must lie in [0, 1)"),
        ({"data": {"weights": (1.0, 2.0)}}, "train.data.weights: 2 weights for 1 texts"),
        ({"data": {"weights": (0.0,)}}, "train.data.weights: found (0.0,)"),
        ({"steps": 0}, "train.steps: must be at least 1"),
        ({"steps": 1.5}, "train.steps: expected int, found 1.5"),
        ({"batch": 6, "accumulate": 4}, "train.accumulate: 4 does not divide train.batch = 6; valid: 1, 2, 3, 6"),
        ({"clip": 0.0}, "train.clip: must be positive or None"),
        ({"eval_every": -1}, "train.eval_every: must be at least 0"),
        ({"max_skipped": 0}, "train.max_skipped: must be at least 1"),
        ({"profile": (3,)}, "train.profile: found (3,)"),
        ({"objective": "casual"}, "train.objective.name: unknown name 'casual' (did you mean 'causal'?)"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as e:
        build(TrainConfig, change, "train")
    assert words in str(e.value)


def test_texts_are_prepared_as_the_settings_say(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"line {i} of a text\n" * 20)
    data = {"texts": (str(tmp_path / "*.txt"),), "tokenizer": "bytes", "seq_len": 32, "held_out": 0.3}
    made = prepare(build(TrainConfig, {"data": data}, "train"), tmp_path / "cache")
    assert made.held_out is not None and len(made.held_out.corpus) + len(made.train[0].corpus) == 6
    assert made.bytes_per_token == pytest.approx(340 / 341)
    whole = prepare(build(TrainConfig, {"data": {**data, "held_out": 0.0}}, "train"), tmp_path / "cache")
    assert whole.held_out is None and whole.identity != made.identity
    each = tuple(str(tmp_path / f"{i}.txt") for i in range(6))
    listed = prepare(build(TrainConfig, {"data": {**data, "texts": each}}, "train"), tmp_path / "cache")
    assert len(listed.train) == 1 and listed.bytes_per_token == made.bytes_per_token
    with pytest.raises(UserError, match=r"train\.data\.texts: unknown source or file 'kjw'"):
        prepare(build(TrainConfig, {"data": {**data, "texts": ("kjw",)}}, "train"), tmp_path / "cache")
