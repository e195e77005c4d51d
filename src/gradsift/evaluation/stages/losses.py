"""The stages `heldout` and `reference_loss`: a model's losses on held-out examples and on reference answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gradsift.artifacts import Artifact
from gradsift.config import TargetConfig
from gradsift.data.batching import collate
from gradsift.data.examples import Example
from gradsift.data.load import heldout_of
from gradsift.data.tokens import Encoded, encode, encoding_settings
from gradsift.errors import GradsiftError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.stages.answers import items_hash, slug_and_parents
from gradsift.runtime import Runtime
from gradsift.training import parallel
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.head import ResponseLosses, require_finite
from gradsift.training.parallel import is_divided
from gradsift.training.target import load_tuned, say_report

VERSION = 3


def heldout_loss(
    runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None, loaded: Artifact
) -> Artifact | None:
    """Return an artifact with the target's loss on held-out examples, or None if no row is held out.

    The loss is the mean NLL per response token (nats) of each example, averaged over the examples.
    """
    if not loaded.info["heldout"]:
        return None
    settings = encoding_settings(config.template, config.max_length)

    def make(folder: Path) -> Mapping[str, Any]:
        model = load_tuned(runtime, config, target, tuned)
        total, count = 0.0, 0
        heldout = heldout_of(loaded)
        for _, losses in example_losses(runtime, config, model, heldout, folder, "held-out loss", "held-out rows"):
            total += float(losses.sum())
            count += len(losses)
        if not count:
            raise GradsiftError("no held-out example has a response token for the target; give data.holdout=0")
        loss = {"heldout_loss": total / count, "rows": count, "left_out": len(heldout) - count}
        (folder / "heldout.json").write_text(json.dumps(loss), encoding="utf-8")
        return loss

    slug, (_, *adapters) = slug_and_parents(config, target, tuned)
    unit = ("heldout", slug, settings, [target, loaded, *adapters], make)
    return runtime.store.obtain(*unit, version=VERSION, size=int(loaded.info["heldout"]), divided=True)


def heldout_loss_of(made: Artifact | None) -> float | None:
    """Return the loss in the artifact of `heldout_loss`; None if `made` is None."""
    return None if made is None else float(made.info["heldout_loss"])


def reference_losses(
    runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None, items: Sequence[Item]
) -> Artifact:
    """Return an artifact with the target's loss on each benchmark's reference answers.

    The loss is the mean NLL per token (nats) of each reference answer, averaged over the benchmark's items.

    The artifact's `info["losses"]` has the losses by benchmark, without benchmarks whose references have no token.
    """
    known = [item for item in items if item.reference is not None]
    settings = {"items": items_hash(known), **encoding_settings(config.template, config.max_length)}

    def make(folder: Path) -> Mapping[str, Any]:
        examples = [
            Example(
                row, f"{item.benchmark}/{item.item_id}", "", (), item.instruction, item.input, str(item.reference), {}
            )
            for row, item in enumerate(known)
        ]
        model = load_tuned(runtime, config, target, tuned)
        purpose, what = "loss of the reference answers", "reference answers"
        by_set: dict[str, list[float]] = {}
        for rows, losses in example_losses(runtime, config, model, examples, folder, purpose, what):
            for row, loss in zip(rows.tolist(), losses.tolist(), strict=True):
                by_set.setdefault(known[row].benchmark, []).append(loss)
        means = {name: sum(losses) / len(losses) for name, losses in by_set.items()}
        return {"rows": len(known), "losses": means, "left_out": len(known) - sum(map(len, by_set.values()))}

    slug, parents = slug_and_parents(config, target, tuned)
    unit = ("reference_loss", slug, settings, parents, make)
    return runtime.store.obtain(*unit, version=VERSION, size=len(known), divided=True)


def example_losses(
    runtime: Runtime,
    config: TargetConfig,
    model: Backbone,
    examples: Sequence[Example],
    folder: Path,
    purpose: str,
    what: str,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return two tensors (B,) for each batch: its examples' positions in `examples`, and their losses.

    The loss of an example is its mean NLL per response token (nats).

    Print how many prompts and responses are cut, and how many examples cannot be used and are omitted.

    Args:
        purpose: name of the computation in the progress bar and in errors.
        what: name of the examples in messages.
    """
    limit = min(config.max_length, model.context)
    with runtime.display.task("tokenise for the target", len(examples)) as advance:
        encoded, report = encode(examples, model.tokenizer, config.template, limit, advance)
    say_report(runtime, report, len(examples), "target", what)
    device = device_of(runtime.compute)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    in_step = is_divided(model.model)  # a divided layer that ran in inference mode fails in later passes
    no_gradients = torch.no_grad() if in_step else torch.inference_mode()
    with runtime.display.task(purpose, len(encoded)) as advance, no_gradients:
        response_losses = ResponseLosses(model.model)
        budget = TokenBudget.of(model.model, runtime.compute.tokens, runtime.display.say)

        def losses_of(batch_examples: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
            batch = collate(batch_examples, model.pad_id).to(device)
            place = "cpu" if parallel.size() > 1 else device  # other ranks can read the losses only from the CPU
            return batch.rows.to(place), response_losses(batch).to(place)

        journal = runtime.journal(folder)
        for results in parallel.passes(budget, encoded, losses_of, journal, advance, in_step=in_step):
            for result in results:
                rows, losses = (values.cpu() for values in result)
                require_finite(purpose, rows, losses, encoded)
                kept.append((rows, losses))
    return kept
