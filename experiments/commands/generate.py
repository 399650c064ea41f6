"""Text from a model, as it comes: arguments, prompts, answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from experiments import cli
from experiments.commands import source
from experiments.running.surgery import applied
from experiments.spec.settings import Text, change, names_first, parts
from experiments.spec.surgery import applicable, surgeries
from lm import interop
from lm.config import ModelConfig, build, merge, overlay, to_dict
from lm.data.chat import Message
from lm.data.record import DRAWN
from lm.data.tokenizers import Tokenizer
from lm.data.tokenizers.base import TORN
from lm.decoding import Generator, Row, Sampling
from lm.decoding.sampling import CUTS, OFF
from lm.errors import UserError, shown, unknown
from lm.files import read_json, read_text, user_path
from lm.interop.readers.tensors import check
from lm.model.language_model import DecoderModel
from lm.plug import SEEDS, table
from lm.surgery.base import Surgery

PROG = "python -m experiments.generate"


def parsed(p: cli.Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Text]]:
    """Parsed arguments, and ``--model.KEY`` overrides; `UserError` for an argument that `p` does not have."""
    overrides = {w.partition("=")[0][2:]: Text(w.partition("=")[2]) for w in argv if w.startswith("--model.")}
    args, rest = p.parse_known_args([w for w in argv if not w.startswith("--model.")])
    p.refuse(rest)
    return args, overrides


def model_arguments(p: cli.Parser) -> None:
    """Which model a command reads, and how."""
    source.add(p)
    source.add_dtype(p)
    p.add_argument("--pattern", help="attention pattern, for example lm_infinite")
    p.add_argument("--cache", default="default", help="default or int8")
    p.add_argument("--surgery", default="none", help="what is done to the weights first: none or int8")


def drawing_arguments(p: cli.Parser) -> None:
    """How a command's tokens are drawn."""
    p.add_argument("--max-new-tokens", type=int, default=128)
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


def template_arguments(p: cli.Parser) -> None:
    """How a command writes conversations."""
    p.add_argument("--system", help="the system message")
    p.add_argument("--template", help="which of the checkpoint's chat templates, by name")
    p.add_argument("--tools", help="JSON file with a list of tools' schemas")
    p.add_argument("--documents", help="JSON file with a list of documents")


def arguments(argv: Sequence[str], doc: str | None = None) -> tuple[argparse.Namespace, dict[str, Text]]:
    """Parsed arguments, and ``--model.KEY`` overrides."""
    p = cli.Parser(PROG, doc)
    model_arguments(p)
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--file", help="prompts, one a line; - is standard input")
    p.add_argument("--whole", action="store_true", help="--file is one prompt")
    p.add_argument("--chat", action="store_true", help="through the checkpoint's chat template")
    template_arguments(p)
    p.add_argument("--samples", type=int, default=1, help="answers per prompt")
    drawing_arguments(p)
    p.add_argument("--json", action="store_true", help="one JSON object per answer")
    return parsed(p, argv)


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
        data = said(stdin) if args.file == "-" else _read(args.file)
        out += [data] if args.whole else [line.removesuffix("\r") for line in data.split("\n") if line.strip()]
    if not out:
        raise UserError("--prompt: none given; valid: --prompt=TEXT, or --file=FILE with a prompt a line")
    return out


def _read(name: str) -> str:
    try:
        return read_text(user_path(name, "--file"), "--file: ")
    except FileNotFoundError:
        raise UserError(f"--file: {name}: no such file; valid: a text file, or - for standard input") from None


def said(stdin: IO[str] | None) -> str:
    """All of standard input; `UserError` where it is not UTF-8 text."""
    try:
        data = (stdin or sys.stdin).read()
        data.encode()
    except UnicodeError:  # bytes that are none come as half characters, or not at all
        raise UserError("--file: -: standard input is not UTF-8; valid: UTF-8 text") from None
    return data


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


@dataclass(frozen=True)
class Opened:
    """A checkpoint as a command reads it: `header` without its weights, `cfg` the model after all switches, `generator`
    with the weights after surgery, `stop` every token that ends an answer."""

    header: interop.Checkpoint
    tokenizer: Tokenizer
    cfg: ModelConfig
    generator: Generator
    stop: tuple[int, ...]

    def conversation(self, turns: Sequence[Message], what: str, **choices: Any) -> list[int]:
        """The ids of a conversation up to where the model answers."""
        return self.header.text.chat(turns, self.header.config.vocab_size, what, **choices)


def headed(args: argparse.Namespace, overrides: dict[str, Text]) -> tuple[interop.Checkpoint, ModelConfig]:
    """What can be known and refused before any weights are read."""
    if args.cache not in ("default", "int8"):
        raise unknown("--cache", args.cache, ("default", "int8"))
    surgery_of(args.surgery)
    source.spread(args)
    header = interop.load(source.name(args), load_params=False, dtype=source.dtype(args))
    header.text.needs_tokenizer("--checkpoint")
    return header, model_of(header.config, args.pattern, overrides)


def opened(args: argparse.Namespace, header: interop.Checkpoint, cfg: ModelConfig, ends: bool = True) -> Opened:
    """The weights, and everything that the switches of `model_arguments` do. `ends`: whether stop tokens stop."""
    tokenizer, spread = header.text.needs_tokenizer("--checkpoint"), source.spread(args)
    cfg = dataclasses.replace(cfg, scan_layers=False)  # as they are read while generating: no second copy is made
    params = interop.load(
        header.source,
        overrides={"scan_layers": False},
        dtype=source.dtype(args),
        where=None if spread is None else spread.where,
    ).params
    check(cfg, params, args.checkpoint)
    cfg, params = applied(surgery_of(args.surgery), cfg, params, tokenizer)
    cfg = merge(cfg, {"cache": {"quantize": "int8"}}, "model") if args.cache == "int8" else cfg
    stop = tuple(i for i in header.text.stop_ids if i < cfg.vocab_size) if ends else ()
    return Opened(header, tokenizer, cfg, Generator(DecoderModel(cfg), params, spread), stop)


def seed_of(seed: int, sample: int) -> int:
    """The seed of a prompt's answer number `sample`."""
    return (seed * 1_000_003 + sample) % SEEDS  # an odd factor: other seeds, other keys


def check_drawing(args: argparse.Namespace) -> None:
    """Raises `UserError` for arguments of `drawing_arguments` that ask for nothing."""
    check_seed(args.seed, "--seed")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: must be at least 1, found {args.max_new_tokens}")
    if "" in args.stop:
        raise UserError("--stop: is empty, which every text holds; valid: a text that ends an answer")


def check_seed(seed: int, key: str) -> int:
    if not 0 <= seed < SEEDS:
        raise UserError(f"{key}: found {seed}; valid: 0 to {SEEDS - 1}")
    return seed


def run(argv: Sequence[str], doc: str | None = None) -> int:
    args, overrides = arguments(argv, doc)
    for name in ("system", "template", "tools", "documents"):
        if vars(args)[name] is not None and not args.chat:
            raise UserError(f"--{name}: needs --chat")
    check_drawing(args)
    if args.samples < 1:
        raise UserError(f"--samples: must be at least 1, found {args.samples}")
    if args.whole and not args.file:
        raise UserError("--whole: has no meaning without --file; valid: --file=FILE --whole")
    texts = prompts(args)
    header, cfg = headed(args, overrides)
    sampling = sampling_of(args, header.text.generation)
    sampling.check(cfg.vocab_size)
    ids = [_encode(header, text, args) for text in texts]
    model = opened(args, header, cfg, ends=not args.ignore_eos)
    total, start = 0, time.perf_counter()
    for i, prompt in enumerate(ids):
        for s in range(args.samples):
            if args.samples > 1 and not args.json:
                print(f"--- sample {s}", flush=True)
            row = Row(prompt, sampling, seed_of(args.seed, s), args.max_new_tokens)
            show = None if args.json else lambda text: print(text, end="", flush=True)
            answer, n = answered(model, row, args.stop, show)
            total += n
            if args.json:
                print(json.dumps({"prompt": texts[i], "sample": s, **answer}, ensure_ascii=False), flush=True)
            else:
                print(flush=True)
    spent = time.perf_counter() - start
    print(f"{total} tokens in {spent:.1f} s, compilation included: {total / spent:.1f} tokens/s", file=sys.stderr)
    return 0


def answered(
    model: Opened, row: Row, stops: Sequence[str], show: Callable[[str], None] | None = None
) -> tuple[dict[str, Any], int]:
    """One answer, shown as it comes, and how many tokens were made for it."""
    cut, logprobs, end = Stop(model.tokenizer, stops, row.prompt), list[float](), "length"
    for _, _, new, scores, done in model.generator.stream(
        [row.prompt], row.sampling, max_new_tokens=row.max_new_tokens, stop=model.stop, seeds=[row.seed]
    ):
        logprobs += scores
        fresh = cut.add([t for t in new if t not in model.stop], bool(done))
        if show is not None:
            show(fresh)
        if cut.met or done:
            end = "stop" if cut.met else done
            break
    made = len(logprobs)
    if cut.met:  # what was read ahead of the stop string is no part of the answer
        logprobs = logprobs[: cut.kept]
    return {"text": cut.text, "finish": end, "logprob": sum(logprobs)}, made


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(f"--bias: found {shown(text)}; valid: ID:VALUE, for example 13:-100") from None


def _encode(header: interop.Checkpoint, text: str, args: argparse.Namespace) -> list[int]:
    """A prompt as ids: as the checkpoint's own rule begins a text, or as its template writes a conversation."""
    size = header.config.vocab_size
    if not args.chat:
        return header.text.encode(text, size, "--prompt")
    system = [{"role": "system", "content": args.system}] if args.system else []
    turns = [*system, {"role": "user", "content": text}]
    choices = {"template": args.template, "tools": objects("--tools", args.tools)}
    return header.text.chat(turns, size, "--prompt", **choices, documents=objects("--documents", args.documents))


def objects(key: str, path: str | None) -> list[dict[str, Any]] | None:
    """The objects of a JSON file; None where none is named."""
    if path is None:
        return None
    try:
        found = read_json(user_path(path, key))
    except FileNotFoundError:
        raise UserError(f"{key}: {path}: no such file; valid: a JSON file with a list of objects") from None
    except UserError as e:
        raise UserError(f"{key}: {e}") from None
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise UserError(f"{key}: {path}: expected a list of objects, found {type(found).__name__}")
    return found


def default_sampling(generation: Mapping[str, Any], given: Mapping[str, float], silent: float) -> dict[str, Any]:
    """What the checkpoint's ``generation_config.json`` says where `given` says nothing: fields of `Sampling`. A
    checkpoint that does not ask for sampling is read greedily; `silent`: the temperature of one that says nothing."""
    own = {k: v for k, v in generation.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    drawn = bool(generation.get("do_sample"))
    said = {n: own[n] for n in DRAWN if n in own and (drawn or n == "repetition_penalty") and n not in given}
    if given.get("temperature") == 0:  # greedy: nothing is truncated
        said = {n: v for n, v in said.items() if n == "repetition_penalty"}
    if "temperature" not in said and "temperature" not in given:
        said["temperature"] = 1.0 if drawn else 0.0 if "do_sample" in generation else silent
    if "top_k" in said:
        said["top_k"] = int(said["top_k"])
    return said


def sampling_of(args: argparse.Namespace, generation: Mapping[str, Any]) -> Sampling:
    """What the arguments of `drawing_arguments` say, and where they say nothing what the checkpoint does."""
    given = {name: value for name in DRAWN if (value := vars(args)[name]) is not None}
    said = default_sampling(generation, given, silent=0.0)
    made = Sampling(
        **said,
        **given,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        bias=tuple(_bias(b) for b in args.bias),
    )
    cuts = [name for name in CUTS if name in given and given[name] != OFF[name]]
    if cuts and made.temperature == 0:
        raise UserError(
            f"--{cuts[0].replace('_', '-')}: has no meaning with temperature 0, which takes the likeliest token; "
            "valid: --temperature above 0"
        )
    told = {n: v for n, v in said.items() if v != vars(Sampling())[n] and (n != "temperature" or v)}
    if told:
        words = ", ".join(f"{n} {v:g}" for n, v in told.items())
        print(f"as the checkpoint's generation settings say: {words}; --temperature=0 is greedy", file=sys.stderr)
    return made
