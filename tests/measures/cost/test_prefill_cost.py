"""What `prefill_cost` reports, against what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases.measured import CFG, measure, quiet, subject

from lm.errors import UserError


@pytest.mark.parametrize("layers", ["stacked", "apart"])
def test_prefill_cost_reads_so_many_layers(layers: str) -> None:
    made = measure("prefill_cost", lengths=(32, 64), layers=2, repeats=2).run(subject(layers=layers), quiet)
    assert {k: len(v) for k, v in made.samples.items()} == {"ms@32": 2, "ms@64": 2, "exponent": 1}
    assert min(made.samples["ms@32"]) > 0 and made.notes["layers"] == 2
    medians = [float(np.median(made.samples[f"ms@{n}"])) for n in (32, 64)]
    assert made.curves["prefill_ms"]["y"] == medians
    assert made.samples["exponent"][0] == pytest.approx(math.log2(medians[1] / medians[0]))
    assert made.curves["prefill_ms"]["ylabel"] == "milliseconds, 2 of 3 layers"
    one = measure("prefill_cost", lengths=(32,))
    assert "exponent" not in one.run(subject(), quiet).samples
    assert one.cost(CFG) == 3 * measure("prefill_cost", lengths=(32,), layers=1).cost(CFG)


def test_bad_costs_are_refused() -> None:
    with pytest.raises(UserError, match=r"measures.prefill_cost: lengths and repeats"):
        measure("prefill_cost", lengths=())
    with pytest.raises(UserError, match=r"measures.prefill_cost.layers: must be at least 1 or None, found 0"):
        measure("prefill_cost", layers=0)
