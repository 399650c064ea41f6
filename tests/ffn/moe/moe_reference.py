"""Mixtures of experts token by token in float64 loops, from the papers' formulas; shares no code with the library."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def best(values: np.ndarray, k: int) -> list[int]:
    """The k largest, ties to the lower index."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


Choice = list[list[tuple[int, float]]]  # per token: (expert, gate)


def topk(z: np.ndarray, k: int, softmax_place: str) -> Choice:
    out = []
    for row in z:
        p = softmax(row)
        chosen = best(p, k)
        total = sum(p[e] for e in chosen) if softmax_place == "after" else 1.0
        out.append([(e, p[e] / total) for e in chosen])
    return out


def gshard(z: np.ndarray, noise: np.ndarray | None = None, uniform: np.ndarray | None = None) -> Choice:
    out = []
    for t, row in enumerate(z):
        p = softmax(row)
        first = best(row, 1)[0]
        other = row if noise is None else row + noise[t]
        second = next(e for e in best(other, 2) if e != first)
        g1, g2 = p[first] / (p[first] + p[second]), p[second] / (p[first] + p[second])
        if uniform is not None and uniform[t] >= 2 * g2:
            g2 = 0.0
        out.append([(first, g1), (second, g2)])
    return out


def sigmoid_topk(
    z: np.ndarray, k: int, normalize: bool, scale: float, bias: np.ndarray, groups: int, keep: int
) -> Choice:
    out = []
    for row in z:
        s = sigmoid(row)
        c = s + bias
        size = len(row) // groups
        score = np.array([sum(sorted(c[g * size : (g + 1) * size])[-2:]) for g in range(groups)])
        allowed = [e for g in best(score, keep) for e in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda e: (-c[e], e))[:k]
        total = sum(s[e] for e in chosen) if normalize else 1.0
        out.append([(e, scale * s[e] / total) for e in chosen])
    return out


def plan(z: np.ndarray, iterations: int) -> np.ndarray:
    """Sinkhorn on exp(z): rows to 1/T and columns to 1/E in turn, then rows once more."""
    T, E = z.shape
    K, d1 = np.exp(z), np.ones(E)
    for _ in range(iterations):
        d0 = 1 / (T * (K @ d1))
        d1 = 1 / (E * (K.T @ d0))
    d0 = 1 / (T * (K @ d1))
    return d0[:, None] * K * d1


def balanced(scores: np.ndarray) -> list[int]:
    T, E = scores.shape
    room = -(-T // E)
    placed: dict[int, int] = {}
    while len(placed) < T:
        taken = [sum(e == j for e in placed.values()) for j in range(E)]
        asks: dict[int, list[int]] = {}
        for t in range(T):
            if t not in placed:
                asks.setdefault(max((j for j in range(E) if taken[j] < room), key=lambda j: scores[t, j]), []).append(t)
        for e, tokens in asks.items():
            tokens.sort(key=lambda t: -scores[t, e])
            placed |= dict.fromkeys(tokens[: room - taken[e]], e)
    return [placed[t] for t in range(T)]


def base(z: np.ndarray, training: bool, iterations: int, temperature: float) -> Choice:
    chosen = balanced(plan(z / temperature, iterations)) if training else [best(row, 1)[0] for row in z]
    return [[(e, sigmoid(z[t, e]))] for t, e in enumerate(chosen)]


def sinkhorn(z: np.ndarray, training: bool, k: int, iterations: int) -> Choice:
    by = plan(z, iterations) if training else z
    out = []
    for t, row in enumerate(by):
        chosen = best(row, k)
        out.append([(e, float(sigmoid(z[t, e])) if k == 1 else softmax(z[t])[e]) for e in chosen])
    return out


def expert_choice(z: np.ndarray, factor: float) -> Choice:
    T, E = z.shape
    p = np.array([softmax(row) for row in z])
    out: Choice = [[] for _ in range(T)]
    for e in range(E):
        for t in best(p[:, e], max(1, round(factor * T / E))):
            out[t].append((e, p[t, e]))
    return out


def drop(choice: Choice, E: int, places: int, priority: str) -> Choice:
    """The same with gate 0 for what does not fit."""
    T, k = len(choice), len(choice[0])
    turns = {
        "choice": [(t, j) for j in range(k) for t in range(T)],
        "token": [(t, j) for t in range(T) for j in range(k)],
        "gate": [(t, j) for j in range(k) for t in sorted(range(T), key=lambda t: (-choice[t][0][1], t))],
    }
    used, out = [0] * E, [list(row) for row in choice]
    for t, j in turns[priority]:
        e, g = choice[t][j]
        if g == 0:
            continue
        if used[e] >= places:
            out[t][j] = (e, 0.0)
        used[e] += 1
    return out


def combine(x: np.ndarray, choice: Choice, experts: list[Any]) -> np.ndarray:
    out = np.zeros_like(x)
    for t, row in enumerate(choice):
        for e, g in row:
            out[t] += g * experts[e](x[t])
    return out


def soft(x: np.ndarray, phi: np.ndarray, scale: float, slots: int, experts: list[Any]) -> np.ndarray:
    T, n = len(x), phi.shape[1]
    logits = np.zeros((T, n))
    for t in range(T):
        for j in range(n):
            logits[t, j] = scale * (x[t] / np.linalg.norm(x[t])) @ (phi[:, j] / np.linalg.norm(phi[:, j]))
    dispatch = np.stack([softmax(logits[:, j]) for j in range(n)], 1)
    outputs = [experts[j // slots](sum(dispatch[t, j] * x[t] for t in range(T))) for j in range(n)]
    return np.stack([sum(w * o for w, o in zip(softmax(logits[t]), outputs, strict=True)) for t in range(T)])
