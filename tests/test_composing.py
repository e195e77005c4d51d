"""The tests' composition from memory gives what plain Hydra gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from composing import _composed, compose_from_memory, compose_plainly
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gradsift.composition import conf_folder, register_schemas
from gradsift.config import TrackerConfig


@pytest.fixture
def plainly() -> Iterator[Callable[..., DictConfig]]:
    def composed(*overrides: str) -> DictConfig:
        compose_plainly()
        return from_memory(*overrides)

    yield composed
    compose_from_memory()


def from_memory(*overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def text(config: DictConfig) -> str:
    """Return everything in the config, Hydra's own part included, with the types of its nodes."""
    config._metadata.resolver_cache.clear()  # it has the time of composing
    return OmegaConf.to_yaml(config) + repr(config._metadata) + repr(config.proxy._metadata)


LINES = [
    (),
    ("experiment=smoke", "method=less", "+nothing=3", "proxy.members=4"),
    ("proxy=smollm2", "scorer=gsnr", "~tracker", "scorer.eps=1e-3", "data.corruption={share: 0.1}"),
    ("experiment=[smoke,search]", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"),
]


def test_a_config_from_memory_is_plain_hydras(plainly: Callable[..., DictConfig]) -> None:
    remembered = [text(from_memory(*line)) for line in (*LINES, *LINES)]  # the second time all come from memory
    assert [text(plainly(*line)) for line in LINES] * 2 == remembered
    assert len(set(remembered)) == len(LINES)
    assert all(not kept._metadata.resolver_cache for kept in _composed.values())  # no run has another's time


def test_errors_are_plain_hydras(plainly: Callable[..., DictConfig]) -> None:
    wrong = ["scorer=nowhere", "scorer.nothing=1", "alpha=abc", "+scorer=random", "++scorer=random", "~scorer=random"]

    def error(composed: Callable[..., DictConfig], override: str) -> str:
        with pytest.raises(HydraException) as caught:
            composed("experiment=smoke", override)
        return str(caught.value)

    remembered = [error(from_memory, override) for override in wrong]
    assert [error(plainly, override) for override in wrong] == remembered


def test_a_changed_config_is_not_changed_in_memory_and_a_changed_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = from_memory("experiment=smoke")
    first.proxy.members, first.data.name = 99, "changed"
    assert from_memory("experiment=smoke").proxy.members != 99
    mine = tmp_path / "conf/experiment/mine.yaml"
    mine.parent.mkdir(parents=True)
    for members in (7, 8):
        mine.write_text(f"# @package _global_\nproxy:\n  members: {members}\n{'#' * members}")
        assert from_memory("experiment=mine").proxy.members == members
    mine.unlink()
    with pytest.raises(HydraException, match="mine"):
        from_memory("experiment=mine")


def test_another_schema_in_the_store_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Other(TrackerConfig):
        added: int = 5

    assert "added" not in from_memory().tracker
    schemas = ConfigStore.instance().repo["schema"]["tracker"]
    other = dataclasses.replace(schemas["tracker.yaml"], node=OmegaConf.structured(Other))
    monkeypatch.setitem(schemas, "tracker.yaml", other)
    assert from_memory().tracker.added == 5
