"""What stands before and behind a text: the tokenizer's own rule, as transformers obeys it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folders import BOS, EOS, around, byte_level, write
from tokenizers import processors
from tokenizers.processors import Sequence

from lm.data.record import from_folder, from_gguf
from lm.data.tokenizers import Tokenizer

FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
RULES: dict[str, Any] = {
    "none": None,
    "first": around("<s> $A", **{"<s>": BOS}),
    "last": around("$A </s>", **{"</s>": EOS}),
    "both": around("<s> $A </s>", **{"<s>": BOS, "</s>": EOS}),
    "twice": around("<s> <s> $A", **{"<s>": BOS}),
    "behind bytes": Sequence([processors.ByteLevel(trim_offsets=False), around("<s> $A", **{"<s>": BOS})]),
    "roberta": processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS), trim_offsets=False),
    "bytes alone": processors.ByteLevel(trim_offsets=False),
}
TEXTS = ("ab", "", " a\n", "<s>ab", "naïve 東京 🙂", "a</s>b")


def tokenizer(folder: Path, **config: Any) -> Tokenizer:
    found = from_folder(folder, config).tokenizer
    assert found is not None
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "said", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}], ids=str
)
def test_a_text_is_begun_and_ended_as_in_transformers(rule: str, said: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    inner = byte_level()
    if RULES[rule] is not None:
        inner.post_processor = RULES[rule]
    folder = write(tmp_path / "t", inner, tokenizer_config={**FAST, **said})
    ours, theirs = tokenizer(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert ours.encode_text(text) == theirs(text)["input_ids"], text
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_the_instance_that_was_missed(tmp_path: Path) -> None:
    inner = byte_level()
    inner.post_processor = RULES["first"]
    assert tokenizer(write(tmp_path / "t", inner)).encode_text("ab") == [256, 97, 98]


def test_a_document_ends_once(tmp_path: Path) -> None:
    for rule, want in (("none", [97, EOS]), ("both", [BOS, 97, EOS]), ("last", [97, EOS]), ("first", [BOS, 97, EOS])):
        inner = byte_level()
        if RULES[rule] is not None:
            inner.post_processor = RULES[rule]
        made = tokenizer(write(tmp_path / rule, inner, tokenizer_config=FAST))
        assert made.encode_document("a") == want


def test_truncation_and_padding_of_whoever_saved_the_file_are_not_obeyed(tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_truncation(16)
    inner.enable_padding(length=32)
    made = tokenizer(write(tmp_path / "t", inner))
    assert made.encode("x" * 100) == [120] * 100 and made.encode_text("abc") == [97, 98, 99]


def gguf(**changes: Any) -> Tokenizer:
    """A vocabulary of SentencePiece's kind: ``<unk>``, ``<s>``, ``</s>``, and letters."""
    letters = [*"\u2581abc"]
    fields: dict[str, Any] = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *letters],
        "scores": [0.0] * 3 + [-1.0] * len(letters),
        "token_type": [2, 3, 3] + [1] * len(letters),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    found = from_gguf(lambda key: fields.get(key.removeprefix("tokenizer.ggml.")), "m.gguf").tokenizer
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, (1,), ()),  # llama.cpp's own choice for this kind
        ({"add_bos_token": False}, (), ()),
        ({"add_bos_token": True, "add_eos_token": True}, (1,), (2,)),
        ({"bos_token_id": None}, (), ()),
    ],
    ids=str,
)
def test_a_gguf_file_says_it_in_two_keys(changes: dict[str, Any], before: Any, after: Any) -> None:
    made = gguf(**changes)
    assert (made.before, made.after) == (before, after)
    assert made.encode_text("a b") == [*before, *made.encode("a b"), *after]


@pytest.mark.parametrize(
    ("pre", "add", "before"),
    [("llama-bpe", None, (4,)), ("llama-bpe", False, ()), ("gpt-2", None, ()), ("gpt-2", True, (4,))],
)
def test_byte_level_vocabularies_in_gguf(pre: str, add: bool | None, before: tuple[int, ...]) -> None:
    tokens = ["a", "b", "c", "ab", "<s>"]
    made = gguf(
        model="gpt2",
        tokens=tokens,
        token_type=[1] * 4 + [3],
        merges=["a b"],
        pre=pre,
        add_bos_token=add,
        bos_token_id=4,
    )
    assert made.encode_text("abc") == [*before, 3, 2]
