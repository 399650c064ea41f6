"""SOCKET objective: what training minimises (`lm.objectives.base.Objective`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table({"causal": "lm.objectives.causal:Causal"})
