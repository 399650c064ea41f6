"""Settings, dotted overrides and arms: what a key means, and that plugs start over when they are named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from ml_collections import ConfigDict
from toy_experiment import Lab

from experiments.spec import arms, registry, settings
from experiments.spec.settings import Text, override
from lm.config import ModelConfig, merge, to_dict
from lm.errors import UserError
from lm.measures.language.passkey import Passkey
from lm.patterns.lm_infinite import LMInfinite
from lm.patterns.sliding_window import SlidingWindow
from lm.plug import table
from lm.positions.scaling import Default, Linear, Yarn

RAW: dict[str, Any] = {
    "name": "x",
    "scale": "smoke",
    "checkpoint": "somewhere",
    "baseline": "a",
    "model": {},
    "measures": {"nll": {"name": "nll_by_position", "tokens": 64}},
    "arms": {"b": {}, "a": {}},
    "seeds": (0,),
}


def model_of(*changes: tuple[str, Any], base: ModelConfig | None = None) -> ModelConfig:
    """The model after overrides ``model.…`` of the settings."""
    base = base or ModelConfig()
    raw = RAW
    for key, value in changes:
        raw = override(raw, key, value, base)
    return merge(base, raw["model"], "model")


def test_naming_a_plug_starts_over() -> None:
    base = merge(ModelConfig(), {"pattern": {"name": "lm_infinite", "window": 9, "sinks": 3}}, "model")
    assert model_of(("model.pattern.window", 7), base=base).pattern == LMInfinite(window=7, sinks=3)
    # the same plug again, by name: nothing of the old one is left
    assert model_of(("model.pattern.name", "lm_infinite"), base=base).pattern == LMInfinite()
    assert model_of(("model.pattern", "sliding_window"), base=base).pattern == SlidingWindow()
    changes = (("model.pattern.name", "sliding_window"), ("model.pattern.window", 5))
    assert model_of(*changes, base=base).pattern == SlidingWindow(window=5)
    assert model_of(*reversed(changes), base=base).pattern == SlidingWindow()
    mapping = {"name": "lm_infinite", "sinks": 1}
    assert model_of(("model.pattern", mapping), base=base).pattern == LMInfinite(sinks=1)


def test_nested_plugs() -> None:
    base = merge(ModelConfig(), {"positions": {"theta": 5e5, "scaling": {"name": "yarn", "factor": 4.0}}}, "model")
    got = model_of(("model.positions.scaling.factor", 8), base=base).positions
    assert (got.theta, got.scaling) == (5e5, Yarn(factor=8.0))
    got = model_of(("model.positions.scaling.name", "linear"), ("model.positions.scaling.factor", 2), base=base)
    assert (got.positions.theta, got.positions.scaling) == (5e5, Linear(2.0))
    got = model_of(("model.positions", "rope"), base=base)
    assert (got.positions.theta, got.positions.scaling) == (10000.0, Default())


def test_values_typed_on_the_command_line() -> None:
    assert model_of(("model.n_kv_heads", Text("None")), ("model.d_ff", Text("12"))).d_ff == 12
    assert model_of(("model.embed_scale", Text("2"))).embed_scale == 2.0
    raw = override(RAW, "measures.nll.texts", Text("1984.txt"))
    assert raw["measures"]["nll"]["texts"] == ("1984.txt",)
    assert override(raw, "measures.nll.texts", Text("('a', 'b')"))["measures"]["nll"]["texts"] == ("a", "b")
    assert override(RAW, "checkpoint", Text("7"))["checkpoint"] == "7"
    assert override(RAW, "seeds", Text("[4, 5]"))["seeds"] == (4, 5)
    assert override(RAW, "measures.nll.context", Text("None"))["measures"]["nll"]["context"] is None
    with pytest.raises(UserError, match=r"measures\.nll\.tokens: expected int, found 'many'"):
        override(RAW, "measures.nll.tokens", Text("many"))
    assert override(RAW, "measures.nll.name", "passkey")["measures"]["nll"] == to_dict(Passkey(), table("lm.measures"))


def test_override_leaves_its_argument_alone() -> None:
    before = copy.deepcopy(RAW)
    override(RAW, "model.pattern", "streaming")
    override(RAW, "arms.a.model.d_ff", 3)
    override(RAW, "measures.nll.tokens", 3)
    override(RAW, "paper.title", "x")
    assert before == RAW


def test_overriding_an_arm() -> None:
    raw = {**RAW, "arms": {"a": {"model.pattern.name": "streaming", "model.pattern.window": 8, "model.d_ff": 4}}}
    assert override(raw, "arms.a.model.pattern.window", Text("6"))["arms"]["a"]["model.pattern.window"] == 6
    # another plug: fields of the old one go
    named = override(raw, "arms.a.model.pattern.name", Text("lm_infinite"))["arms"]["a"]
    assert named == {"model.d_ff": 4, "model.pattern.name": "lm_infinite"}


def test_an_arm_names_plugs_before_it_sets_their_fields() -> None:
    changes = {
        "model.pattern.ceiling": 5.0,
        "model.positions.scaling.factor": 4.0,
        "model.pattern.name": "lm_infinite",
        "model.positions.scaling.name": "yarn",
        "model.positions.name": "rope",
    }
    exp = settings.experiment({**RAW, "arms": {"a": changes}})
    base = merge(ModelConfig(), {"positions": {"name": "rope", "theta": 5.0}}, "model")
    model = arms.resolve(exp, base)["a"].config
    assert model.pattern == LMInfinite(ceiling=5.0)
    assert (model.positions.scaling, model.positions.theta) == (Yarn(factor=4.0), 10000.0)


def test_arms_of_measures() -> None:
    raw = {**RAW, "measures": {**RAW["measures"], "key": {"name": "passkey"}}}
    raw["arms"] = {"a": {"measures.nll.context": 8, "only": ("nll",)}, "b": {"measures.key": "decode_cost"}}
    found = arms.resolve(settings.experiment(raw), ModelConfig())
    assert list(found["a"].measures) == ["nll"] and found["a"].measures["nll"].context == 8
    assert found["a"].measures["nll"].tokens == 64
    assert type(found["b"].measures["key"]).__name__ == "DecodeCost" and found["b"].measures["nll"].context is None


def test_config_dicts_keep_their_order() -> None:
    c = ConfigDict({"z": {"b.name": 1, "a": 2}, "a": (1, [2])}, allow_dotted_keys=True)
    assert list(settings.plain(c)) == ["z", "a"] and list(settings.plain(c)["z"]) == ["b.name", "a"]
    assert settings.plain(c)["a"] == (1, [2]) and settings.plain(c, lists=True)["a"] == [1, [2]]


def test_settings_survive_json(lab: Lab) -> None:
    exp = settings.experiment(registry.load(lab.config).settings("laptop"))
    again = settings.experiment(json.loads(json.dumps(exp.to_dict())))
    assert again.to_dict() == exp.to_dict() and (again.measures, again.seeds) == (exp.measures, exp.seeds)
    assert list(exp.to_dict()["arms"]) == ["zero", "window", "also"]


def test_layer_overrides_can_be_hashed() -> None:
    """Compiled programs are found by their configuration."""
    cfg = model_of(("model.layer_overrides", ({"layers": "0", "pattern": {"name": "sliding_window", "window": 3}},)))
    assert hash(cfg) == hash(copy.deepcopy(cfg))
    assert [type(layer.pattern).__name__ for layer in cfg.layers()] == ["SlidingWindow", "Causal"]
    assert model_of(("model.layer_overrides", ({"layers": "-1", "d_ff": 8},))).layers()[1].d_ff == 8


@pytest.mark.parametrize("scale", ["smoke", "laptop", "long", "gpu", "paper"])
def test_the_first_experiment_is_well_formed(scale: str) -> None:
    """Every scale builds and every arm resolves, without its checkpoint."""
    source = registry.load(registry.CONFIGS / "lm_infinite.py")
    assert scale in source.scales
    exp = settings.experiment(source.settings(scale))
    found = arms.resolve(exp, None)
    assert exp.baseline in found and "lm_infinite" in found
    assert all(arm.measures for arm in found.values())
