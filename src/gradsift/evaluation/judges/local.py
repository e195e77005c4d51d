"""The local judge: log P("A") against log P("B") under a model on this machine; as a rater, the expected digit.

A plumbing check when the model is small. SmolLM2-135M-Instruct prefers A in both orders on all 100 pairs
of LLMBar-Natural; summed over the orders it agrees with the human label on 55 of them (chat template) or
50 (plain), which is chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from gradsift.cost import passed
from gradsift.errors import ConfigError
from gradsift.evaluation.generation import left_padded
from gradsift.evaluation.judges import Combine, JudgeRequest, Rating, RatingRequest, Reply, content_hash
from gradsift.evaluation.judges.rating import SCALES

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


class _Prompt(NamedTuple):
    """Token ids of a prompt, and whether its two answers are the same."""

    tokens: list[int]
    equal: bool


class LocalJudge:
    """Shows a pair to a causal LM and compares the probabilities of the next token being A or B.

    The scores are the two log-probabilities (nats). Small models prefer one letter whatever is
    shown, by about the same amount for every pair, so the orders combine by "sum".

    The parts of a prompt are tokenised apart and answers without special tokens: no answer can
    close the user's turn. Answers that do not fit `max_length` are cut to the same number of tokens.
    Two answers that are equal after that are scored equal without asking the model, whose rounding
    would otherwise decide.
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
        template: Literal["auto", "chat", "plain"] = "auto",
    ) -> None:
        """`name` stands for the weights in `prompt_hash`; `template="auto"` takes the chat template if there is one.

        Raises:
            ConfigError: the tokenizer has no tokens, or only one and the same, for A and B.
        """
        self.name = name
        self._model = model.eval()
        self._tokenizer = tokenizer
        context = getattr(model.config, "max_position_embeddings", None)
        self._max_length = min(max_length, context) if isinstance(context, int) else max_length
        self._batch_size = batch_size
        chat = bool(tokenizer.chat_template) if template == "auto" else template == "chat"
        self._head, self._tail = _chat_frame(tokenizer) if chat else _plain_frame(tokenizer, PLAIN_CUE)
        self._rated_tail = self._tail if chat else _encode(tokenizer, RATED_CUE)
        self._letters = _letter_tokens(tokenizer, "A"), _letter_tokens(tokenizer, "B")
        if not all(self._letters) or set(self._letters[0]) & set(self._letters[1]):
            raise ConfigError(f"judge.model: the tokenizer of {name} has no single tokens for A and B; choose another")

    def prompt_hash(self, request: JudgeRequest) -> str:
        """Hash of the judge's name and the prompt's tokens."""
        prompt = self._prompt(request)
        return content_hash("local", self.name, prompt.tokens if prompt else None)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply]]:
        """Yield the requests that need no model first, then batch by batch, longest prompts first."""
        asked: list[tuple[JudgeRequest, list[int]]] = []
        for request in requests:
            prompt = self._prompt(request)
            if prompt is None:
                reason = f"the question alone exceeds judge.max_length={self._max_length} tokens"
                yield request, Reply("", None, reason)
            elif prompt.equal:
                yield request, Reply("equal answers", (math.log(0.5), math.log(0.5)))
            else:
                asked.append((request, prompt.tokens))
        asked.sort(key=lambda pair: -len(pair[1]))
        for start in range(0, len(asked), self._batch_size):
            batch = asked[start : start + self._batch_size]
            scores = self._log_probabilities([tokens for _, tokens in batch], self._letters)
            for (request, _), (a, b) in zip(batch, scores, strict=True):
                text = f"log P(A) = {a}, log P(B) = {b}"
                finite = math.isfinite(a) and math.isfinite(b)
                yield request, Reply(text, (a, b)) if finite else Reply(text, None, "a log-probability is not finite")

    def rate(self, requests: Sequence[RatingRequest]) -> Iterator[tuple[RatingRequest, Rating]]:
        """Yield the expected grade under the next-token probabilities of the scale's digits.

        A plumbing check, as the judge is: no small model tells good data by it. A response that does not
        fit `max_length` is cut.

        Raises:
            ConfigError: the tokenizer has no single tokens of their own for the digits.
        """
        for question in sorted({request.question for request in requests}):
            scale = SCALES[question]
            grades = range(scale.low, scale.high + 1)
            digits = [_letter_tokens(self._tokenizer, str(grade)) for grade in grades]
            if not all(digits):
                raise ConfigError(
                    f"judge.model: the tokenizer of {self.name} has no single tokens for digits; choose another"
                )
            asked: list[tuple[RatingRequest, list[int]]] = []
            for request in requests:
                if request.question != question:
                    continue
                tokens = self._rated_prompt(request)
                if tokens is None:
                    reason = f"the question alone exceeds judge.max_length={self._max_length} tokens"
                    yield request, Rating("", None, reason)
                else:
                    asked.append((request, tokens))
            asked.sort(key=lambda pair: -len(pair[1]))
            for start in range(0, len(asked), self._batch_size):
                batch = asked[start : start + self._batch_size]
                found = self._log_probabilities([tokens for _, tokens in batch], digits)
                for (request, _), log_p in zip(batch, found, strict=True):
                    yield request, _expected(grades, log_p)

    def rating_cost(self) -> dict[str, float | int | None]:
        """Nothing is paid for."""
        return {}

    def _rated_prompt(self, request: RatingRequest) -> list[int] | None:
        """The prompt's tokens, at most `max_length`; None if the question leaves no room for the response."""
        opening, heading, response, ending = map(self._encode, render_rated(request))
        start = [*self._head, *opening, *heading]
        end = [*ending, *self._rated_tail]
        room = self._max_length - len(start) - len(end)
        if room < SCALES[request.question].shows_response:
            return None
        return [*start, *response[:room], *end]

    def _log_probabilities(self, prompts: list[list[int]], choices: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """log P of each choice as the next token after each prompt, summed over the choice's spellings."""
        tokens, mask = left_padded(prompts, 0, self._model.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # forward() would count the padding
        with torch.no_grad():
            # only the last column's logits: (B, 1, vocabulary) instead of (B, T, vocabulary)
            out = self._model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
            )
        passed(sum(map(len, prompts)))
        log_p = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
        return list(zip(*(log_p[:, list(ids)].logsumexp(dim=-1).tolist() for ids in choices), strict=True))

    def _prompt(self, request: JudgeRequest) -> _Prompt | None:
        """The prompt's tokens, at most `max_length`; None if the question leaves no room for the answers."""
        opening, before_a, first, between, second, question = map(self._encode, render_pair(request))
        start = [*self._head, *opening, *before_a]
        end = [*question, *self._tail]
        room = self._max_length - len(start) - len(between) - len(end)
        if len(first) + len(second) > room:
            if room < 2:
                return None
            # the longer one gets what the shorter one leaves; the same for both orders
            share = max(room // 2, room - min(len(first), len(second)))
            first, second = first[:share], second[:share]
        return _Prompt([*start, *first, *between, *second, *end], equal=first == second)

    def _encode(self, text: str) -> list[int]:
        return _encode(self._tokenizer, text)


def render_pair(request: JudgeRequest) -> tuple[str, str, str, str, str, str]:
    """The pieces of the prompt about a pair, which are tokenised apart; the answers are the third and the fifth."""
    opening = OPENING + request.instruction + (INPUT + request.input if request.input else "")
    return opening, ANSWER_A, request.first, ANSWER_B, request.second, QUESTION


def render_rated(request: RatingRequest) -> tuple[str, str, str, str]:
    """The pieces of the prompt about an example; the response is the third, and empty where it is not shown."""
    scale = SCALES[request.question]
    turns = "".join(f"\n\nEarlier turn, {turn.role}:\n{turn.content}" for turn in request.history)
    given = INPUT + request.input if request.input else ""
    opening = f"{RATED}.{turns}\n\nInstruction:\n{request.instruction}{given}"
    shown = (RATED_RESPONSE, request.response) if scale.shows_response else ("", "")
    return opening, *shown, f"\n\n{scale.short}{RATED_ENDING}"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, markup: bool = False) -> list[int]:
    """Token ids of `text` alone; only with `markup` may it spell special tokens."""
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=not markup)["input_ids"]
    return ids


def _expected(grades: Sequence[int], log_p: Sequence[float]) -> Rating:
    """The mean of the grades, weighted by their probabilities."""
    weights = [math.exp(value) for value in log_p]
    text = ", ".join(f"log P({grade}) = {value:.4f}" for grade, value in zip(grades, log_p, strict=True))
    total = sum(weights)
    if not (math.isfinite(total) and total > 0):
        return Rating(text, None, "no digit has a probability")
    return Rating(text, sum(grade * weight for grade, weight in zip(grades, weights, strict=True)) / total)


def _plain_frame(tokenizer: PreTrainedTokenizerBase, cue: str) -> tuple[list[int], list[int]]:
    """The tokens before and after a plain prompt: the tokenizer's own start token, if any, and the cue."""
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    return start, _encode(tokenizer, cue)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens before and after a user's message in the chat template, up to where the answer begins."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": SLOT}], tokenize=False, add_generation_prompt=True
    )
    if text.count(SLOT) != 1:
        raise ConfigError("judge.model: its chat template does not show a user's message once; use template=plain")
    head, tail = text.split(SLOT)
    return _encode(tokenizer, head, markup=True), _encode(tokenizer, tail, markup=True)


def _letter_tokens(tokenizer: PreTrainedTokenizerBase, letter: str) -> list[int]:
    """Every single token that a model may answer `letter` with: bare, or with white space before it."""
    found = set()
    for spelling in (letter, f" {letter}", f"\n{letter}"):
        # the last token, because some tokenizers put the white space into a token of its own
        last = _encode(tokenizer, spelling)[-1:]
        if last and last[0] != tokenizer.unk_token_id and tokenizer.decode(last).strip() == letter:
            found.add(last[0])
    return sorted(found)
