"""LoRA: the base at start, the merged model after, and nothing but adapters trained and saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import Params
from cases.surgery_case import SurgeryCase

from experiments import convert
from lm import interop, objectives, weights
from lm.config import ModelConfig, build, model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer
from lm.errors import UserError
from lm.files import summed
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.objectives.forward import Forward
from lm.surgery.lora import LoRA
from lm.train import loop, step
from lm.train.config import TrainConfig
from lm.train.data import prepare

SMALL = {
    "vocab_size": 258,
    "d_model": 16,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 24,
    "max_positions": 32,
}
CFG = model_config(SMALL)
OTHERS = {
    "untied": {**SMALL, "head": {"name": "linear", "tie": False}},
    "learned": {**SMALL, "positions": "learned", "ffn": "gelu", "norm": "layernorm"},
    "unequal_layers": {**SMALL, "layer_overrides": ({"layers": "1", "n_heads": 2},)},
}
EVERYTHING = LoRA(targets=("*/kernel", "embed"), rank=3, alpha=5.0, whole=("*/scale",))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 258, (2, 21)))


def logits(cfg: ModelConfig, params: Any) -> np.ndarray:
    out = jax.jit(lambda p: DecoderModel(cfg).apply(p, Inputs(TOKENS)).logits_BTV)(params)
    return np.asarray(out)


def moved(tree: Any, seed: int = 1) -> Any:
    """`tree` after some training, as far as these tests care."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype) for x in leaves])


def made(cfg: ModelConfig, lora: LoRA) -> tuple[Any, Any]:
    base = params_lib.init(cfg, jax.random.key(0))
    return base, lora.init(cfg, base, jax.random.key(1))


@pytest.mark.parametrize("name", ["plain", *OTHERS])
def test_it_is_the_base_at_start_and_the_merged_model_after(name: str) -> None:
    cfg = model_config(OTHERS.get(name, SMALL))
    lora = EVERYTHING if name != "unequal_layers" else LoRA(targets=("*/kernel",), rank=3)
    base, adapters = made(cfg, lora)
    np.testing.assert_array_equal(logits(cfg, lora.attach(cfg, base, adapters)), logits(cfg, base))
    after = moved(adapters)
    merged = lora.merge(cfg, base, after)
    got, want = logits(cfg, lora.attach(cfg, base, after)), logits(cfg, merged)
    assert np.abs(want - logits(cfg, base)).max() > 0.01
    np.testing.assert_allclose(got, want, atol=2e-5)
    if "blocks" in base:  # decoding takes one tree per layer
        np.testing.assert_allclose(logits(cfg, params_lib.unstack(lora.attach(cfg, base, after))), want, atol=2e-5)


def test_the_merged_change_is_the_product_of_the_paper() -> None:
    base, adapters = made(CFG, EVERYTHING)
    after = moved(adapters)
    merged = EVERYTHING.merge(CFG, base, after)
    for layer in range(3):
        for place, n_in in (("q", 1), ("o", 2)):
            w0, w1 = (np.asarray(t["blocks"]["attn"][place]["kernel"][layer], np.float64) for t in (base, merged))
            low = after["blocks"]["attn"][place]["kernel"]
            a, b = (np.asarray(low[k][layer], np.float64) for k in ("lora_a", "lora_b"))
            width = int(np.prod(w0.shape[:n_in]))
            np.testing.assert_allclose((w1 - w0).reshape(width, -1), 5.0 / 3 * a @ b, atol=1e-6)
            assert np.linalg.matrix_rank((w1 - w0).reshape(width, -1), tol=1e-5) == 3
    stabilized = LoRA(rank=4, alpha=6.0, rank_stabilized=True)
    assert stabilized.scale == 3.0 and LoRA(rank=4, alpha=6.0).scale == 1.5


def test_gradients_are_those_of_the_merged_model() -> None:
    objective = objectives.TABLE["causal"]()
    rows = {"inputs": TOKENS, "targets": jnp.roll(TOKENS, -1, 1), "weights": jnp.ones(TOKENS.shape)}
    base, adapters = made(CFG, EVERYTHING)
    after = moved(adapters)

    def gradient(use: Any) -> Any:
        def loss(t: Any) -> Any:
            return objective.loss(Forward(DecoderModel(CFG), use(CFG, base, t)), rows).loss

        return jax.jit(jax.grad(loss))(after)

    got, want = (params_lib.names(gradient(use)) for use in (EVERYTHING.attach, EVERYTHING.merge))
    for name, g in want.items():
        np.testing.assert_allclose(got[name], g, rtol=2e-3, atol=2e-4 * float(jnp.abs(g).max()), err_msg=name)


def test_dropout_keeps_the_mean_and_differs_by_layer() -> None:
    lora = LoRA(rank=2, dropout=0.25)
    base, adapters = made(CFG, lora)
    after = moved(adapters)
    attached = lora.attach(CFG, base, after, jax.random.key(3))
    low = attached["blocks"]["attn"]["q"]["kernel"]
    assert low.key.shape == (3,) and len(np.unique(jax.random.key_data(low.key), axis=0)) == 3
    x = jax.random.normal(jax.random.key(4), (5, 16))
    one = jax.tree.map(lambda leaf: leaf[0], low)
    many = jax.vmap(lambda k: weights.LowRank(one.w, one.a, one.b, k, one.scale, one.rate).product(x, 1))
    drawn = np.asarray(many(jax.random.split(jax.random.key(5), 4000)))
    plain = np.asarray(weights.LowRank(one.w, one.a, one.b, scale=one.scale).product(x, 1))
    assert drawn.std(0).min() > 1e-3
    np.testing.assert_allclose(drawn.mean(0), plain, atol=5 * drawn.std(0).max() / 4000**0.5)
    # not while evaluating
    np.testing.assert_allclose(
        logits(CFG, lora.attach(CFG, base, after)), logits(CFG, lora.merge(CFG, base, after)), atol=2e-5
    )


def test_accumulated_gradients_are_the_big_batchs() -> None:
    rows = {"inputs": TOKENS, "targets": jnp.roll(TOKENS, -1, 1), "weights": jnp.ones(TOKENS.shape)}
    base, adapters = made(CFG, LoRA())
    after = moved(adapters)

    def gradient(**change: Any) -> Any:
        train = build(TrainConfig, {"surgery": "lora", "batch": 2, **change}, "train")
        return jax.jit(lambda t: step.gradients(CFG, train, t, rows, step.Beside(base))[0])(after)

    for a, b in zip(*(jax.tree.leaves(gradient(**c)) for c in ({}, {"accumulate": 2})), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# Training runs.


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to adapt, and texts beside it."""
    folder = tmp_path_factory.mktemp("start")
    params = moved(params_lib.init(CFG, jax.random.key(7)), 3)
    to_huggingface.write(folder / "model", CFG, params, TextRecord.of(ByteTokenizer()))
    (folder / "texts").mkdir()
    for name in sorted(topics)[:8]:
        (folder / "texts" / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return folder


def settings(start: Path, **change: Any) -> TrainConfig:
    base = {
        "steps": 8,
        "batch": 8,
        "save_every": 2,
        "eval_every": 0,
        "eval_rows": 4,
        "final_rows": 4,
        "data": {"texts": (str(start / "texts"),), "tokenizer": "bytes", "seq_len": 16, "held_out": 0.3},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "surgery": {"name": "lora", "rank": 2, "dropout": 0.1, "targets": ("*/attn/*/kernel", "*/ffn/*")},
    }
    return build(TrainConfig, {**base, **change}, "train")


def train(folder: Path, start: Path, **change: Any) -> loop.Trained:
    chosen, source = settings(start, **change), str(start / "model")
    found = interop.load(source)
    return loop.run(
        found.config,
        chosen,
        prepare(chosen, folder.parent / "data"),
        folder,
        start=loop.Start(found.params, found.identity, source, lambda: found.identity),
        tell=lambda text: None,
    )


@pytest.fixture(scope="module")
def run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.Trained]:
    folder = tmp_path_factory.mktemp("lora") / "run"
    return folder, train(folder, start)


def test_only_adapters_are_trained_and_saved(run: tuple[Path, loop.Trained], start: Path) -> None:
    folder, done = run
    base = params_lib.names(interop.load(str(start / "model")).params)
    for name, leaf in params_lib.names(done.params).items():
        touched = "/attn/" in name or ("/ffn/" in name and name.endswith("kernel"))
        assert np.array_equal(leaf, base[name]) != touched, name
    listed = [line.split()[0] for line in (folder / "parameters.txt").read_text().splitlines()[:-1]]
    assert listed and all(name.rsplit("/", 1)[1] in ("lora_a", "lora_b") for name in listed)
    saved = interop.reader(str(folder)).trained(CFG)
    assert sorted(params_lib.names(saved)) == sorted(listed)
    assert params_lib.count(saved) < 0.4 * sum(leaf.size for leaf in base.values())
    assert f"beside {sum(leaf.size for leaf in base.values()):,} that stay" in (folder / "parameters.txt").read_text()


def test_a_killed_run_goes_on_bit_for_bit(
    run: tuple[Path, loop.Trained], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Death(BaseException):
        pass

    original = loop.Loop._read

    def read(self: Any, i: int, metrics: Any) -> None:
        original(self, i, metrics)
        if i == 4:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_read", read)
        with pytest.raises(Death):
            train(tmp_path / "run", start)
    again = train(tmp_path / "run", start)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(run[1].params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_folder_is_a_checkpoint_and_exports_merged(run: tuple[Path, loop.Trained], tmp_path: Path) -> None:
    folder, done = run
    want = logits(CFG, done.params)
    found = interop.load(str(folder))
    np.testing.assert_array_equal(logits(found.config, found.params), want)
    assert convert.main([f"--checkpoint={folder}", f"--to={tmp_path / 'hf'}"]) == 0
    np.testing.assert_array_equal(logits(CFG, interop.load(str(tmp_path / "hf")).params), want)


def test_peft_loads_the_adapters_to_the_same_logits(
    run: tuple[Path, loop.Trained], start: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder, done = run
    assert convert.main([f"--checkpoint={folder}", f"--to={tmp_path / 'peft'}", "--as=peft"]) == 0
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(start / "model") and about["r"] == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(start / "model")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        got = model(torch.as_tensor(np.asarray(TOKENS))).logits.numpy()
    np.testing.assert_allclose(got, logits(CFG, done.params), atol=2e-4)
    assert np.abs(got - logits(CFG, interop.load(str(start / "model")).params)).max() > 0.01


def test_a_start_that_is_gone_or_changed_is_told(
    run: tuple[Path, loop.Trained], start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    about = json.loads((folder / "run.json").read_text())
    for source, words in ((str(tmp_path / "gone"), "which cannot be read"), (str(start / "other"), "is not the")):
        if "other" in source:
            params = params_lib.init(CFG, jax.random.key(8))
            to_huggingface.write(Path(source), CFG, params, TextRecord.of(ByteTokenizer()))
        (folder / "run.json").write_text(json.dumps(summed({**about, "start_source": source})))
        with pytest.raises(UserError, match=words):
            interop.load(str(folder))
    assert convert.main([f"--checkpoint={start / 'model'}", f"--to={tmp_path / 'x'}", "--as=peft"]) == 2
    assert "has no adapters" in capsys.readouterr().err


MISTAKES = {
    "targets nothing": ({"targets": ("*/attn/qq/kernel",)}, "fits no parameter"),
    "targets a vector": ({"targets": ("final_norm/scale",)}, "is a vector"),
    "whole nothing": ({"whole": ("*/bias",)}, "whole: '\\*/bias' fits no parameter"),
    "rank too large": ({"rank": 17}, "rank: found 17; valid for .*: 1 to 16"),
    "dropout of a table": ({"targets": ("embed",), "dropout": 0.1}, "dropout: embed is not read by a linear layer"),
    "rank 0": ({"rank": 0}, "rank: must be at least 1"),
    "alpha": ({"alpha": 0.0}, "alpha: must be positive"),
    "dropout": ({"dropout": 1.0}, "dropout: must lie in"),
    "nothing": ({"targets": ()}, "targets: is empty"),
    "unknown key": ({"ranks": 3}, "train.surgery.ranks: unknown key"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    change, words = MISTAKES[name]
    with pytest.raises(UserError, match=words):
        build(TrainConfig, {"surgery": {"name": "lora", **change}}, "train").surgery.check(CFG)


def test_a_run_without_surgery_keeps_its_identity() -> None:
    assert "surgery" not in TrainConfig().determines()
    assert build(TrainConfig, {"surgery": "lora"}, "train").determines()["surgery"]["rank"] == 8


class TestLoRA(SurgeryCase):
    """Adapters that have been trained; before that they change nothing, bit for bit."""

    lora = LoRA(targets=("*/kernel", "embed"), rank=3, alpha=5.0)

    def adapters(self, cfg: ModelConfig, params: Params) -> Params:
        made = self.lora.init(cfg, params, jax.random.key(1))
        rng = np.random.default_rng(5)
        return jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), made)

    def made(self, cfg: ModelConfig, params: Params) -> Params:
        return dict(self.lora.attach(cfg, params, self.adapters(cfg, params)))

    def limits(self, cfg: ModelConfig, params: Params) -> dict[str, Params]:
        return {"untrained": self.lora.attach(cfg, params, self.lora.init(cfg, params, jax.random.key(1)))}

    def oracle(self, name: str, weight: np.ndarray) -> np.ndarray | None:
        adapters = params_lib.names(self.adapters(self.cfg, self.params))
        if f"{name}/lora_a" not in adapters:
            return None
        a, b = (np.float64(adapters[f"{name}/lora_{x}"]) for x in "ab")
        return weight + 5.0 / 3 * (a @ b).reshape(weight.shape)
