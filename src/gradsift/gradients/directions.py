"""Cosine of each example's gradient with the mean gradient of the pool, at one member's late snapshot.

    cos_i = <g_i, g> / (|g_i| |g|),   g = (1/N) sum_i g_i

The gradients are those of the LoRA parameters, without a random projection. If the cosine is positive, a small gradient
step on the example alone also lowers the pool's mean loss. Two passes over the pool are needed: one for the mean
gradient, one for the cosines.

Shape letters: M members, N examples, B examples of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from gradsift.artifacts import Artifact
from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients.per_sample import gradient_pass
from gradsift.journal import Journal
from gradsift.proxy.epochs import ProxyInputs, member_table
from gradsift.runtime import Advance, Runtime
from gradsift.training import lora
from gradsift.training.head import ResponseLosses, require_finite

VERSION = 2
DIRECTIONS_FILE = "directions.parquet"


def directions(runtime: Runtime, config: LoraConfig, member: Artifact, load: Callable[[], ProxyInputs]) -> Artifact:
    """Return an artifact with a table whose columns are row, cosine and norm (of the example's gradient).

    `row` is the position among the examples; `cosine` is NaN if the gradient is zero.

    Args:
        member: the artifact of a member's epoch, which holds the adapter.
        load: called only if the table has to be made.
    """

    def columns(adapted: Any, inputs: ProxyInputs, advance: Advance, journal: Journal) -> dict[str, np.ndarray]:
        return cosines(adapted, inputs, mean_gradient(adapted, inputs, advance), advance, journal)

    return member_table(runtime, "direction", DIRECTIONS_FILE, config, member, load, columns, passes=2, version=VERSION)


def mean_gradient(adapted: Any, inputs: ProxyInputs, advance: Advance = lambda done: None) -> torch.Tensor:
    """Return the mean gradient g (P,) float64, in the order of `lora.trainable_parameters`, with dropout off.

    Raises:
        GradsiftError: the mean gradient is zero.
    """
    parameters = list(lora.trainable_parameters(adapted).values())
    losses_of = ResponseLosses(adapted)
    # float64: after a million examples, a float32 sum may round away most digits of the next gradient
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=parameters[0].device)

    def of_batch(batch: Sequence[Encoded]) -> torch.Tensor:
        losses = losses_of(collate(batch, inputs.backbone.pad_id).to(total.device))
        # the sum and not the mean: a mean would divide each gradient by the size of its batch
        return torch.cat([part.flatten() for part in torch.autograd.grad(losses.sum(), parameters)])

    with lora.evaluating(adapted), torch.enable_grad():
        # no journal: the result of a batch is a gradient of P numbers, too much to write for each batch
        for gradients in inputs.budget.passes(inputs.encoded, of_batch, advance=advance):
            for gradient in gradients:
                total += gradient
    if not bool(total.any().cpu()):
        raise GradsiftError("the mean gradient of the pool is zero, so it has no direction; see proxy.learning_rate")
    return total / len(inputs.encoded)


def cosines(
    adapted: Any,
    inputs: ProxyInputs,
    mean: torch.Tensor,
    advance: Advance = lambda done: None,
    journal: Journal | None = None,
) -> dict[str, np.ndarray]:
    """Return columns row (N,) int64, cosine and norm (N,) float64, in the order of the encoded examples."""
    # normalised in float64, then rounded to float32, the type of the examples' gradients
    unit = (mean / mean.norm()).float()
    rows = np.array([example.row for example in inputs.encoded], dtype=np.int64)
    places = {int(row): place for place, row in enumerate(rows)}
    norms, dots = np.zeros(len(rows)), np.zeros(len(rows))
    with gradient_pass(adapted, "lora", inputs.backbone.pad_id) as gradients:

        def of_batch(batch: Sequence[Encoded]) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
            return [
                ([places[example.row] for example in part], torch.linalg.vector_norm(g, dim=1), g @ unit)
                for part, g in gradients.parts(batch)
            ]

        for batches in inputs.budget.passes(inputs.encoded, of_batch, journal, advance):
            for where, norm, dot in (part for parts in batches for part in parts):
                norms[where], dots[where] = norm.double().cpu().numpy(), dot.double().cpu().numpy()
    require_finite("gradient", torch.from_numpy(rows), torch.from_numpy(norms), inputs.encoded)
    # NaN for a gradient of zero: a cosine of 0 would mean that the gradient is orthogonal to the mean gradient
    cosine = np.divide(dots, norms, out=np.full(len(rows), np.nan), where=norms > 0)
    return {"row": rows, "cosine": cosine, "norm": norms}


def read_cosines(artifacts: Sequence[Artifact], rows: int) -> np.ndarray:
    """Return the members' cosines (M, N) float64, with N = `rows`; NaN for an example without a gradient."""
    cosine = np.full((len(artifacts), rows), np.nan)
    for index, artifact in enumerate(artifacts):
        table = pq.read_table(artifact.file(DIRECTIONS_FILE))
        cosine[index, table["row"].to_numpy()] = table["cosine"].to_numpy()
    return cosine
