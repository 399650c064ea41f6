"""Model families of `transformers`: config.json to ``ModelConfig`` and back, and tables of tensor names."""

from __future__ import annotations

from lm.interop.families.common import Family
from lm.interop.families.experts import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from lm.interop.families.gpt2 import GPT2
from lm.interop.families.gpt_neox import GPT_NEOX
from lm.interop.families.llama import LLAMA, MISTRAL
from lm.interop.families.qwen import QWEN2, QWEN3

__all__ = ["FAMILIES", "Family"]

FAMILIES = {  # by ``model_type``; a model is written as the first that can express it
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
}
