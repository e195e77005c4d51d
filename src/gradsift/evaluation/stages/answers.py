"""The stage `generate`: the items of benchmarks, and a model's answers to them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.config import EMBEDDED, TERSE, BenchmarkConfig, EndpointGeneratorConfig, GeneratorConfig, TargetConfig
from gradsift.data import verifiable
from gradsift.data.examples import Turn
from gradsift.data.load import benchmark_rows
from gradsift.data.tokens import encode_prompt, template_identity
from gradsift.data.verifiable import FAMILIES
from gradsift.evaluation.benchmarks import Item, load_benchmark
from gradsift.evaluation.generation import OUTPUTS_FILE, Question, generate_answers, model_outputs, write_model_outputs
from gradsift.evaluation.judges import with_input
from gradsift.evaluation.remote import endpoint_answers, generator_settings
from gradsift.journal import Journal
from gradsift.runtime import Advance, Runtime
from gradsift.training.backbones import Backbone
from gradsift.training.target import load_to_answer

VERSION = 2
TERSE_ITEMS = 360  # 20 per skill


def benchmark_items(
    runtime: Runtime, config: BenchmarkConfig, names: Sequence[str], loaded: Artifact, seed: int
) -> list[Item]:
    """Return the items of the benchmarks `names`, in this order.

    Args:
        seed: seed with which the items of the embedded world's terse benchmark are drawn.
    """
    downloads = runtime.store.root / "downloads"
    folder = None if config.folder is None else Path(config.folder).expanduser()
    items: list[Item] = []
    for name in names:
        if name == EMBEDDED:
            items += embedded_items(loaded)[: config.limit]
        elif name == TERSE:
            items += [_item(TERSE, row) for row in verifiable.terse_rows(TERSE_ITEMS, seed=seed)][: config.limit]
        else:
            items += load_benchmark(name, config.catalog[name], downloads, config.limit, folder)
    return items


def embedded_items(loaded: Artifact) -> list[Item]:
    """Return the items of the embedded world; each family that `data.delayed` adds is a benchmark of its own."""
    rows = benchmark_rows(loaded)
    names = [EMBEDDED if row["family"] in FAMILIES else f"{EMBEDDED}_{row['family']}" for row in rows]
    return [_item(name, row) for name, row in zip(names, rows, strict=True)]


def _item(name: str, row: Mapping[str, str]) -> Item:
    return Item(name, row["item_id"], row["instruction"], row["input"], row["reference"])


def generate(
    runtime: Runtime,
    config: BenchmarkConfig,
    target_config: TargetConfig,
    target: Artifact,
    tuned: Artifact | None,
    items: Sequence[Item],
    generator_config: GeneratorConfig,
) -> Artifact:
    """Generate greedy answers to all items with the finetuned target, or with the untuned target if `tuned` is None.

    Args:
        generator_config: says whether this process or an endpoint computes the answers, and names the endpoint.
    """
    settings = {
        "items": items_hash(items),
        "max_new_tokens": config.max_new_tokens,
        "template": template_identity(target_config.template),
    }
    generator = tuned.path.name if tuned else f"{target_config.name}-untuned"
    remote = generator_config if isinstance(generator_config, EndpointGeneratorConfig) else None
    if remote is not None:
        settings["generator"] = generator_settings(remote)

    def make(folder: Path) -> Mapping[str, Any]:
        answers: dict[Item, str] = {}
        answer: Callable[[Sequence[Question], Advance], list[str]]
        with ExitStack() as stack:
            if remote is None:
                loaded, journal = load_to_answer(runtime, target_config, target, tuned), runtime.journal(folder)
                answer = functools.partial(_answers, runtime, config, target_config.template, loaded, journal)
            else:
                given = (remote, target_config, target, tuned, config.max_new_tokens, folder)
                answer = stack.enter_context(endpoint_answers(runtime, *given))
            advance = stack.enter_context(runtime.display.task(f"answer {len(items)} questions", len(items)))
            for turn in (1, 2):
                if asked := [item for item in items if (item.after is None) == (turn == 1)]:
                    answers |= zip(asked, answer(_questions(asked, answers), advance), strict=True)
        rows = model_outputs(items, [answers[item] for item in items], generator)
        write_model_outputs(folder / OUTPUTS_FILE, rows)
        return {"rows": len(items)}

    slug, parents = slug_and_parents(target_config, target, tuned)
    unit = ("generate", slug, settings, parents, make)
    return runtime.store.obtain(*unit, version=VERSION, size=len(items), divided=remote is None)


def _answers(
    runtime: Runtime,
    config: BenchmarkConfig,
    template: str,
    loaded: Backbone,
    journal: Journal,
    questions: Sequence[Question],
    advance: Advance,
) -> list[str]:
    return generate_answers(
        loaded.model,
        loaded.tokenizer,
        [encode_prompt(item.instruction, item.input, loaded.tokenizer, template, past) for item, past in questions],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        max_tokens=runtime.compute.tokens,
        progress=advance,
        journal=journal,
    )


def _questions(items: Sequence[Item], answers: Mapping[Item, str]) -> list[Question]:
    """Return the items as questions; the history of a second turn is the first question and its answer."""
    histories = {
        (item.benchmark, item.item_id): (
            Turn("user", with_input(item.instruction, item.input)),
            Turn("assistant", text),
        )
        for item, text in answers.items()
    }
    return [Question(item, histories[item.after, item.item_id] if item.after else ()) for item in items]


def items_hash(items: Sequence[Item]) -> str:
    """Return the SHA-256 of the items; the field `after` is left out of the hash if it is None."""
    known = [{name: value for name, value in asdict(item).items() if name != "after" or value} for item in items]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def slug_and_parents(config: TargetConfig, target: Artifact, tuned: Artifact | None) -> tuple[str, list[Artifact]]:
    """Return the slug and the parents for an artifact that a model computes.

    The model is the finetuned target `tuned`, or the untuned `target` if `tuned` is None.
    """
    if tuned is None:
        return f"{config.name}-untuned", [target]
    return tuned.path.name.rsplit("-", 1)[0], [target, tuned]
