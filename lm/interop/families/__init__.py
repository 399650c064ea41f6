"""Model families of `transformers`: config.json to ``ModelConfig`` and back, and tables of tensor names."""

from __future__ import annotations

from lm.interop.families.common import Family
from lm.interop.families.deepseek import DEEPSEEK_V3
from lm.interop.families.experts import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from lm.interop.families.gemma import GEMMA2, GEMMA3
from lm.interop.families.gpt2 import GPT2
from lm.interop.families.gpt_neox import GPT_NEOX
from lm.interop.families.gpt_oss import GPT_OSS
from lm.interop.families.llama import LLAMA, MISTRAL
from lm.interop.families.olmo2 import OLMO2
from lm.interop.families.phi3 import PHI3
from lm.interop.families.qwen import QWEN2, QWEN3
from lm.interop.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Family"]

_OLDER = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_NEOX, GPT2)
_ALL = (*_OLDER, OLMO2, PHI3, SMOLLM3, GEMMA2, GEMMA3, GPT_OSS, DEEPSEEK_V3)
FAMILIES = {family.name: family for family in _ALL}  # a model is written as the first that can express it
