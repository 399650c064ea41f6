"""Folders with a SentencePiece model and no tokenizer.json, token for token as `transformers` reads them."""

from __future__ import annotations

import io
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from folders import write

from lm.data.record import from_folder

BASE = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONFIG = {"model_type": "llama", "vocab_size": 401, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = (
    "hello world",
    "a <|im|> b",
    "a<|im|>b ",
    "<|im|>user\nhi<|im|>\n",
    "x</s>y",
    "</s> y",
    "<s>hello",
    "é\u4e2d\n\n z",
    "",
)


def added(**flags: bool) -> dict[str, Any]:
    token = {"content": "<|im|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"added_tokens_decoder": {"400": {**token, "special": True, **flags}}}


SAYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a beginning": {"add_bos_token": True},
    "no beginning": {"add_bos_token": False},
    "an end": {"add_eos_token": True},
    "not legacy": {"legacy": False},
    "an added token": added(),
    "an added token that eats before": added(lstrip=True),
    "an added token that eats behind": added(rstrip=True),
    "an added token that stands alone": added(single_word=True),
    "no space in front": {"add_prefix_space": False, **added()},
}


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the library sentencepiece is not installed")
    made = {}
    for kind in ("bpe", "unigram"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(topics[k] for k in sorted(topics)[:40]).splitlines()),
            model_writer=model,
            vocab_size=400,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        made[kind] = model.getvalue()
    return made


def folder(path: Path, model: bytes, says: dict[str, Any] | None) -> Path:
    path.mkdir()
    (path / "tokenizer.model").write_bytes(model)
    return write(path, config=CONFIG, **({} if says is None else {"tokenizer_config": {**BASE, **says}}))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_as_transformers(kind: str, models: dict[str, bytes], tmp_path: Path) -> None:
    """Also what is written: another folder, read again by both."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for i, (name, says) in enumerate(SAYS.items()):
        here = folder(tmp_path / str(i), models[kind], says)
        record = from_folder(here, CONFIG)
        record.save(write(tmp_path / f"{i} saved", config=CONFIG))
        for place in (here, tmp_path / f"{i} saved"):
            theirs = transformers.AutoTokenizer.from_pretrained(str(place))
            ours = from_folder(place, CONFIG).tokenizer
            assert ours is not None
            for text in TEXTS:
                want = theirs(text)["input_ids"]
                assert ours.encode_text(text) == want, (name, place.name, text)
                assert ours.decode(want) == theirs.decode(want), (name, place.name, text)


def test_a_bare_file_is_read_as_llama_was_trained(models: dict[str, bytes], tmp_path: Path) -> None:
    """Nothing says how a text begins: by its beginning token, and every piece as the library encodes it."""
    import sentencepiece

    record = from_folder(folder(tmp_path / "bare", models["bpe"], None), CONFIG)
    library = sentencepiece.SentencePieceProcessor(model_proto=models["bpe"])
    assert record.tokenizer is not None
    assert record.tokenizer.encode_text("hello world") == [1, *library.encode("hello world")]
    assert record.tokenizer.encode("a</s>b") == [*library.encode("a"), 2, *library.encode("b")]
    record.save(write(tmp_path / "saved", config=CONFIG))
    again = from_folder(tmp_path / "saved", CONFIG).tokenizer
    assert again is not None and again.identity == record.tokenizer.identity
    assert again.encode_text("a</s>b") == record.tokenizer.encode_text("a</s>b")
