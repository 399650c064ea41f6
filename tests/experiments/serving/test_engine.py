"""Which rows run together, what each is told, and what ends one; with a model that says what it is told to say."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest

from experiments.commands.generate import Opened
from experiments.serving.engine import Engine, Event, Failed, Fresh, Job
from experiments.serving.refusal import Refused
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import Piece, Row
from lm.errors import UserError

WAIT = 20.0  # seconds after which a test has failed


class Speaker:
    """Says the bytes of `text`, `stride` a piece, to every row; waits for `go` before each batch."""

    vocab_size = 258

    def __init__(self, text: str = "abc") -> None:
        self.text, self.go, self.begun = text.encode(), threading.Event(), threading.Semaphore(0)
        self.stride = 1
        self.batches: list[list[Row]] = []
        self.unwanted: Collection[int] = ()
        self.error: Exception | None = None
        self.model, self.params = self, None
        self.go.set()

    def rows(self, rows: Sequence[Row], *, unwanted: Collection[int], **settings: Any) -> Iterator[Piece]:
        self.batches.append(list(rows))
        self.unwanted = unwanted
        self.begun.release()
        assert self.go.wait(WAIT)
        if self.error is not None and len(rows) > 1 - (type(self.error) is not UserError):
            raise self.error
        for at in range(0, len(self.text), self.stride):
            for i in range(len(rows)):
                if i not in unwanted:
                    new = [*self.text[at : min(at + self.stride, rows[i].max_new_tokens)]]
                    last = at + len(new) in (len(self.text), rows[i].max_new_tokens)
                    scores = [-0.5 - t for t in range(at, at + len(new))]
                    yield Piece(i, new, scores, [], "length" if last else "")


def opened(speaker: Any) -> Opened:
    nothing: Any = None
    return Opened(nothing, ByteTokenizer(), nothing, speaker, ())


class Told:
    """What one row is told."""

    def __init__(self, new: int = 99, stops: Sequence[str] = ()) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()
        self.job = Job(Row([65], max_new_tokens=new), self.hear, stops)

    def hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Failed) or (isinstance(event, Fresh) and event.finish):
            self.done.set()

    def text(self) -> str:
        assert self.done.wait(WAIT)
        return "".join(e.text for e in self.events if isinstance(e, Fresh))


@pytest.fixture
def speaker() -> Speaker:
    return Speaker()


@pytest.fixture
def engine(speaker: Speaker) -> Iterator[Engine]:
    made = Engine(opened(speaker), batch=3, wait=0.0, queue=5)
    yield made
    speaker.go.set()
    made.close()


def busy(engine: Engine, speaker: Speaker) -> Told:
    """A row that runs until `speaker.go`."""
    speaker.go.clear()
    first = Told()
    engine.submit([first.job])
    assert speaker.begun.acquire(timeout=WAIT)
    return first


def test_rows_that_come_while_a_batch_runs_are_the_next_one(engine: Engine, speaker: Speaker) -> None:
    first = busy(engine, speaker)
    others = [Told() for _ in range(4)]
    for told in others:
        engine.submit([told.job])
    speaker.go.set()
    assert [told.text() for told in (first, *others)] == ["abc"] * 5
    assert [len(batch) for batch in speaker.batches] == [1, 3, 1]


def test_rows_that_come_shortly_after_the_first_run_with_it(speaker: Speaker) -> None:
    patient = Engine(opened(speaker), batch=2, wait=WAIT, queue=5)
    told = [Told(), Told()]
    for one in told:
        patient.submit([one.job])
    assert [one.text() for one in told] == ["abc", "abc"] and [len(b) for b in speaker.batches] == [2]
    patient.close()


def test_a_full_queue_refuses_all_of_a_request(engine: Engine, speaker: Speaker) -> None:
    first = busy(engine, speaker)
    kept = [Told() for _ in range(4)]
    engine.submit([told.job for told in kept])
    with pytest.raises(Refused, match="4 answers wait already, there is room for 5") as found:
        engine.submit([Told().job, Told().job])
    assert found.value.status == 429 and engine.waiting == 4
    speaker.go.set()
    assert [told.text() for told in (first, *kept)] == ["abc"] * 5


def test_whoever_leaves_is_not_answered(engine: Engine, speaker: Speaker) -> None:
    first = busy(engine, speaker)
    gone, stays = Told(), Told()
    engine.submit([gone.job, stays.job])
    gone.job.cancelled.set()  # while it waits
    first.job.cancelled.set()  # while it runs
    speaker.go.set()
    assert stays.text() == "abc"
    assert gone.events == [] and len(first.events) == 1 and [len(b) for b in speaker.batches] == [1, 1]


@pytest.mark.parametrize("stride", [1, 4, 99])
def test_a_text_ends_at_its_stop_text_and_its_row_is_not_wanted_any_more(
    engine: Engine, speaker: Speaker, stride: int
) -> None:
    speaker.text, speaker.stride = b"one two three", stride
    one, other = Told(stops=["tw", "zz"]), Told(new=3)
    engine.submit([one.job, other.job])
    assert one.text() == "one " and other.text() == "one"
    last = one.events[-1]
    assert isinstance(last, Fresh) and last.finish == "stop" and 0 in speaker.unwanted
    made = [e for e in one.events if isinstance(e, Fresh)]
    assert sum(len(e.tokens) for e in made) == 6 and [p for e in made for p in e.logprobs] == [
        -0.5 - t for t in range(6)
    ]


def test_no_piece_ends_within_a_character(engine: Engine, speaker: Speaker) -> None:
    speaker.text = "é€😀!".encode()
    told = Told()
    engine.submit([told.job])
    assert told.text() == "é€😀!"
    assert [e.text for e in told.events if isinstance(e, Fresh) and e.text] == ["é", "€", "😀", "!"]


def test_a_batch_that_fails_leaves_the_next_alone(
    engine: Engine, speaker: Speaker, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker.error = RuntimeError("out\nof memory")
    told = Told()
    engine.submit([told.job])
    assert told.text() == "" and told.events == [Failed("the model failed: RuntimeError: out of memory")]
    speaker.error = None
    again = Told()
    engine.submit([again.job])
    assert again.text() == "abc"


def test_rows_that_do_not_fit_together_run_alone(engine: Engine, speaker: Speaker) -> None:
    speaker.error = UserError("prompt: the longest has too many")
    told = [Told(), Told()]
    engine.submit([one.job for one in told])
    assert [one.text() for one in told] == ["abc", "abc"] and [len(b) for b in speaker.batches] == [2, 1, 1]


def test_an_end_is_told_to_everybody(engine: Engine, speaker: Speaker) -> None:
    first, second = busy(engine, speaker), Told()
    engine.submit([second.job])
    threading.Thread(target=lambda: first.done.wait(WAIT) and speaker.go.set()).start()  # the batch goes on, then ends
    engine.close()
    assert [told.events[0] for told in (first, second)] == [Failed("the server is ending", 503)] * 2
    with pytest.raises(Refused, match="the server is ending"):
        engine.submit([Told().job])
