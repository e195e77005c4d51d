"""Instruction-following difficulty as a ratio of losses (Cherry, arXiv 2308.12032).

    IFD(x, y) = mean loss of y after the prompt x / mean loss of y alone

Superfiltering's score of the same name is a ratio of perplexities with another prompt, and ranks rows differently. Here
the prompt is Alpaca's, "alone" means after the line "### Response:", a start token comes first if the tokenizer adds
one by itself, and every token of the answer is scored, both times. A prompt of p tokens is cut to L; prompt
and answer together are cut to L too. Highest IFD up to 1 is kept. The budget is a share of the rows that remain
(budget_base=scored, as in method=cherry). For conversations, where the source is silent, the prompt is all that comes
before the last response. The published model is first trained on 1,000 diverse rows; here the proxy's backbone is used
as it is, so name a model trained that way if you want this step.

`fidelity=original` measures the answer after the cut to L - p + 4 tokens, including "### Response:". The rule "prompt
and answer longer than L" then depends on the number of tokens of that line: with LLaMA's tokenizer no row is ever too
long, and the two losses of a long answer are means over different tokens. `fixed` measures it before the cut, as the
rule says. Two rules of the published code are not
reproduced, because they belong to the selection: of equal scores it prefers the last one, and a share of less than one
row selects all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradsift.data.examples import Example
from gradsift.data.templates import render
from gradsift.data.tokens import Encoded
from gradsift.journal import Journal
from gradsift.runtime import Task
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores
from gradsift.scoring.spans import span, span_losses, token_ids
from gradsift.training.backbones import Backbone

_RESPONSE = "### Response:"
_ROOM_FOR_RESPONSE = 4  # tokens that the published code assumes for the line "### Response:"


def cherry(
    examples: Sequence[Example], backbone: Backbone, task: Task, journal: Journal, *, max_length: int, fidelity: str
) -> Scores:
    """Return the IFD of each example under the proxy's backbone, without adapters.

    Args:
        max_length: L of the published code; the model's context if that is smaller.
        fidelity: original or fixed; see above.
    """
    limit = min(max_length, backbone.context)
    alone, together, too_long = cherry_spans(examples, backbone, limit, measure_cut=fidelity == "original")
    lacks = np.array([not (one.scored and two.scored) for one, two in zip(alone, together, strict=True)])
    passed = np.flatnonzero(~too_long & ~lacks)
    losses = np.full((2, len(examples)), np.nan)
    with task("cherry", 2 * len(examples)) as advance:
        chosen = [spans[row] for spans in (alone, together) for row in passed]
        losses[:, passed] = span_losses(backbone, chosen, advance, journal).reshape(2, -1)
        advance(2 * (len(examples) - len(passed)))
    return loss_ratios(losses[0], losses[1], too_long, lacks)


def loss_ratios(alone: np.ndarray, together: np.ndarray, too_long: np.ndarray, lacks: np.ndarray) -> Scores:
    """Return the scores from mean losses (N,) in nats; rows in `too_long` or `lacks` (N,) bool have none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ifd = together / alone
    scores = Scores(ifd, {"ifd": ifd, "loss_alone": alone, "loss_with_prompt": together})
    # the first mark of a row stands, so the order decides which reason it has
    scores.mark(too_long, EXCLUDED, "the prompt and the response together are longer than max_length")
    scores.mark(lacks, UNDEFINED, "the prompt leaves no token of the response within max_length")
    scores.mark(alone == 0, UNDEFINED, "the response alone has a loss of 0, by which nothing can be divided")
    scores.mark(ifd > 1, EXCLUDED, "IFD is above 1: the prompt does not make the response likelier")
    return scores


def cherry_spans(
    examples: Sequence[Example], backbone: Backbone, limit: int, *, measure_cut: bool
) -> tuple[list[Encoded], list[Encoded], np.ndarray]:
    """Return token spans of each answer after "### Response:" and after its prompt, and the rows that are too long.

    Args:
        measure_cut: measure the answer after it was cut.
    """
    # with "### Response:" at the end
    prompts = ["".join(segment.text for segment in render(example, "alpaca")[:-1]) for example in examples]
    alone = [_RESPONSE + example.output for example in examples]
    together = [prompt + example.output for prompt, example in zip(prompts, examples, strict=True)]
    (line,) = token_ids(backbone.tokenizer, [_RESPONSE], special=True)
    limits = (limit, limit if measure_cut else None, limit)  # a response that is measured before the cut
    ids = (
        token_ids(backbone.tokenizer, texts, special=True, limit=most)
        for texts, most in zip((prompts, alone, together), limits, strict=True)
    )
    spans: tuple[list[Encoded], list[Encoded]] = [], []
    too_long = []
    for row, (example, prompt, direct, text) in enumerate(zip(examples, *ids, strict=True)):
        length = min(len(prompt), limit)
        # L - p + 4 tokens of the answer, "### Response:" included, as published
        cut = span(row, example, direct[: limit - length + _ROOM_FOR_RESPONSE], len(line))
        answer = cut.scored if measure_cut else len(direct) - len(line)
        too_long.append(length + answer > limit)
        spans[0].append(cut if measure_cut else span(row, example, direct, len(line)))
        spans[1].append(span(row, example, text[:limit], len(prompt)))
    return *spans, np.array(too_long, dtype=bool)
