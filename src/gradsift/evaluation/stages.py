"""The stages behind the finetune: answers, their metrics, held-out loss, forgetting, judgments, PWS."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from gradsift.artifacts import Artifact, file_hash
from gradsift.config import (
    EMBEDDED,
    TERSE,
    AlpacaEvalJudgeConfig,
    BenchmarkConfig,
    EndpointJudgeConfig,
    JudgeConfig,
    LocalJudgeConfig,
    OpenaiJudgeConfig,
    TargetConfig,
)
from gradsift.data import verifiable
from gradsift.data.batching import collate
from gradsift.data.download import fetch_url
from gradsift.data.examples import Example
from gradsift.data.load import benchmark_rows, heldout_of
from gradsift.data.tokens import Encoded, encode, encode_prompt
from gradsift.data.verifiable import FAMILIES, answers_match
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.evaluation.benchmarks import Item, load_benchmark
from gradsift.evaluation.bias import length_bias, position_bias
from gradsift.evaluation.chat import ChatClient
from gradsift.evaluation.generation import generate_answers, model_outputs, read_model_outputs, write_model_outputs
from gradsift.evaluation.judges import Rater
from gradsift.evaluation.judges.alpaca_eval import AlpacaEvalJudge
from gradsift.evaluation.judges.annotators import read_annotator
from gradsift.evaluation.judges.openai import OpenaiJudge
from gradsift.evaluation.judges.parsing import Parse
from gradsift.evaluation.judges.verifier import VerifierJudge
from gradsift.evaluation.judges.wording import judge_wording, rating_wording
from gradsift.evaluation.judging import judge_pairs, read_judgments
from gradsift.evaluation.lm_harness import check_lm_eval, evaluate_tasks
from gradsift.evaluation.matching import MATCHERS
from gradsift.evaluation.metrics import change, check_wordnet, measure, read_wordnet
from gradsift.evaluation.pws import read_pws, summarise, write_pws
from gradsift.evaluation.reply_cache import ReplyCache
from gradsift.evaluation.spending import Terms
from gradsift.journal import Journal
from gradsift.runtime import Runtime
from gradsift.sources import Source
from gradsift.training.backbones import Backbone, backbone, load_shown
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.finetuning import ResponseLosses, require_finite
from gradsift.training.target import load_tuned

if TYPE_CHECKING:
    from gradsift.evaluation.judges.local import LocalJudge

VERSION = 2
PWS_VERSION = 3
METRICS_VERSION = 1
OUTPUTS_FILE = "model_outputs.json"
METRICS_FILE = "metrics.json"
TERSE_ITEMS = 360  # twenty of each skill
REPLIES_FILE = "judge_cache.sqlite"  # in the store's folder, for all runs
_LOSS_TOKENS = 4096  # padded tokens at once, where compute.tokens does not say; no result depends on it


def benchmark_items(
    runtime: Runtime, config: BenchmarkConfig, names: Sequence[str], loaded: Artifact, seed: int
) -> list[Item]:
    """The items of the sets `names`, in that order; `seed` draws those of the embedded world's terse set."""
    fetch = functools.partial(fetch_url, folder=runtime.store.root / "downloads")
    folder = None if config.folder is None else Path(config.folder).expanduser()
    items: list[Item] = []
    for name in names:
        if name == EMBEDDED:
            items += embedded_items(loaded)[: config.limit]
        elif name == TERSE:
            items += [_item(TERSE, row) for row in verifiable.terse_rows(TERSE_ITEMS, seed=seed)][: config.limit]
        else:
            items += load_benchmark(name, config.catalog[name], config.limit, fetch, folder)
    return items


def embedded_items(loaded: Artifact) -> list[Item]:
    """The benchmark that came with the embedded world; the families of `data.delayed` are benchmarks of their own."""
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
) -> Artifact:
    """Greedy answers of the finetuned target (or of the untouched one, for `tuned=None`) to every item."""
    settings = {
        "items": _hash(items),
        "max_new_tokens": config.max_new_tokens,
        "template": target_config.template,
        **runtime.compute.numerics,
    }
    generator = tuned.path.name if tuned else f"{target_config.name}-untuned"

    def make(folder: Path) -> Mapping[str, Any]:
        tuned_model = load_tuned(runtime, target_config, target, tuned)
        prompts = [
            encode_prompt(item.instruction, item.input, tuned_model.tokenizer, target_config.template) for item in items
        ]
        with runtime.display.task(f"answer {len(items)} questions", len(items)) as advance:
            answers = generate_answers(
                tuned_model.model,
                tuned_model.tokenizer,
                prompts,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
                progress=advance,
                journal=Journal(folder, runtime.compute.save_every),
            )
        write_model_outputs(folder / OUTPUTS_FILE, model_outputs(items, answers, generator))
        return {"rows": len(items)}

    parents, slug = [target, *([tuned] if tuned else [])], _slug(target_config, tuned)
    return runtime.store.obtain("generate", slug, settings, parents, make, version=VERSION, size=len(items))


def _hash(items: Sequence[Item]) -> str:
    questions = json.dumps([asdict(item) for item in items], sort_keys=True)
    return hashlib.sha256(questions.encode()).hexdigest()


def _slug(config: TargetConfig, tuned: Artifact | None) -> str:
    return tuned.path.name.rsplit("-", 1)[0] if tuned else f"{config.name}-untuned"


def check_metrics(config: BenchmarkConfig) -> None:
    """Refuse now metrics that could not be computed later."""
    check_wordnet(config.wordnet_dir)
    if config.lm_eval_folder is not None and not Path(config.lm_eval_folder).is_dir():
        raise DataError(
            f"benchmark.lm_eval_folder={config.lm_eval_folder} is no folder; name one with tasks of lm-eval"
        )
    check_lm_eval(config.lm_eval_tasks, config.lm_eval_folder)


def metrics(runtime: Runtime, config: BenchmarkConfig, answers: Artifact, items: Sequence[Item]) -> Artifact | None:
    """Accuracy, ROUGE-L, BLEU and METEOR per benchmark and pooled (see `gradsift.evaluation.metrics`).

    Args:
        answers: those of `generate` to the items.

    Returns:
        What `metrics_of` reads; None where no item has a reference answer.
    """
    asked = sorted({item.benchmark for item in items if item.reference is not None})
    if not asked:
        return None
    wordnet = check_wordnet(config.wordnet_dir)
    settings = {
        "match": {name: config.match_of(name) for name in asked},
        "wordnet": None if wordnet is None else [file_hash(file) for file in sorted(wordnet.glob("data.*"))],
    }

    def make(folder: Path) -> Mapping[str, Any]:
        rows = read_model_outputs(answers.file(OUTPUTS_FILE))
        known = sum(row["reference"] is not None for row in rows)
        with runtime.display.task(f"metrics of {known:,} answers", 2 * known) as advance:
            found = measure(rows, config.match_of, None if wordnet is None else read_wordnet(wordnet), advance)
        (folder / METRICS_FILE).write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
        return {"rows": found["pooled"]["items"]}

    slug = answers.path.name.rsplit("-", 1)[0]
    return runtime.store.obtain("metrics", slug, settings, [answers], make, version=METRICS_VERSION)


def metrics_of(made: Artifact | None) -> dict[str, Any] | None:
    """What `metrics` wrote."""
    if made is None:
        return None
    found: dict[str, Any] = json.loads(made.file(METRICS_FILE).read_text(encoding="utf-8"))
    return found


def accuracy(config: BenchmarkConfig, answers: Artifact) -> float | None:
    """Share of the answers that are right by their benchmark's rule, over the items with a reference answer."""
    rows = [row for row in read_model_outputs(answers.file(OUTPUTS_FILE)) if row["reference"] is not None]
    right = [MATCHERS[config.match_of(row["dataset"])](row["output"], str(row["reference"])) for row in rows]
    return sum(right) / len(right) if right else None


# ---------------------------------------------------------------------------------------- forgetting


class General(NamedTuple):
    """What is known of a model outside what it is tuned for; None where it was not asked for."""

    metrics: Artifact | None
    losses: Artifact | None
    tasks: Artifact | None


def forgetting(
    runtime: Runtime,
    config: BenchmarkConfig,
    target_config: TargetConfig,
    target: Artifact,
    tuned: Artifact,
    items: Sequence[Item],
) -> tuple[General, General]:
    """What the target knew before the finetune, and knows after it, of what it was not tuned for.

    Args:
        items: those of `benchmark.general`.
    """

    def state(model: Artifact | None) -> General:
        measured = losses = tasks = None
        if items:
            answers = generate(runtime, config, target_config, target, model, items)
            measured = metrics(runtime, config, answers, items)
            losses = reference_losses(runtime, target_config, target, model, items)
        if config.lm_eval_tasks:
            tasks = _lm_eval(runtime, config, target_config, target, model)
        return General(measured, losses, tasks)

    return state(None), state(tuned)


def forgetting_of(states: tuple[General, General]) -> dict[str, Any]:
    """What `forgetting` found.

    Returns:
        `{set: {"before", "after", "change"}}`, each with the metrics and with `loss`, the mean NLL of a token of
        the reference answer (nats), as far as they are there; a task of lm-eval is the set `lm_eval/<task>`.
    """

    def values_of(state: General) -> dict[str, dict[str, Any]]:
        measured = metrics_of(state.metrics) or {"benchmarks": {}}
        losses = {} if state.losses is None else state.losses.info["losses"]
        found = {name: {**values, "loss": losses.get(name)} for name, values in measured["benchmarks"].items()}
        tasks = {} if state.tasks is None else state.tasks.info["tasks"]
        return found | {f"lm_eval/{task}": values for task, values in tasks.items()}

    before, after = (values_of(state) for state in states)
    return {
        name: {"before": before[name], "after": after[name], "change": change(before[name], after[name])}
        for name in before
    }


def reference_losses(
    runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None, items: Sequence[Item]
) -> Artifact:
    """Mean over a benchmark's items of the mean NLL of a token of the reference answer, nats; `info["losses"]` by name.

    A set none of whose references has a token for the target is left out.
    """
    known = [item for item in items if item.reference is not None]
    settings = {
        "items": _hash(known),
        "template": config.template,
        "max_length": config.max_length,
        **runtime.compute.numerics,
    }

    def make(folder: Path) -> Mapping[str, Any]:
        examples = [
            Example(
                row, f"{item.benchmark}/{item.item_id}", "", (), item.instruction, item.input, str(item.reference), {}
            )
            for row, item in enumerate(known)
        ]
        model = load_tuned(runtime, config, target, tuned)
        by_set: dict[str, list[float]] = {}
        for rows, losses in _losses(runtime, config, model, examples, folder, "loss of the reference answers"):
            for row, loss in zip(rows.tolist(), losses.tolist(), strict=True):
                by_set.setdefault(known[row].benchmark, []).append(loss)
        return {"rows": len(known), "losses": {name: sum(found) / len(found) for name, found in by_set.items()}}

    parents, slug = [target, *([tuned] if tuned else [])], _slug(config, tuned)
    return runtime.store.obtain("reference_loss", slug, settings, parents, make, version=VERSION, size=len(known))


def _lm_eval(
    runtime: Runtime, config: BenchmarkConfig, target_config: TargetConfig, target: Artifact, tuned: Artifact | None
) -> Artifact:
    settings: dict[str, Any] = {"tasks": list(config.lm_eval_tasks), "limit": config.limit, **runtime.compute.numerics}
    settings["package"] = metadata.version("lm-eval")  # tasks change from release to release
    if config.lm_eval_folder is not None:
        files = sorted(file for file in Path(config.lm_eval_folder).rglob("*") if file.is_file())
        settings["folder"] = {str(file.relative_to(config.lm_eval_folder)): file_hash(file) for file in files}

    def make(folder: Path) -> Mapping[str, Any]:
        model = load_tuned(runtime, target_config, target, tuned)
        plain: Any = model.model
        plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain  # LoRA layers sit inside
        found = evaluate_tasks(
            plain,
            model.tokenizer,
            config.lm_eval_tasks,
            folder=config.lm_eval_folder,
            limit=config.limit,
            batch_size=config.batch_size,
        )
        return {"rows": len(found), "tasks": found}

    parents = [target, *([tuned] if tuned else [])]
    return runtime.store.obtain("lm_eval", _slug(target_config, tuned), settings, parents, make, version=1)


# ------------------------------------------------------------------------------------- held-out loss


def heldout_loss(
    runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None, loaded: Artifact
) -> Artifact | None:
    """Mean over the held-out examples of the mean NLL of a response token, in nats; None without such examples."""
    if not loaded.info["heldout"]:
        return None
    settings = {
        "template": config.template,
        "max_length": config.max_length,
        **runtime.compute.numerics,
    }

    def make(folder: Path) -> Mapping[str, Any]:
        model = load_tuned(runtime, config, target, tuned)
        total, count = 0.0, 0
        for _, losses in _losses(runtime, config, model, heldout_of(loaded), folder, "held-out loss"):
            total += float(losses.sum())
            count += len(losses)
        if not count:
            raise GradsiftError("no held-out example has a response token for the target; take data.holdout=0")
        loss = {"heldout_loss": total / count, "rows": count}
        (folder / "heldout.json").write_text(json.dumps(loss), encoding="utf-8")
        return loss

    parents, slug = [target, loaded, *([tuned] if tuned else [])], _slug(config, tuned)
    size = int(loaded.info["heldout"])
    return runtime.store.obtain("heldout", slug, settings, parents, make, version=VERSION, size=size)


def heldout_loss_of(made: Artifact | None) -> float | None:
    """What `heldout_loss` found."""
    return None if made is None else float(made.info["heldout_loss"])


def _losses(
    runtime: Runtime, config: TargetConfig, model: Backbone, examples: Sequence[Example], folder: Path, purpose: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positions in `examples` and mean NLL of a response token, batch by batch; those without one are left out."""
    limit = min(config.max_length, model.context)
    with runtime.display.task("tokenise for the target", len(examples)) as advance:
        encoded, _ = encode(examples, model.tokenizer, config.template, limit, advance)
    row_indices, device = [example.row_index for example in examples], device_of(runtime.compute)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with runtime.display.task(purpose, len(encoded)) as advance, torch.inference_mode():
        response_losses = ResponseLosses(model.model)
        budget = TokenBudget(runtime.compute.tokens or _LOSS_TOKENS, runtime.display.say)

        def losses_of(batch_examples: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
            batch = collate(batch_examples, model.pad_id).to(device)
            return batch.rows, response_losses(batch)

        journal = Journal(folder, runtime.compute.save_every)
        for passed, results in budget.passes(encoded, losses_of, journal):
            for rows, losses in results:
                require_finite(purpose, rows, losses, row_indices)
                found.append((rows.cpu(), losses.cpu()))
            advance(len(passed))
    return found


def check_judge(runtime: Runtime, config: JudgeConfig) -> None:
    """Refuse a judge that could not be asked later: a missing key, a model that cannot be had."""
    if isinstance(config, LocalJudgeConfig):
        backbone(runtime, config.model)
    else:
        _client(runtime, config, [])


def judge(
    runtime: Runtime, config: JudgeConfig, benchmark: BenchmarkConfig, answers: Artifact, reference: Artifact
) -> Artifact:
    """Judge every pair of answers in both orders; replies are kept as they arrive and never asked for twice."""
    models = judge_models(runtime, config)
    # by set, where the verifier compares otherwise than word for word
    rules = {name: rule for name in benchmark.sets if (rule := benchmark.match_of(name)) != "exact"}

    def make(folder: Path) -> Mapping[str, Any]:
        ours, theirs = (read_model_outputs(a.file(OUTPUTS_FILE)) for a in (answers, reference))
        client = _client(runtime, config, models, scope=f"judge-{folder.name}", rules=rules)
        with runtime.display.task(f"judge={config.name}, both orders", 2 * len(ours)) as advance:
            judgments = judge_pairs(client, ours, theirs, folder / "judgments.jsonl", advance)
        invalid = sum(not judgment.valid for judgment in judgments)
        cost = client.cost() if isinstance(client, OpenaiJudge | AlpacaEvalJudge) else {}
        return {"rows": len(judgments), "invalid": invalid, "combine": client.combine, "cost": cost}

    settings = judge_settings(runtime, config, judge_wording(config.name))
    parents = [answers, reference, *models]
    if config.name == "verifier" and rules:
        settings["match"] = rules
    return runtime.store.obtain("judge", config.name, settings, parents, make, version=VERSION, keep_part=True)


def judge_models(runtime: Runtime, config: JudgeConfig) -> list[Artifact]:
    """The model that judges, where it is on this machine."""
    return [backbone(runtime, config.model)] if isinstance(config, LocalJudgeConfig) else []


def judge_settings(runtime: Runtime, config: JudgeConfig, wording: str | None) -> dict[str, Any]:
    """What the judge's replies depend on besides what it is shown and its model's weights."""
    settings = {k: v for k, v in asdict(config).items() if k not in _NOT_JUDGMENT}
    if isinstance(config, EndpointJudgeConfig):  # two endpoints may call different models by one name
        settings["base_url"] = config.base_url or os.environ.get("OPENAI_BASE_URL")
    if isinstance(config, AlpacaEvalJudgeConfig):  # by what is in the files, wherever they lie
        annotator = read_annotator(config.annotators)
        settings["annotators"] = {"name": annotator.name, "content": annotator.content}
        settings["base_url"] = config.base_url or annotator.base_url or os.environ.get("OPENAI_BASE_URL")
    if isinstance(config, LocalJudgeConfig):
        settings |= {"model": None, **runtime.compute.numerics}
    return settings if wording is None else {**settings, "wording": wording}


def rater(runtime: Runtime, config: JudgeConfig) -> Source:
    """The run's judge as what grades single examples, for the scorers that ask for it."""

    def value() -> Rater:
        client = _client(runtime, config, judge_models(runtime, config))
        if isinstance(client, AlpacaEvalJudge):
            raise ConfigError(f"judge={config.name} compares pairs and cannot rate one example; take judge=openai")
        return client

    settings = judge_settings(runtime, config, rating_wording(config.name))
    return Source(lambda: judge_models(runtime, config), value, settings)


# what changes neither a reply nor its meaning
_NOT_JUDGMENT = (
    "bootstrap",
    "confidence",
    "api_key_env",
    "timeout",
    "retries",
    "max_wait",
    "give_up",
    "concurrency",
    "dry_run",
    "price_input",
    "price_output",
    "max_usd",
    "max_calls",
    "batch_size",
)


def _client(
    runtime: Runtime,
    config: JudgeConfig,
    models: Sequence[Artifact],
    scope: str = "judge",
    rules: Mapping[str, str] | None = None,
) -> OpenaiJudge | AlpacaEvalJudge | LocalJudge | VerifierJudge:
    if isinstance(config, OpenaiJudgeConfig):
        request: dict[str, Any] = {
            "model": config.model,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        return OpenaiJudge(_chat(runtime, config, **request), scope=scope, parse=cast(Parse, config.parse))
    if isinstance(config, AlpacaEvalJudgeConfig):
        annotator = read_annotator(config.annotators)
        request = {
            "model": config.model or annotator.model,
            "temperature": annotator.temperature,
            "max_tokens": config.max_tokens or annotator.max_tokens,
            "parameters": annotator.parameters,
            "base_url": config.base_url or annotator.base_url,
        }
        # a price that the annotator's file states is one for prompt and reply alike, and that of its own model
        price = annotator.price if config.model is None and config.price_input is None else None
        return AlpacaEvalJudge(_chat(runtime, config, price=price, **request), annotator, scope=scope)
    if isinstance(config, LocalJudgeConfig):
        from gradsift.evaluation.judges.local import LocalJudge

        (model,) = models
        loaded = load_shown(runtime, model, config.model)
        device = device_of(runtime.compute)
        return LocalJudge(
            loaded.model.to(device),
            loaded.tokenizer,
            name=f"local:{model.path.name}",
            max_length=min(config.max_length, loaded.context),
            batch_size=config.batch_size,
        )
    if config.name == "verifier":
        by_set = {name: MATCHERS[rule] for name, rule in (rules or {}).items()}
        name = ",".join(["verifier:exact", *(f"{key}={rule}" for key, rule in sorted((rules or {}).items()))])
        return VerifierJudge(answers_match, name=name, by_benchmark=by_set)
    raise ConfigError(f"judge={config.name} is not known; choose verifier, local, openai or alpaca_eval")


def _chat(runtime: Runtime, config: EndpointJudgeConfig, price: float | None = None, **request: Any) -> ChatClient:
    """The endpoint, with the store's replies beside it: nothing that any run paid for is paid again.

    Args:
        price: USD a million tokens, where the config has none.
        request: what `ChatClient` sends with every prompt.
    """
    prices = (config.price_input, config.price_output) if price is None else (price, price)
    terms = Terms(*prices, config.max_usd, config.max_calls, config.dry_run)
    return ChatClient(
        cache=ReplyCache(runtime.store.root / REPLIES_FILE),
        api_key_env=config.api_key_env,
        timeout=config.timeout,
        retries=config.retries,
        max_wait=config.max_wait,
        give_up=config.give_up,
        concurrency=config.concurrency,
        terms=terms,
        say=runtime.display.say,
        **{"base_url": config.base_url, **request},
    )


def pws(runtime: Runtime, config: JudgeConfig, judged: Artifact, answers: Artifact, reference: Artifact) -> Artifact:
    """Outcomes and PWS with intervals, per benchmark and pooled, and the judge's bias towards place and length.

    Args:
        answers: what was judged, against `reference`.
    """
    settings = {"bootstrap": config.bootstrap, "confidence": config.confidence, "seed": 0}

    def make(folder: Path) -> Mapping[str, Any]:
        judgments, combine = read_judgments(judged.file("judgments.jsonl")), judged.info["combine"]
        summary = summarise(judgments, combine, config.bootstrap, config.confidence, seed=0)
        ours, theirs = (_lengths(artifact) for artifact in (answers, reference))
        summary["position_bias"] = position_bias(judgments)
        summary["length_bias"] = length_bias(judgments, combine, {item: (ours[item], theirs[item]) for item in ours})
        write_pws(folder / "pws.json", summary)
        return {"rows": len(judgments)}

    return runtime.store.obtain("pws", config.name, settings, [judged], make, version=PWS_VERSION)


def pws_of(made: Artifact) -> dict[str, Any]:
    """What `pws` wrote."""
    return read_pws(made.file("pws.json"))


def _lengths(answers: Artifact) -> dict[tuple[str, str], int]:
    """Characters of each answer, by benchmark and item."""
    rows = read_model_outputs(answers.file(OUTPUTS_FILE))
    return {(row["dataset"], row["item_id"]): len(row["output"]) for row in rows}
