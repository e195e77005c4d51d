"""The stage `judge`, which judges each pair of answers in both orders, and `pws`, which computes the PWS."""

from __future__ import annotations

import json
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
from gradsift.diagnostics import write_diagnostics
from gradsift.errors import ConfigError
from gradsift.evaluation.chat import client_of
from gradsift.evaluation.generation import OUTPUTS_FILE, read_model_outputs
from gradsift.evaluation.judges import JudgeError, Rater
from gradsift.evaluation.judges.alpaca_eval import AlpacaEvalJudge
from gradsift.evaluation.judges.annotators import read_annotator
from gradsift.evaluation.judges.openai import OpenaiJudge
from gradsift.evaluation.judges.parsing import Parse
from gradsift.evaluation.judges.verifier import VerifierJudge
from gradsift.evaluation.judges.wording import judge_wording, rating_wording
from gradsift.evaluation.judgments import invalid_share, judge_pairs, read_judgments
from gradsift.evaluation.matching import MATCHERS
from gradsift.journal import Journal
from gradsift.runtime import Runtime
from gradsift.sources import Source

if TYPE_CHECKING:
    from gradsift.evaluation.judges.local import LocalJudge

VERSION = 5  # version of the rules by which a judge's replies, ratings included, are read
PWS_VERSION = 6
# options that change neither a reply nor its meaning
_NOT_JUDGMENT = (
    *("confidence", "batch_size", "api_key_env", "timeout", "retries", "max_wait", "give_up", "give_up_unreadable"),
    *("concurrency", "dry_run", "price_input", "price_output", "max_usd", "max_calls"),
)


def check_judge(runtime: Runtime, config: JudgeConfig) -> None:
    """Raise an error early if the judge cannot be used, for example because its key is missing."""
    if not judge_models(runtime, config):
        _client(runtime, config, [])


def judge(
    runtime: Runtime, config: JudgeConfig, benchmark: BenchmarkConfig, answers: Artifact, reference: Artifact
) -> Artifact:
    """Judge every pair of answers in both orders."""
    models = judge_models(runtime, config)
    # sets that the verifier does not compare word for word
    rules = {name: rule for name in benchmark.sets if (rule := benchmark.match_of(name)) != "exact"}

    def make(folder: Path) -> Mapping[str, Any]:
        rows, reference_rows = (read_model_outputs(a.file(OUTPUTS_FILE)) for a in (answers, reference))
        client = _client(runtime, config, models, f"judge-{folder.name}", rules, runtime.journal(folder))
        with runtime.display.task(f"judge={config.name}, both orders", 2 * len(rows)) as advance:
            judgments = judge_pairs(client, rows, reference_rows, folder / "judgments.jsonl", advance)
        invalid = sum(not judgment.valid for judgment in judgments)
        cost = client.cost()
        if cost and invalid == len(judgments):
            first = judgments[0]
            raise JudgeError(
                f"{client.name}: none of its {invalid} replies can be read; the first one: {first.reply[:300]!r} "
                f"({first.reason}); check judge.model, judge.max_tokens and judge.parse, and give the same command "
                "again (stored replies are free)"
            )
        return {"rows": len(judgments), "invalid": invalid, "combine": client.combine, "cost": cost}

    settings = judge_settings(config, judge_wording(_kind(config)))
    if config.name == "verifier" and rules:
        settings["match"] = rules
    return runtime.store.obtain("judge", config.name, settings, [answers, reference, *models], make, version=VERSION)


def _kind(config: JudgeConfig) -> str:
    """Return "openai" for all judges with an `OpenaiJudgeConfig`, whose prompts are the same, else the judge's name."""
    return "openai" if isinstance(config, OpenaiJudgeConfig) else config.name


def judge_models(runtime: Runtime, config: JudgeConfig) -> list[Artifact]:
    """Return a list that holds the artifact of a local judge's model; the list is empty for other judges."""
    if not isinstance(config, LocalJudgeConfig):
        return []
    from gradsift.training.backbones import backbone  # here: no other judge needs torch

    return [backbone(runtime, config.model)]


def judge_settings(config: JudgeConfig, wording: str | None) -> dict[str, Any]:
    """Return the settings that a judge's replies depend on, besides the answers and a local model's weights."""
    settings = {k: v for k, v in asdict(config).items() if k not in _NOT_JUDGMENT}
    if isinstance(config, EndpointJudgeConfig):  # two endpoints may use one name for different models
        settings["base_url"] = config.base_url or os.environ.get("OPENAI_BASE_URL")
    if isinstance(config, AlpacaEvalJudgeConfig):  # the contents of the annotator's files count, not their location
        annotator = read_annotator(config.annotators)
        settings["annotators"] = {"name": annotator.name, "content": annotator.content}
        settings["base_url"] = config.base_url or annotator.base_url or os.environ.get("OPENAI_BASE_URL")
    if isinstance(config, LocalJudgeConfig):
        from gradsift.data.tokens import template_identity  # here: other judges need not wait for numpy

        settings["model"] = None  # represented by the parent artifact
        settings["chat"] = template_identity("chat")  # the version of the encoding, and the date in prompts
    return settings if wording is None else {**settings, "wording": wording}


def rater(runtime: Runtime, config: JudgeConfig) -> Source:
    """Return the run's judge as a rater of single examples, for `scorer=llm_rating`."""

    def value() -> Rater:
        client = _client(runtime, config, judge_models(runtime, config))
        if isinstance(client, AlpacaEvalJudge):
            raise ConfigError(f"judge={config.name} compares pairs and cannot rate one example; choose judge=openai")
        return client

    settings = {**judge_settings(config, rating_wording(_kind(config))), "version": VERSION}
    return Source(lambda: judge_models(runtime, config), value, settings)


def _client(
    runtime: Runtime,
    config: JudgeConfig,
    models: Sequence[Artifact],
    scope: str = "judge",
    rules: Mapping[str, str] | None = None,
    journal: Journal | None = None,
) -> OpenaiJudge | AlpacaEvalJudge | LocalJudge | VerifierJudge:
    if isinstance(config, OpenaiJudgeConfig):
        chat, parse = client_of(runtime, config), cast(Parse, config.parse)
        return OpenaiJudge(chat, scope=scope, parse=parse, system=config.system, task=config.task)
    if isinstance(config, AlpacaEvalJudgeConfig):
        annotator = read_annotator(config.annotators)
        chat = client_of(
            runtime,
            config,
            # the annotator's file gives the price of its own model
            price=annotator.price if config.model is None else None,
            model=config.model or annotator.model,
            temperature=annotator.temperature,
            max_tokens=config.max_tokens or annotator.max_tokens,
            extra_body={**annotator.parameters, **(config.extra_body or {})},
            base_url=config.base_url or annotator.base_url,
        )
        return AlpacaEvalJudge(chat, annotator, scope=scope)
    if isinstance(config, LocalJudgeConfig):
        from gradsift.evaluation.judges.local import LocalJudge
        from gradsift.training.backbones import load_shown
        from gradsift.training.device import device_of

        (model,) = models
        loaded = load_shown(runtime, model, config.model)
        return LocalJudge(
            loaded.model.to(device_of(runtime.compute)),
            loaded.tokenizer,
            name=f"local:{model.path.name}",
            max_length=min(config.max_length, loaded.context),
            batch_size=config.batch_size,
            max_tokens=runtime.compute.tokens,
            journal=journal,
        )
    if config.name == "verifier":
        rules = rules or {}
        name = ",".join(["verifier:exact", *(f"{key}={rule}" for key, rule in sorted(rules.items()))])
        return VerifierJudge(answers_match, name, {key: MATCHERS[rule] for key, rule in rules.items()})
    raise ConfigError(f"judge={config.name} is not known; choose verifier, local, openai or alpaca_eval")


def pws(runtime: Runtime, config: JudgeConfig, judged: Artifact, answers: Artifact, reference: Artifact) -> Artifact:
    """Compute outcomes, PWS with intervals (per benchmark and pooled) and the judge's position and length bias."""
    # imported here, so that `compare` sends its first request without waiting for numpy
    from gradsift.evaluation.bias import length_bias, length_controlled, position_bias
    from gradsift.evaluation.pws import outcome_strings, outcomes_of, summarise

    settings = {"confidence": config.confidence}

    def make(folder: Path) -> Mapping[str, Any]:
        judgments, combine = read_judgments(judged.file("judgments.jsonl")), judged.info["combine"]
        outcomes = outcomes_of(judgments, combine)
        summary = {"combine": combine, **summarise(outcomes, config.confidence)}
        lengths, reference_lengths = (
            {(row["dataset"], row["item_id"]): len(row["output"]) for row in read_model_outputs(a.file(OUTPUTS_FILE))}
            for a in (answers, reference)
        )
        both = {item: (length, reference_lengths[item]) for item, length in lengths.items()}
        summary["position_bias"] = position_bias(judgments)
        summary["outcomes"] = outcome_strings(outcomes)
        if config.name != "verifier":  # the verifier has no length bias: only right and wrong count
            summary["length_bias"] = length_bias(outcomes, both)
            summary["length_controlled"] = length_controlled(outcomes, both) | {
                "benchmarks": {
                    name: length_controlled({item: kind for item, kind in outcomes.items() if item[0] == name}, both)
                    for name in summary["benchmarks"]
                }
            }
            write_diagnostics(folder, [invalid_share(judgments)])
        content = json.dumps(summary, indent=2, allow_nan=False)
        (folder / "pws.json").write_text(content + "\n", encoding="ascii")
        return {"rows": len(judgments)}

    return runtime.store.obtain("pws", config.name, settings, [judged], make, version=PWS_VERSION)


def pws_of(made: Artifact) -> dict[str, Any]:
    """Return the contents of `pws.json` in the artifact that `pws` made."""
    summary: dict[str, Any] = json.loads(made.file("pws.json").read_text(encoding="ascii"))
    return summary
