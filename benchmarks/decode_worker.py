"""One contestant of `benchmarks.decode`: answers each JSON line on standard input with one on standard output.

``{"greedy": n}`` generates n tokens after a fixed prompt, ``{"prefill": n}`` reads n tokens and gives the next one;
both answer ``seconds``, ``cpu_seconds`` and ``tokens``. ``{"decode": n, "pattern": name}`` times one-token steps behind
n cached tokens: ``ms`` and ``cache_mib`` (ours only).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.train_step_worker import peak_mib

PROMPT = "Once upon a time, in a village by the sea,"


class Ours:
    """`lm.decoding.Generator`; ``int8``: weights through `lm.surgery.int8`."""

    def __init__(self, options: argparse.Namespace) -> None:
        from lm import interop
        from lm.decoding import Generator, Sampling
        from lm.model.language_model import DecoderModel
        from lm.surgery import TABLE

        found = interop.load(str(options.weights))
        plug = TABLE["int8" if options.kind == "ours-int8" else "none"]()
        self.cfg, self.params = plug.apply(found.config, found.params)
        self.generator, self.greedily = Generator(DecoderModel(self.cfg), self.params), Sampling(temperature=0.0)

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        return self.generator([prompt], self.greedily, max_new_tokens=n)[0][0].tokens

    def prefill(self, prompt: list[int]) -> list[int]:
        return self.greedy(prompt, 1)

    def decode(self, length: int, pattern: str, steps: int) -> dict[str, Any]:
        from lm.config import merge
        from lm.measures import Subject
        from lm.measures.cost.decode_cost import DecodeCost
        from lm.model.language_model import DecoderModel

        settings: dict[str, Any] = {"name": pattern}
        if pattern == "lm_infinite":
            settings |= {"window": self.cfg.max_positions, "ceiling": float(self.cfg.max_positions)}
        subject = Subject(DecoderModel(merge(self.cfg, {"pattern": settings}, "model")), self.params, None, 0)
        done = DecodeCost((length,), steps).run(subject, lambda fraction, text: None)
        return {"ms": done.samples[f"ms@{length}"], "cache_mib": done.samples[f"cache_mib@{length}"][0]}


class HuggingFace:
    """`generate` of transformers on PyTorch, scaled_dot_product_attention, its default cache."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            str(options.weights), attn_implementation="sdpa", dtype=torch.float32
        ).eval()

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        ids = self.torch.tensor([prompt])
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        return [int(t) for t in out[0, len(prompt) :]]

    def prefill(self, prompt: list[int]) -> list[int]:
        return self.greedy(prompt, 1)


class LlamaCpp:
    """llama-cpp-python on the GGUF file itself, whose weights stay at 4 bits."""

    def __init__(self, options: argparse.Namespace) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            str(options.weights), n_ctx=8192, n_threads=options.threads, n_threads_batch=options.threads, verbose=False
        )

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        self.model.reset()
        out: list[int] = []
        for token in self.model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            out.append(int(token))
            if len(out) == n:
                break
        return out

    def prefill(self, prompt: list[int]) -> list[int]:
        return self.greedy(prompt, 1)


KINDS: dict[str, Any] = {"ours": Ours, "ours-int8": Ours, "huggingface": HuggingFace, "llama-cpp": LlamaCpp}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.decode_worker")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("weights", type=Path)
    parser.add_argument("prompt", type=Path, help="token ids: the short prompt's and the long text's")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    ids = json.loads(options.prompt.read_text(encoding="utf-8"))
    model = KINDS[options.kind](options)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        cpu, start = time.process_time(), time.perf_counter()
        if "greedy" in ask:
            answer: dict[str, Any] = {"tokens": model.greedy(ids["short"], ask["greedy"])}
        elif "prefill" in ask:
            answer = {"tokens": model.prefill(ids["long"][: ask["prefill"]])}
        else:
            answer = model.decode(ask["decode"], ask["pattern"], ask["steps"])
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps({**answer, **spent, "peak_mib": peak_mib()}), flush=True)


if __name__ == "__main__":
    main()
