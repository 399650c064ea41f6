"""How byte-level BPE cuts a text into words before it merges, by the names that GGUF files use (`tokenizer.ggml.pre`).

The rules are llama.cpp's (``src/llama-vocab.cpp``), whose ids a GGUF file is made for. Regular expressions are applied
one after the other, each to the pieces that the ones before it left; what none of them matches stays a piece.

Checked against the ids that llama.cpp publishes for 47 texts per vocabulary (``models/ggml-vocab-*.gguf.out``): all of
deepseek-coder, falcon, gpt-2, mpt, refact and starcoder, and of the SentencePiece vocabularies llama-spm and phi-3.
"""

from __future__ import annotations

from dataclasses import dataclass

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DIGIT = r"\p{N}"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
_UPPER = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
_OTHERS = f"\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_SPACES}"
_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""


def _gpt4(digits: str, letters: str = r"\p{L}", others: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """GPT-4's rule of words, with so many digits in one token."""
    return f"{_ENDINGS}|[^\\r\\n\\p{{L}}\\p{{N}}]?{letters}+|{digits}|{others}|{_SPACES}"


@dataclass(frozen=True)
class Cut:
    """`rules` in their order. `whole`: a word that is a token is taken whole, even where no merges lead to it.
    `begins`: texts begin with bos unless the file says otherwise. `composed`: accents are composed first (NFC)."""

    rules: tuple[str, ...]
    whole: bool = False
    begins: bool = False
    composed: bool = False


_LLAMA3 = _gpt4(r"\p{N}{1,3}")
_QWEN = _gpt4(DIGIT)
_CHINESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    _CHINESE,
    f"{_MARKS}|[^\\r\\n\\p{{L}}\\p{{P}}\\p{{S}}]?[\\p{{L}}\\p{{M}}]+| ?[\\p{{P}}\\p{{S}}]+[\\r\\n]*|{_SPACES}",
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"

_NAMES: tuple[tuple[str, Cut], ...] = (
    ("default", Cut((_PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais "
        "trillion granite-docling",
        Cut((GPT2,)),
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", Cut((DIGIT, GPT2))),
    ("falcon", Cut((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"))),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", Cut((_LLAMA3,), whole=True, begins=True)),
    ("dbrx smaug-bpe glm4 chatglm-bpe", Cut((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen megrez", Cut((_QWEN,), composed=True)),
    ("hunyuan stablelm2 solar-open grok-2 kormo", Cut((_QWEN,))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Cut(_DEEPSEEK)),
    ("deepseek-coder", Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, DIGIT))),
    ("bloom poro-chat gpt3-finnish", Cut((_BLOOM,))),
    ("viking", Cut((_BLOOM, DIGIT))),
    (
        "tekken",
        Cut(
            (f"{_CASED}|{_UPPER}|\\p{{N}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_SPACES}",),
            whole=True,
            begins=True,
        ),
    ),
    (
        "gpt-4o llama4 kanana2 minimax-m2",
        Cut((f"{_CASED}{_ENDINGS}?|{_UPPER}{_ENDINGS}?|{_OTHERS}",)),
    ),
    ("seed-coder", Cut((_gpt4(r"\p{N}{1}", others=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
)
CUTS: dict[str, Cut] = {name: cut for names, cut in _NAMES for name in names.split()}
