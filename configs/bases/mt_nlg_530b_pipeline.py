"""Megatron-Turing NLG 530B in the paper's own layout (arXiv 2201.11990): data x tensor x pipeline.

A replica is 280 chips: 35 stages of three layers, each cut over 8 by tensor parallelism; 8 replicas, the paper's
smallest number, are the 2,240 chips of a v5p slice of 4 x 20 x 28. One row is a microbatch. The paper's 1,920 rows a
step are 240 a replica; 245 is the next number that 35 stages can share, so that embeddings and loss are computed once
and not by every stage. Tokens between layers are cut over `tensor` too (Megatron's sequence parallelism, arXiv
2205.05198, by some of the same authors): a stage holds the inputs of its layers for all microbatches
(`lm.sharding.pipeline`), and a chip an eighth of them.
"""

from __future__ import annotations

from typing import Any

from configs.bases import mt_nlg_530b

POD = "v5p:4x20x28"  # a slice that its training step is certified for

model = mt_nlg_530b.model


def train() -> dict[str, Any]:
    """The recipe of the other layout, in one part, 245 microbatches a replica."""
    mesh = {
        "data": -1,
        "stage": 35,
        "tensor": 8,
        "microbatches": 245,
        "rules": {"stream": ("sequence", "tensor")},
    }
    return {**mt_nlg_530b.train(), "batch": 8 * 245, "accumulate": 1, "mesh": mesh}
