"""The judge `alpaca_eval`, which asks an annotator of the package alpaca_eval about each pair in both orders.

An annotator consists of a prompt, the parameters of the request, and a parser that reads a preference from the reply.

gradsift uses the package's annotators without the package's class PairwiseAnnotator. This class shows each pair in one
order, which depends on the instruction and is not recorded. The class also stores replies under a key that contains
neither the model nor the prompt, and it drops replies that it cannot read. The tests compare gradsift's requests and
preferences with those of PairwiseAnnotator.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

from gradsift.evaluation.chat import ChatClient
from gradsift.evaluation.judges import Cost, Judge, JudgeRequest, Pair, Reply, content_hash, in_one_turn, with_input
from gradsift.evaluation.judges.annotators import SLOT, Annotator
from gradsift.evaluation.judges.parsing import after_thinking, json_objects, parse_scores
from gradsift.evaluation.replies import CUT, Completion

NAMES = "alpaca_eval/"  # the beginning of these judges' names in records
EQUAL = "both answers are the same text, a draw without asking (as in alpaca_eval)"

Parser = Callable[[Any], Any]
# errors that alpaca_eval's parsers raise for unexpected replies
_ERRORS = (AssertionError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError)


@dataclass
class AlpacaEvalJudge(Judge):
    """Asks one of alpaca_eval's annotators which answer is better.

    A preference p is between 1 (the first answer is better) and 2 (the second is better). The first answer gets the
    score 2 - p, and the second answer gets p - 1. For an annotator that reads log-probabilities, p is 1 + the
    probability that the second answer is better. Only the sign of the score difference counts in each order
    (`combine="signs"`).

    Attributes:
        chat: a client with the annotator's model and parameters.
        scope: name under which the spending is counted.
    """

    chat: ChatClient
    annotator: Annotator
    scope: str = "judge"

    def __post_init__(self) -> None:
        self.name = f"{NAMES}{self.annotator.name}/{self.chat.parameters['model']}"

    def prompt_hash(self, request: JudgeRequest) -> str:
        reading = [self.annotator.parser, self.annotator.parser_options, self.annotator.reads_choice]
        return content_hash("alpaca_eval", self.chat.identity, reading, render(self.annotator, request))

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Pair]]]:
        """Yield replies in order of arrival, then draws for pairs of equal answers, which need no request."""
        shown = {request: in_one_turn(request) for request in requests}
        asked = [request for request, pair in shown.items() if pair.first != pair.second]
        name, parser = self.annotator.parser, parser_of(self.annotator)
        needs = " and needs the endpoint's log-probabilities" if name == "logprob_parser" else ""
        unread = f"{name} finds no preference in it{needs}"

        def read(position: int, completion: Completion) -> Pair | None:
            completion = replace(completion, text=after_thinking(completion.text))
            if name == "lmsys_parser":  # alpaca_eval's own reads neither "8, 7" nor "8/10 7/10"
                return _votes(parse_scores(completion.text, cut=completion.finish == CUT))
            if name == "json_parser":  # json_parser would take the last of two equal keys
                list(json_objects(completion.text))
            p = preference(parser, completion, reads_choice=self.annotator.reads_choice)
            return None if p is None else (2 - p, p - 1)

        prompts = [render(self.annotator, request) for request in asked]
        for position, reply in self.chat.ask(prompts, read, scope=self.scope, unread=unread):
            yield asked[position], reply
        yield from ((r, Reply("", (0.5, 0.5), EQUAL)) for r, pair in shown.items() if pair.first == pair.second)

    def cost(self) -> Cost:
        return self.chat.spent(self.scope)


def render(annotator: Annotator, request: JudgeRequest) -> list[dict[str, str]]:
    """Return the messages for a pair. All slots are filled at once, so `{input}` in an answer is not taken for a slot.

    If the prompt has no slot for the input, the input is appended to the instruction after an empty line.
    """
    request = in_one_turn(request)
    has_slot = any("{input}" in text for _, text in annotator.messages)
    parts = {
        "instruction": request.instruction if has_slot else with_input(request.instruction, request.input),
        "input": request.input,
        "output_1": request.first,
        "output_2": request.second,
    }
    return [
        {"role": role, "content": SLOT.sub(lambda slot: parts[slot[1]], text).strip()}
        for role, text in annotator.messages
    ]


def preference(parser: Parser, completion: Completion, *, reads_choice: bool) -> float | None:
    """Return the preference, from 1 to 2, that the parser finds in a reply.

    The result is None if the parser fails, or if it finds no preference or several.
    """
    shown: Any = completion.text
    if reads_choice:
        shown = {"text": completion.text, "message": {"content": completion.text}}
        shown |= {"logprobs": {"content": completion.logprobs}} if completion.logprobs else {}
    try:
        preferences = list(parser(shown))
    except _ERRORS:
        return None
    if len(preferences) != 1 or isinstance(preferences[0], bool) or not isinstance(preferences[0], Real):
        return None
    value = 1.5 if preferences[0] == 0 else float(preferences[0])  # 0 is alpaca_eval's older value for a draw
    return value if math.isfinite(value) and 1 <= value <= 2 else None


def parser_of(annotator: Annotator) -> Parser:
    """Return alpaca_eval's function that reads the list of preferences from a reply."""
    # a copy: regex_parser puts compiled patterns into its options, which are hashed and must stay JSON values
    return partial(getattr(_parsers(), annotator.parser), **copy.deepcopy(dict(annotator.parser_options)))


def _votes(scores: Pair | None) -> Pair | None:
    """Replace the higher score by 1 and the lower by 0, or equal scores by 0.5; None if `scores` is None."""
    if scores is None:
        return None
    first, second = scores
    return (0.5, 0.5) if first == second else (float(first > second), float(first < second))


def _parsers() -> Any:
    """Return the module of alpaca_eval's parsers, and undo the side effects of importing the package.

    The import sets the root logger's level to INFO and adds the variables of a `.env` file to the environment, such as
    another project's address or key. The parsers' log messages are switched off.
    """
    root, environment = logging.getLogger(), set(os.environ)
    level = root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # alpaca_eval uses a deprecated part of setuptools
            from alpaca_eval import completion_parsers
    finally:
        root.setLevel(level)
        for name in set(os.environ) - environment:
            del os.environ[name]
    silent = logging.getLogger("alpaca_eval.completion_parsers")
    silent.disabled = True
    completion_parsers.logging = silent
    return completion_parsers
