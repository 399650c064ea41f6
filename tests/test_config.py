"""From mappings to frozen configurations and back: every plug of every table, and what a mistake is told."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from ml_collections import ConfigDict

from lm.config import ModelConfig, merge, model_config, plug, to_dict
from lm.errors import UserError
from lm.plug import table

SOCKETS = {
    "norm": "lm.norms",
    "mixer": "lm.mixers",
    "pattern": "lm.patterns",
    "positions": "lm.positions",
    "ffn": "lm.ffn",
    "head": "lm.heads",
}
SAVED = {"mixer": "attention"}  # by its older name, so that addresses of results stay
PLUGS = [(field, name) for field, module in SOCKETS.items() for name in table(module)]
EIGHT = [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]  # half of the default head width
NEEDS: dict[str, Any] = {"longrope": {"short_factor": EIGHT, "long_factor": EIGHT}}


def through_json(cfg: ModelConfig) -> ModelConfig:
    return model_config(json.loads(json.dumps(to_dict(cfg))))


@pytest.mark.parametrize(("field", "name"), PLUGS)
def test_every_plug_survives_the_round_trip(field: str, name: str) -> None:
    cfg = model_config({field: {"name": name}})
    assert type(getattr(cfg, field)) is table(SOCKETS[field])[name]
    assert to_dict(cfg)[SAVED.get(field, field)]["name"] == name
    again = through_json(cfg)
    assert again == cfg and hash(again) == hash(cfg)
    assert model_config({field: name}) == cfg == model_config(ConfigDict({field: {"name": name}}))


@pytest.mark.parametrize("name", table("lm.positions.scaling"))
def test_every_scaling_survives_the_round_trip(name: str) -> None:
    scaling = {"name": name, **NEEDS.get(name, {})}
    cfg = model_config({"positions": {"name": "rope", "scaling": scaling}})
    assert type(cfg.positions.scaling) is table("lm.positions.scaling")[name]
    assert through_json(cfg) == cfg


def test_changed_fields_survive_the_round_trip() -> None:
    cfg = model_config(
        {
            "n_kv_heads": 2,
            "dtype": "bfloat16",
            "pattern": {"name": "lm_infinite", "window": None, "ceiling": 12.5, "sinks": 0},
            "positions": {"name": "rope", "scaling": {"name": "yarn", "factor": None, "original": 512}},
            "head": {"name": "linear", "tie": False, "softcap": 30},
            "layer_overrides": [{"layers": "1", "pattern": {"name": "causal"}, "d_ff": 8}],
        }
    )
    assert cfg.head.softcap == 30.0 and isinstance(cfg.head.softcap, float)
    again = through_json(cfg)
    assert again == cfg and hash(again) == hash(cfg)
    assert again.layers() == cfg.layers()


@pytest.mark.parametrize(("field", "name"), PLUGS)
def test_a_misspelt_plug_is_told_the_nearest(field: str, name: str) -> None:
    if len(name) < 3:
        pytest.fail("the misspelling below needs longer names")
    with pytest.raises(UserError) as error:
        model_config({field: {"name": name[:-1] + "_"}})
    text = str(error.value)
    assert text.startswith(f"model.{field}.name: unknown name {name[:-1] + '_'!r} (did you mean ")
    assert all(option in text for option in table(SOCKETS[field]))


BAD: list[tuple[Any, str]] = [
    ({"d_modle": 3}, r"model\.d_modle: unknown key \(did you mean 'd_model'\?\); valid: .*vocab_size"),
    ({"pattern": {"name": "sliding_window", "widow": 3}}, r"model\.pattern\.widow: .*'window'"),
    ({"positions": {"name": "rope", "scaling": {"name": "yarm"}}}, r"model\.positions\.scaling\.name: .*'yarn'"),
    ({"positions": {"name": "rope", "scaling": {"name": "yarn", "betafast": 1.0}}}, r"scaling\.betafast: .*beta_fast"),
    ({"pattern": {"window": 3}}, r"model\.pattern\.name: missing in .*valid: bidirectional, causal"),
    ({"pattern": {"name": ["causal"]}}, r"model\.pattern\.name: unknown name \['causal'\]"),
    ({"pattern": None}, r"model\.pattern\.name: missing in None"),
    ({"pattern": 3}, r"model\.pattern\.name: missing in 3"),
    ({"pattern": ModelConfig().ffn}, r"model\.pattern\.name: missing"),
    ({"n_layers": 2.0}, r"model\.n_layers: expected int, found 2\.0 \(float\)"),
    ({"n_layers": True}, r"model\.n_layers: expected int, found True \(bool\)"),
    ({"n_layers": "2"}, r"model\.n_layers: expected int, found '2' \(str\)"),
    ({"n_layers": 0}, r"model\.n_layers: must be at least 1, found 0"),
    ({"remat": 1}, r"model\.remat: expected bool, found 1 \(int\)"),
    ({"embed_scale": "x"}, r"model\.embed_scale: expected float, found 'x'"),
    ({"n_kv_heads": "2"}, r"model\.n_kv_heads: expected int or None, found '2'"),
    ({"n_heads": 6, "n_kv_heads": 4}, r"model\.n_kv_heads: 4 does not divide model\.n_heads = 6; valid: 1, 2, 3, 6"),
    ({"n_kv_heads": 0}, r"model\.n_kv_heads: 0 does not divide"),
    ({"n_heads": 5}, r"model\.d_model: 64 is not divisible by model\.n_heads = 5; set model\.head_dim"),
    ({"head_dim": 0, "positions": "nope"}, r"model\.head_dim: must be at least 1, found 0"),
    ({"head_dim": 7}, r"model\.positions\.fraction: rotary width .* = 7 must be even"),
    ({"positions": {"name": "rope", "fraction": 1.5}}, r"model\.positions\.fraction: rotary width .* = 24"),
    ({"positions": {"name": "rope", "fraction": 0.01}}, r"model\.positions\.fraction: rotary width .* = 0"),
    ({"positions": {"name": "rope", "theta": 1.0}}, r"model\.positions\.theta: must exceed 1"),
    ({"positions": {"name": "rope", "trained": 0}}, r"model\.positions\.trained: must be at least 1"),
    ({"positions": {"name": "learned", "size": 0}}, r"model\.positions\.size: must be at least 1"),
    ({"positions": {"name": "alibi", "style": "mtp"}}, r"model\.positions\.style: unknown name 'mtp' .*'mpt'"),
    ({"dtype": "float64"}, r"model\.dtype: unknown name 'float64' .* valid: bfloat16, float16, float32"),
    ({"mixer": {"name": "softmax", "backend": "bloked"}}, r"model\.mixer\.backend: .*'blocked'"),
    ({"mixer": {"name": "softmax", "block_k": 0}}, r"model\.mixer\.block_k: must be at least 1"),
    ({"mixer": {"name": "softmax", "softcap": 0.0}}, r"model\.mixer\.softcap: must be positive"),
    ({"head": {"name": "linear", "softcap": -1.0}}, r"model\.head\.softcap: must be positive"),
    ({"pattern": {"name": "causal", "prefix": -1}}, r"model\.pattern\.prefix: must not be negative"),
    ({"pattern": {"name": "sliding_window", "window": 0}}, r"model\.pattern\.window: must be at least 1"),
    ({"pattern": {"name": "streaming", "sinks": -1}}, r"model\.pattern: .*sinks=-1"),
    ({"pattern": {"name": "streaming", "sink_positions": "turn"}}, r"sink_positions: unknown name 'turn'.*'true'"),
    ({"pattern": {"name": "lm_infinite", "window": 0}}, r"model\.pattern\.window: must be at least 1 or None"),
    ({"pattern": {"name": "lm_infinite", "ceiling": float("inf")}}, r"model\.pattern\.ceiling: .* found inf"),
    ({"pattern": {"name": "lm_infinite", "ceiling": -1.0}}, r"model\.pattern\.ceiling: .* not negative"),
    ({"pattern": {"name": "lm_infinite", "window": None, "top_k": 3}}, r"model\.pattern\.top_k: needs a window"),
    ({"layer_overrides": "0"}, r"model\.layer_overrides\[0\]: found '0'"),
    ({"layer_overrides": [{"d_ff": 3}]}, r"model\.layer_overrides\[0\]: .*'layers'"),
    ({"layer_overrides": [{"layers": "a"}]}, r"model\.layer_overrides\[0\]\.layers: found 'a'"),
    ({"layer_overrides": [{"layers": "0:2:0"}]}, r"model\.layer_overrides\[0\]\.layers: found '0:2:0'"),
    ({"layer_overrides": [{"layers": "2"}]}, r"model\.layer_overrides\[0\]\.layers: found '2'.*0 to 1"),
    ({"layer_overrides": [{"layers": "0", "dff": 1}]}, r"model\.layer_overrides\[0\]\.dff: .*'d_ff'"),
    ({"layer_overrides": [{"layers": "0"}, {"layers": "1", "d_model": 32}]}, r"overrides\[1\]\.d_model: cannot differ"),
    ({"layer_overrides": [{"layers": "0", "ffn": {"name": "swigul"}}]}, r"overrides\[0\]\.ffn\.name: .*'swiglu'"),
]


@pytest.mark.parametrize(("settings", "text"), BAD, ids=[text for _, text in BAD])
def test_a_mistake_ends_in_one_line_that_names_the_key(settings: Any, text: str) -> None:
    with pytest.raises(UserError) as error:
        model_config(settings)
    assert re.match(text if text.startswith("model") else f".*{text}", str(error.value)), error.value
    assert "\n" not in str(error.value)


SCALINGS: list[tuple[dict[str, Any], str]] = [
    ({"name": "linear", "factor": 0.5}, "factor: linear needs a factor of at least 1, found 0.5"),
    ({"name": "ntk", "factor": float("nan")}, "factor: found nan; valid: a finite number"),
    ({"name": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast: must exceed beta_slow"),
    ({"name": "yarn", "original": 0}, "original: must be at least 1"),
    ({"name": "llama3", "high_freq_factor": 1.0}, "high_freq_factor: must exceed low_freq_factor"),
    ({"name": "longrope", "short_factor": EIGHT, "long_factor": EIGHT[1:]}, "long_factor: 7 numbers found, 8 needed"),
    ({"name": "longrope", "short_factor": [0.0] * 8, "long_factor": EIGHT}, "short_factor: all numbers must be pos"),
    ({"name": "longrope", "original": 1, **NEEDS["longrope"]}, "original: must be at least 2"),
    ({"name": "longrope", "long_factor": [1.0, "x"]}, "long_factor[1]: expected float, found 'x'"),
]


@pytest.mark.parametrize(("settings", "text"), SCALINGS, ids=[text for _, text in SCALINGS])
def test_mistakes_in_a_scaling(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.positions.scaling.{text}")):
        model_config({"positions": {"name": "rope", "scaling": settings}})


@pytest.mark.parametrize("name", ["ntk", "dynamic"])
def test_a_base_change_needs_more_than_one_frequency(name: str) -> None:
    with pytest.raises(UserError, match="rotary width of at least 4, found 2"):
        model_config({"head_dim": 2, "positions": {"name": "rope", "scaling": {"name": name, "factor": 2.0}}})


def test_what_is_derived() -> None:
    cfg = model_config({"d_model": 96, "n_heads": 6})
    assert (cfg.n_kv_heads, cfg.head_dim) == (6, 16)
    assert model_config({"n_heads": 5, "head_dim": 4}).head_dim == 4


def test_merge_keeps_what_it_is_not_told() -> None:
    base = model_config({"pattern": {"name": "lm_infinite", "window": 64, "sinks": 3}, "d_ff": 99})
    same = merge(base, {"pattern": {"sinks": 5}}, "model")
    assert (same.pattern.window, same.pattern.sinks, same.d_ff) == (64, 5, 99)
    assert merge(base, {"pattern": {"name": "lm_infinite", "sinks": 5}}, "model") == same
    assert merge(base, {}, "model") == base and base.pattern.sinks == 3


def test_merge_with_another_name_starts_from_its_defaults() -> None:
    base = model_config({"pattern": {"name": "lm_infinite", "window": 64}})
    other = merge(base, {"pattern": {"name": "sliding_window"}}, "model")
    assert other.pattern == table("lm.patterns")["sliding_window"]()
    assert merge(base, {"pattern": "sliding_window"}, "model") == other


def test_merge_reaches_plugs_inside_plugs() -> None:
    base = model_config({"positions": {"name": "rope", "theta": 5e5, "scaling": {"name": "yarn", "factor": 4.0}}})
    deeper = merge(base, {"positions": {"scaling": {"beta_slow": 2.0}}}, "model").positions
    assert (deeper.theta, deeper.scaling.factor, deeper.scaling.beta_slow) == (5e5, 4.0, 2.0)
    other = merge(base, {"positions": {"scaling": {"name": "linear", "factor": 2.0}}}, "model").positions
    assert (other.theta, other.scaling) == (5e5, plug("lm.positions.scaling", {"name": "linear", "factor": 2.0}, "s"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pattern": {"name": "casual"}}, r"at\.pattern\.name: unknown name 'casual' \(did you mean 'causal'"),
        ({"pattern": {"prefx": 2}}, r"at\.pattern\.prefx: unknown key \(did you mean 'prefix'"),
        ({"dff": 2}, r"at\.dff: unknown key \(did you mean 'd_ff'"),
        ({"d_ff": "2"}, r"at\.d_ff: expected int"),
    ],
)
def test_merge_names_the_place_of_a_mistake(changes: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        merge(ModelConfig(), changes, "at")


def test_layer_overrides_apply_in_order_to_their_slices() -> None:
    cfg = model_config(
        {
            "n_layers": 5,
            "layer_overrides": [
                {"layers": "1::2", "pattern": {"name": "sliding_window", "window": 8}},
                {"layers": "-2:", "d_ff": 12},
                {"layers": 3, "pattern": {"window": 4}},
            ],
        }
    )
    layers = cfg.layers()
    assert [getattr(c.pattern, "window", None) for c in layers] == [None, 8, None, 4, None]
    assert [c.d_ff for c in layers] == [256, 256, 256, 12, 12]
    assert layers[0] == dataclasses.replace(cfg, layer_overrides=()) == layers[2]


def test_layer_overrides_are_values_whatever_mapping_they_came_as() -> None:
    entry = {"layers": "0", "pattern": {"name": "sliding_window", "window": 4}}
    plain = model_config({"layer_overrides": [entry]})
    other = model_config(ConfigDict({"layer_overrides": (ConfigDict(entry),)}))
    assert plain == other and hash(plain) == hash(other)
    assert through_json(other) == plain
    entry["layers"] = "1"
    assert plain.layer_overrides[0]["layers"] == "0"


def test_a_configuration_is_frozen_and_comparable() -> None:
    a, b = model_config({"d_ff": 8}), model_config({"d_ff": 8})
    assert a == b and hash(a) == hash(b) and a != model_config({"d_ff": 9})
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.d_ff = 9  # type: ignore[misc]
