"""The committed certificates are of today's configs: every ``:paper`` scale has one that fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.certificates import kept as certificates
from experiments.spec import registry
from lm.errors import UserError

WANTED = certificates.wanted()


def test_every_paper_scale_is_certified() -> None:
    """And so is every architecture that names a slice."""
    papers = {p.stem for p in registry.files() if "paper" in registry.load(p).scales}
    assert papers and papers <= {w.name for w in WANTED if not w.base}
    assert len({w.name for w in WANTED if w.base}) == 8


@pytest.mark.parametrize("one", WANTED, ids=lambda w: f"{w.name}-{w.entry['step']}-{w.entry['arm']}")
def test_it_fits_and_is_of_this_config(one: certificates.Wanted) -> None:
    """Parameters, layout, batch, lengths and slice, by arithmetic; the message says how it is made again."""
    found, why = certificates.find(one)
    again = f"python -m experiments.compile --all --only={one.name}"
    assert found is not None, f"no certificate: {again}"
    assert not why, f"{why}: {again}"
    assert found["fits"] and found["memory"]["peak"] <= found["hbm"]


def test_the_page_is_what_the_certificates_say() -> None:
    assert certificates.PAGE.read_text(encoding="utf-8") == certificates.page(), "python -m experiments.certificates"


def test_another_config_is_seen(tmp_path: Path) -> None:
    """A certificate with other parameters or another layout is not of this config; keeping replaces it."""
    one = next(w for w in WANTED if w.name == "lm_infinite" and w.entry["step"] == "decode")
    good = certificates.find(one)[0]
    assert good is not None
    certificates.keep(one, {**good, "parameters": 5, "mesh": {**good["mesh"], "tensor": 2}}, tmp_path)
    found, why = certificates.find(one, tmp_path)
    assert found is not None and "parameters is 5 there and 6738415616 now" in why and "mesh" in why
    certificates.keep(one, good, tmp_path)
    assert certificates.find(one, tmp_path) == (good, "")
    kept = json.loads((tmp_path / "lm_infinite-paper.json").read_text())
    assert kept["config"] == "lm_infinite:paper" and len(kept["certificates"]) == 1
    with pytest.raises(UserError, match="CERTIFIED: lenght: unknown key"):
        certificates.Wanted("lm_infinite", False, {"lenght": 3}).arguments()
