"""The interface to Hydra: the schemas of each group, and the conversion of composed configs to checked dataclasses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradsift.config import data, evaluation, export, machine, methods, models
from gradsift.config.known_models import known_choices
from gradsift.config.run import Config
from gradsift.errors import ConfigError, first_line

SCHEMAS: dict[str, dict[str, type]] = {
    "data": {
        "json": data.JsonDataConfig,
        "hub": data.HubDataConfig,
        "mixture": data.MixtureDataConfig,
        "verifiable": data.VerifiableDataConfig,
    },
    "target_set": {
        "target_set": data.TargetSetConfig,
        "files": data.FilesTargetSetConfig,
        "verifiable_tasks": data.VerifiableTargetSetConfig,
    },
    "proxy": {"proxy": models.ProxyConfig},
    "features": {"features": models.FeaturesConfig},
    "target": {"target": models.TargetConfig},
    "embedder": {
        "hidden_states": models.HiddenStatesConfig,
        "sentence_transformers": models.SentenceTransformersConfig,
    },
    "scorer": {
        "scorer": methods.ScorerConfig,
        "published": methods.PublishedConfig,
        "gsnr": methods.GsnrConfig,
        "contrast": methods.ContrastConfig,
        "gsnr_direction": methods.GsnrDirectionConfig,
        "g2is": methods.G2isConfig,
        "llm_rating": methods.RatingConfig,
        "random": methods.RandomScorerConfig,
        "superfilter": methods.SuperfilterConfig,
        "grads": methods.GradsConfig,
        "cherry": methods.CherryConfig,
        "perplexity": methods.PerplexityConfig,
        "length": methods.LengthConfig,
        "sbert": methods.SbertConfig,
    },
    "selector": {
        "selector": methods.SelectorConfig,
        "facility_location": methods.FacilityLocationConfig,
        "repr_filter": methods.ReprFilterConfig,
        "clusters": methods.ClustersConfig,
        "quotas": methods.QuotasConfig,
        "gumbel": methods.GumbelConfig,
        "round_robin_queries": methods.RoundRobinQueriesConfig,
        "gradient_walk": methods.GradientWalkConfig,
    },
    "benchmark": {"benchmark": evaluation.BenchmarkConfig},
    "generator": {
        "local": evaluation.GeneratorConfig,
        "endpoint": evaluation.EndpointGeneratorConfig,
    },
    "judge": {
        "verifier": evaluation.VerifierJudgeConfig,
        "local": evaluation.LocalJudgeConfig,
        "openai": evaluation.OpenaiJudgeConfig,
        "alpaca_eval": evaluation.AlpacaEvalJudgeConfig,
    },
    "tracker": {"tracker": machine.TrackerConfig},
    "compute": {"compute": machine.ComputeConfig},
    "export": {"export": export.ExportConfig},
    "model": {"model": models.ModelConfig},
}

COMPARED = ("benchmark", "judge", "compute", "model")  # the groups of a `CompareConfig`

REPLACED = {  # settings of Hydra's plugins that files in `conf/hydra/` replace
    "launcher": ("joblib", "submitit_local", "submitit_slurm", "ray"),
    "sweeper": ("optuna",),
}


def register_schemas(groups: Collection[str] = tuple(SCHEMAS)) -> None:
    """Register the dataclasses with Hydra as `schema/<group>/<variant>`, and remove the settings in `REPLACED`.

    The groups `COMPARED` are enough for a `CompareConfig`. After this call Hydra also searches the user's `./conf`.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from gradsift.user_conf import UserConf

    store = ConfigStore.instance()
    Plugins.instance().register(UserConf)  # the first call of instance() loads the plugins and their settings
    if "schema.yaml" in store.repo:  # registered before in this process
        return
    for group, choices in REPLACED.items():
        for choice in choices:  # Hydra accepts a choice from one source only
            store.repo["hydra"].get(group, {}).pop(f"{choice}.yaml", None)
    store.store(name="compare_schema", node=evaluation.CompareConfig)
    for group in groups:
        for name, node in SCHEMAS[group].items():
            store.store(group=f"schema/{group}", name=name, node=node)
    if groups == COMPARED:
        return
    store.store(name="schema", node=Config)
    for model, content in known_choices().items():
        for group in ("proxy", "target"):
            store.store(group=group, name=model, node=content)


Root = TypeVar("Root", Config, evaluation.CompareConfig)


def load_config(composed: DictConfig) -> Config:
    """Convert the composed config of a run into a checked `Config`; see `load_root`."""
    return load_root(composed, Config, "config")


def load_root(composed: DictConfig, kind: type[Root], file: str) -> Root:
    """Convert a composed config into checked dataclasses.

    Args:
        kind: the dataclass of the whole config.
        file: name, without .yaml, of the file in `conf/` from which the config is composed, for errors.

    Raises:
        ConfigError: an option is missing, unknown or has a value that cannot be used.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; give it as in {missing[0]}=VALUE")
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        reason = first_line(error)
        if match := re.search(r"Environment variable '(\w+)' not found", reason):
            reason = f"the environment variable {match[1]} is not set; the YAML file's header says to what"
        raise ConfigError(reason) from error
    if not isinstance(config, kind):
        raise ConfigError(f"the config was not composed from conf/{file}.yaml: its first default must be its schema")
    _require_known("", config)
    return config


def _require_known(option: str, value: Any) -> None:
    """Raise ConfigError for unknown options added with `+` or `++`, which would be attributes that nothing reads."""
    if not dataclasses.is_dataclass(value):
        return
    known = [field.name for field in dataclasses.fields(value)]
    for name, each in vars(value).items():
        if name not in known:
            raise ConfigError(f"{option}{name} is no option; known: {', '.join(known)}")
        _require_known(f"{option}{name}.", each)


def dump_config(config: Config) -> dict[str, Any]:
    """Return a config as plain values, with the schema of each group, so that `restore_config` can read it."""
    values = dataclasses.asdict(config)
    schemas: dict[str, str] = {}
    for group, variants in SCHEMAS.items():
        for name, schema in variants.items():
            if type(getattr(config, group, None)) is schema:
                schemas[group] = name
    return {"schemas": schemas, "values": values}


def restore_config(dumped: dict[str, Any]) -> Config:
    """Return the config that `dump_config` described, checked again.

    Raises:
        ConfigError: `dumped` does not describe a config, or was written by a version with other options.
    """
    if not all(isinstance(dumped.get(part), dict) for part in ("schemas", "values")):
        raise ConfigError("this run's config has no readable schemas and values; give another run, or its options")
    try:
        composed = OmegaConf.structured(Config)
        for group, schema in dumped["schemas"].items():
            composed[group] = OmegaConf.structured(SCHEMAS[group][schema])
        return load_config(OmegaConf.merge(composed, dumped["values"]))  # type: ignore[arg-type]
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"this run's config cannot be read by this version of gradsift ({error})") from error
