"""Instruction-following difficulty by a small model (Superfiltering, arXiv 2402.00530).

    IFD(x, y) = exp(mean loss of y after the prompt x) / exp(mean loss of y alone)

Highest IFD below 1 is kept; `keep=low` keeps the lowest, which ranks clean rows higher in noisy data.
The details are those of the published procedure: the prompt is `instruction` and `input`, a line each,
whatever template the training uses; neither BOS nor EOS; p tokens of the prompt cut to L; the answer
alone is cut to L - p + 1 tokens and its first token is not scored; prompt and answer together are cut
to L, and only the tokens after those of the prompt are scored. For conversations, where the source is
silent, the prompt is all that comes before the last response.

`fidelity=original` gives every row the IFD that the published code gives it, slips included:

    a text that its model cannot take        IFD 0: a row like any other, at the end of the ranking. That is
                                             a text without a token, or with more of them than the backbone's
                                             context where max_length is larger than that
    an answer of one token                   IFD NaN, so it is never selected; `undefined` here in both ways
    a perplexity that float32 cannot hold    infinite: IFD 0, at least 1 or NaN, by which of the two it is
    a tokenizer that puts BOS before a text  BOS counts as a token (GPT-2's puts none)

`fixed` never makes a number of a failure, cuts to the context, and calculates in float64. The published
budget, a share of 52,002 rows whatever the data, belongs to the selection and is not reproduced: for k rows
of N give alpha=k/N.

`superfilter_screened` selects the same rows as `fixed` in less time where bfloat16 is fast: see there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsift.data.examples import Example
from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.journal import Journal
from gradsift.runtime import Advance, Task
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores
from gradsift.scoring.spans import Span, span_losses, token_ids
from gradsift.training.backbones import Backbone
from gradsift.training.fused import fuse
from gradsift.training.residual import residual_in_float32

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
    """IFD of each example under the proxy's backbone, without adapters.

    Args:
        max_length: L of the published code. With `fixed` the model's context where that is smaller.
        fidelity: original or fixed; see above.
        keep: high (the published direction) or low: what a high score stands for.
    """
    if fidelity == "original":
        prompts, answers = [ifd_prompt(example) for example in examples], [example.output for example in examples]
        alone, together = ifd_spans(backbone.tokenizer, prompts, answers, max_length, special=True)
    else:
        alone, together = spans_of(examples, backbone, max_length)
    spans = [*alone, *together]
    fails = np.array([fidelity == "original" and not 0 < len(span.ids) <= backbone.context for span in spans])
    row_indices = [example.row_index for example in examples]
    with task("superfilter", len(spans)) as advance:
        losses = np.full(len(spans), np.nan)
        passed = np.flatnonzero(~fails)
        chosen, rows = [spans[i] for i in passed], [row_indices[i % len(examples)] for i in passed]
        losses[passed] = span_losses(backbone, chosen, rows, advance, journal)
        advance(int(fails.sum()))
    loss_alone, loss_together = losses.reshape(2, -1)
    if fidelity == "original":
        scores = published_scores(loss_alone, loss_together, fails.reshape(2, -1))
    else:
        scores = ifd_scores(loss_alone, loss_together, {})
    if keep == "low":
        scores.score = -scores.score
    return scores


def superfilter_screened(
    examples: Sequence[Example],
    backbone: Backbone,
    task: Task,
    journal: Journal,
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
    those are (16), and no selector but `topk` may rely on their order. The selected examples and the
    statuses are those of `superfilter`, as long as no error exceeds `safety` times the largest
    measured, and up to IFDs that differ by no more than float32's own rounding (1e-6); the order
    among the selected is that of the table's scores.

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
        return span_losses(model, chosen, named, advance, journal).reshape(2, -1)

    with task("superfilter, bfloat16", 2 * count) as advance:
        half = Backbone(in_bfloat16(backbone.model), backbone.tokenizer)
        losses = losses_of(half, np.arange(count), advance, check=False)
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
    scores.mark(np.isnan(loss_together), UNDEFINED, _NOTHING_LEFT)
    scores.mark(np.isnan(loss_alone), UNDEFINED, _NOTHING_ALONE)
    scores.mark(ifd >= 1, EXCLUDED, _NOT_BELOW_ONE)
    return scores


def published_scores(loss_alone: np.ndarray, loss_together: np.ndarray, fails: np.ndarray) -> Scores:
    """The score table as the published code would fill it.

    Args:
        loss_alone, loss_together: (N,) nats; NaN where no token is scored.
        fails: (2, N) bool, texts (alone, together) that the model cannot take: perplexity and loss are 0 there.
    """
    losses = np.where(fails, 0.0, [loss_alone, loss_together])
    with np.errstate(over="ignore", invalid="ignore"):
        alone, together = np.where(fails, 0.0, np.exp(losses.astype(np.float32)).astype(float))
        ifd = np.divide(together, alone, out=np.zeros_like(alone), where=~fails[0])  # 0 in place of a division by 0
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
    """The prompt text of the published procedure."""
    history = "".join(turn.content + "\n" for turn in example.history)
    return history + example.instruction + "\n" + (example.input + "\n" if example.input else "")


def spans_of(examples: Sequence[Example], backbone: Backbone, max_length: int) -> tuple[list[Span], list[Span]]:
    """Token spans of each example's answer alone and after its prompt."""
    prompts, answers = [ifd_prompt(example) for example in examples], [example.output for example in examples]
    return ifd_spans(backbone.tokenizer, prompts, answers, min(max_length, backbone.context))


def ifd_spans(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], limit: int, *, special: bool = False
) -> tuple[list[Span], list[Span]]:
    """Token spans of the answers alone and of the answers after their prompts.

    The published code looks for the answer's last occurrence in the text. As the text ends with the answer, all
    before that is the prompt, whatever else the prompt repeats.
    """
    alone, together = [], []
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids = (token_ids(tokenizer, each, special=special, limit=limit) for each in (prompts, answers, texts))
    for prompt, answer, text in zip(*ids, strict=True):
        alone.append(Span(answer[: limit - min(len(prompt), limit) + 1], 1))
        together.append(Span(text[:limit], len(prompt)))
    return alone, together


def in_bfloat16(model: Any) -> Any:
    """A copy as `load_backbone` gives it in bfloat16; buffers, such as the frequencies of rotary positions, stay."""
    weights: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        for weight in model.parameters()
    }
    half: Any = copy.deepcopy(model, weights)
    residual_in_float32(half)
    if half.device.type == "cpu":
        fuse(half)
    return half
