"""Instruction-following difficulty as a ratio of losses (Cherry, arXiv 2308.12032).

    IFD(x, y) = mean loss of y after the prompt x / mean loss of y alone

The prompt has Alpaca's template, and "alone" means after the line "### Response:". Each text begins with a start token
if the tokenizer adds one by default. Every token of the answer is scored, in both losses. The prompt is cut to L tokens
(`max_length`); p is its length after the cut. Prompt and answer together are cut to L tokens too. Rows with an IFD
above 1 are excluded, and so are rows whose prompt and answer together are longer than L.

With `fidelity=original`, the line "### Response:" and the answer are first cut to L - p + 4 tokens together, and the
length of the answer is measured after this cut. So prompt and answer count as longer than L only if that line has fewer
than 4 tokens (a start token included). With `fidelity=fixed`, the length of the answer is measured before the cut.
docs/methods.md has further decisions.
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
from gradsift.scoring.superfilter import span, span_losses, token_ids
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
    with task("cherry", 2 * len(examples)) as advance:
        losses = span_losses(backbone, [*alone, *together], advance, journal, np.tile(too_long | lacks, 2))
    loss_alone, loss_together = losses.reshape(2, -1)
    return loss_ratios(loss_alone, loss_together, too_long, lacks)


def loss_ratios(alone: np.ndarray, together: np.ndarray, too_long: np.ndarray, lacks: np.ndarray) -> Scores:
    """Return the scores, given the mean losses (N,), in nats, of the answers alone and after their prompts.

    `too_long` and `lacks`, (N,) bool, mark the rows that are too long and those without a scored response token.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ifd = together / alone
    scores = Scores(ifd, {"ifd": ifd, "loss_alone": alone, "loss_with_prompt": together})
    # `mark` changes only rows without a mark, so a row to which several reasons apply gets the first of them
    scores.mark(too_long, EXCLUDED, "the prompt and the response together are longer than max_length")
    scores.mark(lacks, UNDEFINED, "the prompt leaves no token of the response within max_length")
    scores.mark(alone == 0, UNDEFINED, "the response alone has a loss of 0, so the ratio is not defined")
    scores.mark(ifd > 1, EXCLUDED, "IFD is above 1: the prompt does not make the response likelier")
    return scores


def cherry_spans(
    examples: Sequence[Example], backbone: Backbone, limit: int, *, measure_cut: bool
) -> tuple[list[Encoded], list[Encoded], np.ndarray]:
    """Return each answer's span after "### Response:", its span after the prompt, and whether its row is too long.

    Args:
        measure_cut: whether the answer's length is measured after the cut (fidelity=original) or before it.
    """
    # Alpaca's prompts end with "### Response:"
    prompts = ["".join(segment.text for segment in render(example, "alpaca")[:-1]) for example in examples]
    answers_alone = [_RESPONSE + example.output for example in examples]
    texts = [prompt + example.output for prompt, example in zip(prompts, examples, strict=True)]
    (line,) = token_ids(backbone.tokenizer, [_RESPONSE], special=True)
    ids = (
        token_ids(backbone.tokenizer, prompts, special=True, limit=limit),
        # the whole response is needed to measure it before the cut
        token_ids(backbone.tokenizer, answers_alone, special=True, limit=limit if measure_cut else None),
        token_ids(backbone.tokenizer, texts, special=True, limit=limit),
    )
    alone, together, too_long = [], [], []
    for row, (example, prompt, direct, text) in enumerate(zip(examples, *ids, strict=True)):
        length = min(len(prompt), limit)
        # L - p + 4 tokens of the answer, "### Response:" included, as published
        cut = span(row, example, direct[: limit - length + _ROOM_FOR_RESPONSE], len(line))
        answer = cut.scored if measure_cut else len(direct) - len(line)
        too_long.append(length + answer > limit)
        alone.append(cut if measure_cut else span(row, example, direct, len(line)))
        together.append(span(row, example, text[:limit], len(prompt)))
    return alone, together, np.array(too_long, dtype=bool)
