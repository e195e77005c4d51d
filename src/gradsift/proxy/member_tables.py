"""Tables with one row per example, computed at one member's weights with dropout off.

Losses of the responses, from two forward passes over the pool:

    body_i   mean loss of the response tokens before the last one
    end_i    loss of the last response token (the end token, unless the response was cut)
    other_i  body_i, but with the prompt of another example, which is drawn at random for each member

For a response of a single token, body and end are both that token's loss. other_i is NaN for a conversation with
several trained replies, because the later replies would keep their own prompts. It is also NaN for an example whose
prompt equals all prompts that are tried for it.

Directions: the cosine of each example's gradient with the mean gradient of the pool, from two passes over the pool:

    cos_i = <g_i, g> / (|g_i| |g|),   g = (1/N) sum_i g_i

The gradients are those of the LoRA parameters, without a random projection. If the cosine is positive, a small gradient
step on the example alone also lowers the pool's mean loss.

Shape letters: M members, N examples, B examples of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gradsift.artifacts import Artifact
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.gradients.per_sample import gradient_pass
from gradsift.journal import Journal
from gradsift.proxy.epochs import Ensemble, ProxyInputs, adapter
from gradsift.runtime import Advance, derive_seed
from gradsift.training import lora
from gradsift.training.head import ResponseLosses, require_finite

LOSSES_VERSION = 3
DIRECTIONS_VERSION = 2
LOSSES_FILE = "answer_losses.parquet"
DIRECTIONS_FILE = "directions.parquet"
_TRIES = 10  # prompts that are tried until one differs from the example's own


def member_table(
    ensemble: Ensemble,
    stage: str,
    file: str,
    member: Artifact,
    columns: Callable[[Any, ProxyInputs, Advance, Journal], Mapping[str, np.ndarray]],
    *,
    passes: int,
    version: int,
    info: Callable[[ProxyInputs], Mapping[str, Any]] = lambda inputs: {},
) -> Artifact:
    """Return the artifact of the table `file`, which `columns` computes from the examples at a member's weights.

    Args:
        member: the artifact of a member's epoch, with its adapter.
        passes: how many times `columns` passes over the examples; the progress bar needs this number.
        info: function that returns additional entries for the artifact's info.
    """
    runtime, slug = ensemble.runtime, member.path.name.rsplit("-", 1)[0]

    def make(folder: Path) -> Mapping[str, Any]:
        inputs = ensemble.load()
        with (
            adapter(inputs.backbone, ensemble.config.lora, 0, runtime.compute) as adapted,
            runtime.display.task(f"{stage.replace('_', ' ')} of {slug}", passes * len(inputs.encoded)) as advance,
        ):
            lora.load_adapter(adapted, member.path)
            table = columns(adapted, inputs, advance, runtime.journal(folder))
        pq.write_table(pa.table(table), folder / file)
        return {"rows": len(inputs.encoded), **info(inputs)}

    return runtime.store.obtain(stage, slug, {}, [member], make, version=version)


def read_member_tables(
    artifacts: Sequence[Artifact], file: str, names: Sequence[str], count: int
) -> dict[str, np.ndarray]:
    """Return the columns `names` of the members' tables, (M, `count`) float64; NaN where a table lacks an example."""
    columns = {name: np.full((len(artifacts), count), np.nan) for name in names}
    for member, artifact in enumerate(artifacts):
        table = pq.read_table(artifact.file(file))
        for name, column in columns.items():
            column[member, table["row"].to_numpy()] = table[name].to_numpy()
    return columns


@dataclass(frozen=True)
class AnswerLosses:
    """The members' losses body, end and other (see the module's description) in nats, (M, N) float64 each.

    All three are NaN for an example without a response token. `other` is also NaN for an example that got no other
    prompt.
    """

    body: np.ndarray
    end: np.ndarray
    other: np.ndarray


def answer_losses(ensemble: Ensemble, member: Artifact, index: int) -> Artifact:
    """Return an artifact with the table of `collect_losses`.

    The random draw of the other prompts depends on the member's number, `index`.
    """
    collect = partial(collect_losses, seed=derive_seed(ensemble.runtime.seed, "other prompts", index))
    return member_table(ensemble, "losses", LOSSES_FILE, member, collect, passes=2, version=LOSSES_VERSION)


@torch.inference_mode()
def collect_losses(
    adapted: Any, inputs: ProxyInputs, advance: Advance, journal: Journal, *, seed: int
) -> dict[str, np.ndarray]:
    """Return the columns row (int64) and body, end and other (float32), (N,) each, in the order of the examples.

    Raises:
        GradsiftError: a loss is not finite; the message names the rows.
    """
    losses_of = ResponseLosses(adapted)
    count = len(inputs.encoded)
    lone = [  # examples with one trained reply, that is, one run of response tokens
        place
        for place, example in enumerate(inputs.encoded)
        if (np.diff(example.is_response.astype(int), prepend=0) == 1).sum() == 1
    ]
    texts = with_other_prompts([inputs.encoded[place] for place in lone], seed)
    swapped = {place: text for place, text in zip(lone, texts, strict=True) if text is not None}
    losses = np.empty((2, count + len(swapped)), dtype=np.float32)  # body and end; own prompts first

    def of_batch(examples: list[Encoded]) -> tuple[list[int], torch.Tensor]:
        batch = collate(examples, inputs.backbone.pad_id)
        parts = losses_of.body_and_end(batch.to(inputs.backbone.model.device))
        return [example.row for example in examples], torch.stack(parts).cpu()

    placed = [replace(text, row=place) for place, text in enumerate([*inputs.encoded, *swapped.values()])]
    advance(2 * count - len(placed))
    with lora.evaluating(adapted):
        for batches in inputs.budget.passes(placed, of_batch, journal, advance):
            for where, values in batches:
                losses[:, where] = values.numpy()
    rows = np.array([example.row for example in inputs.encoded], dtype=np.int64)
    own, other = losses[:, :count], np.full(count, np.nan, dtype=np.float32)
    other[list(swapped)] = losses[0, count:]
    # a sum is finite only if all losses in it are
    sums = own.sum(0)
    sums[list(swapped)] += losses[0, count:]
    require_finite("loss", torch.from_numpy(rows), torch.from_numpy(sums), inputs.encoded)
    return {"row": rows, "body": own[0], "end": own[1], "other": other}


def with_other_prompts(examples: Sequence[Encoded], seed: int) -> list[Encoded | None]:
    """Return each example with its prompt (all tokens before its response) replaced by another example's prompt.

    The examples are put in a random cyclic order. The next `_TRIES` prompts in this order are tried for an example, and
    it gets the first of them that differs from its own. If none differs, the example's entry in the result is None. If
    the new text would be longer than the longest example, the prompt is cut at its start. A first token that all
    examples share, such as a start token, is kept.
    """
    limit = max((len(example.input_ids) for example in examples), default=0)
    kept = int(len({int(example.input_ids[0]) for example in examples}) == 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    place_in_order = np.argsort(order)
    texts: list[Encoded | None] = []
    for example, place in zip(examples, place_in_order, strict=True):
        own = _prompt(example)
        following = ((place + step) % len(order) for step in range(1, min(_TRIES + 1, len(order))))
        nearby = (_prompt(examples[order[position]]) for position in following)
        other = next((prompt for prompt in nearby if not np.array_equal(prompt, own)), None)
        texts.append(None if other is None else _after_prompt(example, other, kept, limit))
    return texts


def _prompt(example: Encoded) -> np.ndarray:
    ids: np.ndarray = example.input_ids[: int(example.is_response.argmax())]
    return ids


def _after_prompt(example: Encoded, prompt: np.ndarray, kept: int, limit: int) -> Encoded:
    """Return the example with `prompt` as its prompt.

    If the result would have more than `limit` tokens, the prompt is shortened: the tokens that follow its first `kept`
    tokens are left out.
    """
    response = len(example.input_ids) - len(_prompt(example))
    cut = max(0, min(len(prompt) + response - limit, len(prompt) - kept))
    prompt = np.concatenate([prompt[:kept], prompt[kept + cut :]])
    return replace(
        example,
        input_ids=np.concatenate([prompt, example.input_ids[-response:]]),
        is_response=np.concatenate([np.zeros(len(prompt), dtype=bool), example.is_response[-response:]]),
    )


def read_answer_losses(members: Sequence[Artifact], count: int) -> AnswerLosses:
    """Return the losses of all members, for a pool of `count` examples; NaN where a member's table lacks an example."""
    return AnswerLosses(**read_member_tables(members, LOSSES_FILE, ("body", "end", "other"), count))


def directions(ensemble: Ensemble, member: Artifact) -> Artifact:
    """Return an artifact with the table of `cosines` at a member's weights."""
    return member_table(ensemble, "direction", DIRECTIONS_FILE, member, cosines, passes=2, version=DIRECTIONS_VERSION)


def cosines(adapted: Any, inputs: ProxyInputs, advance: Advance, journal: Journal) -> dict[str, np.ndarray]:
    """Return the columns row (int64) and cosine and norm (float64), (N,) each, in the order of the examples.

    `norm` is the norm of the example's gradient. `cosine` is NaN if this gradient is zero.

    Raises:
        GradsiftError: the mean gradient is zero, or a gradient is not finite (the message names the rows).
    """
    mean = _mean_gradient(adapted, inputs, advance)
    # normalised in float64, then rounded to float32, the dtype of the examples' gradients
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
    # NaN if the gradient is zero, because a cosine of 0 would mean that it is orthogonal to the mean gradient
    cosine = np.divide(dots, norms, out=np.full(len(rows), np.nan), where=norms > 0)
    return {"row": rows, "cosine": cosine, "norm": norms}


def _mean_gradient(adapted: Any, inputs: ProxyInputs, advance: Advance) -> torch.Tensor:
    """Return the mean gradient g (P,) float64, in the order of `lora.trainable_parameters`, with dropout off."""
    parameters = list(lora.trainable_parameters(adapted).values())
    losses_of = ResponseLosses(adapted)
    # float64: in a float32 sum of a million gradients, the next one would lose most of its digits
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=parameters[0].device)

    def of_batch(batch: Sequence[Encoded]) -> torch.Tensor:
        losses = losses_of(collate(batch, inputs.backbone.pad_id).to(total.device))
        # the sum and not the mean: a mean would divide each gradient by the size of its batch
        return torch.cat([part.flatten() for part in torch.autograd.grad(losses.sum(), parameters)])

    with lora.evaluating(adapted), torch.enable_grad():
        # no journal, because the result of each batch is a gradient of P numbers
        for gradients in inputs.budget.passes(inputs.encoded, of_batch, advance=advance):
            for gradient in gradients:
                total += gradient
    if not bool(total.any().cpu()):
        raise GradsiftError("the mean gradient of the pool is zero, so it has no direction; see proxy.learning_rate")
    return total / len(inputs.encoded)


def read_cosines(artifacts: Sequence[Artifact], rows: int) -> np.ndarray:
    """Return the members' cosines (M, N) float64, with N = `rows`; NaN for an example without a gradient."""
    return read_member_tables(artifacts, DIRECTIONS_FILE, ["cosine"], rows)["cosine"]
