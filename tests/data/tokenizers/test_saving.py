"""Every tokenizer comes back from what it saves and says of itself."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lm.data.record import TextRecord, from_description, from_folder
from lm.data.texts import Document
from lm.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    ValueTokenizer,
    bpe,
    from_directory,
)

TEXT = "the cat sat on the mat"


def byte_level_bpe(cache: Path) -> Tokenizer:
    return bpe.trained([Document("d", TEXT, "test", "none")], 270, cache)


def sentencepiece(cache: Path) -> Tokenizer:
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 9), model_writer=model, vocab_size=15, minloglevel=2
    )
    inner = library.SentencePieceProcessor()
    inner.LoadFromSerializedProto(model.getvalue())
    return SentencePieceTokenizer(inner, bos_id=1, eos_id=2)


@pytest.mark.parametrize("kind", ["bytes", "bytes without an end", "bpe", "sentencepiece"])
def test_it_comes_back(kind: str, tmp_path: Path) -> None:
    made = {
        "bytes": lambda: ByteTokenizer(),
        "bytes without an end": lambda: ByteTokenizer(None, None),
        "bpe": lambda: byte_level_bpe(tmp_path / "cache"),
        "sentencepiece": lambda: sentencepiece(tmp_path / "cache"),
    }[kind]()
    folder = tmp_path / "saved"
    folder.mkdir()
    record = TextRecord.of(made, "{{ messages }}")
    record.save(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    assert about["chat_template"] == "{{ messages }}" and ("eos_token" in about) == (made.eos_id is not None)
    described = json.loads(json.dumps(record.describe()))
    for back in (from_description(folder, described).tokenizer, from_folder(folder, record.config).tokenizer):
        assert back is not None and (back.bos_id, back.eos_id) == (made.bos_id, made.eos_id)
        assert back.encode(TEXT) == made.encode(TEXT) and back.decode(back.encode(TEXT)) == TEXT
    back = from_description(folder, described).tokenizer
    assert back is not None and back.identity == made.identity


def test_bins_need_no_file(tmp_path: Path) -> None:
    made = ValueTokenizer(bins=8, context=2, low=-1.5, high=3.0)
    made.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert from_description(tmp_path, json.loads(json.dumps(made.describe()))).tokenizer == made


def test_without_a_file_there_is_none(tmp_path: Path) -> None:
    assert from_directory(tmp_path) is None and from_description(tmp_path, {}).tokenizer is None
