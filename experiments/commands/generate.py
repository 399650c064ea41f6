"""Text from a model, as it comes: arguments, prompts, answers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from experiments import cli
from experiments.running.surgery import applied
from experiments.spec.settings import Text, change, names_first, parts
from experiments.spec.surgery import applicable, surgeries
from lm import interop
from lm.config import ModelConfig, build, merge, overlay, to_dict
from lm.data.tokenizers import Tokenizer
from lm.decoding import Generator, Sampling
from lm.decoding.chat import render
from lm.errors import UserError, unknown
from lm.interop.readers.tensors import check
from lm.model.language_model import DecoderModel
from lm.plug import table
from lm.surgery.base import Surgery

PROG = "python -m experiments.generate"


def arguments(argv: Sequence[str], doc: str | None = None) -> tuple[argparse.Namespace, dict[str, Text]]:
    """Parsed arguments, and ``--model.KEY`` overrides."""
    overrides = {w.partition("=")[0][2:]: Text(w.partition("=")[2]) for w in argv if w.startswith("--model.")}
    p = cli.Parser(PROG, doc)
    p.add_argument("--checkpoint", required=True, help="a name, a Hugging Face folder, a GGUF file, a run's folder")
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--file", help="prompts, one a line; - is standard input")
    p.add_argument("--whole", action="store_true", help="--file is one prompt")
    p.add_argument("--chat", action="store_true", help="through the checkpoint's chat template")
    p.add_argument("--system", help="the system message of --chat")
    p.add_argument("--pattern", help="attention pattern, for example lm_infinite")
    p.add_argument("--cache", default="default", help="default or int8")
    p.add_argument("--surgery", default="none", help="what is done to the weights first: none or int8")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--samples", type=int, default=1, help="answers per prompt")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--min-p", type=float, default=0.0)
    p.add_argument("--typical-p", type=float, default=1.0)
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--presence-penalty", type=float, default=0.0)
    p.add_argument("--frequency-penalty", type=float, default=0.0)
    p.add_argument("--bias", action="append", default=[], help="ID:VALUE, added to the token's logit")
    p.add_argument("--stop", action="append", default=[], help="text that ends an answer; may be given several times")
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")
    p.add_argument("--json", action="store_true", help="one JSON object per answer")
    parsed, rest = p.parse_known_args([w for w in argv if not w.startswith("--model.")])
    p.refuse(rest)
    return parsed, overrides


def model_of(cfg: ModelConfig, pattern: str | None, overrides: dict[str, Text]) -> ModelConfig:
    """`cfg` with another pattern and other keys; windows and ceilings that nobody set are the trained length."""
    changes: dict[str, Any] = {}
    if pattern is not None:
        options = table("lm.patterns")
        if pattern not in options:
            raise unknown("--pattern", pattern, options)
        changes["pattern"] = to_dict(options[pattern].trained_at(cfg.max_positions), options)
    settings = overlay(ModelConfig, cfg, changes, "model")
    for dotted, value in names_first(overrides):
        settings = change(ModelConfig, settings, parts(dotted)[1:], value, "model")
    return cast(ModelConfig, build(ModelConfig, settings, "model"))


def surgery_of(name: str) -> tuple[Surgery, ...]:
    """The plug of `lm.surgery` with its defaults; `UserError` for one that there is not, or that needs training."""
    options = applicable()
    if name not in ("none", *options):
        raise unknown("--surgery", name, ("none", *options))
    return () if name == "none" else surgeries(name)


def prompts(args: argparse.Namespace, stdin: IO[str] | None = None) -> list[str]:
    """All prompts; raises `UserError` when there is none, or a file cannot be read."""
    out = list(args.prompt)
    if args.file:
        try:
            data = (stdin or sys.stdin).read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"--file: {args.file}: no such file; valid: a text file, or - for standard input") from None
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--file: {args.file}: cannot be read as UTF-8 text ({e})") from None
        out += [data] if args.whole else [line for line in data.splitlines() if line.strip()]
    if not out:
        raise UserError("--prompt: none given; valid: --prompt=TEXT, or --file=FILE with a prompt a line")
    return out


class Stop:
    """Text as it comes, cut at the first stop string; holds back what may be the beginning of one."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.ids: list[int] = []
        self.text, self.shown, self.met = "", 0, False

    def add(self, ids: Sequence[int], last: bool) -> str:
        """The new text to show."""
        self.ids += ids
        self.text = self.tokenizer.decode(self.ids)
        if not last:
            self.text = self.text.rstrip("\ufffd")  # a character of which bytes are still to come
        ends = [i for i in (self.text.find(s) for s in self.stops) if i >= 0]
        if ends:
            self.text, self.met = self.text[: min(ends)], True
        keep = 0 if last or self.met else max((len(s) - 1 for s in self.stops), default=0)
        upto = max(len(self.text) - keep, self.shown)
        fresh, self.shown = self.text[self.shown : upto], upto
        return fresh


def run(argv: Sequence[str], doc: str | None = None) -> int:
    args, overrides = arguments(argv, doc)
    if args.cache not in ("default", "int8"):
        raise unknown("--cache", args.cache, ("default", "int8"))
    surgery = surgery_of(args.surgery)
    texts = prompts(args)
    sampling = Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.typical_p,
        args.repetition_penalty,
        args.presence_penalty,
        args.frequency_penalty,
        tuple(_bias(b) for b in args.bias),
    )
    header = interop.load(args.checkpoint, load_params=False)
    tokenizer = header.tokenizer
    if tokenizer is None:
        raise UserError(
            f"--checkpoint: {args.checkpoint} has no tokenizer; valid: one with tokenizer.json or a GGUF file"
        )
    cfg = model_of(header.config, args.pattern, overrides)
    ids = [_encode(header, tokenizer, text, args) for text in texts]
    params = interop.load(args.checkpoint).params
    check(cfg, params, args.checkpoint)
    cfg, params = applied(surgery, cfg, params, tokenizer)
    cfg = merge(cfg, {"cache": {"quantize": "int8"}}, "model") if args.cache == "int8" else cfg
    generator = Generator(DecoderModel(cfg), params)
    stop = [] if args.ignore_eos or header.eos_id is None else [header.eos_id]
    total, start = 0, time.perf_counter()
    for i, prompt in enumerate(ids):
        for s, answer, n in _answers(generator, tokenizer, prompt, sampling, stop, args, show=not args.json):
            total += n
            if args.json:
                print(json.dumps({"prompt": texts[i], "sample": s, **answer}, ensure_ascii=False), flush=True)
    spent = time.perf_counter() - start
    print(f"{total} tokens in {spent:.1f} s, compilation included: {total / spent:.1f} tokens/s", file=sys.stderr)
    return 0


def _answers(
    generator: Generator,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    stop: list[int],
    args: argparse.Namespace,
    show: bool,
) -> Iterator[tuple[int, dict[str, Any], int]]:
    """All answers to one prompt, one after the other when they are shown."""
    for s in range(args.samples):
        cut, logprobs, end = Stop(tokenizer, args.stop), [], "length"
        if show and args.samples > 1:
            print(f"--- sample {s}", flush=True)
        seed = args.seed * 1_000_003 + s
        for _, _, new, scores, done in generator.stream(
            [prompt], sampling, max_new_tokens=args.max_new_tokens, stop=stop, seeds=[seed]
        ):
            shown = [t for t in new if t not in stop]
            logprobs += scores
            fresh = cut.add(shown, bool(done))
            if show:
                print(fresh, end="", flush=True)
            if cut.met or done:
                end = "stop" if cut.met else done
                break
        if show:
            print(flush=True)
        yield s, {"text": cut.text, "finish": end, "logprob": sum(logprobs)}, len(logprobs)


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(f"--bias: found {text!r}; valid: ID:VALUE, for example 13:-100") from None


def _encode(header: interop.Checkpoint, tokenizer: Tokenizer, text: str, args: argparse.Namespace) -> list[int]:
    if args.chat:
        words = {
            name: tokenizer.decode([i]) if i is not None else ""
            for name, i in (("bos_token", header.bos_id), ("eos_token", header.eos_id))
        }
        system = [{"role": "system", "content": args.system}] if args.system else []
        text = render(header.chat_template, [*system, {"role": "user", "content": text}], args.checkpoint, **words)
    elif args.system:
        raise UserError("--system: needs --chat")
    return list(tokenizer.encode(text))
