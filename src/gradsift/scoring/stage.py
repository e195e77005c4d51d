"""The score stage: call a scorer with what it asks for, and nothing else."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.data.examples import Example
from gradsift.diagnostics import Diagnostic, write_diagnostics
from gradsift.errors import ConfigError
from gradsift.runtime import Runtime
from gradsift.scoring.scores import Scores, read_scores, write_scores

VERSION = 2
SCORES_FILE = "scores.parquet"


@dataclass(frozen=True)
class Source:
    """Something that a scorer may ask for: the artifacts it comes from, and how to read it from them."""

    artifacts: Callable[[], Sequence[Artifact]]
    value: Callable[[], Any]
    settings: Mapping[str, Any] = field(default_factory=dict)  # options of the run that it comes from; JSON values


def score(
    runtime: Runtime,
    config: Any,
    loaded: Artifact,
    pool: Callable[[], Sequence[Example]],
    sources: Mapping[str, Source],
    diagnose: Callable[[Sequence[str]], Sequence[Diagnostic]],
) -> Artifact:
    """Score every example of the pool.

    Args:
        diagnose: given what the scorer asks for, diagnostics of these things; they are stored with the
            scores, so they must depend on nothing else.
    """
    options = scorer_options(config)
    target, name = options.pop("_target_"), options.pop("name")
    scorer = resolve(target)
    asked, constants = signature_of(name, scorer, sources)
    unknown = sorted(set(options) - set(constants))
    if unknown:
        raise ConfigError(
            f"scorer.{unknown[0]} is no constant of scorer={name}; it has {', '.join(constants) or 'none'}"
        )
    required = [n for n, p in inspect.signature(scorer).parameters.items() if n in constants and p.default is p.empty]
    if missing := [constant for constant in required if constant not in options]:
        raise ConfigError(f"scorer.{missing[0]} is not set, and scorer={name} has no default for it")
    parents = [loaded, *(artifact for parameter in asked for artifact in sources[parameter].artifacts())]

    def make(folder: Path) -> Mapping[str, Any]:
        scores: Scores = scorer(*(sources[parameter].value() for parameter in asked), **options)
        examples = pool()
        scores.require_finite([example.row_index for example in examples])
        write_scores(folder / SCORES_FILE, scores, [example.example_id for example in examples])
        write_diagnostics(folder, [*diagnose(asked), *scores.diagnostics])
        statuses, counts = _counts(scores)
        return {"rows": len(examples), **dict(zip(statuses, counts, strict=True))}

    settings = {"name": name, "function": target, **runtime.compute.numerics, **options}
    for parameter in asked:
        settings |= {f"{parameter}.{option}": value for option, value in sources[parameter].settings.items()}
    if not target.startswith("gradsift."):  # ours are versioned by hand, a user's own by its text
        settings["source"] = hashlib.sha256(inspect.getsource(inspect.getmodule(scorer) or scorer).encode()).hexdigest()
    return runtime.store.obtain("score", name, settings, parents, make, version=VERSION)


def scorer_options(config: Any) -> dict[str, Any]:
    """A scorer's config, ours or a user's own, as a plain dictionary with `_target_` and `name`."""
    options = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    for key in ("_target_", "name"):
        if not isinstance(options.get(key), str):
            raise ConfigError(f"scorer.{key} is missing; a scorer's YAML names its function and itself")
    return options


def resolve(target: str) -> Callable[..., Scores]:
    """The function that `_target_` names."""
    module_name, _, function_name = target.rpartition(".")
    try:
        scorer: Callable[..., Scores] = getattr(importlib.import_module(module_name), function_name)
        if not inspect.isfunction(scorer):
            raise ConfigError(f"scorer._target_={target} is no function; a scorer is one")
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"scorer._target_={target} cannot be imported ({error}); give package.module.function"
        ) from error
    return scorer


def signature_of(
    name: str, scorer: Callable[..., Scores], sources: Mapping[str, Source]
) -> tuple[list[str], list[str]]:
    """The scorer's inputs (positional parameters) and its constants (keyword-only ones)."""
    parameters = inspect.signature(scorer).parameters.values()
    asked = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    unknown = [parameter for parameter in asked if parameter not in sources]
    if unknown:
        raise ConfigError(f"scorer={name} asks for {unknown[0]!r}; a scorer can ask for {', '.join(sources)}")
    return asked, [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _counts(scores: Scores) -> tuple[list[str], list[int]]:
    statuses = sorted(set(scores.status.tolist()))
    return statuses, [int((scores.status == status).sum()) for status in statuses]


def scores_of(artifact: Artifact) -> Scores:
    """What the score stage wrote."""
    return read_scores(artifact.file(SCORES_FILE))
