"""The backbone's perplexity of each response after its prompt: a baseline without training.

    PPL(x, y) = exp(mean loss of y's tokens after the prompt x)

Prompt and response are formatted with the proxy's template and cut as for training, and the end token is scored too
unless it is cut off. All responses of a conversation count. `prefer=low` prefers responses that the model expects,
`high` responses that it does not expect (hard rows and noise alike), and `middle` the rows whose rank is closest to the
median rank (a band of percentiles).
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
from gradsift.training.head import ResponseLosses, require_finite


def perplexity(proxy_inputs: ProxyInputs, count: int, task: Task, journal: Journal, *, prefer: str) -> Scores:
    """Return scores that prefer low, high or middle perplexity under the proxy's backbone, without adapters.

    Raises:
        GradsiftError: a loss is not finite; the message names the rows.
    """
    losses = response_losses(proxy_inputs, count, task, journal)
    with np.errstate(over="ignore"):  # the perplexity of a loss above 709 is infinite
        parts = {"perplexity": np.exp(losses), "loss": losses}
    # losses have the order of the perplexities, and are finite even if exp overflows
    scores = Scores({"low": -losses, "high": losses, "middle": -from_median(losses)}[prefer], parts)
    scores.mark(np.isnan(losses), UNDEFINED, NO_RESPONSE)
    return scores


@torch.inference_mode()
def response_losses(proxy_inputs: ProxyInputs, count: int, task: Task, journal: Journal) -> np.ndarray:
    """Return the mean loss (nats) of each example's response tokens, (count,) float64; NaN if there are none."""
    backbone, encoded, budget = proxy_inputs
    losses = np.full(count, np.nan)
    losses_of = ResponseLosses(backbone.model)

    def pass_through(examples: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(examples, backbone.pad_id)
        return batch.rows, losses_of(batch.to(backbone.model.device)).cpu()

    with task("perplexity", len(encoded)) as advance:
        for batches in budget.passes(encoded, pass_through, journal, advance):
            for rows, values in batches:
                require_finite("loss", rows, values, encoded)
                losses[rows.numpy()] = values.double().numpy()
    return losses


def from_median(values: np.ndarray) -> np.ndarray:
    """Return each value's distance in rank from the median, divided by the number of values: (N,), from 0 to 0.5."""
    from scipy.stats import rankdata

    shares = (rankdata(values, nan_policy="omit") - 0.5) / (~np.isnan(values)).sum()
    return np.asarray(np.abs(shares - 0.5))
