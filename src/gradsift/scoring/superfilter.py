"""Instruction-following difficulty (IFD) computed by a small model (Superfiltering, arXiv 2402.00530).

    IFD(x, y) = exp(mean loss of y after the prompt x) / exp(mean loss of y alone)

Rows with an IFD of at least 1 are excluded. `keep=high` selects the remaining rows with the highest IFD, `keep=low`
those with the lowest. The prompt consists of the earlier turns, `instruction` and `input`, each followed by a newline,
without BOS and EOS. The prompt is cut to L tokens (`max_length`); p is the prompt's length after this cut. The answer
alone is cut to L - p + 1 tokens, and its first token is not scored. Prompt and answer together are cut to L tokens, and
only the tokens after the prompt are scored.

`fidelity=original` gives every row the IFD that the published code gives it, including the code's errors, which
docs/methods.md lists. `fidelity=fixed` differs in four points. A row whose losses are not defined is `undefined` and
never gets a number. Texts are cut to the model's context if that is smaller than L. The IFD is computed in float64. A
start token that the tokenizer adds by default is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradsift.data.batching import collate
from gradsift.data.examples import Example
from gradsift.data.tokens import Encoded, chunks, start_of
from gradsift.diagnostics import Diagnostic
from gradsift.journal import Journal
from gradsift.runtime import Advance, Task
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget, tokens_factor
from gradsift.training.head import OutputHead, require_finite, token_losses

_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # of a batch, padding included; no effect on results. 512 fit in CPU caches


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
        max_length: L; with `fidelity=fixed`, L is the model's context if the context is smaller.
        fidelity: original or fixed; see the module's docstring.
        keep: high (as published) or low.
    """
    original = fidelity == "original"
    limit = max_length if original else min(max_length, backbone.context)
    alone, together = ifd_spans(backbone.tokenizer, examples, limit, special=original)
    spans = [*alone, *together]
    fails = np.array([original and not 0 < len(one.input_ids) <= backbone.context for one in spans])
    with task("superfilter", len(spans)) as advance:
        loss_alone, loss_together = span_losses(backbone, spans, advance, journal, fails).reshape(2, -1)
    if original:
        scores = published_scores(loss_alone, loss_together, fails.reshape(2, -1))
    else:
        scores = ifd_scores(loss_alone, loss_together)
    if keep == "low":
        scores.score = -scores.score
    return scores


def ifd_scores(loss_alone: np.ndarray, loss_together: np.ndarray) -> Scores:
    """Return the scores of `fidelity=fixed`, given mean losses (N,) in nats; a loss is NaN if no token is scored."""
    return _with_reasons(np.exp(loss_together) / np.exp(loss_alone), loss_alone, loss_together)


def published_scores(loss_alone: np.ndarray, loss_together: np.ndarray, fails: np.ndarray) -> Scores:
    """Return the scores of `fidelity=original`, as the published code computes them.

    Args:
        loss_alone, loss_together: as in `ifd_scores`.
        fails: (2, N) bool, marks the texts (alone, together) that the model cannot process. Their perplexity and loss
            count as 0.
    """
    losses = np.where(fails, 0.0, [loss_alone, loss_together])
    with np.errstate(over="ignore", invalid="ignore"):
        # the published code exponentiates in float32, where a loss above 88.7 overflows
        alone, together = np.where(fails, 0.0, np.exp(losses.astype(np.float32)).astype(float))
        ifd = np.divide(together, alone, out=np.zeros_like(alone), where=~fails[0])  # 0 instead of a division by 0
    scores = _with_reasons(ifd, *losses)
    scores.mark(np.isnan(ifd), UNDEFINED, "both perplexities are larger than float32 can hold")
    failed = int(fails.any(0).sum())
    diagnostic = Diagnostic.judged(
        "failed_rows",
        failed > 0,
        {"failed": float(failed)},
        f"{failed:,} rows have IFD 0 because their text could not be scored, as in the published code",
        "whether such rows were selected; scorer.fidelity=fixed leaves them out",
    )
    scores.diagnostics.append(diagnostic)
    return scores


def _with_reasons(ifd: np.ndarray, loss_alone: np.ndarray, loss_together: np.ndarray) -> Scores:
    """Return the scores, with IFD and losses as parts; rows that cannot be selected are marked with the reason."""
    scores = Scores(ifd, {"ifd": ifd, "loss_alone": loss_alone, "loss_with_prompt": loss_together})
    undefined = np.isnan(ifd)
    scores.mark(
        undefined & np.isnan(loss_together), UNDEFINED, "the prompt leaves no token of the response within max_length"
    )
    scores.mark(
        undefined & np.isnan(loss_alone),
        UNDEFINED,
        "the response has a single token, and the first token of a response alone is not scored",
    )
    scores.mark(ifd >= 1, EXCLUDED, "IFD is at least 1: the prompt does not make the response likelier")
    return scores


def ifd_prompt(example: Example) -> str:
    """Return the prompt of the published procedure: earlier turns, instruction and input, each ending in a newline."""
    history = "".join(turn.content + "\n" for turn in example.history)
    return history + example.instruction + "\n" + (example.input + "\n" if example.input else "")


def ifd_spans(
    tokenizer: Any, examples: Sequence[Example], limit: int, *, special: bool = False
) -> tuple[list[Encoded], list[Encoded]]:
    """Return token spans of the answers alone and of the answers after their prompts; `limit` is L.

    The published code looks for the answer's last occurrence in the text. Since the text ends with the answer,
    everything before this occurrence is the prompt, even if the prompt contains the answer too.
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


def span(row: int, example: Example, ids: np.ndarray, start: int) -> Encoded:
    """Return the span of `ids` (T,), token ids of the example at position `row`; it is scored from token `start` on."""
    # at least from 1: the model does not predict the first token, because nothing precedes it
    return Encoded(row, example.row_index, ids, np.arange(len(ids)) >= max(1, start))


def token_ids(tokenizer: Any, texts: Sequence[str], *, special: bool, limit: int | None = None) -> Iterator[np.ndarray]:
    """Yield token ids (T,) int32 of each text, in order.

    Args:
        special: whether the tokenizer adds the special tokens (such as a start token) that it adds by default.
        limit: number of tokens that the caller uses, or None for all. A text that is much longer than `limit` tokens is
            shortened before it is tokenised, so its result may have more than `limit` tokens, but not all tokens of the
            text.
    """
    cut = texts if limit is None else (start_of(text, tokenizer, limit) for text in texts)
    for chunk in chunks(cut, len):
        for ids in tokenizer(chunk, add_special_tokens=special, verbose=False)["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def span_losses(
    backbone: Backbone, spans: Sequence[Encoded], advance: Advance, journal: Journal, skip: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean loss (nats) over each span's scored tokens, (N,) float64; NaN without such tokens or if skipped.

    Only one of several equal spans passes through the model, so equal spans have exactly equal losses.

    Raises:
        GradsiftError: a loss is not finite; the message names the rows.
    """
    losses = np.full(len(spans), np.nan)
    equal: dict[tuple[bytes, bytes], list[int]] = {}
    for index, one in enumerate(spans):
        if one.scored and (skip is None or not skip[index]):
            # in batches of different widths, the losses of equal spans could differ in the last bit
            equal.setdefault((one.input_ids.tobytes(), one.is_response.tobytes()), []).append(index)
    groups = list(equal.values())
    different = [replace(spans[group[0]], row=place) for place, group in enumerate(groups)]
    advance(len(spans) - len(different))
    head = OutputHead.of(backbone.model)
    usual = _BATCH_TOKENS[backbone.model.device.type] * min(2, tokens_factor(backbone.model))

    def means_of(batch: list[Encoded]) -> list[list[Any]]:
        return [[one.row for one in batch], _batch_losses(backbone, head, batch).tolist()]

    for batches in TokenBudget(backbone.tokens or usual).passes(different, means_of, journal, advance):
        for places, means in batches:
            for place, mean in zip(places, means, strict=True):
                losses[groups[place]] = mean
            indices = [index for place in places for index in groups[place]]
            rows = torch.tensor([spans[index].row for index in indices])
            require_finite("loss", rows, torch.from_numpy(losses[indices]), spans)
    return losses


@torch.inference_mode()
def _batch_losses(backbone: Backbone, head: OutputHead | None, spans: Sequence[Encoded]) -> np.ndarray:
    """Return the mean loss of each span, (B,), averaged in float64; every span must have a scored token."""
    batch = collate(spans, backbone.pad_id).to(backbone.model.device)
    losses = token_losses(backbone.model, head, batch.model_inputs(), batch.places, batch.targets)
    ends = np.cumsum([one.scored for one in spans])
    return np.array([part.mean() for part in np.split(losses.cpu().double().numpy(), ends[:-1])])
