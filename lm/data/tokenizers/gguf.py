"""The vocabulary inside a GGUF file as a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.cuts import CUTS, DIGIT, GPT2, Cut
from lm.data.tokenizers.huggingface import HFTokenizer
from lm.errors import UserError, unknown

if TYPE_CHECKING:
    import tokenizers

Field = Callable[[str], Any]  # a metadata key's value, None where the file has none
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # numbers of ``tokenizer.ggml.token_type``


def from_gguf(field: Field, file: str) -> Tokenizer | None:
    """The vocabulary in a GGUF file's metadata; `field(key)` gives a value or None. None when there is none.

    Byte-level BPE (kind ``gpt2``) and SentencePiece's BPE (kind ``llama``); `UserError` for others and damaged tables.
    """
    kind, tokens = field("tokenizer.ggml.model"), field("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise unknown(f"{file} tokenizer.ggml.model", kind, ("gpt2", "llama"))
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{file} tokenizer.ggml.tokens: {len(tokens)} tokens, of which {len(set(tokens))} differ")
    types = field("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{file} tokenizer.ggml.token_type: {len(types)} found, {len(tokens)} needed")
    from tokenizers import AddedToken

    try:
        inner = _byte_bpe(field, file, tokens) if kind == "gpt2" else _sentencepiece_bpe(field, file, tokens, types)
    except UserError:
        raise
    except Exception as e:  # the library raises bare Exception for merges of unknown tokens and the like
        raise UserError(f"{file}: the tokenizer in its metadata cannot be built ({e})") from None
    for number, special in ((CONTROL, True), (USER_DEFINED, False)):
        named = [t for t, c in zip(tokens, types, strict=True) if c == number]
        inner.add_tokens([AddedToken(t, special=special, normalized=False) for t in named])
    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    begins, ends = field("tokenizer.ggml.add_bos_token"), field("tokenizer.ggml.add_eos_token")
    if begins is None:  # as llama.cpp has it
        begins = kind == "llama" or _cut(field, file).begins
    return HFTokenizer(
        inner, bos, eos, (bos,) if begins and bos is not None else (), (eos,) if ends and eos is not None else ()
    )


def _byte_bpe(field: Field, file: str, tokens: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Inner
    from tokenizers import pre_tokenizers as cut

    rule = _cut(field, file)
    merges = [tuple(m.split(" ", 1)) for m in field("tokenizer.ggml.merges") or ()]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = Inner(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole))
    # The library has a step for two of the rules; with them a tokenizer's identity is what it has been.
    gpt2 = rule.rules[-1] == GPT2 and set(rule.rules) <= {DIGIT, GPT2}
    plain = rule.rules[:-1] if gpt2 else rule.rules
    steps: list[Any] = [
        cut.Digits(individual_digits=True) if gpt2 else cut.Split(Regex(pattern), behavior="isolated")
        for pattern in plain
    ]
    inner.pre_tokenizer = cut.Sequence([*steps, cut.ByteLevel(add_prefix_space=False, use_regex=gpt2)])
    inner.decoder = decoders.ByteLevel()
    if rule.composed:
        inner.normalizer = normalizers.NFC()
    return inner


def _cut(field: Field, file: str) -> Cut:
    """How the file's texts are cut into words; a file that does not say it is read as llama.cpp reads it."""
    pre = field("tokenizer.ggml.pre") or "default"
    if pre not in CUTS:
        raise unknown(f"{file} tokenizer.ggml.pre", pre, CUTS)
    return CUTS[pre]


def _sentencepiece_bpe(field: Field, file: str, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """BPE whose merges are ordered by score: SentencePiece joins the pair whose union has the best score."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers

    scores = field("tokenizer.ggml.scores") or ()
    if len(scores) != len(tokens):
        raise UserError(f"{file} tokenizer.ggml.scores: {len(scores)} found, {len(tokens)} needed")
    vocab = {token: i for i, token in enumerate(tokens)}
    plain = {t: s for t, s, c in zip(tokens, scores, types, strict=True) if c not in (UNKNOWN, CONTROL, USER_DEFINED)}
    merges = []
    for token in sorted(plain, key=lambda t: -plain[t]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [p for p in pairs if p[0] in plain and p[1] in plain]
        merges += sorted(found, key=lambda p: (vocab[p[0]], vocab[p[1]]))
    unk = next((t for t, c in zip(tokens, types, strict=True) if c == UNKNOWN), None)
    inner = Inner(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = field("tokenizer.ggml.add_space_prefix") is not False
    space = "\u2581"
    before = [normalizers.Prepend(space)] if prefix else []
    inner.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", space)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *after],
    )
    return inner
