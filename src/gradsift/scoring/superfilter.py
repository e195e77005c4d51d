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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from gradsift.data.batching import length_batches
from gradsift.data.examples import Example
from gradsift.runtime import Advance
from gradsift.scoring.scores import EXCLUDED, UNDEFINED, Scores
from gradsift.training.backbones import Backbone
from gradsift.training.finetuning import require_finite

_BATCH_TOKENS = 4096  # padded; no result depends on it


@dataclass(frozen=True)
class Span:
    """Token ids, of which those from `start` on are scored."""

    ids: list[int]
    start: int

    @property
    def scored(self) -> int:
        return max(0, len(self.ids) - max(1, self.start))


def superfilter(
    examples: Sequence[Example],
    backbone: Backbone,
    task: Callable[[str, int], AbstractContextManager[Advance]],
    *,
    max_length: int,
) -> Scores:
    """IFD of each example under the proxy's backbone, without adapters.

    Args:
        max_length: L of the published code; the model's context where that is smaller.
    """
    limit = min(max_length, backbone.context)
    prompts, answers = [ifd_prompt(example) for example in examples], [example.output for example in examples]
    alone, together = ifd_spans(backbone.tokenizer, prompts, answers, limit)
    row_indices = [example.row_index for example in examples]
    with task("superfilter", 2 * len(examples)) as advance:
        loss_alone = span_losses(backbone, alone, row_indices, advance)
        loss_together = span_losses(backbone, together, row_indices, advance)
    ifd = np.exp(loss_together) / np.exp(loss_alone)
    scores = Scores(ifd, {"ifd": ifd, "loss_alone": loss_alone, "loss_with_prompt": loss_together})
    scores.mark(np.isnan(loss_together), UNDEFINED, "the prompt leaves no token of the response within max_length")
    scores.mark(np.isnan(loss_alone), UNDEFINED, "the response has a single token, of which none is scored alone")
    scores.mark(ifd >= 1, EXCLUDED, "IFD is at least 1: the prompt does not make the response likelier")
    return scores


def ifd_prompt(example: Example) -> str:
    """The prompt text of the published procedure."""
    history = "".join(turn.content + "\n" for turn in example.history)
    return history + example.instruction + "\n" + (example.input + "\n" if example.input else "")


def ifd_spans(
    tokenizer: object, prompts: Sequence[str], answers: Sequence[str], limit: int
) -> tuple[list[Span], list[Span]]:
    """Token spans of the answers alone and of the answers after their prompts."""
    before = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    # the answer may stand in the text twice: all before its last occurrence is context
    contexts = [text[: text.rfind(answer)] for text, answer in zip(before, answers, strict=True)]
    prompt_ids, answer_ids, text_ids, context_ids = (
        _ids(tokenizer, texts) for texts in (prompts, answers, before, contexts)
    )
    alone, together = [], []
    for prompt, answer, text, context in zip(prompt_ids, answer_ids, text_ids, context_ids, strict=True):
        alone.append(Span(answer[: limit - min(len(prompt), limit) + 1], 1))
        together.append(Span(text[:limit], len(context)))
    return alone, together


def _ids(tokenizer: object, texts: Sequence[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
    return encoded


def span_losses(backbone: Backbone, spans: Sequence[Span], row_indices: Sequence[int], advance: Advance) -> np.ndarray:
    """Mean loss (nats) over each span's scored tokens, (N,) float64; NaN where a span scores none."""
    losses = np.full(len(spans), np.nan)
    scorable = [index for index, span in enumerate(spans) if span.scored]
    advance(len(spans) - len(scorable))
    device = next(backbone.model.parameters()).device
    for batch in length_batches([len(spans[index].ids) for index in scorable], _BATCH_TOKENS):
        rows = [scorable[position] for position in batch]
        losses[rows] = _batch_losses(backbone, [spans[row] for row in rows], device)
        require_finite("loss", torch.tensor(rows), torch.from_numpy(losses[rows]), row_indices)
        advance(len(rows))
    return losses


@torch.inference_mode()
def _batch_losses(backbone: Backbone, spans: Sequence[Span], device: torch.device) -> np.ndarray:
    """Right-padded; padding comes after everything that is scored, so causal attention never sees it."""
    longest = max(len(span.ids) for span in spans)
    ids = torch.full((len(spans), longest), backbone.pad_id)
    scored = torch.zeros((len(spans), longest), dtype=torch.bool)
    real = torch.zeros((len(spans), longest), dtype=torch.long)
    for row, span in enumerate(spans):
        ids[row, : len(span.ids)] = torch.tensor(span.ids)
        scored[row, max(1, span.start) : len(span.ids)] = True
        real[row, : len(span.ids)] = 1
    ids, scored = ids.to(device), scored[:, 1:].to(device)
    logits = backbone.model(input_ids=ids, attention_mask=real.to(device), use_cache=False).logits[:, :-1]
    token_losses = torch.zeros(scored.shape, dtype=torch.float64, device=device)
    token_losses[scored] = F.cross_entropy(logits[scored].float(), ids[:, 1:][scored], reduction="none").double()
    return (token_losses.sum(1) / scored.sum(1)).cpu().numpy()
