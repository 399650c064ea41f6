"""Tokenizers against the libraries that define them: `transformers`' pipelines, and `sentencepiece` itself."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lm.data.tokenizers import ByteTokenizer, HFTokenizer, check_vocab, from_directory, from_gguf
from lm.data.tokenizers.cuts import CUTS
from lm.errors import UserError

CORPUS = [
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;",
    "def f(x, y):\n    return x**2 + y  # they're 12345 or 1999\n\n\nprint(f(1, 2))",
    "We'll see; THEY'RE here, it's 3.14159 and 2,000,000! Don't   stop.\r\n",
    "naïve café — “quoted” 東京 … ½ £5",
] * 3
TEXTS = [
    *CORPUS[:4],
    "1234567 tokens\t\twith  spaces   \n \n end",
    "unseen: Ωmega łódź 🙂 cafe\u0301",
    " leading and trailing ",
    "don'T I'LL x's",
    "a",
]


def byte_level() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE, whole words and triples of digits among them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, min_frequency=1))
    model = json.loads(inner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def metadata(pre: str | None = None, **changes: Any) -> dict[str, Any]:
    tokens, merges = byte_level()
    fields: dict[str, Any] = {
        "model": "gpt2",
        "tokens": [*tokens, "<|im_start|>"],
        "merges": merges,
        "token_type": [1] * len(tokens) + [3],
        "pre": pre,
        **changes,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}


def load(fields: dict[str, Any]) -> Any:
    return from_gguf(lambda key: fields.get(key), "m.gguf")


def bpe(fields: dict[str, Any], **options: Any) -> Any:
    vocab = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))


def agree(ours: Any, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs(text), text


def test_qwen_vocabulary_is_what_transformers_builds() -> None:
    transformers = pytest.importorskip("transformers")
    fields = metadata("qwen2")
    vocab = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    start = "<|im_start|>"
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=start, eos_token=start, pad_token=start)
    agree(load(fields), lambda text: theirs(text, add_special_tokens=False)["input_ids"])


def test_llama3_vocabulary_is_what_transformers_builds() -> None:
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokens, merges = byte_level()
    fields = metadata("llama-bpe", tokens=[*tokens, "<|im_start|>", "Ġstop.", "123"], token_type=None)

    class Converter(TikTokenConverter):
        def tokenizer(self) -> Any:
            return bpe(fields, ignore_merges=True)

    theirs = Converter().converted()
    ours = load(fields)
    agree(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids)
    assert ours.encode("123456") != ours.encode("12") + ours.encode("3456"), "digits are cut in threes from the left"
    assert ours.encode("123") == [len(tokens) + 2], "a word that is a token needs no merges"


@pytest.mark.parametrize("pre", ["gpt-2", "phi-2", "olmo"])
def test_gpt2_vocabulary(pre: str | None) -> None:
    fields = metadata(pre)
    inner = bpe(fields)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    agree(load(fields), lambda text: inner.encode(text).ids)


@pytest.mark.parametrize("pre", sorted(CUTS))
def test_byte_level_text_comes_back(pre: str) -> None:
    ours = load(metadata(pre))
    for text in TEXTS:
        if not CUTS[pre].composed or "\u0301" not in text:  # Qwen composes accents first
            assert ours.decode(ours.encode(text)) == text
    start = ours.vocab_size - 1
    assert ours.encode("<|im_start|>a") == [start, *ours.encode("a")]


@pytest.mark.parametrize("pre", [*sorted(CUTS), None])
def test_words_are_cut_as_llama_cpp_cuts_them(pre: str | None) -> None:
    """Its own loop, with another library of regular expressions: every rule on the pieces of the one before."""
    regex = pytest.importorskip("regex")
    cut = CUTS[pre or "default"]
    ours = load(metadata(pre)).inner.pre_tokenizer
    for text in [
        *TEXTS,
        "I'D we'LL a's 'T x\u00b2 12345678 3rd\u0301 \u00c9tUDE HTTPServer myVar_2 $5+3=8 `a|b` \n\n \t x ",
    ]:
        pieces = [text]
        for rule in cut.rules:
            found = []
            for piece in pieces:
                at = 0
                for m in regex.finditer(rule, piece):
                    if m.end() > m.start():
                        found += [p for p in (piece[at : m.start()], m.group()) if p]
                        at = m.end()
                found += [piece[at:]] if piece[at:] else []
            pieces = found
        want, at = [], 0
        for piece in pieces:
            want.append((at, at + len(piece)))
            at += len(piece)
        assert [span for _, span in ours.pre_tokenize_str(text)] == want, text


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines()]),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return out.getvalue()


def sentencepiece_metadata(model: bytes) -> dict[str, Any]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(sp.vocab_size())
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
    fields = {
        "model": "llama",
        "tokens": [sp.id_to_piece(i) for i in ids],
        "scores": [sp.get_score(i) for i in ids],
        "token_type": kinds,
        "bos_token_id": sp.bos_id(),
        "eos_token_id": sp.eos_id(),
    }
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items()}


def test_sentencepiece_vocabulary_in_gguf_is_the_library(sentencepiece_model: bytes) -> None:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    ours = load(sentencepiece_metadata(sentencepiece_model))
    agree(ours, sp.encode)
    assert max(len(sp.encode(text)) for text in TEXTS) > 20
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, sp.vocab_size())


def test_sentencepiece_file_in_a_directory(sentencepiece_model: bytes, tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    ours = from_directory(tmp_path, 1, 2)
    assert ours is not None
    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    agree(ours, sp.encode)
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, len(ours.identity)) == (sp.vocab_size(), 1, 2, 64)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\xff\xff"])
def test_damaged_sentencepiece_file(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        from_directory(tmp_path)


def test_without_the_library_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"tokenizer\.model: .*pip install 'decoder-lab\[data\]'"):
        from_directory(tmp_path)


def test_tokenizer_json_comes_before_sentencepiece(tmp_path: Path) -> None:
    bpe(metadata()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    ours = from_directory(tmp_path, eos_id=3)
    assert isinstance(ours, HFTokenizer) and ours.eos_id == 3 and ours.bos_id is None
    assert from_directory(tmp_path / "none") is None


def test_no_vocabulary_in_the_file() -> None:
    assert load({}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, ("tokenizer.ggml.model", "'bert'", "gpt2, llama")),
        ({"pre": "qwen3"}, ("tokenizer.ggml.pre", "did you mean 'qwen2'")),
        ({"pre": "kimi-k2"}, ("tokenizer.ggml.pre", "unknown name 'kimi-k2'")),
        ({"tokens": ["a", "a"], "token_type": None}, ("tokenizer.ggml.tokens", "2 tokens, of which 1 differ")),
        ({"token_type": [1]}, ("tokenizer.ggml.token_type", "1 found")),
        ({"merges": ["a zzz"]}, ("cannot be built", "zzz")),
        ({"merges": ["a"]}, ("cannot be built",)),
        ({"model": "llama"}, ("tokenizer.ggml.scores", "0 found")),
    ],
)
def test_damaged_metadata(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load(metadata(**changes))
    for word in ("m.gguf", *words):
        assert word in str(caught.value)


def test_bytes() -> None:
    ours = ByteTokenizer()
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == list(text.encode()) and ours.decode([256, *ids, 257]) == text
    assert (ours.vocab_size, ByteTokenizer(None, None).vocab_size, ByteTokenizer(None, 256).vocab_size) == (
        258,
        256,
        257,
    )


def test_vocabulary_with_gaps_needs_a_row_for_its_largest_id() -> None:
    """Three tokens, but an id of 40: counting tokens would let it pass, and the embedding would silently be clipped."""
    ours = HFTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 7, "c": 40}, unk_token="a")))
    check_vocab(ours, SimpleNamespace(vocab_size=41))
    with pytest.raises(UserError, match=r"41 ids.*model\.vocab_size = 40"):
        check_vocab(ours, SimpleNamespace(vocab_size=40))


def test_identity_follows_the_content() -> None:
    a, b = load(metadata("gpt-2")), load(metadata("smollm"))
    assert a.identity == load(metadata("phi-2")).identity != b.identity
