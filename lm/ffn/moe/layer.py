"""The layer of `lm.ffn.moe.plug`: route, dispatch, experts, combine. Letters as there; G routing groups, R expert
outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.ffn.glu import SwiGLU
from lm.ffn.moe.exchange import sorted_rows, to_experts
from lm.ffn.moe.routing import ExpertChoice, Scores, Slots, TokenChoice, limit
from lm.layer import LayerInputs, LayerOut
from lm.plug import Model
from lm.sharding import current
from lm.watch import tap
from lm.weights.project import Project
from lm.weights.weight import param


class _Stack(nn.Module):
    """E matrices ``[E, in, out]``, each drawn as one dense layer's is, and with `bias` ``[E, out]`` beside them."""

    shape: tuple[int, int, int]
    cfg: Model
    axes: tuple[str, str, str]
    bias: bool = False

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        init, of, (E, _, out) = nn.initializers.normal(self.cfg.init_std), self.cfg.param_dtype, self.shape
        kernel: jax.Array = param(self, "kernel", init, self.shape, of, axes=self.axes)
        if not self.bias:
            return kernel, None
        return kernel, param(self, "bias", nn.initializers.zeros, (E, out), of, axes=self.axes[::2])


class _Experts(nn.Module):
    """All experts: on buffers ``[E, C, D]``, or, with `chosen` (experts, gates, two bounds), on tokens
    ``[B, T, D]``, by `lm.ffn.moe.exchange.to_experts`."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array, chosen: tuple[Any, ...] | None = None) -> Any:
        cfg, moe = self.cfg, self.cfg.ffn
        E, D, F = moe.experts, cfg.d_model, moe.width(cfg)
        kind, gated = moe.kind, isinstance(moe.kind, SwiGLU)
        inward, outward = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        stacks = {"up": ((E, D, F), inward), **({"gate": ((E, D, F), inward)} if gated else {})}
        stacks |= {"down": ((E, F, D), outward)}
        weights = {}
        for name, (shape, axes) in stacks.items():
            kernel, bias = _Stack(shape, cfg, axes, kind.bias, name=name)()
            weights[name] = kernel.astype(x.dtype)
            if bias is not None:
                weights[f"{name}_bias"] = bias.astype(x.dtype)
        if chosen is not None:
            experts_BTk, gates_BTk, per_row, in_all = chosen
            return to_experts(x, experts_BTk, gates_BTk, weights, kind, moe.implementation, per_row, in_all)

        def product(x_ECK: jax.Array, name: str) -> jax.Array:
            y = jnp.einsum("eck,ekn->ecn", x_ECK, weights[name])
            return y if not kind.bias else y + weights[f"{name}_bias"][:, None]

        up = product(x, "up")
        return product(kind.inner(up, product(x, "gate") if gated else None), "down")


class _Router(nn.Module):
    """Logits, in float32 whatever the compute type, and the decision group by group."""

    cfg: Model

    @nn.compact
    def __call__(self, x_GTD: jax.Array, mask_GT: jax.Array, ids_GT: Any, key: Any) -> tuple[Any, jax.Array, jax.Array]:
        """The decision with a leading axis G, logits ``[G, T, E s]`` and the bias ``[E]``."""
        cfg, moe, router = self.cfg, self.cfg.ffn, self.cfg.ffn.router
        E, D, G = moe.experts, cfg.d_model, x_GTD.shape[0]
        if router.needs_ids:
            if ids_GT is None:
                raise ValueError(f"router {moe.name_of_router!r} goes by token ids; the model was given embeddings")
            router = dataclasses.replace(router, vocab=cfg.vocab_size)
        x = x_GTD.astype(jnp.float32)
        keys: list[Any] = [None, None] if key is None else list(jax.random.split(key))
        if key is not None and router.jitter:
            low, high = 1.0 - router.jitter, 1.0 + router.jitter
            x = x * jax.random.uniform(keys[0], x.shape, minval=low, maxval=high)
        logits = jnp.zeros((*x.shape[:2], E), jnp.float32)
        if router.learned:
            shape = (D, E * (router.slots or 1))
            init, of = nn.initializers.normal(cfg.init_std), cfg.param_dtype
            kernel = param(self, "kernel", init, shape, of, axes=("embed", "routes"))
            kernel = kernel.astype(jnp.float32)
            if router.slots:
                scale = param(self, "scale", nn.initializers.ones, (1,), of, axes=("one",)).astype(jnp.float32)
                x = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)
                kernel = scale * kernel / (jnp.linalg.norm(kernel, axis=0) + 1e-6)
            logits = jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)
        if router.offset:
            logits = logits + param(self, "offset", nn.initializers.zeros, (E,), of, axes=("routes",))
        bias = jnp.zeros(E)
        if router.biased:
            bias = param(self, "bias", nn.initializers.zeros, (E,), jnp.float32, axes=("routes",))
            bias = jax.lax.stop_gradient(bias)
        if G == 1:
            ids = None if ids_GT is None else ids_GT[0]
            one = router.route(Scores(logits[0], mask_GT[0], bias, ids, keys[1]))
            return jax.tree.map(lambda a: a[None], one), logits, bias
        split = None if key is None else jax.random.split(keys[1], G)
        every = Scores(logits, mask_GT, jnp.broadcast_to(bias, (G, E)), ids_GT, split)
        return jax.vmap(router.route)(every), logits, bias


class MoELayer(nn.Module):
    """``(x[B, T, D], layer) -> LayerOut``. Watched: what the decision says of every token (``experts``, ``gates`` and
    ``kept`` ``[B, T, k]`` of routers whose tokens choose)."""

    cfg: Model

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs) -> LayerOut:
        cfg, moe = self.cfg, self.cfg.ffn
        B, T, D = x_BTD.shape
        G = B if moe.group == "sequence" else 1
        mask = layer.tokens.index_BT >= 0
        ids = None if layer.ids_BT is None else layer.ids_BT.reshape(G, -1)
        decision, logits, bias = _Router(cfg, name="router")(
            x_BTD.reshape(G, -1, D), mask.reshape(G, -1), ids, layer.key
        )
        flat = x_BTD.reshape(B * T, D)
        experts = _Experts(cfg, name="experts")
        if isinstance(decision, Slots):
            y, stats = _soft(experts, flat, decision)
        elif isinstance(decision, ExpertChoice):
            y, stats = _by_expert(experts, flat, decision, mask.reshape(B * T))
        else:
            places = moe.places(B * T // G, layer.key is not None)
            y, stats = _by_token(experts, x_BTD, decision, mask.reshape(G, -1), places, moe)
        if moe.shared:
            inner = dataclasses.replace(cfg, d_ff=moe.shared, ffn=moe.kind)
            own = moe.kind.module(inner, name="shared")(flat).x
            if moe.shared_gate:
                gate = Project((D, 1), 1, False, cfg, ("embed", "one"), name="shared_gate")(flat).astype(jnp.float32)
                own = jax.nn.sigmoid(gate).astype(own.dtype) * own
            y = y + own
        report = _report(moe, decision, stats, logits, bias, mask)
        for name, value in stats["taps"].items():
            tap(self, layer.watch, name, value.reshape(B, T, -1))
        return LayerOut(y.reshape(B, T, D).astype(x_BTD.dtype), None, report)


def _by_token(
    experts: Any, x_BTD: jax.Array, choice: TokenChoice, mask_GT: jax.Array, places: int | None, moe: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Tokens choose: assignments sorted by expert, every array of M = N k rows or fewer."""
    (B, T, D), E, k, G = x_BTD.shape, moe.experts, choice.experts_Tk.shape[-1], mask_GT.shape[0]
    live = mask_GT[..., None] & (choice.gates_Tk != 0)
    keep, expert, gates = live, choice.experts_Tk, choice.gates_Tk
    # Without places, padding is routed like everything else: nobody reads its output, and nobody has to wait.
    if places is not None:
        keep = jax.vmap(lambda c, m: limit(c, m, places, moe.priority))(choice, mask_GT)
        expert = jnp.where(keep, expert, E)  # E: dropped
        gates = jnp.where(keep, gates, 0.0 * gates)  # NaN stays NaN
    if moe.dispatch == "buffers" and places is not None and current() is None:
        y = _buffers(experts, x_BTD.reshape(B * T, D), expert.reshape(-1), gates.reshape(-1, k), G * places, E)
    else:
        bounds = (places, None) if moe.group == "sequence" else (None, places)
        y, fits = experts(x_BTD, (expert.reshape(B, T, k), gates.reshape(B, T, k), *bounds))
        keep = keep & fits.reshape(keep.shape)
    return y.reshape(B * T, D), {
        "counts_E": _counts(choice.experts_Tk, live, E),
        "kept": keep.sum(),
        "chosen": live.sum(),
        "taps": {"experts": choice.experts_Tk, "kept": keep, "gates": choice.gates_Tk},
    }


def _buffers(experts: Any, x_ND: Any, expert_M: Any, gates_Nk: Any, places: int, E: int) -> jax.Array:
    N, k = gates_Nk.shape
    order_M, place_M, sizes_E = sorted_rows(expert_M, E)
    C, first_E = min(places, N * k), jnp.cumsum(sizes_E) - sizes_E
    at_EC = first_E[:, None] + jnp.arange(C)
    full_EC = jnp.arange(C) < sizes_E[:, None]
    rows = x_ND[order_M[jnp.minimum(at_EC, N * k - 1)] // k]
    out = experts(jnp.where(full_EC[..., None], rows, jnp.zeros((), rows.dtype))).reshape(E * C, -1)
    e = jnp.minimum(expert_M, E - 1)
    out_Nk = out[jnp.clip(e * C + place_M - first_E[e], 0, E * C - 1).reshape(N, k)]
    return jnp.einsum("nkd,nk->nd", out_Nk, gates_Nk.astype(out_Nk.dtype))


def _counts(experts: jax.Array, live: jax.Array, E: int) -> jax.Array:
    return (live.reshape(-1, 1) & (experts.reshape(-1, 1) == jnp.arange(E))).sum(0)


def _by_expert(
    experts: Any, x_ND: jax.Array, choice: ExpertChoice, mask_N: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """Experts choose: buffers are full by construction. Padding is no token that could be dropped."""
    G, E, n = choice.tokens_En.shape
    N, D = x_ND.shape
    tokens = choice.tokens_En + (jnp.arange(G) * (N // G))[:, None, None]
    tokens = jnp.moveaxis(tokens, 1, 0).reshape(E, G * n)
    gates = jnp.moveaxis(choice.gates_En, 1, 0).reshape(E, G * n)
    out = experts(x_ND[tokens])
    y = jnp.zeros((N, D), out.dtype).at[tokens].add(gates[..., None].astype(out.dtype) * out)
    taken = jnp.zeros((N, E), jnp.int32).at[tokens, jnp.arange(E)[:, None]].add((gates != 0).astype(jnp.int32))
    return y, {
        "counts_E": (gates != 0).sum(1),
        "kept": ((taken.sum(1) > 0) & mask_N).sum(),
        "chosen": mask_N.sum(),
        "taps": {"taken": taken},
    }


def _soft(experts: Any, x_ND: jax.Array, slots: Slots) -> tuple[jax.Array, dict[str, Any]]:
    G, T, E, s = slots.dispatch_TEs.shape
    x_GTD = x_ND.reshape(G, T, -1)
    mixed = jnp.einsum("gtes,gtd->egsd", slots.dispatch_TEs.astype(x_ND.dtype), x_GTD).reshape(E, G * s, -1)
    out = experts(mixed).reshape(E, G, s, -1)
    y = jnp.einsum("gtes,egsd->gtd", slots.combine_TEs.astype(out.dtype), out).reshape(x_ND.shape)
    weight_TE = slots.combine_TEs.sum(-1)
    return y, {
        "counts_E": weight_TE.sum((0, 1)),
        "kept": jnp.asarray(1.0),
        "chosen": jnp.asarray(1.0),
        "taps": {"weights": weight_TE},
    }


def _report(
    moe: Any, decision: Any, stats: dict[str, Any], logits: Any, bias: Any, mask_BT: jax.Array
) -> dict[str, Any]:
    """Losses and sums of one layer; padding counts for nothing."""
    E, (B, T) = moe.experts, mask_BT.shape
    tokens = mask_BT.sum().astype(jnp.float32)
    probs = decision.combine_TEs.sum(-1) if isinstance(decision, Slots) else decision.probs_TE
    probs = probs.reshape(B, T, E)
    weight = mask_BT[..., None].astype(jnp.float32)
    over = (0, 1) if moe.balance_over == "batch" else (1,)
    n = jnp.maximum(weight.sum(over), 1.0)
    balance = jnp.ones(())
    if isinstance(decision, TokenChoice) and decision.balanced:
        first = decision.experts_Tk.reshape(B, T, -1)[..., : decision.balanced]
        chosen = (first[..., None] == jnp.arange(E)).sum(2) * weight
        share, mean = chosen.sum(over) / n, (probs * weight).sum(over) / n
        balance = E / decision.balanced * (jax.lax.stop_gradient(share) * mean).sum(-1).mean()
    lse = jax.nn.logsumexp(logits.reshape(B, T, -1), axis=-1)
    z = (mask_BT * lse**2).sum() * float(moe.router.learned)
    safe = jnp.maximum(probs, 1e-30)
    entropy = -(weight * probs * jnp.log(safe)).sum()
    loss = moe.load_balance_loss * balance + moe.router_z_loss * z / jnp.maximum(tokens, 1.0)
    sums = {
        "tokens": tokens,
        "counts_E": stats["counts_E"],
        "kept": stats["kept"],
        "chosen": stats["chosen"],
        "entropy": entropy,
        "balance": balance * tokens,
        "z": z,
    }
    if moe.router.biased:
        sums["bias_E"] = bias * tokens
    return {"loss": loss, "sums": {k: jax.lax.stop_gradient(v).astype(jnp.float32) for k, v in sums.items()}}
