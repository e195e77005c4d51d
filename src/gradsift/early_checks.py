"""Checks of a run before its first heavy stage."""

from __future__ import annotations

import math

from gradsift.config import ContrastConfig, EndpointGeneratorConfig, QuotasConfig
from gradsift.data.load import labels_of
from gradsift.data.target_set import find_overlap, warn_of_leak
from gradsift.errors import ConfigError
from gradsift.evaluation.remote import check_generator
from gradsift.evaluation.stages.judging import check_judge
from gradsift.evaluation.stages.metrics import check_metrics
from gradsift.features.warmup import warmup_rows
from gradsift.line import Line
from gradsift.scoring.contrast import require_neighbours
from gradsift.scoring.random import require_labels
from gradsift.selection.budget import budget
from gradsift.selection.quotas import groups_of
from gradsift.training.target import planned_steps


def check(line: Line) -> None:
    """Check a run's options before any training, so that the run does not fail after hours of training.

    Raises:
        GradsiftError: an option does not fit the data, a model or the machine.
    """
    config = line.config
    methods = [line.scorer] if config.reaches("scores") and config.stop_after != "statistics" else []
    methods += [line.selector] if config.reaches("selection") else []
    asked = {source for chosen in methods for source in chosen.asked}
    towards_target = any(source.startswith("target_") for source in asked)
    if config.reaches("selection") and not line.keeps_all:
        for alpha in (config.alpha, *(config.audit.alphas if config.audit.enabled else ())):
            budget(alpha, line.rows)
    if config.audit.enabled:
        _ = line.clusters
    if methods:
        _check_rows(line, asked)
    if asked & {"gradients", "target_gradients"}:
        if config.features.name == "nano" and config.proxy.model.kind != "nano":
            raise ConfigError(
                f"features=nano is made for the embedded world's models, not for proxy={config.proxy.name}; "
                "choose features=less or features=g2is"
            )
        warmup = config.features.warmup
        warmup.warmup_of(warmup.epochs * math.ceil(warmup_rows(warmup, line.rows) / warmup.batch_size))
    if towards_target:
        find_overlap(line.runtime, line.target_set, line.loaded)
    if asked & {"embeddings", "target_embeddings"}:
        _ = line.embedder
    if "rater" in asked:
        config.check_rater()
    if "rater" in asked or (config.reaches("judge") and not line.keeps_all):
        check_judge(line.runtime, config.judge)
    if config.reaches("generate"):
        check_metrics(config.benchmark)
        if isinstance(config.generator, EndpointGeneratorConfig):
            check_generator(config.generator)
        _ = line.items, line.general_items
        if towards_target:
            questions = {(item.instruction.strip(), item.input.strip()) for item in line.items}
            warn_of_leak(line.runtime, line.target_set, questions)
    if config.reaches("finetune"):
        config.target.warmup_of(planned_steps(config.target, line.budget))
        _ = line.target


def _check_rows(line: Line, asked: set[str]) -> None:
    """Raise GradsiftError if the rows lack something that the scorer or the selector needs."""
    config = line.config
    if isinstance(config.scorer, ContrastConfig):
        require_neighbours(line.rows, config.scorer.neighbours)
    if "labels" in asked:
        require_labels(labels_of(line.loaded))
    if isinstance(config.selector, QuotasConfig) and config.reaches("selection"):
        groups_of(line.pool, config.selector.column, config.selector.shares)
