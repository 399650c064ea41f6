"""SOCKET pattern: which keys a query sees, and at which positions (`lm.patterns.base.Pattern`)."""

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
