"""Our models in the lm-evaluation-harness: any of its tasks on any checkpoint, attention pattern and cache.

The harness is optional (extra ``eval``). Contexts, truncation and windows are those of its own Hugging Face model, so
that the two agree on equal weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from lm.config import ModelConfig
from lm.data.chat import choose
from lm.data.tokenizers import check_ids
from lm.data.tokenizers.base import same_start
from lm.decoding import Generator, Sampling
from lm.decoding.scoring import score
from lm.decoding.spread import Spread
from lm.errors import UserError
from lm.interop import Checkpoint
from lm.model.language_model import DecoderModel, LanguageModel


class DecoderLM(TemplateLM):
    """One checkpoint (`lm.interop.Checkpoint`) read with `config`, or with another model of its parameters.

    `max_length`: tokens of context, None = the trained length; `batch_size`: rows scored at a time. `spread`: the
    devices that the parameters are on.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig | LanguageModel | None = None,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        spread: Spread | None = None,
    ) -> None:
        super().__init__()
        config = checkpoint.config if config is None else config
        self.language_model = config if isinstance(config, LanguageModel) else DecoderModel(config)
        self.checkpoint, self.text, self.params = checkpoint, checkpoint.text, checkpoint.params
        self.tokenizer = checkpoint.text.needs_tokenizer("--checkpoint")
        self.max_length = max_length or self.language_model.trained_length
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self.spread = spread

    @functools.cached_property
    def _generator(self) -> Generator:
        """Made by the first task that generates: it reads layers one by one, which are copies of stacked ones."""
        return Generator(self.language_model, self.params, self.spread)

    @property
    def eot_token_id(self) -> int:
        """The end of a text; for a tokenizer without one, its beginning, else id 0."""
        ids = (self.tokenizer.eos_id, self.text.eos_id, self.text.bos_id)
        return next((int(i) for i in ids if i is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning token if there is one, else the end."""
        return self.eot_token_id if self.tokenizer.bos_id is None else int(self.tokenizer.bos_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.checkpoint.source).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids as the tokenizer's own rule begins the text, unless the text spells the beginning out already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        ids = self.tokenizer.encode_text(string) if add_special_tokens else self.tokenizer.encode(string)
        return check_ids(self.tokenizer, ids, self.language_model.vocab_size, "--tasks")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.text.render(chat_history, add_generation_prompt=add_generation_prompt).text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not self.text.templates:
            return ""
        return choose(self.text.templates, chat_template if isinstance(chat_template, str) else None, False, "--chat")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) of each request."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            rows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in chosen]
            scores, greedy = self._score(rows)
            for b, i in enumerate(chosen):
                n, end = min(len(requests[i][2]), len(rows[b]) - 1), len(rows[b]) - 1
                out[i] = (float(scores[b, end - n : end].sum()), bool(greedy[b, end - n : end].all()))
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
        return out

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as ids. Where the continuation melts into the context's last token, the pair is cut where the text with
        it and the text without it begin to differ, so that something is scored."""
        head, tail = super()._encode_pair(context, continuation)
        if tail or not continuation:
            return head, tail
        whole = self.tok_encode(context + continuation)
        cut = max(min(same_start(whole, head), len(whole) - 1), 1)
        return whole[:cut], whole[cut:]

    def _score(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of token t + 1 given those up to t, and whether it is the first choice: ``[B, T]``."""
        made = score(self.language_model, self.params, rows, self.batch_size, spread=self.spread)
        return made.logprobs_BT, made.greedy_BT

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            made = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, made):
                windows.append((None, *window))
                owner.append(i)
        out = [0.0] * len(requests)
        for i, (nats, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            out[i] += nats
        for request, nats in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        out = []
        stop = sorted({self.eot_token_id, *self.text.eos_ids})
        for seed, request in enumerate(requests):
            context, given = request.args
            wanted = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until, room = [s for s in wanted.pop("until", []) if s], int(wanted.pop("max_gen_toks"))
            if room >= self.max_length:
                raise UserError(
                    f"--tasks: {room} new tokens asked for, the model reads {self.max_length} in all; valid: a smaller "
                    "max_gen_toks or a larger --max-length"
                )
            prompt = self.tok_encode(context)[-(self.max_length - room) :] or [self.prefix_token_id]
            sampling = Sampling(
                temperature=float(wanted.get("temperature") or 0.0),
                top_k=int(wanted.get("top_k") or 0),
                top_p=float(wanted.get("top_p") or 1.0),
            )
            ids: list[int] = []
            text = ""
            for _, _, new, _, _ in self._generator.stream(
                [prompt], sampling, max_new_tokens=room, stop=stop, seeds=[seed]
            ):
                ids += [t for t in new if t not in stop and not self.tokenizer.is_special(t)]
                text = self.tokenizer.decode(ids)
                if any(s in text for s in until):
                    break
            for s in until:
                text = text.split(s)[0]
            out.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out
