"""Which tests `make check` chooses, and that every mutation of `make mutants` can be made."""

from __future__ import annotations

import check
import mutate
import pytest

MUTANTS = mutate.mutants([])


@pytest.mark.parametrize(
    ("changed", "wanted", "smoke"),
    [
        ("lm/norms.py", "tests/test_norms.py", False),
        ("lm/norms.py", "tests/patterns/test_generic.py::TestPartialRotaryParallelLayerNorm", False),
        ("lm/patterns/streaming.py", "tests/patterns/test_generic.py", False),  # by name; its class is within
        ("lm/positions/rope.py", "tests/positions/test_scaling.py", False),
        ("lm/surgery/int8.py", "tests/surgery/test_int8.py", False),
        ("lm/attention/masks.py", "tests/attention/test_masks.py", True),
        ("tests/decoding/test_sampling.py", "tests/decoding/test_sampling.py", False),
        ("tests/oracles.py", "tests/patterns/test_longheads.py", False),
        ("kernels_pallas/lightning/tpu.py", "tests/kernels/test_lightning.py", False),
    ],
)
def test_a_change_is_tested_where_it_lies(changed: str, wanted: str, smoke: bool) -> None:
    tests, everything = check.chosen([changed])
    assert wanted in tests and set(check.ALWAYS) <= set(tests)
    assert everything == smoke


def test_what_is_not_touched_is_not_tested() -> None:
    tests, smoke = check.chosen(["README.md", "lm/ffn/glu.py"])
    assert not smoke and not any(t.startswith(("tests/kernels", "tests/experiments", "tests/train")) for t in tests)
    for test in check.SMOKE:
        assert "smoke" in (check.ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.socket}: {m.why}")
def test_a_mutation_finds_its_place(mutant: mutate.Mutant) -> None:
    assert mutant.wrong() == "" and mutant.noticing() and mutant.old != mutant.new


def test_every_socket_has_ten() -> None:
    sockets = [mutant.socket for mutant in MUTANTS]
    assert {name: sockets.count(name) for name in sockets if sockets.count(name) < 10} == {}
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
