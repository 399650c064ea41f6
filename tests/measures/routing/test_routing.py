"""What routing depends on, where it drops and when it settled: on routers of which all this is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import build, model_config
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError
from lm.measures import Subject
from lm.measures.routing.routing import information
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.plug import table
from lm.watch import Watch

TEXTS = ("python-docs:pass", "python-docs:in")


def model(**ffn: Any) -> Any:
    small = {"vocab_size": 258, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 8, "max_positions": 64}
    return model_config({**small, "ffn": {"name": "moe", "experts": 4, "group": "sequence", **ffn}})


def subject(cfg: Any, run: Path | None = None) -> Subject:
    tree = jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, params_lib.init(cfg, jax.random.key(0)))
    return Subject(DecoderModel(cfg), tree, ByteTokenizer(), run=run)


def measure(name: str, **fields: Any) -> Any:
    return build(table("lm.measures")[name], {"texts": TEXTS, "length": 32, "rows": 8, **fields}, f"measures.{name}")


def quiet(share: float, what: str) -> None:
    assert 0 < share <= 1


def test_information_of_what_is_known() -> None:
    rng = np.random.default_rng(0)
    c, noise = rng.integers(0, 8, 4000), rng.integers(0, 4, 4000)
    nats, accuracy = information(c[:2000], c[:2000] % 4, c[2000:], c[2000:] % 4, 4)
    assert accuracy == 1.0 and nats == pytest.approx(np.log(4), abs=0.02)
    nats, accuracy = information(c[:2000], noise[:2000], c[2000:], noise[2000:], 4)
    assert abs(accuracy - 0.25) < 0.05 and -0.02 < nats < 0.005  # a table of noise costs, it does not gain
    many = rng.integers(0, 4000, 4000)  # nearly every row of the table was never seen: it says what the whole says
    assert -0.5 < information(many[:2000], noise[:2000], many[2000:], noise[2000:], 4)[0] < 0.02
    # by hand: experts 0, 0, 1 under c = 0 and 1 under c = 1, tested on (0, 0) and (1, 1)
    got = information(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), np.array([0, 1]), np.array([0, 1]), 2)
    want = np.mean([np.log((2 + 0.5) / 4 / 0.5), np.log((1 + 0.5) / 2 / 0.5)])
    assert got == (pytest.approx(want, abs=1e-6), 1.0)


def test_a_hash_is_known_by_the_id_and_by_nothing_else() -> None:
    cfg = model(router="hash")
    made = measure("routing").run(subject(cfg), quiet)
    s = {k: v[0] for k, v in made.samples.items()}
    assert s["accuracy_id"] > 0.9 and s["info_id"] > 2 * max(s["info_previous"], s["info_position"], s["info_text"])
    assert s["dropped"] == s["dropped_late"] == s["dropped@python-docs"] == 0 and made.notes["layers"] == 2
    ids, positions = (made.curves[f"spread_{c}"]["y"] for c in ("id", "position"))
    # an id's share is 0 or 1: its spread follows from how many ids each expert has
    seen = np.bincount(np.array([list(d.text.encode())[: 8 * 32] for d in _documents()]).ravel(), minlength=258) >= 8
    share = np.bincount(cfg.ffn.router.experts_of(258, 4)[seen, 0], minlength=4) / seen.sum()
    assert seen.sum() > 10 and ids == pytest.approx(sorted(np.sqrt(share * (1 - share)), reverse=True), abs=1e-6)
    assert max(positions) < 0.2


def test_drops_by_position_are_those_of_the_layers() -> None:
    """Two choices and room for one: with first choices served first, the second ones go, late ones before early
    ones."""
    cfg = model(eval_capacity=1.0, capacity_counts_k=False)
    who = subject(cfg)
    made = measure("routing", bin=4).run(who, quiet)
    ids = [list(d.text.encode())[: 8 * 32] for d in _documents()]
    rows = jnp.asarray(np.array(ids).reshape(-1, 32))
    out = who.model.apply(who.params, Inputs(rows), watch=Watch(taps=("ffn/*",)))
    lost = 1 - np.stack([np.asarray(kept) for kept in out.tap("ffn/kept")]).mean((0, 1, 3))
    np.testing.assert_allclose(made.curves["dropped"]["y"], lost.reshape(8, 4).mean(1), atol=1e-6)
    s = {k: v[0] for k, v in made.samples.items()}
    assert s["dropped"] == pytest.approx(lost.mean()) and s["dropped"] >= 0.5
    assert s["dropped_late"] == pytest.approx(lost[-8:].mean()) and s["dropped_late"] > s["dropped_early"] + 0.1


def _documents() -> Any:
    from lm.data import texts

    return [d for spec in TEXTS for d in texts.documents(spec)]


class Kept:
    """Checkpoints of a run that changed its router once, after step 2."""

    def __init__(self, last: Any) -> None:
        turned = jax.tree.map(lambda x: x[..., jnp.array([1, 2, 3, 0])], last["blocks"]["ffn"]["router"])
        first = {**last, "blocks": {**last["blocks"], "ffn": {**last["blocks"]["ffn"], "router": turned}}}
        self.by_step = {2: first, 4: last, 6: last, 10: last}

    def steps(self) -> list[int]:
        return list(self.by_step)

    def params(self, cfg: Any, step: int) -> Any:
        return self.by_step[step]


def test_history_finds_when_choices_were_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = model(router={"name": "switch"})
    who = subject(cfg, tmp_path)
    monkeypatch.setattr("lm.measures.routing.routing.Run", lambda path, reader: Kept(who.params))
    made = measure("routing_history", early=0.3).run(who, quiet)
    s = {k: v[0] for k, v in made.samples.items()}
    # the first layer's experts are renumbered in a circle: none is kept; the second layer sees another input
    assert made.curves["overlap"]["x"] == [2, 4, 6] and made.curves["overlap"]["y"][1:] == [1.0, 1.0]
    assert s["overlap_early"] == 1.0 and s["overlap_first"] < 0.4 and made.notes["early step"] == 4
    rows = jnp.asarray(np.array([list(d.text.encode())[: 8 * 32] for d in _documents()]).reshape(-1, 32))
    out = who.model.apply(who.params, Inputs(rows), watch=Watch(taps=("ffn/*",)))
    loads = [np.bincount(np.asarray(chosen).ravel(), minlength=4) / rows.size for chosen in out.tap("ffn/experts")]
    assert s["overlap_chance"] == pytest.approx(np.mean([(p * p).sum() for p in loads]), abs=1e-6)


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dense = model_config({"vocab_size": 258, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 8})
    for name, who, fields, message in (
        ("routing", subject(model()), {"rows": 10_000}, r"measures\.routing\.rows: 10000 rows of 32 tokens asked for"),
        ("routing", subject(dense), {}, r"in no layer do tokens choose experts; valid: model\.ffn = moe"),
        ("routing", subject(model(router="soft")), {}, "in no layer do tokens choose experts"),
        ("routing_history", subject(model()), {}, "were not trained here"),
    ):
        with pytest.raises(UserError, match=message):
            measure(name, **fields).run(who, quiet)
    few = Kept(subject(model()).params)
    few.by_step = {5: None, 10: None}
    monkeypatch.setattr("lm.measures.routing.routing.Run", lambda path, reader: few)
    with pytest.raises(UserError, match=r"keeps checkpoints \[5, 10\]; valid: set train\.keep_every"):
        measure("routing_history").run(subject(model(), tmp_path), quiet)
    with pytest.raises(UserError, match=r"measures\.routing_history: early must lie in \(0, 1\)"):
        measure("routing_history", early=1.0)
    with pytest.raises(UserError, match=r"measures\.routing: length must be at least 8"):
        measure("routing", length=4)
