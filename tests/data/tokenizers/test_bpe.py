"""Tokenizers by name: trained the same everywhere, lossless, kept whole or not at all."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import record
from lm.data.texts.document import Document
from lm.data.tokenizers import HFTokenizer, bpe
from lm.errors import UserError

PROGRAM = """
import sys
from pathlib import Path
from lm.data import texts
from lm.data import record
from lm.data.tokenizers import HFTokenizer, bpe
print(bpe.trained(texts.documents("kjv:Jude,kjv:Ruth"), 400, Path(sys.argv[1])).identity)
"""


def tokenizer_of(spec: str, documents: Any, cache: Path) -> Any:
    """The tokenizer that the setting names."""
    return record.by_name(spec, documents, cache).tokenizer


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{i}", t, "test", "none") for i, t in enumerate(texts)]


@functools.lru_cache(maxsize=1)
def trained() -> HFTokenizer:
    docs = documents("the cat sat on the mat <|endoftext|> " * 30)
    return HFTokenizer(bpe._train(docs, 280))


def test_training_depends_on_the_text_alone(tmp_path: Path) -> None:
    """The library hashes words with random seeds and counts them in threads; neither may show."""
    found = set()
    for name, parallel in (("a", "true"), ("b", "false")):
        env = {**os.environ, "TOKENIZERS_PARALLELISM": parallel}
        program = [sys.executable, "-c", PROGRAM, str(tmp_path / name)]
        found.add(subprocess.run(program, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1 and len(found.pop().strip()) == 64


@given(st.text(max_size=30))
@settings(deadline=None)
def test_any_text_comes_back(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates are no text
    assert trained().decode(trained().encode(text)) == text


def test_text_that_spells_the_end_is_no_end(tmp_path: Path) -> None:
    docs = documents("to end a text write <|endoftext|> at its end " * 20)
    for _ in range(2):  # trained, then read
        tokenizer = tokenizer_of("bpe:300", lambda: docs, tmp_path)
        ids = tokenizer.encode("so <|endoftext|> it is")
        assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "so <|endoftext|> it is"


def test_size_is_the_size_asked_for(tmp_path: Path) -> None:
    docs = documents("the cat sat on the mat and that was that " * 20)
    assert bpe.trained(docs, 270, tmp_path).vocab_size == 270
    assert 258 <= bpe.trained(documents("aa"), 5000, tmp_path).vocab_size < 270  # there are no more pairs to join


def test_paths(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.save(str(tmp_path / "mine.json"))
    found = tokenizer_of(str(tmp_path / "mine.json"), list, tmp_path)
    assert found.encode("b") == [1] and found.eos_id is None  # it names none


def test_sentencepiece_models_by_path(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 9), model_writer=model, vocab_size=15, minloglevel=2
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    for spec in (folder, folder / "tokenizer.model"):
        pieces = tokenizer_of(str(spec), list, tmp_path)
        assert pieces.vocab_size == 15 and pieces.eos_id == 2
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(UserError, match=r"text\.model: not a SentencePiece model"):
        tokenizer_of(str(tmp_path / "text.model"), list, tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer '.*tokenizer\.json' \(did you mean 'tokenizer\.model'\?\)"):
        tokenizer_of(str(folder / "tokenizer.json"), list, tmp_path)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "no tokenizer ''"),
        ("bpe", "no tokenizer 'bpe'"),
        ("bpe:", "the size is not a number"),
        ("bpe:-5", "the size is not a number"),
        ("bpe:257", "valid: bpe:N with N from 258 to 1048576"),
        (f"bpe:{2**64}", "valid: bpe:N with N from 258 to 1048576"),
        ("{here}", "holds no tokenizer.json and no tokenizer.model"),
        ("{here}/text.json", "text.json: not a tokenizer"),
        ("{here}/test.json", "(did you mean 'text.json'?)"),
    ],
)
def test_names_of_no_tokenizer(spec: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no tokenizer")
    with pytest.raises(UserError) as e:
        tokenizer_of(spec.format(here=tmp_path), lambda: documents("x"), tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"tokenizers.*cannot be written"):
        tokenizer_of("bpe:260", lambda: documents("abab"), tmp_path)
