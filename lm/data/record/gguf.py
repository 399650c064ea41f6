"""The record of a GGUF file's metadata."""

from __future__ import annotations

from typing import Any

from lm.data.record.record import TextRecord
from lm.data.tokenizers import from_gguf as tokenizer_of
from lm.data.tokenizers.gguf import Field

ENDS = ("eos", "eot", "eom")  # the end of a text, of a turn, and of a message
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TEMPLATE = "tokenizer.chat_template"


def from_gguf(field: Field, file: str) -> TextRecord:
    """What the file says; `field(key)` gives a metadata value or None. Raises `UserError` as the tokenizer does."""
    tokenizer = tokenizer_of(field, file)
    size = 0 if tokenizer is None else tokenizer.vocab_size
    ids = {name: field(f"tokenizer.ggml.{key}_token_id") for name, key in NAMES.items()}
    words = {n: tokenizer.token(i) for n, i in ids.items() if tokenizer is not None and i is not None and i < size}
    ends = [field(f"tokenizer.ggml.{key}_token_id") for key in ENDS]
    templates = {"default": field(TEMPLATE)} | {
        str(name): field(f"{TEMPLATE}.{name}") for name in field("tokenizer.chat_templates") or ()
    }
    return TextRecord(
        tokenizer,
        words,
        ids["bos_token"],
        tuple(dict.fromkeys(int(i) for i in ends if i is not None and i >= 0)),
        ids["pad_token"],
        {name: source for name, source in templates.items() if isinstance(source, str)},
        _generation(field),
        source=file,
    )


def _generation(field: Field) -> dict[str, Any]:
    """How the file says that answers are drawn (``general.sampling.*``), under transformers' names."""
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {theirs: field(f"general.sampling.{ours}") for ours, theirs in names.items()}
    drawn = {name: value for name, value in found.items() if value is not None}
    return {"do_sample": True, **drawn} if drawn else {}
