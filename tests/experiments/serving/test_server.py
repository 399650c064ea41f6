"""The server against OpenAI's client and the harness's own, on a small model: the same texts and numbers as here."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import generate, serve
from experiments.commands.generate import headed, parsed
from experiments.serving import command
from experiments.serving.app import Api
from lm import interop
from lm.config import model_config
from lm.data.record import TextRecord
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import Generator, Piece, Row
from lm.interop.writers import to_huggingface
from lm.model import params as params_lib

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
MODEL = {"vocab_size": 258, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 32}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
ROOT = Path(__file__).resolve().parents[3]
WAIT = 20.0  # seconds after which a test has failed
NAME = "tiny"


@dataclass
class Server:
    """A server that runs, and what asks it."""

    api: Api
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def post(self, route: str, body: object, raw: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON, past any client's own checks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        data = json.dumps(body).encode() if raw is None else raw
        connection.request("POST", f"/v1/{route}", data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def completion(self, **fields: Any) -> Any:
        return self.client.completions.create(model=NAME, **{"max_tokens": 6, "temperature": 0, **fields})


@contextlib.contextmanager
def running(api: Api) -> Iterator[Server]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api.app(), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    yield Server(api, listening.getsockname()[1])
    server.should_exit = True
    thread.join(WAIT)
    api.engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = model_config({**MODEL, "max_positions": 96, "norm": {"name": "rmsnorm", "eps": 1e-5}})
    weights = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params_lib.init(cfg, jax.random.key(3)))
    path = tmp_path_factory.mktemp("model") / "hf"
    to_huggingface.write(path, cfg, weights, TextRecord.of(ByteTokenizer(None, 257), CHAT))
    return path


def built(folder: Path, *flags: str) -> Api:
    args, overrides = parsed(command.arguments(None), [f"--checkpoint={folder}", f"--model-name={NAME}", *flags])
    return command.api(args, *headed(args, overrides))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with running(built(folder, "--max-wait-ms=100", "--max-body=4000", "--max-queue=20")) as made:
        yield made


def generated(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> list[dict[str, Any]]:
    """What ``experiments.generate`` says."""
    capsys.readouterr()
    assert generate.main([f"--checkpoint={folder}", "--max-new-tokens=6", "--json", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def test_the_model_is_listed(server: Server) -> None:
    (card,) = server.client.models.list().data
    assert card.id == NAME and server.client.models.retrieve(NAME) == card
    with pytest.raises(openai.NotFoundError, match="unknown name 'other'"):
        server.client.models.retrieve("other")


def test_greedy_texts_are_those_of_generate(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["ab", "a longer prompt", "x"]
    want = generated(capsys, folder, *(f"--prompt={p}" for p in prompts))
    made = server.completion(prompt=prompts)
    assert [c.text for c in made.choices] == [w["text"] for w in want]
    assert [c.finish_reason for c in made.choices] == [w["finish"] for w in want] == ["length"] * 3
    assert made.usage.prompt_tokens == sum(map(len, prompts)) and made.usage.completion_tokens == 18
    for prompt in ([*b"ab"], [[*b"ab"], [*b"x"]]):
        texts = [c.text for c in server.completion(prompt=prompt).choices]
        assert texts == ([want[0]["text"]] if prompt == [*b"ab"] else [want[0]["text"], want[2]["text"]])
    echoed = server.completion(prompt="ab", echo=True).choices[0].text
    assert echoed == "ab" + want[0]["text"]


def test_samples_are_those_of_generate(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompt=ab", "--temperature=1.2", "--top-p=0.9", "--seed=7", "--samples=3")
    want = generated(capsys, folder, *flags)
    made = server.completion(prompt="ab", temperature=1.2, top_p=0.9, seed=7, n=3, logprobs=0)
    assert [c.text for c in made.choices] == [w["text"] for w in want] and len({w["text"] for w in want}) > 1
    for choice, w in zip(made.choices, want, strict=True):
        assert sum(choice.logprobs.token_logprobs) == pytest.approx(w["logprob"], abs=1e-4)
    assert len({server.completion(prompt="ab", temperature=1.5, max_tokens=12).choices[0].text for _ in range(3)}) > 1


def test_a_conversation_is_written_by_the_checkpoints_template(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (want,) = generated(capsys, folder, "--prompt=hi", "--chat", "--system=be brief", "--temperature=0")
    parts = [{"type": "text", "text": "hi"}]
    for content in ("hi", parts):
        turns: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
        made = server.client.chat.completions.create(model=NAME, messages=turns, max_completion_tokens=6, temperature=0)
        assert made.choices[0].message.content == want["text"] and made.choices[0].message.role == "assistant"
        assert made.usage.prompt_tokens == len("<system>be brief<user>hi<assistant>")


def test_pieces_are_the_whole(server: Server) -> None:
    for fields in ({}, {"temperature": 1.3, "seed": 5}, {"echo": True, "logprobs": 2}):
        asked = {"prompt": ["ab", "é"], "n": 2, "max_tokens": 40, **fields}
        whole = server.completion(**asked)
        pieces = list(server.completion(**asked, stream=True, stream_options={"include_usage": True}))
        assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage and len(pieces) > 8
        for choice in whole.choices:
            own = [c for p in pieces for c in p.choices if c.index == choice.index]
            assert "".join(c.text for c in own) == choice.text
            assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
            if choice.logprobs:
                scores = [x for c in own for x in c.logprobs.token_logprobs]
                assert scores == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)
                assert [x for c in own for x in c.logprobs.text_offset] == choice.logprobs.text_offset
    turns: Any = [{"role": "user", "content": "hi"}]
    asked = {"model": NAME, "messages": turns, "seed": 1, "max_tokens": 20, "logprobs": True, "top_logprobs": 3}
    whole = server.client.chat.completions.create(**asked)
    pieces = [p.choices[0] for p in server.client.chat.completions.create(**asked, stream=True)]
    assert "".join(p.delta.content for p in pieces) == whole.choices[0].message.content
    assert pieces[0].delta.role == "assistant" and pieces[1].delta.role is None
    told = whole.choices[0].logprobs.content
    assert [t.token for p in pieces for t in p.logprobs.content] == [t.token for t in told]
    for token in told:
        likely = [t.logprob for t in token.top_logprobs]
        assert len(likely) == 3 and likely == sorted(likely, reverse=True) and token.logprob <= likely[0]


def test_a_stop_text_ends_an_answer(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = server.completion(prompt="ab", max_tokens=24).choices[0].text
    word = whole[3:5]
    (want,) = generated(capsys, folder, "--prompt=ab", "--max-new-tokens=24", f"--stop={word}")
    made = server.completion(prompt="ab", max_tokens=24, stop=[word, "never met"], logprobs=0)
    assert made.choices[0].text == want["text"] == whole[: whole.index(word)]
    assert made.choices[0].finish_reason == "stop"
    assert sum(made.choices[0].logprobs.token_logprobs) == pytest.approx(want["logprob"], abs=1e-4)
    ended = server.completion(prompt="ab", logit_bias={"257": 1000}).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")


def test_requests_at_one_time_are_one_batch_and_answered_as_alone(server: Server) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "ab", "max_tokens": 3},
        {"prompt": "a longer prompt", "max_tokens": 20, "temperature": 1.4, "seed": 3},
        {"prompt": "x", "max_tokens": 9, "temperature": 0.8, "top_p": 0.7, "seed": 4, "stop": ["\n"]},
        {"prompt": "yz", "max_tokens": 5, "logit_bias": {"65": 30}, "presence_penalty": 1.0},
        {"prompt": "ab", "max_tokens": 4, "extra_body": {"top_k": 2, "repetition_penalty": 1.3}, "seed": 9},
    ]
    alone = [server.completion(**fields).choices[0].text for fields in asked]

    async def together() -> list[str]:
        client = openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        made = [client.completions.create(model=NAME, **{"temperature": 0, **fields}) for fields in asked]
        return [answer.choices[0].text for answer in await asyncio.gather(*made)]

    server.api.engine.batches = []
    assert asyncio.run(together()) == alone
    batches = server.api.engine.batches
    assert sum(batches) == len(asked) and max(batches) > 1


def test_the_harness_measures_the_same_through_the_server(server: Server, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from lm.interop.harness import DecoderLM

    theirs = LocalCompletionsAPI(
        base_url=f"{server.url}/completions", model=NAME, tokenizer=str(folder), tokenizer_backend="huggingface",
        max_length=96, batch_size=2,
    )  # fmt: skip
    ours = DecoderLM(interop.load(str(folder)))
    pairs = [("The quick brown", " fox"), ("a", "b"), ("", "beginning"), ("x" * 60, " and more")]
    pairs += [("The quick brown", c.text) for c in [server.completion(prompt="The quick brown").choices[0]]]

    def asked(kind: str, arguments: Sequence[Any]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]

    through, here = (m.loglikelihood(asked("loglikelihood", pairs)) for m in (theirs, ours))
    assert [s for s, _ in through] == pytest.approx([s for s, _ in here], abs=1e-4)
    assert [g for _, g in through] == [g for _, g in here]
    texts = [("A text that is read from its beginning to its end.",)]
    through, here = (m.loglikelihood_rolling(asked("loglikelihood_rolling", texts)) for m in (theirs, ours))
    assert through[0] == pytest.approx(here[0], abs=1e-3)
    until = [("The quick brown", {"until": ["q"], "max_gen_toks": 12})]
    through, here = (m.generate_until(asked("generate_until", until)) for m in (theirs, ours))
    assert through == here


def test_a_prompt_is_scored_without_an_answer(server: Server) -> None:
    made = server.completion(prompt="café", echo=True, logprobs=1, max_tokens=0)
    (choice,) = made.choices
    assert choice.text == "café" and made.usage.completion_tokens == 0
    scores = choice.logprobs
    assert scores.token_logprobs[0] is None and all(p < 0 for p in scores.token_logprobs[1:])
    assert scores.tokens == ["c", "a", "f", "token_id:195", "é"] and scores.text_offset == [0, 1, 2, 3, 3]
    assert all(
        max(top.values()) >= p for top, p in zip(scores.top_logprobs[1:], scores.token_logprobs[1:], strict=True)
    )
    one = server.completion(prompt="c", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert one.text == "c" and one.logprobs.token_logprobs == [None]


TURNS = [{"role": "user", "content": "hi"}]
MISTAKES: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    ("completions", {"promt": "a"}, 400, "promt", "promt: unknown or unsupported field (did you mean 'prompt'?)"),
    ("completions", {}, 400, "prompt", "prompt: none given"),
    ("completions", {"prompt": ""}, 400, "prompt", "prompt 0: is empty"),
    ("completions", {"prompt": []}, 400, "prompt", "prompt: found []"),
    ("completions", {"prompt": ["a", 3]}, 400, "prompt", "valid: a text, a list of texts"),
    ("completions", {"prompt": [1, 258]}, 400, "prompt", "unknown token id 258; valid: 0 to 257"),
    ("completions", {"prompt": [[1], [-1]]}, 400, "prompt", "prompt 1: unknown token id -1"),
    ("completions", {"prompt": "a" * 90, "max_tokens": 7}, 400, "prompt", "90 tokens and 7 new ones"),
    ("completions", {"prompt": "a", "model": "tinny"}, 404, "model", "unknown name 'tinny' (did you mean 'tiny'?)"),
    ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "must be 0 (greedy) or more"),
    ("completions", {"prompt": "a", "temperature": "warm"}, 400, "temperature", 'found "warm"; valid: a number'),
    ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p", "top_p: must lie in (0, 1]"),
    ("completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "valid: a whole number of 0 or more"),
    ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "max_tokens: found true"),
    ("completions", {"prompt": "a", "n": 21}, 400, "n", "n: 21 answers to 1 prompts; valid: at most 20"),
    ("completions", {"prompt": "a", "stop": [""]}, 400, "stop", "stop: found"),
    ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs", "valid: 0 to 20"),
    ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "valid: an object of token ids"),
    ("completions", {"prompt": "a", "logit_bias": {"999": 1}}, 400, "logit_bias", "unknown token id 999"),
    ("completions", {"prompt": "a", "seed": 2**32}, 400, "seed", "seed: found 4294967296"),
    ("completions", {"prompt": "a", "best_of": 2}, 400, "best_of", "best_of: not supported; valid: 1"),
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix: unknown or unsupported field"),
    ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options", "stream_options: needs stream"),
    ("completions", {"prompt": "a" * 5000}, 413, None, "the body is too large; valid: at most 4000 bytes"),
    ("chat/completions", {"messages": []}, 400, "messages", "messages: none given"),
    ("chat/completions", {"messages": [{"content": "a"}]}, 400, "messages.0.role", "messages.0.role: none given"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content", "has a part that is no text"),
    ("chat/completions", {"messages": [{"role": "user", "contents": "a"}]}, 400, "messages.0.contents", "did you mean"),
    ("chat/completions", {"messages": TURNS, "tools": [{"type": "function"}]}, 400, "tools", "tools: not supported"),
    ("chat/completions", {"messages": TURNS, "response_format": {"type": "json_object"}}, 400, "response_format",
     "response_format: not supported"),
    ("chat/completions", {"messages": TURNS, "max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens", "one of"),
    ("chat/completions", {"messages": TURNS, "top_logprobs": 2}, 400, "top_logprobs", "top_logprobs: needs logprobs"),
    ("chat/completions", {"messages": TURNS, "echo": True}, 400, "echo", "echo: unknown or unsupported field"),
    ("embeddings", {}, 404, None, "POST /v1/embeddings: not found"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "status", "param", "words"), MISTAKES)
def test_mistakes(server: Server, route: str, body: dict[str, Any], status: int, param: str | None, words: str) -> None:
    found, answer = server.post(route, body)
    error = answer["error"]
    assert (found, error["param"]) == (status, param) and words in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [b"{", b"[1]", b'{"prompt": NaN}', b"\xff", b"[" * 3000, b'{"prompt": "\\ud800"}'])
def test_what_is_no_object_is_refused(server: Server, raw: bytes) -> None:
    status, answer = server.post("completions", None, raw)
    assert status == 400 and answer["error"]["message"].startswith("the body is")


def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    neutral = {"best_of": 1, "suffix": None, "user": None, "store": False, "service_tier": "auto", "stop": None}
    status, _ = server.post("completions", {"prompt": "a", "max_tokens": 1, **neutral})
    assert status == 200


class Slow:
    """Says "é" for ever to every row; `ended`: when the first is not wanted any more."""

    def __init__(self, inner: Generator) -> None:
        self.model, self.params = inner.model, inner.params
        self.ended, self.begun = threading.Event(), threading.Event()

    def rows(self, rows: Sequence[Row], *, unwanted: Collection[int], **settings: Any) -> Iterator[Piece]:
        pause = threading.Event()
        for t in range(10_000):
            if 0 in unwanted:
                self.ended.set()
                return
            yield Piece(0, ["é".encode()[t % 2]], [-1.0], [], "")
            self.begun.set()
            pause.wait(0.01)


@pytest.fixture
def slow(folder: Path) -> Iterator[tuple[Server, Slow]]:
    api = built(folder, "--max-queue=1", "--max-wait-ms=0")
    api.engine.generator = speaker = Slow(api.engine.generator)  # type: ignore[assignment]
    with running(api) as made:
        yield made, speaker


def test_whoever_closes_the_connection_is_not_answered(slow: tuple[Server, Slow]) -> None:
    server, speaker = slow
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 90}))
    assert speaker.begun.wait(WAIT)
    connection.close()
    assert speaker.ended.wait(WAIT)


def test_whoever_stops_reading_a_stream_is_not_answered_and_characters_are_whole(slow: tuple[Server, Slow]) -> None:
    server, speaker = slow
    pieces = server.completion(prompt="a", max_tokens=90, stream=True)
    texts = [piece.choices[0].text for piece, _ in zip(pieces, range(5), strict=False)]
    assert texts == ["é"] * 5
    pieces.close()
    assert speaker.ended.wait(WAIT)


def test_a_full_queue_is_said(slow: tuple[Server, Slow]) -> None:
    server, speaker = slow
    first = server.completion(prompt="a", max_tokens=90, stream=True)
    assert speaker.begun.wait(WAIT)
    second = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    second.request("POST", "/v1/completions", json.dumps({"prompt": "b", "max_tokens": 2}))
    until = threading.Event()
    while server.api.engine.waiting < 1:
        until.wait(0.01)
    with pytest.raises(openai.RateLimitError, match="1 answers wait already, there is room for 1"):
        server.completion(prompt="c")
    second.close()
    first.close()


def test_a_model_without_a_template_answers_texts_alone(tmp_path: Path) -> None:
    cfg = model_config({**MODEL, "max_positions": 32})
    weights = params_lib.init(cfg, jax.random.key(0))
    to_huggingface.write(tmp_path / "hf", cfg, weights, TextRecord.of(ByteTokenizer(None, 257)))
    with running(built(tmp_path / "hf")) as made:
        status, answer = made.post("chat/completions", {"messages": TURNS})
    assert status == 400 and "has no chat template" in answer["error"]["message"]
    assert answer["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-batch=0",), "--max-batch: must be at least 1, found 0"),
        (("--port=70000",), "--port: found 70000; valid: 0 to 65535"),
        (("--max-wait-ms=-1",), "--max-wait-ms: found -1"),
        (("--patern=x",), "--patern: unknown argument (did you mean '--pattern'?)"),
        (("--pattern=lm_infinit",), "--pattern: unknown name 'lm_infinit'"),
        (("--cache=int4",), "--cache: unknown name 'int4'"),
        (("--template=rag",), "--template"),
        (("--host=nowhere.invalid",), "--host, --port: cannot listen at nowhere.invalid:8000"),
    ],
)
def test_mistakes_of_the_command(
    folder: Path, flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main([f"--checkpoint={folder}", *flags]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


def test_a_port_that_is_taken_is_named(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([f"--checkpoint={folder}", f"--port={server.port}"]) == 2
    assert f"cannot listen at 127.0.0.1:{server.port}" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert serve.main([f"--checkpoint={folder}"]) == 2
    err = capsys.readouterr().err
    assert "serve needs starlette and uvicorn; get it with: pip install 'decoder-lab[serve]'" in err


@pytest.mark.nightly
def test_a_process_ends_when_it_is_told_to(folder: Path) -> None:
    words = [sys.executable, "-m", "experiments.lab", "serve", f"--checkpoint={folder}", "--port=0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        url = re.fullmatch(r"hf at (http://127\.0\.0\.1:\d+/v1)\n", first)
        assert url is not None, first + process.stderr.read()
        client = openai.OpenAI(base_url=url[1], api_key="none", max_retries=0, timeout=120)
        assert client.completions.create(model="hf", prompt="a", max_tokens=2).usage.completion_tokens <= 2
        process.send_signal(signal.SIGTERM)
        assert (process.wait(WAIT), process.stderr.read()) == (0, "ended\n")
