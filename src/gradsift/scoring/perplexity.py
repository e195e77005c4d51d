"""The backbone's perplexity of each response after its prompt: a baseline without training.

    PPL(x, y) = exp(mean loss of y's tokens after the prompt x)

Prompt and response stand in the proxy's template and are cut as for training, the end token included; of
a conversation every response counts. `low` prefers what the model already expects, `high` what surprises it
(hard rows and noise alike), `middle` the rows that stand closest to the median in the ranking. Papers prune by
perplexity in all three directions and define the middle as a band of percentiles, which is our reading.
"""

from __future__ import annotations

import numpy as np
import torch

from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.journal import Journal
from gradsift.proxy.epochs import ProxyInputs
from gradsift.runtime import Task
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores
from gradsift.training.finetuning import require_finite
from gradsift.training.modules import ResponseLosses


def perplexity(proxy_inputs: ProxyInputs, count: int, task: Task, journal: Journal, *, prefer: str) -> Scores:
    """Perplexity under the proxy's backbone, without adapters, and the score that prefers it low, high or middle.

    Raises:
        GradsiftError: a loss that is not finite, named by its row.
    """
    losses = response_losses(proxy_inputs, count, task, journal)
    with np.errstate(over="ignore"):  # beyond e^709 it is infinite; scores are made of the losses
        parts = {"perplexity": np.exp(losses), "loss": losses}
    scores = Scores({"low": -losses, "high": losses, "middle": -from_median(losses)}[prefer], parts)
    scores.mark(np.isnan(losses), UNDEFINED, NO_RESPONSE)
    return scores


@torch.inference_mode()
def response_losses(proxy_inputs: ProxyInputs, count: int, task: Task, journal: Journal) -> np.ndarray:
    """Mean loss (nats) of each example's response tokens, (count,) float64; NaN where there is none."""
    backbone, encoded, budget = proxy_inputs
    losses = np.full(count, np.nan)
    losses_of = ResponseLosses(backbone.model)

    def pass_through(examples: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(examples, backbone.pad_id)
        return batch.rows, losses_of(batch.to(backbone.model.device)).cpu()

    with task("perplexity", len(encoded)) as advance:
        for found in budget.passes(encoded, pass_through, journal, advance):
            for rows, values in found:
                require_finite("loss", rows, values, encoded)
                losses[rows.numpy()] = values.double().numpy()
    return losses


def from_median(values: np.ndarray) -> np.ndarray:
    """How far from the middle of the ranking each value (N,) stands: 0 at the median, up to 0.5; equal values alike."""
    from scipy.stats import rankdata

    found = np.full(len(values), np.nan)
    known = ~np.isnan(values)
    if known.any():
        found[known] = np.abs((rankdata(values[known]) - 0.5) / known.sum() - 0.5)
    return found
