"""Passkey retrieval: a number hidden at a depth of a long text, asked for at its end (arXiv 2305.16300 section 4.2)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lm.config import ModelConfig
from lm.data import texts
from lm.errors import UserError
from lm.measures.base import Measure, Measured, Progress, Subject, encode, score

TASK = "A pass key is hidden in the text below. Find it and remember it, the question comes at the end.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey(Measure):
    """`trials` prompts per length and depth; each is exactly `length` tokens long, question included.

    Filler is consecutive real text (`filler`, a spec of `lm.data.texts`), a different stretch per trial. The answer
    counts when every digit is the model's first choice, i.e. when greedy decoding would write it. `context` keeps
    only the last so many tokens of the prompt (truncation baseline). Samples, one per trial: ``accuracy``,
    ``accuracy_inside`` / ``accuracy_beyond`` (length at most / above the model's `max_positions`) and ``answer_nll``,
    nats per digit.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    trials: int = 1
    digits: int = 5
    filler: str = "python-docs"
    context: int | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 128:
            raise UserError(f"measures.passkey.lengths: each must be at least 128, found {self.lengths}")
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 1:
            raise UserError(f"measures.passkey.depths: each must be in 0 … 1, found {self.depths}")
        if self.trials < 1 or not 1 <= self.digits <= 100:
            raise UserError(
                "measures.passkey: trials must be at least 1 and digits from 1 to 100, found "
                f"{self.trials}, {self.digits}"
            )

    def identity(self) -> str:
        return texts.identity(texts.documents(self.filler))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def cost(self, cfg: ModelConfig) -> float:
        kept = [min(n, self.context or n) for n in self.lengths]
        return sum(n * (1.0 + n / 8192) for n in kept) * len(self.depths) * self.trials

    def prompt(
        self, subject: Subject, filler: list[int], length: int, depth: float, rng: random.Random
    ) -> tuple[list[int], list[int], range]:
        """Token ids of prompt and answer, and where in the prompt the key is told; it is exactly `length` tokens."""
        key = str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))
        task, needle, question, answer = (
            encode(subject, t, "measures.passkey", alone=t is TASK)
            for t in (TASK, NEEDLE.format(key=key), QUESTION, f" {key}")
        )
        room = length - len(task) - len(needle) - len(question)
        if room < 0 or room > len(filler):
            raise UserError(
                f"measures.passkey.lengths: {length} tokens need {room} tokens of filler; "
                f"{self.filler!r} has {len(filler)}"
            )
        start = rng.randrange(len(filler) - room + 1)
        cut = start + round(depth * room)
        head = task + filler[start:cut]
        told = range(len(head), len(head) + len(needle))
        return head + needle + filler[cut : start + room] + question, answer, told

    def prompts(self, subject: Subject) -> Iterator[tuple[int, int, list[int], list[int], range]]:
        """(number of the length, number of the depth, prompt, answer, needle). A prompt depends on seed, length, depth
        and trial alone: every arm reads the same ones."""
        text = "\n\n".join(d.text for d in texts.documents(self.filler))
        filler = encode(subject, text, "measures.passkey", alone=False)
        for j, length in enumerate(self.lengths):
            for i, depth in enumerate(self.depths):
                for trial in range(self.trials):
                    rng = random.Random(f"{subject.seed}/{length}/{depth}/{trial}")
                    yield j, i, *self.prompt(subject, filler, length, depth, rng)

    def check(self, subject: Subject, trains: bool) -> None:
        least = dataclasses.replace(self, lengths=(min(self.lengths), max(self.lengths)), depths=(0.0,), trials=1)
        for _ in least.prompts(subject):
            pass

    def run(self, subject: Subject, progress: Progress) -> Measured:
        trained = subject.model.trained_length
        samples: dict[str, list[float]] = {"accuracy": [], "answer_nll": []}
        grid = np.zeros((len(self.depths), len(self.lengths)))
        steps = len(self.lengths) * len(self.depths) * self.trials * subject.n_layers
        done, length, depth = 0, self.lengths[0], self.depths[0]

        def tick() -> None:
            nonlocal done
            done += 1
            progress(done / steps, f"{length} tokens, depth {depth:g}")

        for j, i, prompt, answer, _ in self.prompts(subject):
            length, depth = self.lengths[j], self.depths[i]
            side = "accuracy_inside" if length <= trained else "accuracy_beyond"
            prompt = prompt if self.context is None else prompt[-self.context :]
            nll, best = score(subject, prompt + answer, len(answer), tick)
            right = float(best.all())
            grid[i, j] += right / self.trials
            for name, value in (("accuracy", right), (side, right), ("answer_nll", float(nll.mean()))):
                samples.setdefault(name, []).append(value)
        curve = {
            "kind": "grid",
            "x": list(self.lengths),
            "y": list(self.depths),
            "z": grid.tolist(),
            "xlabel": "prompt length, tokens",
            "ylabel": "depth of the key",
            "zlabel": "retrieved",
        }
        return Measured(samples, {"passkey": curve}, {"filler": self.filler, "trials": self.trials})
