"""Passkeys are where they are said to be."""

from __future__ import annotations

from cases.measured import subject

from lm.data.tokenizers import ByteTokenizer
from lm.measures.language.passkey import Passkey


def test_the_needle_is_where_it_is_said_to_be() -> None:
    tokenizer = ByteTokenizer()
    prompts = list(Passkey((200, 300), (0.0, 0.7), 2, 4, "kjv:Jude").prompts(subject()))
    assert len(prompts) == 8
    for j, i, prompt, answer, told in prompts:
        assert len(prompt) == (200, 300)[j] and i in (0, 1)
        sentence, key = tokenizer.decode(prompt[told.start : told.stop]), tokenizer.decode(answer).strip()
        assert len(key) == 4 and sentence.strip().startswith(f"The pass key is {key}.")
