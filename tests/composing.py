"""Hydra's composition without the repeated work: the tests compose some thousand configs from the same files.

Hydra takes 0.25 s for one. What depends on the files and the chosen groups alone is made once in a process and copied;
values given on the command line are set by Hydra itself each time. `test_composing.py` holds it beside plain Hydra.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

PLAIN = {  # what Hydra has in their place
    (config_loader_impl, "create_defaults_list"): config_loader_impl.create_defaults_list,
    (ConfigLoaderImpl, "_compose_config_from_defaults_list"): ConfigLoaderImpl._compose_config_from_defaults_list,
    (defaults_list, "_create_interpolation_map"): defaults_list._create_interpolation_map,
    (FileConfigSource, "load_config"): FileConfigSource.load_config,
}
_lists: dict[Any, Any] = {}  # the defaults lists, by sources and chosen groups
_composed: dict[int, DictConfig] = {}  # by the identity of a list that `_lists` keeps
_files: dict[tuple[str, int, int], Any] = {}


def _stamp(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file), stat.st_mtime_ns, stat.st_size


def _sources(repo: Any) -> tuple[Any, ...]:
    """Return the searched places with the state of their files, and what is in Hydra's store."""
    places = []
    for source in repo.get_sources():
        files = sorted(Path(source.path).glob("**/*.yaml")) if source.scheme() == "file" else []
        places.append((source.scheme(), source.path, *map(_stamp, files)))
    return *places, *_stored(ConfigStore.instance().repo)


def _stored(nodes: dict[str, Any], group: str = "") -> Iterator[tuple[str, str | None, Any]]:
    """Yield the place, the package and the type of everything in Hydra's store."""
    for name, node in nodes.items():
        if isinstance(node, dict):
            yield from _stored(node, f"{group}{name}/")
        else:
            yield f"{group}{name}", node.package, OmegaConf.get_type(node.node)


def _create_defaults_list(
    repo: Any, config_name: str | None, overrides_list: list[Any], prepend_hydra: bool, skip_missing: bool
) -> Any:
    kept = [each for each in overrides_list if not each.is_sweep_override()]
    chosen = [each for each in kept if repo.group_exists(each.key_or_group) and not isinstance(each.value(), dict)]
    key = (_sources(repo), config_name, prepend_hydra, skip_missing, tuple(each.input_line for each in chosen))
    if key not in _lists:
        plain = PLAIN[config_loader_impl, "create_defaults_list"]
        _lists[key] = plain(repo, config_name, chosen, prepend_hydra, skip_missing)
    made = copy.copy(_lists[key])
    made.config_overrides = [each for each in kept if each not in chosen]
    return made


def _compose_config_from_defaults_list(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    if id(defaults) not in _composed:
        plain = PLAIN[ConfigLoaderImpl, "_compose_config_from_defaults_list"]
        _composed[id(defaults)] = plain(self, defaults, repo)
        _composed[id(defaults)]._metadata.resolver_cache.clear()  # it has the time, which is each run's own
    return copy.deepcopy(_composed[id(defaults)])


def _create_interpolation_map(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig:
    if not any(each.is_interpolation() for each in defaults):  # then nobody reads it
        return OmegaConf.create()
    return PLAIN[defaults_list, "_create_interpolation_map"](overrides, defaults, self_added)


def _load_config(self: FileConfigSource, config_path: str) -> Any:
    file = Path(self.path) / self._normalize_file_name(config_path)
    plain: Callable[..., Any] = PLAIN[FileConfigSource, "load_config"]
    if not file.is_file():
        return plain(self, config_path)
    key = _stamp(file.resolve())
    if key not in _files:
        _files[key] = plain(self, config_path)
    loaded = copy.copy(_files[key])  # Hydra takes the defaults out of the config, and puts more beside it
    loaded.config, loaded.header = copy.deepcopy(loaded.config), dict(loaded.header)
    loaded.path, loaded.provider = f"{self.scheme()}://{self.path}", self.provider
    return loaded


def compose_from_memory() -> None:
    """Have Hydra use what it has made before, from here on in this process."""
    config_loader_impl.create_defaults_list = _create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = _compose_config_from_defaults_list
    defaults_list._create_interpolation_map = _create_interpolation_map
    FileConfigSource.load_config = _load_config
    ConfigStore.__deepcopy__ = lambda store, memo: store  # Hydra copies it with its repository, and only reads it


def compose_plainly() -> None:
    """Put Hydra's own functions back."""
    for (place, name), function in PLAIN.items():
        setattr(place, name, function)
    if "__deepcopy__" in vars(ConfigStore):
        del ConfigStore.__deepcopy__
