"""The local judge compares log P("A") and log P("B") under a model on this machine.

When it rates single examples, it gives the mean grade under the model's probabilities of the digits. With a small
model, the judge only checks that the pipeline runs: on LLMBar-Natural, SmolLM2-135M-Instruct prefers A in both orders
on all 100 pairs. With the scores summed over the orders, the judge agrees with the human label on 55 of the pairs
(prompts in the chat template) or 50 (plain prompts), which is no better than chance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from gradsift.cost import passed
from gradsift.data.batching import capped_batches
from gradsift.data.chat_templates import chat_segments, template_of
from gradsift.data.examples import Turn
from gradsift.data.turns import Unusable
from gradsift.errors import ConfigError
from gradsift.evaluation.generation import left_padded
from gradsift.evaluation.judges import (
    Combine,
    Judge,
    JudgeRequest,
    Pair,
    Rater,
    RatingRequest,
    Reply,
    content_hash,
    in_one_turn,
)
from gradsift.evaluation.judges.rating import SCALES
from gradsift.journal import Journal
from gradsift.training.device import without_host_reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The pieces around instruction, input, answer A and answer B.
OPENING = "Two answers, A and B, were given to the same instruction. Which one is better?\n\nInstruction:\n"
INPUT = "\n\nInput:\n"
ANSWER_A = "\n\nAnswer A:\n"
ANSWER_B = "\n\nAnswer B:\n"
QUESTION = "\n\nWhich answer is more helpful, relevant, accurate and detailed? Reply with one letter, A or B."
PLAIN_CUE = "\nBetter answer:"
# The pieces around an example that is rated.
RATED = "An instruction from a dataset"
RATED_RESPONSE = "\n\nResponse:\n"
RATED_ENDING = " Reply with one digit."
RATED_CUE = "\nGrade:"
SLOT = "\N{OBJECT REPLACEMENT CHARACTER}gradsift\N{OBJECT REPLACEMENT CHARACTER}"

Request = TypeVar("Request")


class _Prompt(NamedTuple):
    tokens: list[int]
    equal: bool  # whether both answers have the same tokens


class LocalJudge(Judge, Rater):
    """Shows a pair to a causal LM and compares the log-probabilities (nats) of A and B as the next token.

    Small models prefer one letter for all pairs, by about the same amount. So the scores of the two orders are added
    (`combine` is "sum"), which cancels this preference. The parts of a prompt are tokenised separately and without
    special tokens, so no answer can end the user's turn. If the answers do not fit into `max_length`, both are cut to
    the same limit. Answers whose tokens are equal after this cut get equal scores without a forward pass, because
    rounding errors would decide between them.
    """

    combine: Combine = "sum"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_length: int,
        batch_size: int,
        max_tokens: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        """Find the tokens of A and B.

        Args:
            name: identifies the weights in `prompt_hash`.
            max_length: the largest number of tokens of a prompt.
            batch_size, max_tokens: the largest numbers of prompts and of tokens per batch; padding counts as tokens.
            journal: stores each batch's scores; stored scores are not computed again.

        Raises:
            ConfigError: the tokenizer has no single tokens for A and B, or its chat template cannot be used.
        """
        self.name = name
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._max_length, self._batch_size, self._max_tokens = max_length, batch_size, max_tokens
        self._journal = journal or Journal()
        if tokenizer.chat_template:
            self._head, self._tail = self._chat_frame()
            self._rated_tail = self._tail
        else:
            self._head = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
            self._tail, self._rated_tail = self._encode(PLAIN_CUE), self._encode(RATED_CUE)
        self._letters = self._spellings("A"), self._spellings("B")
        if not all(self._letters) or set(self._letters[0]) & set(self._letters[1]):
            raise ConfigError(f"judge.model: the tokenizer of {name} has no single tokens for A and B; choose another")
        self._too_long = f"the question alone exceeds judge.max_length={self._max_length} tokens"

    def prompt_hash(self, request: JudgeRequest) -> str:
        prompt = self._prompt(request)
        return content_hash("local", self.name, prompt.tokens if prompt else None)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Pair]]]:
        """Yield each request with its reply: first those that need no forward pass, then batches of the others.

        The batch with the longest prompts comes first.
        """
        asked: list[tuple[JudgeRequest, list[int]]] = []
        for request in requests:
            prompt = self._prompt(request)
            if prompt is None:
                yield request, Reply("", None, self._too_long)
            elif prompt.equal:
                yield request, Reply("equal answers", (math.log(0.5), math.log(0.5)))
            else:
                asked.append((request, prompt.tokens))
        for request, (a, b) in self._log_probabilities(asked, self._letters):
            text = f"log P(A) = {a}, log P(B) = {b}"
            finite = math.isfinite(a) and math.isfinite(b)
            yield request, Reply(text, (a, b)) if finite else Reply(text, None, "a log-probability is not finite")

    def rate(self, requests: Sequence[RatingRequest]) -> Iterator[tuple[RatingRequest, Reply[float]]]:
        """Yield each request with its grade: the mean of the scale's grades, weighted by their probabilities.

        The probability of a grade is the model's probability that the next token is the grade's digit. A response that
        does not fit into `max_length` is cut.

        Raises:
            ConfigError: the tokenizer has no single tokens for the digits.
        """
        for question in sorted({request.question for request in requests}):
            grades = range(SCALES[question].low, SCALES[question].high + 1)
            digits = [self._spellings(str(grade)) for grade in grades]
            if not all(digits):
                raise ConfigError(
                    f"judge.model: the tokenizer of {self.name} has no single tokens for digits; choose another"
                )
            asked: list[tuple[RatingRequest, list[int]]] = []
            for request in requests:
                if request.question == question:
                    tokens = self._rated_prompt(request)
                    if tokens is None:
                        yield request, Reply("", None, self._too_long)
                    else:
                        asked.append((request, tokens))
            for request, log_p in self._log_probabilities(asked, digits):
                text = ", ".join(f"log P({grade}) = {p:.4f}" for grade, p in zip(grades, log_p, strict=True))
                weights = [math.exp(p) for p in log_p]
                if math.isfinite(sum(weights)) and sum(weights) > 0:
                    mean = sum(grade * weight for grade, weight in zip(grades, weights, strict=True)) / sum(weights)
                    yield request, Reply(text, mean)
                else:
                    yield request, Reply(text, None, "no digit has a probability")

    def _log_probabilities(
        self, asked: Sequence[tuple[Request, list[int]]], choices: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Request, tuple[float, ...]]]:
        """Yield each request with log P (nats) of each choice.

        P is the probability that the next token after the prompt is one of the choice's token ids.
        """

        def scores(prompts: list[list[int]]) -> list[list[float]]:
            tokens, mask = left_padded(prompts, 0, self._model.device)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # the default of forward() counts the padding
            with torch.no_grad(), without_host_reads():
                # the logits of the last column only: (B, 1, vocabulary) instead of (B, T, vocabulary)
                out = self._model(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
                )
            passed(sum(map(len, prompts)))
            log_p = torch.log_softmax(out.logits[:, -1].float(), dim=-1).cpu()
            return [log_p[:, list(ids)].logsumexp(dim=-1).tolist() for ids in choices]

        for places in capped_batches([len(tokens) for _, tokens in asked], self._batch_size, self._max_tokens):
            batch = [asked[place] for place in places]
            prompts = [tokens for _, tokens in batch]
            columns = self._journal.once(content_hash(prompts), functools.partial(scores, prompts))
            yield from zip((request for request, _ in batch), zip(*columns, strict=True), strict=True)

    def _prompt(self, request: JudgeRequest) -> _Prompt | None:
        """Return a pair's prompt of at most `max_length` tokens; None if the question leaves no room for answers."""
        opening, before_a, first, between, second, question = map(self._encode, render_pair(request))
        start = [*self._head, *opening, *before_a]
        end = [*question, *self._tail]
        room = self._max_length - len(start) - len(between) - len(end)
        if len(first) + len(second) > room:
            if room < 2:
                return None
            # the longer answer gets the room that the shorter one leaves, in both orders
            share = max(room // 2, room - min(len(first), len(second)))
            first, second = first[:share], second[:share]
        return _Prompt([*start, *first, *between, *second, *end], equal=first == second)

    def _rated_prompt(self, request: RatingRequest) -> list[int] | None:
        """Return a rating's prompt of at most `max_length` tokens; None if no room is left for the response."""
        opening, heading, response, ending = map(self._encode, render_rated(request))
        start = [*self._head, *opening, *heading]
        end = [*ending, *self._rated_tail]
        room = self._max_length - len(start) - len(end)
        if room < SCALES[request.question].shows_response:
            return None
        return [*start, *response[:room], *end]

    def _encode(self, text: str, *, markup: bool = False) -> list[int]:
        if not text:
            return []
        # special tokens in the text are recognised only with `markup`
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not markup)["input_ids"]
        return ids

    def _chat_frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens of the chat template before and after a user's message, up to the start of the answer."""
        try:
            asked = chat_segments([Turn("user", SLOT)], self._tokenizer, template_of("chat", self._tokenizer))
        except Unusable as reason:
            raise ConfigError(f"judge.model: {reason}; choose another model") from reason
        text = "".join(segment.text for segment in asked)
        if text.count(SLOT) != 1:
            raise ConfigError("judge.model: its chat template does not show a user's message once; choose another")
        head, tail = text.split(SLOT)
        return self._encode(head, markup=True), self._encode(tail, markup=True)

    def _spellings(self, letter: str) -> list[int]:
        """Return all single tokens that stand for `letter` as an answer: alone, or after white space."""
        tokens = set()
        for spelling in (letter, f" {letter}", f"\n{letter}"):
            # the last token: some tokenizers make white space a token of its own
            last = self._encode(spelling)[-1:]
            if last and last[0] != self._tokenizer.unk_token_id and self._tokenizer.decode(last).strip() == letter:
                tokens.add(last[0])
        return sorted(tokens)


def render_pair(request: JudgeRequest) -> tuple[str, str, str, str, str, str]:
    """Return the pieces of a pair's prompt, which are tokenised separately; the third and the fifth are the answers."""
    request = in_one_turn(request)
    opening = OPENING + request.instruction + (INPUT + request.input if request.input else "")
    return opening, ANSWER_A, request.first, ANSWER_B, request.second, QUESTION


def render_rated(request: RatingRequest) -> tuple[str, str, str, str]:
    """Return the pieces of the prompt that asks for an example's grade.

    The third piece is the response; it is empty if the question does not show the response.
    """
    scale = SCALES[request.question]
    turns = "".join(f"\n\nEarlier turn, {turn.role}:\n{turn.content}" for turn in request.history)
    shown_input = INPUT + request.input if request.input else ""
    opening = f"{RATED}.{turns}\n\nInstruction:\n{request.instruction}{shown_input}"
    shown = (RATED_RESPONSE, request.response) if scale.shows_response else ("", "")
    return opening, *shown, f"\n\n{scale.short}{RATED_ENDING}"
