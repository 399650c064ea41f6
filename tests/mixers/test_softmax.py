"""Softmax attention as a layer, against NumPy written from the equations."""

from __future__ import annotations

import numpy as np
import oracles
from cases.mixer_case import MixerCase
from cases.model import Params


def _rotated(x_Td: np.ndarray) -> np.ndarray:
    return np.stack([oracles.rotate(x, t, 10000.0) for t, x in enumerate(x_Td)])


class TestSoftmax(MixerCase):
    """Grouped queries, biases, normalised queries and keys, a soft cap and a scale."""

    change = {
        "mixer": {
            "name": "softmax",
            "qk_norm": True,
            "qkv_bias": True,
            "out_bias": True,
            "softcap": 1.5,
            "scale": 0.7,
            "backend": "dense",
        }
    }

    def naive(self, params: Params, x_TD: np.ndarray) -> np.ndarray:
        over = (1, 2) if self.cfg.mixer.qk_norm_over == "width" else 2

        def project(name: str) -> np.ndarray:
            p = params[name]
            out = np.einsum("tD,Dhd->thd", x_TD, p["kernel"]) + p["bias"]
            if name == "v":
                return np.asarray(out)
            scale = params[f"{name}_norm"]["scale"]
            out = out / np.sqrt((out**2).mean(over, keepdims=True) + 1e-5) * scale.reshape(-1, out.shape[2])
            return np.stack([_rotated(out[:, h]) for h in range(out.shape[1])], 1)

        q, k, v = (project(name) for name in "qkv")
        y = np.zeros_like(q)
        for t, h in np.ndindex(len(x_TD), q.shape[1]):
            group = h * k.shape[1] // q.shape[1]
            s = np.array([0.7 * q[t, h] @ k[j, group] for j in range(t + 1)])
            p = np.exp(1.5 * np.tanh(s / 1.5))
            nothing = np.exp(params["sinks"][h]) if "sinks" in params else 0.0
            y[t, h] = p @ v[: t + 1, group] / (p.sum() + nothing)
        return np.einsum("thd,hdD->tD", y, params["o"]["kernel"]) + params["o"]["bias"]


class TestSinkLogits(TestSoftmax):
    """A logit per head that gives nothing; queries and keys normalised over all heads."""

    change = {"mixer": {**TestSoftmax.change["mixer"], "sink_logits": True, "qk_norm_over": "width"}}
