"""The vocabulary inside a GGUF file as a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.huggingface import HFTokenizer
from lm.errors import UserError, unknown

if TYPE_CHECKING:
    import tokenizers

Field = Callable[[str], Any]  # a metadata key's value, None where the file has none
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # numbers of ``tokenizer.ggml.token_type``
# ``tokenizer.ggml.pre`` -> digits of one token where text is cut by GPT-4's rule of words; None: by GPT-2's rule
CUTS = {"default": None, "gpt-2": None, "smollm": None, "llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}

BEGIN = ("llama-bpe",)  # byte-level vocabularies whose texts begin with bos unless the file says otherwise


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
        begins = kind == "llama" or field("tokenizer.ggml.pre") in BEGIN
    return HFTokenizer(
        inner, bos, eos, (bos,) if begins and bos is not None else (), (eos,) if ends and eos is not None else ()
    )


def _byte_bpe(field: Field, file: str, tokens: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Inner
    from tokenizers import pre_tokenizers as cut

    pre = field("tokenizer.ggml.pre") or "default"
    if pre not in CUTS:
        raise unknown(f"{file} tokenizer.ggml.pre", pre, CUTS)
    merges = [tuple(m.split(" ", 1)) for m in field("tokenizer.ggml.merges") or ()]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token whole, even where no sequence of merges leads to it.
    inner = Inner(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    digits = CUTS[pre]
    steps: list[Any] = [cut.Digits(individual_digits=True)] if pre == "smollm" else []
    if digits:
        contractions, words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
        others, spaces = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
        rule = Regex("|".join((contractions, words, digits, others, spaces)))
        steps.append(cut.Split(rule, behavior="isolated"))
    steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=not digits))
    inner.pre_tokenizer = cut.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    return inner


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
