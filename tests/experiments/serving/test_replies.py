"""How tokens are spelled in a reply: as pieces of one text, whatever stands before them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from experiments.serving.asked import Asked
from experiments.serving.engine import Fresh, Scored
from experiments.serving.replies import Reply, Spelling
from lm.data.tokenizers import ByteTokenizer
from lm.decoding import Row


class Twins(ByteTokenizer):
    """Bytes, of which "B" is written as "A"; the beginning of a text is written too."""

    def decode(self, ids: Sequence[int]) -> str:
        return ("<s>" if 256 in ids else "") + super().decode(ids).replace("B", "A")


def test_of_two_tokens_that_are_spelled_alike_the_likelier_is_told() -> None:
    (token,) = Spelling(Twins()).add([66], [-3.0], [[(65, -0.1), (67, -2.5)]])
    assert (token.spelling, token.logprob) == ("A", -3.0)
    assert token.top == {"A": -0.1, "C": -2.5}  # so that nobody takes it for the first choice


@pytest.mark.parametrize("scored", [False, True])
def test_a_token_goes_on_with_a_character_that_the_prompt_began(scored: bool) -> None:
    prompt = [*b"caf\xc3"]
    asked = Asked(False, ["caf\ufffd"], [Row(prompt)], top=1, echo=scored)
    reply = Reply(asked, "m", ByteTokenizer())
    if scored:
        reply.add(0, Scored([-1.0] * 3, [[(97, -1.0)]] * 3))
    _, text, tokens = reply.add(0, Fresh("é!", [0xA9, 33], [-0.5, -0.7], [[(0xA9, -0.5)], [(0x80, -0.2)]], "length"))
    assert text == "é!" and [t.spelling for t in tokens] == ["é", "!"]
    assert [t.start for t in tokens] == ([3, 4] if scored else [0, 1])
    assert tokens[1].top == {"token_id:128": -0.2, "!": -0.7}


def test_what_the_tokenizers_rule_adds_is_no_part_of_the_text() -> None:
    asked = Asked(False, ["ab"], [Row([256, 97, 98])], top=0, echo=True, marks=1)
    reply = Reply(asked, "m", Twins(256, 257))
    _, text, tokens = reply.add(0, Scored([-1.0, -2.0], [[], []]))
    assert text == "ab" and [t.start for t in tokens] == [0, 0, 1] and tokens[0].logprob is None
    told = reply.whole()["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [None, -1.0, -2.0] and told["top_logprobs"] is None
