"""Judgments of every pair of answers in both orders, and their PWS."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gradsift.artifacts import Artifact
from gradsift.config import (
    AlpacaEvalJudgeConfig,
    BenchmarkConfig,
    EndpointJudgeConfig,
    JudgeConfig,
    LocalJudgeConfig,
    OpenaiJudgeConfig,
)
from gradsift.data.verifiable import answers_match
from gradsift.errors import ConfigError
from gradsift.evaluation.bias import length_bias, position_bias
from gradsift.evaluation.chat import ChatClient, Terms
from gradsift.evaluation.generation import OUTPUTS_FILE, read_model_outputs
from gradsift.evaluation.judges import Rater
from gradsift.evaluation.judges.alpaca_eval import AlpacaEvalJudge
from gradsift.evaluation.judges.annotators import read_annotator
from gradsift.evaluation.judges.openai import OpenaiJudge
from gradsift.evaluation.judges.parsing import Parse
from gradsift.evaluation.judges.verifier import VerifierJudge
from gradsift.evaluation.judges.wording import judge_wording, rating_wording
from gradsift.evaluation.judging import judge_pairs, read_judgments
from gradsift.evaluation.matching import MATCHERS
from gradsift.evaluation.pws import read_pws, summarise, write_pws
from gradsift.evaluation.replies import Replies
from gradsift.runtime import Runtime
from gradsift.sources import Source
from gradsift.training.backbones import backbone, load_shown
from gradsift.training.device import device_of

if TYPE_CHECKING:
    from gradsift.evaluation.judges.local import LocalJudge

VERSION = 3
PWS_VERSION = 3
REPLIES_FILE = "judge_cache.sqlite"  # in the store's folder, for all runs
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
            judgments = judge_pairs(client, ours, theirs, folder / "judgments.jsonl", advance, runtime.display.say)
        invalid = sum(not judgment.valid for judgment in judgments)
        cost = client.cost() if isinstance(client, OpenaiJudge | AlpacaEvalJudge) else {}
        return {"rows": len(judgments), "invalid": invalid, "combine": client.combine, "cost": cost}

    settings = judge_settings(runtime, config, judge_wording(config.name))
    parents = [answers, reference, *models]
    if config.name == "verifier" and rules:
        settings["match"] = rules
    return runtime.store.obtain("judge", config.name, settings, parents, make, version=VERSION)


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
        settings["model"] = None  # the parent artifact stands for it
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
        replies=Replies(runtime.store.root / REPLIES_FILE, runtime.display.say),
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
