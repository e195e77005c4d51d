"""Instruction-following difficulty as a ratio of losses (Cherry, arXiv 2308.12032).

    IFD(x, y) = mean loss of y after the prompt x / mean loss of y alone

Superfiltering has a score of the same name, but divides perplexities and uses another prompt, so it ranks rows
differently. In Cherry, the prompt has Alpaca's template, and "alone" means after the line "### Response:". Each text
begins with a start token if the tokenizer adds one by default. Every token of the answer is scored, in both losses. The
prompt is cut to L tokens (`max_length`); p is its length after the cut. Prompt and answer together are cut to L tokens
too. Rows with an IFD above 1 are excluded, and the remaining rows with the highest IFD are selected. With
method=cherry, the budget is a share of the rows that are not excluded (budget_base=scored). The paper does not treat
conversations; for them the prompt is everything before the last response. The paper first trains its model on 1,000
diverse rows. gradsift skips this step and uses the proxy's backbone as it is. To include the step, train the model
yourself and set `proxy.model.path` to the trained model.

Rows whose prompt and answer together are longer than L are excluded. `fidelity=original` measures the answer's length
after the line "### Response:" and the answer were cut to L - p + 4 tokens together. A row can then be too long only if
this line has fewer than 4 tokens, a start token included. With LLaMA's tokenizer it has at least 4, so no row is
excluded as too long, and the two losses of a long answer are means over different tokens. `fidelity=fixed` measures the
answer's length before the cut. Two rules of the published code are not reproduced, because they belong to the
selection: of rows with equal scores the code selects the last ones, and for a share of less than one row it selects all
rows.
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
        max_length: L; if the model's context is smaller, L is the context.
        fidelity: original or fixed; see the module's docstring.
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
    """Return the scores, given the mean losses (N,), in nats, of the answers alone and after their prompts.

    Args:
        too_long: (N,) bool, whether a row is too long and therefore excluded.
        lacks: (N,) bool, whether a row has no scored response token.
    """
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
    """Return the spans of each answer after "### Response:" and after its prompt, and whether each row is too long.

    Args:
        limit: L.
        measure_cut: whether the answer's length is measured after the cut (fidelity=original) and not before.
    """
    # the prompts end with "### Response:"
    prompts = ["".join(segment.text for segment in render(example, "alpaca")[:-1]) for example in examples]
    alone = [_RESPONSE + example.output for example in examples]
    together = [prompt + example.output for prompt, example in zip(prompts, examples, strict=True)]
    (line,) = token_ids(backbone.tokenizer, [_RESPONSE], special=True)
    limits = (limit, limit if measure_cut else None, limit)  # None: the whole response is needed to measure it
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
