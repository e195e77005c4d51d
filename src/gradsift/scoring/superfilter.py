"""Instruction-following difficulty by a small model (Superfiltering, arXiv 2402.00530).

    IFD(x, y) = exp(mean loss of y after the prompt x) / exp(mean loss of y alone)

Highest IFD below 1 is kept. The details are those of the published procedure: the prompt is
`instruction` and `input`, a line each, whatever template the training uses; neither BOS nor EOS;
p tokens of the prompt cut to L; the answer alone is cut to L - p + 1 tokens and its first token is
not scored; prompt and answer together are cut to L, and only the tokens after those of the text
before the answer's last occurrence are scored. Two things differ on purpose: an answer without a
score is `undefined` with a reason (the published code drops it silently), and the budget's base is
not fixed to 52,002. For conversations, where the source is silent, the prompt is all that comes
before the last response.

`superfilter_screened` selects the same rows in less time where bfloat16 is fast: see there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsift.data.batching import length_batches
from gradsift.data.examples import Example
from gradsift.errors import GradsiftError
from gradsift.runtime import Advance
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget
from gradsift.training.finetuning import require_finite
from gradsift.training.head import OutputHead, token_losses
from gradsift.training.residual import residual_in_float32

_CHUNK = 1000  # examples tokenised in one call
_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # padded; no result depends on it. A CPU has them in its caches

Task = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Span:
    """Token ids, of which those from `start` on are scored."""

    ids: np.ndarray  # (T,) int32
    start: int

    @property
    def first(self) -> int:
        """The first token that is scored: at least the second, as nothing predicts the first."""
        return max(1, self.start)

    @property
    def scored(self) -> int:
        return max(0, len(self.ids) - self.first)


def superfilter(examples: Sequence[Example], backbone: Backbone, task: Task, *, max_length: int) -> Scores:
    """IFD of each example under the proxy's backbone, without adapters.

    Args:
        max_length: L of the published code; the model's context where that is smaller.
    """
    alone, together = spans_of(examples, backbone, max_length)
    row_indices = [example.row_index for example in examples]
    with task("superfilter", 2 * len(examples)) as advance:
        losses = span_losses(backbone, [*alone, *together], 2 * row_indices, advance)
    loss_alone, loss_together = losses.reshape(2, -1)
    return ifd_scores(loss_alone, loss_together, {})


def superfilter_screened(
    examples: Sequence[Example],
    backbone: Backbone,
    task: Task,
    budget: Callable[[int], int],
    *,
    max_length: int,
    calibration: int,
    safety: float,
) -> Scores:
    """IFD in bfloat16, and again in float32 for every example on which this budget's selection can depend.

    The error of bfloat16 is measured on a random sample that is scored both ways, and on every
    example that is scored both ways later (see `Screening`). What is certain to be selected, left
    out or excluded at that error keeps its bfloat16 score; the part `bits` of the table says which
    those are (16). The selected examples and the statuses are those of `superfilter`, as long as no
    error exceeds `safety` times the largest measured, and up to IFDs that differ by no more than
    float32's own rounding (1e-6); the order among the selected is that of the table's scores.

    It can pay where the machine multiplies bfloat16 fast (AMX or AVX-512 BF16, CUDA).

    Args:
        budget: size of the selection for a number of examples that have a score.
        max_length: L of the published code; the model's context where that is smaller.
        calibration: examples in the random sample.
        safety: largest error to be reckoned with, in largest errors that were measured.

    Raises:
        GradsiftError: the backbone is not in float32, so there is nothing to screen for.
    """
    if backbone.model.dtype != torch.float32:
        raise GradsiftError(
            f"superfilter_screened refines in float32, but the backbone is in {backbone.model.dtype}; "
            "load it in float32, or take superfilter"
        )
    spans = spans_of(examples, backbone, max_length)
    row_indices = [example.row_index for example in examples]
    count = len(examples)

    def losses_of(model: Backbone, rows: np.ndarray, advance: Advance, check: bool = True) -> np.ndarray:
        chosen = [span[row] for span in spans for row in rows]
        named = 2 * [row_indices[row] for row in rows] if check else None
        return span_losses(model, chosen, named, advance).reshape(2, -1)

    everything = np.arange(count)
    with task("superfilter, bfloat16", 2 * count) as advance:
        losses = losses_of(Backbone(in_bfloat16(backbone.model), backbone.tokenizer), everything, advance, check=False)
    lengths = np.array([[span.scored for span in each] for each in spans], dtype=float).reshape(2, -1)
    screening = Screening(np.exp(losses[1]) / np.exp(losses[0]), lengths, safety)
    bits = np.full(count, 16)
    rows = screening.sample(calibration)
    while len(rows):
        with task("superfilter, float32", 2 * len(rows)) as advance:
            losses[:, rows] = losses_of(backbone, rows, advance)
        bits[rows] = 32
        screening.measure(rows, np.exp(losses[1, rows]) / np.exp(losses[0, rows]))
        rows = screening.undecided(budget)
    return ifd_scores(losses[0], losses[1], {"bits": bits})


class Screening:
    """What each IFD can be, given approximate values and the exact ones measured so far.

    An example's relative error is reckoned in units of sqrt(1/n + 1/m), n and m its numbers of
    scored tokens alone and after the prompt: the standard error of a difference of mean losses, were
    the tokens' rounding errors independent. Where they are not (long responses) the largest error in
    these units is that of a long response, and the bound is only wider than needed for the rest.
    The bound is measured, not proven: `safety` is its distance to the largest error seen.
    """

    def __init__(self, approximate: np.ndarray, lengths: np.ndarray, safety: float) -> None:
        """`approximate` (N,) IFD, `lengths` (2, N) scored tokens; an example without tokens has no score."""
        self.defined = lengths.min(0) > 0
        self.values = approximate.copy()  # (N,) the best that is known
        self.exact = ~self.defined  # (N,) bool: there is nothing more to learn
        self._unit = np.sqrt((1 / np.maximum(lengths, 1)).sum(0))
        self._safety = safety
        self._largest = 0.0  # error measured so far, in units

    def sample(self, size: int) -> np.ndarray:
        """Random examples to measure the error on."""
        rows = np.flatnonzero(self.defined)
        return np.sort(np.random.default_rng(0).permutation(rows)[:size])

    def measure(self, rows: np.ndarray, exact: np.ndarray) -> None:
        """Learn the exact values (n,) of `rows` (n,)."""
        errors = np.abs(np.log(exact / self.values[rows])) / self._unit[rows]
        self._largest = max(self._largest, errors.max(initial=0.0, where=np.isfinite(errors)))
        self.values[rows] = exact
        self.exact[rows] = True

    def undecided(self, budget: Callable[[int], int]) -> np.ndarray:
        """Examples whose exact value is still needed: 1 or the value at the last selected place may lie on either
        side of theirs. None when statuses and selection are certain."""
        factor = np.exp(np.where(self.exact, 0.0, self._safety * self._largest * self._unit))
        known = np.isfinite(self.values)  # bfloat16 may overflow where float32 does not
        low, high = np.where(known, self.values / factor, 0.0), np.where(known, self.values * factor, np.inf)
        about_one = ~self.exact & (low < 1) & (high >= 1)
        if about_one.any():
            return np.flatnonzero(about_one)
        scored = np.flatnonzero(self.defined & (high < 1))
        size = budget(len(scored)) if len(scored) else 0
        if size >= len(scored):
            return np.array([], dtype=int)
        low, high = low[scored], high[scored]
        inside = low > np.sort(high)[::-1][size]  # fewer than `size` others can be above
        outside = high < np.sort(low)[::-1][size - 1]  # `size` others are above for certain
        rows: np.ndarray = scored[~inside & ~outside & ~self.exact[scored]]
        return rows


def ifd_scores(loss_alone: np.ndarray, loss_together: np.ndarray, parts: dict[str, np.ndarray]) -> Scores:
    """The score table of mean losses (N,) in nats; NaN where there is none."""
    ifd = np.exp(loss_together) / np.exp(loss_alone)
    scores = Scores(ifd, {"ifd": ifd, "loss_alone": loss_alone, "loss_with_prompt": loss_together, **parts})
    scores.mark(np.isnan(loss_together), UNDEFINED, "the prompt leaves no token of the response within max_length")
    scores.mark(np.isnan(loss_alone), UNDEFINED, "the response has a single token, of which none is scored alone")
    scores.mark(ifd >= 1, EXCLUDED, "IFD is at least 1: the prompt does not make the response likelier")
    return scores


def ifd_prompt(example: Example) -> str:
    """The prompt text of the published procedure."""
    history = "".join(turn.content + "\n" for turn in example.history)
    return history + example.instruction + "\n" + (example.input + "\n" if example.input else "")


def spans_of(examples: Sequence[Example], backbone: Backbone, max_length: int) -> tuple[list[Span], list[Span]]:
    """Token spans of each example's answer alone and after its prompt."""
    prompts, answers = [ifd_prompt(example) for example in examples], [example.output for example in examples]
    return ifd_spans(backbone.tokenizer, prompts, answers, min(max_length, backbone.context))


def ifd_spans(
    tokenizer: object, prompts: Sequence[str], answers: Sequence[str], limit: int
) -> tuple[list[Span], list[Span]]:
    """Token spans of the answers alone and of the answers after their prompts."""
    alone, together = [], []
    for first in range(0, len(prompts), _CHUNK):  # bounds the memory that the tokenizer's own records take
        chunk = slice(first, first + _CHUNK)
        before = [prompt + answer for prompt, answer in zip(prompts[chunk], answers[chunk], strict=True)]
        # the answer may stand in the text twice: all before its last occurrence is context
        contexts = [text[: text.rfind(answer)] for text, answer in zip(before, answers[chunk], strict=True)]
        ids = (_ids(tokenizer, texts) for texts in (prompts[chunk], answers[chunk], before, contexts))
        for prompt, answer, text, context in zip(*ids, strict=True):
            alone.append(Span(answer[: limit - min(len(prompt), limit) + 1], 1))
            together.append(Span(text[:limit], len(context)))
    return alone, together


def _ids(tokenizer: object, texts: Sequence[str]) -> list[np.ndarray]:
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy as `load_backbone` gives it in bfloat16; buffers, such as the frequencies of rotary positions, stay."""
    weights: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        for weight in model.parameters()
    }
    half = copy.deepcopy(model, weights)
    residual_in_float32(half)
    return half


def span_losses(
    backbone: Backbone, spans: Sequence[Span], row_indices: Sequence[int] | None, advance: Advance
) -> np.ndarray:
    """Mean loss (nats) over each span's scored tokens, (N,) float64; NaN where a span scores none.

    Args:
        row_indices: of the spans in the data's source, for errors; None where a loss may be NaN or infinite.
    """
    losses = np.full(len(spans), np.nan)
    same: dict[tuple[int, bytes], list[int]] = {}  # equal spans are passed once, so that their losses tie
    for index, span in enumerate(spans):
        if span.scored:
            same.setdefault((span.first, span.ids.tobytes()), []).append(index)
    groups = list(same.values())
    advance(len(spans) - sum(map(len, groups)))
    head = OutputHead.of(backbone.model)
    budget = TokenBudget(_BATCH_TOKENS[backbone.model.device.type])
    lengths = [len(spans[group[0]].ids) for group in groups]
    for batch in length_batches(lengths, budget.tokens):

        def means_of(tokens: int, batch: Sequence[int] = batch) -> dict[int, float]:
            means: dict[int, float] = {}
            for part in length_batches([lengths[position] for position in batch], tokens):
                positions = [batch[index] for index in part]
                found = _batch_losses(backbone, head, [spans[groups[position][0]] for position in positions])
                means |= dict(zip(positions, found.tolist(), strict=True))
            return means

        for position, mean in budget.run(means_of, [lengths[position] for position in batch]).items():
            losses[groups[position]] = mean
        rows = [index for position in batch for index in groups[position]]
        if row_indices is not None:
            require_finite("loss", torch.tensor(rows), torch.from_numpy(losses[rows]), row_indices)
        advance(len(rows))
    return losses


@torch.inference_mode()
def _batch_losses(backbone: Backbone, head: OutputHead | None, spans: Sequence[Span]) -> np.ndarray:
    """Padded on the right, so that causal attention never sees the padding, and needs no mask."""
    device = backbone.model.device
    longest = max(len(span.ids) for span in spans)
    ids = torch.full((len(spans), longest), backbone.pad_id)
    for row, span in enumerate(spans):
        ids[row, : len(span.ids)] = torch.from_numpy(span.ids)
    # where to predict is worked out here and not by a mask on the device, which would have to be waited for
    predicted = [torch.arange(span.first, len(span.ids)) + row * longest for row, span in enumerate(spans)]
    positions = torch.cat(predicted)
    losses = token_losses(
        backbone.model,
        head,
        {"input_ids": ids.to(device)},
        (positions - 1).to(device),
        ids.flatten()[positions].to(device),
    )
    return np.array([float(part.mean()) for part in losses.cpu().double().split([span.scored for span in spans])])
