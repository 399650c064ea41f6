"""Where a block's norms stand: the generic suite on what they are not by default, with what goes with them there."""

from __future__ import annotations

import numpy as np
from cases import model
from cases.model import BASE, TOKENS
from cases.plug_case import KindCase, PlugCase

SINKS = {"mixer": {"qk_norm": True, "qk_norm_over": "width", "sink_logits": True}}


class TestNormsOnBothSides(PlugCase):
    """As in Gemma 2: scales are 1 and a weight; the logit of every head that gives nothing is gpt-oss's."""

    change = {"norm_place": "both", "norm": {"name": "rmsnorm", "unit_offset": True}, **SINKS}
    training_free = False


class TestNormsOnTheOutput(KindCase):
    """As in OLMo 2."""

    change = {"norm_place": "output", "parallel_residual": True}
    training_free = False


def test_a_norm_on_the_output_makes_its_layer_blind_to_its_scale() -> None:
    """Of the last matrix, that is: the output is normalised. A norm before the layer does nothing of the sort."""
    change = model.changed(BASE, {"norm_place": "output"})
    for cfg, blind in ((change, True), (BASE, False)):
        params = model.parameters(cfg)
        blocks = params["blocks"]
        down = {"kernel": 3 * blocks["ffn"]["down"]["kernel"]}
        louder = {**params, "blocks": {**blocks, "ffn": {**blocks["ffn"], "down": down}}}
        got, want = (model.logits(cfg, p, tokens_BT=TOKENS) for p in (louder, params))
        assert (np.abs(got - want).max() <= 1e-4) == blind
