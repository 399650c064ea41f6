"""Tokenizers: bytes, byte-level BPE, ``tokenizer.json``, SentencePiece, a GGUF file's vocabulary, bins of numbers."""

from __future__ import annotations

from lm.data.tokenizers.base import Tokenizer, check_ids, check_vocab
from lm.data.tokenizers.bytes import ByteTokenizer
from lm.data.tokenizers.folder import from_directory
from lm.data.tokenizers.gguf import from_gguf
from lm.data.tokenizers.huggingface import HFTokenizer, from_json
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer, from_sentencepiece
from lm.data.tokenizers.values import ValueTokenizer

__all__ = [
    "ByteTokenizer",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "ValueTokenizer",
    "check_ids",
    "check_vocab",
    "from_directory",
    "from_gguf",
    "from_json",
    "from_sentencepiece",
]
