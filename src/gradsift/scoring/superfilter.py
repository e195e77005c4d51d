"""Instruction-following difficulty (IFD) computed by a small model (Superfiltering, arXiv 2402.00530).

    IFD(x, y) = exp(mean loss of y after the prompt x) / exp(mean loss of y alone)

Rows with an IFD of at least 1 are excluded. `keep=high` selects the remaining rows with the highest IFD, `keep=low`
those with the lowest. In noisy data, clean rows rank higher with `keep=low`. The details follow the published
procedure. The prompt is `instruction` and `input`, each on its own line, whatever template the training uses, without
BOS and EOS. The prompt is cut to L tokens (`max_length`); p is its length after the cut. The answer alone is cut to
L - p + 1 tokens, and its first token is not scored. Prompt and answer together are cut to L tokens, and only the tokens
after the prompt are scored. The paper does not treat conversations; for them the prompt is everything before the last
response.

`fidelity=original` gives every row the IFD that the published code gives it, including the code's errors:

    a text that the model cannot process     the IFD is 0, so with keep=high the row ranks last. Such a text has no
                                             token, or more tokens than the backbone's context (possible only if
                                             max_length is larger than the context)
    an answer of one token                   the IFD is NaN, so the row is never selected; with `original` and with
                                             `fixed` its status is `undefined`
    a perplexity that float32 cannot hold    counts as infinite. The IFD is 0 if only the perplexity of the answer alone
                                             is infinite, infinite if only the perplexity after the prompt is
                                             infinite, and NaN if both are
    a tokenizer that puts BOS before a text  BOS counts as a token (GPT-2's tokenizer adds no BOS)

With `fidelity=fixed`, a row whose losses are not defined is `undefined` and never gets a number. Texts are cut to the
model's context if that is smaller than L, and the IFD is computed in float64. The published budget, a share of 52,002
rows whatever the data, belongs to the selection and is not reproduced: to select k of N rows, give alpha=k/N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradsift.data.examples import Example
from gradsift.data.tokens import Encoded
from gradsift.diagnostics import Diagnostic
from gradsift.journal import Journal
from gradsift.runtime import Task
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores
from gradsift.scoring.spans import span, span_losses, token_ids
from gradsift.training.backbones import Backbone

_NOTHING_LEFT = "the prompt leaves no token of the response within max_length"
_NOTHING_ALONE = "the response has a single token, of which none is scored alone"
_NOT_BELOW_ONE = "IFD is at least 1: the prompt does not make the response likelier"


def superfilter(
    examples: Sequence[Example],
    backbone: Backbone,
    task: Task,
    journal: Journal,
    *,
    max_length: int,
    fidelity: str,
    keep: str,
) -> Scores:
    """Return the IFD (keep=low: minus the IFD) of each example under the proxy's backbone, without adapters.

    Args:
        max_length: L; with `fixed`, L is the model's context if the context is smaller.
        fidelity: original or fixed; see the module's docstring.
        keep: high (as published) or low.
    """
    original = fidelity == "original"
    limit = max_length if original else min(max_length, backbone.context)
    alone, together = ifd_spans(backbone.tokenizer, examples, limit, special=original)
    spans = [*alone, *together]
    fails = np.array([original and not 0 < len(one.input_ids) <= backbone.context for one in spans])
    with task("superfilter", len(spans)) as advance:
        losses = np.full(len(spans), np.nan)
        passed = np.flatnonzero(~fails)
        losses[passed] = span_losses(backbone, [spans[i] for i in passed], advance, journal)
        advance(int(fails.sum()))
    loss_alone, loss_together = losses.reshape(2, -1)
    if original:
        scores = published_scores(loss_alone, loss_together, fails.reshape(2, -1))
    else:
        scores = ifd_scores(loss_alone, loss_together)
    if keep == "low":
        scores.score = -scores.score
    return scores


def ifd_scores(loss_alone: np.ndarray, loss_together: np.ndarray) -> Scores:
    """Return the scores of `fidelity=fixed`.

    Args:
        loss_alone, loss_together: (N,) mean losses in nats; NaN where no token is scored.
    """
    ifd = np.exp(loss_together) / np.exp(loss_alone)
    scores = Scores(ifd, {"ifd": ifd, "loss_alone": loss_alone, "loss_with_prompt": loss_together})
    scores.mark(np.isnan(loss_together), UNDEFINED, _NOTHING_LEFT)
    scores.mark(np.isnan(loss_alone), UNDEFINED, _NOTHING_ALONE)
    scores.mark(ifd >= 1, EXCLUDED, _NOT_BELOW_ONE)
    return scores


def published_scores(loss_alone: np.ndarray, loss_together: np.ndarray, fails: np.ndarray) -> Scores:
    """Return the scores of `fidelity=original`, as the published code computes them.

    Args:
        loss_alone, loss_together: (N,) nats; NaN where no token is scored.
        fails: (2, N) bool, texts (alone, together) that the model cannot process; their perplexity and loss count as 0.
    """
    losses = np.where(fails, 0.0, [loss_alone, loss_together])
    with np.errstate(over="ignore", invalid="ignore"):
        # the published code exponentiates in float32, where a loss above 88.7 overflows
        alone, together = np.where(fails, 0.0, np.exp(losses.astype(np.float32)).astype(float))
        ifd = np.divide(together, alone, out=np.zeros_like(alone), where=~fails[0])  # 0 instead of a division by 0
    either = fails.any(0)
    failed = Diagnostic.judged(
        "failed_rows",
        bool(either.any()),
        {"failed": float(either.sum())},
        f"{int(either.sum()):,} rows have IFD 0 because their text could not be scored, as in the published code",
        "whether such rows were selected; scorer.fidelity=fixed leaves them out",
    )
    scores = Scores(ifd, {"ifd": ifd, "loss_alone": losses[0], "loss_with_prompt": losses[1]}, [failed])
    scores.mark(np.isnan(ifd) & np.isnan(losses[1]), UNDEFINED, _NOTHING_LEFT)
    scores.mark(np.isnan(ifd) & np.isnan(losses[0]), UNDEFINED, _NOTHING_ALONE)
    scores.mark(np.isnan(ifd), UNDEFINED, "both perplexities are larger than float32 can hold")
    scores.mark(ifd >= 1, EXCLUDED, _NOT_BELOW_ONE)
    return scores


def ifd_prompt(example: Example) -> str:
    """Return the prompt of the published procedure: earlier turns, instruction and input, each ending in a newline."""
    history = "".join(turn.content + "\n" for turn in example.history)
    return history + example.instruction + "\n" + (example.input + "\n" if example.input else "")


def ifd_spans(
    tokenizer: Any, examples: Sequence[Example], limit: int, *, special: bool = False
) -> tuple[list[Encoded], list[Encoded]]:
    """Return token spans of the answers alone and of the answers after their prompts.

    The published code looks for the answer's last occurrence in the text. Since the text ends with the answer,
    everything before this occurrence is the prompt, even if the prompt also contains the answer.

    Args:
        limit: L.
        special: whether the tokenizer adds its special tokens, as in `fidelity=original`.
    """
    alone, together = [], []
    prompts, answers = [ifd_prompt(example) for example in examples], [example.output for example in examples]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids = (token_ids(tokenizer, each, special=special, limit=limit) for each in (prompts, answers, texts))
    for row, (example, prompt, answer, text) in enumerate(zip(examples, *ids, strict=True)):
        # the first of the L - p + 1 tokens is not scored: L - p scored tokens, as for the answer after the prompt
        alone.append(span(row, example, answer[: limit - min(len(prompt), limit) + 1], 1))
        together.append(span(row, example, text[:limit], len(prompt)))
    return alone, together
