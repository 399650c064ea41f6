"""Text from a model, as it comes: arguments, prompts, answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from experiments import cli
from experiments.commands import source
from experiments.running.surgery import applied
from experiments.spec.settings import Text, change, names_first, parts
from experiments.spec.surgery import applicable, surgeries
from lm import interop
from lm.config import ModelConfig, build, merge, overlay, to_dict
from lm.data.tokenizers import Tokenizer
from lm.data.tokenizers.base import TORN
from lm.decoding import Generator, Sampling
from lm.decoding.generator import SEEDS
from lm.errors import UserError, unknown
from lm.files import read_json
from lm.interop.readers.tensors import check
from lm.model.language_model import DecoderModel
from lm.plug import table
from lm.surgery.base import Surgery

PROG = "python -m experiments.generate"


def arguments(argv: Sequence[str], doc: str | None = None) -> tuple[argparse.Namespace, dict[str, Text]]:
    """Parsed arguments, and ``--model.KEY`` overrides."""
    overrides = {w.partition("=")[0][2:]: Text(w.partition("=")[2]) for w in argv if w.startswith("--model.")}
    p = cli.Parser(PROG, doc)
    source.add(p)
    source.add_dtype(p)
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--file", help="prompts, one a line; - is standard input")
    p.add_argument("--whole", action="store_true", help="--file is one prompt")
    p.add_argument("--chat", action="store_true", help="through the checkpoint's chat template")
    p.add_argument("--system", help="the system message of --chat")
    p.add_argument("--template", help="which of the checkpoint's chat templates, by name")
    p.add_argument("--tools", help="JSON file with a list of tools' schemas, for --chat")
    p.add_argument("--documents", help="JSON file with a list of documents, for --chat")
    p.add_argument("--pattern", help="attention pattern, for example lm_infinite")
    p.add_argument("--cache", default="default", help="default or int8")
    p.add_argument("--surgery", default="none", help="what is done to the weights first: none or int8")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--samples", type=int, default=1, help="answers per prompt")
    p.add_argument("--seed", type=int, default=0)
    own = "default: as the checkpoint's generation settings say"
    p.add_argument("--temperature", type=float, help=f"0 = greedy; {own}, else greedy")
    p.add_argument("--top-k", type=int, help=f"0 = off; {own}")
    p.add_argument("--top-p", type=float, help="1 = off; likewise")
    p.add_argument("--min-p", type=float, help="0 = off; likewise")
    p.add_argument("--typical-p", type=float, help="1 = off; likewise")
    p.add_argument("--repetition-penalty", type=float, help="1 = off; likewise")
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
        out += [data] if args.whole else [line.removesuffix("\r") for line in data.split("\n") if line.strip()]
    if not out:
        raise UserError("--prompt: none given; valid: --prompt=TEXT, or --file=FILE with a prompt a line")
    return out


class Stop:
    """Text as it comes behind a prompt, cut at the first stop string; holds back what may be the beginning of one.

    `kept`: how many of the tokens made the text that is left.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops, self.prompt = tokenizer, [s for s in stops if s], list(prompt)
        self.ids: list[int] = []
        self.text, self.shown, self.kept, self.met = "", 0, 0, False

    def add(self, ids: Sequence[int], last: bool) -> str:
        """The new text to show."""
        self.ids += ids
        self.kept = len(self.ids)
        self.text = self.tokenizer.continued(self.prompt, self.ids)
        if not last:
            self.text = self.text.rstrip(TORN)  # a character of which bytes are still to come
        ends = [i for i in (self.text.find(s) for s in self.stops) if i >= 0]
        if ends:
            self.text, self.met = self.text[: min(ends)], True
            self.kept = self._needed()
        keep = 0 if last or self.met else max((len(s) - 1 for s in self.stops), default=0)
        upto = max(len(self.text) - keep, self.shown)
        fresh, self.shown = self.text[self.shown : upto], upto
        return fresh

    def _needed(self) -> int:
        """The fewest tokens that hold the stop string: whoever asks for that many more gets the same answer."""
        for n in range(1, len(self.ids) + 1):
            text = self.tokenizer.continued(self.prompt, self.ids[:n])
            if any(s in text for s in self.stops):
                return n
        return len(self.ids)


def run(argv: Sequence[str], doc: str | None = None) -> int:
    args, overrides = arguments(argv, doc)
    if args.cache not in ("default", "int8"):
        raise unknown("--cache", args.cache, ("default", "int8"))
    for name in ("system", "template", "tools", "documents"):
        if getattr(args, name) is not None and not args.chat:
            raise UserError(f"--{name}: needs --chat")
    if not 0 <= args.seed < SEEDS:
        raise UserError(f"--seed: found {args.seed}; valid: 0 to {SEEDS - 1}")
    surgery = surgery_of(args.surgery)
    texts = prompts(args)
    spread, dtype = source.spread(args), source.dtype(args)
    header = interop.load(source.name(args), load_params=False, dtype=dtype)
    tokenizer = header.text.needs_tokenizer("--checkpoint")
    sampling = _sampling(args, header.text.generation)
    cfg = model_of(header.config, args.pattern, overrides)
    ids = [_encode(header, text, args) for text in texts]
    cfg = dataclasses.replace(cfg, scan_layers=False)  # as they are read while generating: no second copy is made
    params = interop.load(
        header.source, overrides={"scan_layers": False}, dtype=dtype, where=None if spread is None else spread.where
    ).params
    check(cfg, params, args.checkpoint)
    cfg, params = applied(surgery, cfg, params, tokenizer)
    cfg = merge(cfg, {"cache": {"quantize": "int8"}}, "model") if args.cache == "int8" else cfg
    generator = Generator(DecoderModel(cfg), params, spread)
    stop = [] if args.ignore_eos else [i for i in header.text.stop_ids if i < cfg.vocab_size]
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
        cut, logprobs, end = Stop(tokenizer, args.stop, prompt), [], "length"
        if show and args.samples > 1:
            print(f"--- sample {s}", flush=True)
        seed = (args.seed * 1_000_003 + s) % SEEDS  # an odd factor: other seeds, other keys
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
        made = len(logprobs)
        if cut.met:  # what was read ahead of the stop string is no part of the answer
            logprobs = logprobs[: cut.kept]
        yield s, {"text": cut.text, "finish": end, "logprob": sum(logprobs)}, made


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(f"--bias: found {text!r}; valid: ID:VALUE, for example 13:-100") from None


def _encode(header: interop.Checkpoint, text: str, args: argparse.Namespace) -> list[int]:
    """A prompt as ids: as the checkpoint's own rule begins a text, or as its template writes a conversation."""
    size = header.config.vocab_size
    if not args.chat:
        return header.text.encode(text, size, "--prompt")
    system = [{"role": "system", "content": args.system}] if args.system else []
    turns = [*system, {"role": "user", "content": text}]
    choices = {"template": args.template, "tools": _json("--tools", args.tools)}
    return header.text.chat(turns, size, "--prompt", **choices, documents=_json("--documents", args.documents))


def _json(key: str, path: str | None) -> list[dict[str, Any]] | None:
    """The objects of a JSON file; None where none is named."""
    if path is None:
        return None
    try:
        found = read_json(Path(path))
    except FileNotFoundError:
        raise UserError(f"{key}: {path}: no such file; valid: a JSON file with a list of objects") from None
    except UserError as e:
        raise UserError(f"{key}: {e}") from None
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise UserError(f"{key}: {path}: expected a list of objects, found {type(found).__name__}")
    return found


def _sampling(args: argparse.Namespace, generation: Mapping[str, Any]) -> Sampling:
    """What the arguments say, and what the checkpoint's ``generation_config.json`` says where they say nothing. A
    checkpoint that does not ask for sampling is read greedily."""
    own = {k: v for k, v in generation.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    drawn = bool(generation.get("do_sample"))
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    said = {n: own[n] for n in names if n in own and (drawn or n == "repetition_penalty") and n not in given}
    if given.get("temperature") == 0:  # greedy: nothing is truncated
        said = {n: v for n, v in said.items() if n == "repetition_penalty"}
    neutral = Sampling()
    told = {n: v for n, v in said.items() if v != getattr(neutral, n)}
    if told:
        words = ", ".join(f"{n} {v:g}" for n, v in told.items())
        print(f"as the checkpoint's generation settings say: {words}; --temperature=0 is greedy", file=sys.stderr)
    if "temperature" not in said and "temperature" not in given:
        said["temperature"] = 1.0 if drawn else 0.0
    settings = {**said, **given}
    settings["top_k"] = int(settings.get("top_k", 0))
    return Sampling(
        **settings,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        bias=tuple(_bias(b) for b in args.bias),
    )
