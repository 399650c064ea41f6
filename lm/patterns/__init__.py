"""SOCKET pattern: which keys a query sees, and at which positions.

A plug is a frozen dataclass with ``branches(ctx: Context) -> tuple[Branch, ...]`` (disjoint branches of one softmax)
and, when layers differ, ``for_layer(i) -> plug``. Optional: ``keeps`` = (sinks, window), all that a cache must hold;
``summary`` (`lm.attention.blocks.Summary`), what a cache must keep of every block of keys; ``check(model_config)``;
``records(ctx, branches) -> {name: array[B, T, ...]}``, what the decoder's `records` collects of the layer.
``lists_keys``: True where single keys are listed at run time, which the backend ``pallas`` refuses.
"""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "causal": "lm.patterns.causal:Causal",
        "bidirectional": "lm.patterns.causal:Bidirectional",
        "sliding_window": "lm.patterns.sliding_window:SlidingWindow",
        "streaming": "lm.patterns.streaming:Streaming",
        "lm_infinite": "lm.patterns.lm_infinite:LMInfinite",
        "longheads": "lm.patterns.longheads:LongHeads",
    }
)
