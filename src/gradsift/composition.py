"""Composition of a config from overrides such as `alpha=0.2`, and one-line messages for Hydra's errors."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from gradsift import config as config_module
from gradsift.config import SCHEMAS, CompareConfig, Config, load_root, register_schemas
from gradsift.config.checks import require_no_typed_secret
from gradsift.config.schemas import COMPARED, Root
from gradsift.errors import ConfigError
from gradsift.user_conf import conf_folder

_SHORT = {"model": "model.path", "quantization": "model.quantization"}  # short options of proxy and target
_TEMPLATES = ("proxy.template", "target.template")
_TEMPLATE_OF_BOTH = ("template", "template.file")
_MOST_DIGITS = 1000  # of a number in an override; Python reads up to 4,300, and no option needs a hundred


def compose_config(overrides: Sequence[str]) -> Config:
    """Return the config of a run with these overrides, for callers in Python.

    The function also works inside another program's Hydra application, whose settings it restores.

    Raises:
        ConfigError: a group, an option or a value cannot be used; the command line would print the same message.
    """
    return compose_root("config", Config, overrides)


def compose_root(file: str, kind: type[Root], overrides: Sequence[str]) -> Root:
    """Return the config that `conf/<file>.yaml` describes, with these overrides (see `compose_config`)."""
    overrides = in_full(overrides)
    require_readable(overrides, conf_folder())
    Plugins.instance()  # before the copy below: the first call stores the settings of the plugins, which must remain
    store, outer = ConfigStore.instance(), GlobalHydra.instance()
    repo, hydra_of_caller = copy.deepcopy(store.repo), outer.hydra
    outer.clear()
    try:
        register_schemas(COMPARED if kind is CompareConfig else tuple(SCHEMAS))
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return load_root(hydra.compose(file, overrides=list(overrides)), kind, file)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(in_one_line(error)) from None  # Hydra's own trace does not help the caller
    finally:
        store.repo = repo
        GlobalHydra.instance().hydra = hydra_of_caller


def in_full(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of the command line with short options such as `proxy.model=ID` spelt in full.

    `template=NAME` and `template.file=FILE.jinja` set the template of both the proxy and the target.

    Raises:
        ConfigError: the arguments give a template for both, and another one for the proxy or the target.
    """
    short = re.compile(rf"^(\+{{0,2}}(?:proxy|target)\.)({'|'.join(_SHORT)})=(?!\{{)")
    spelt: list[str] = []
    for argument in arguments:
        option, sign, value = argument.partition("=")
        if not sign or option not in _TEMPLATE_OF_BOTH:
            spelt.append(short.sub(lambda match: f"{match[1]}{_SHORT[match[2]]}=", argument))
            continue
        for other in arguments:
            if other != argument and other.lstrip("+").startswith((*_TEMPLATES, *_TEMPLATE_OF_BOTH)):
                raise ConfigError(f"{argument} is the template of proxy and target, which {other} sets too; give one")
        # the target refers to the proxy's template, so each job of a sweep over templates uses one template for both
        spelt += [f"{_TEMPLATES[0]}={value}", f"{_TEMPLATES[1]}=${{{_TEMPLATES[0]}}}"]
    return spelt


def require_readable(arguments: Sequence[str], conf: Path) -> None:
    """Refuse overrides on the command line that would make Hydra end with a traceback, or that contain a secret.

    Args:
        conf: the folder whose subfolders are the config groups.

    Raises:
        ConfigError: a group is set to null, a number has more than 1,000 digits, or a secret is typed out.
    """
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or argument.startswith("-"):
            continue
        require_no_typed_secret(key.lstrip("+~"), value)
        group = key.lstrip("+~").split("@")[0]
        if (longest := max((len(digits) for digits in re.findall(r"\d+", value)), default=0)) > _MOST_DIGITS:
            raise ConfigError(f"{key} is given a number of {longest:,} digits; give one that fits into 64 bits")
        if "null" not in re.split(r"[\s,()\[\]]+", value.lower()) or not group or not (conf / group).is_dir():
            continue
        if group in ("method", "experiment"):
            raise ConfigError(f"{group}=null is no choice; leave {group} out where none is wanted")
        choices = ", ".join(sorted(path.stem for path in (conf / group).glob("*.yaml")))
        raise ConfigError(f"{group}=null leaves the run without its {group}; choose one of: {choices}")


def in_one_line(error: Exception) -> str:
    """Return the message of a Hydra or OmegaConf error as one line, without the search path.

    For an unknown choice or option, the line names the most similar name or the known ones.
    """
    message = f"{error}\n{error.__cause__ or ''}"
    kept = message.split("Config search path:")[0].split("full_key:")[0]
    text = " ".join(part.strip() for part in kept.splitlines() if part.strip() and "To append" not in part)
    if match := re.search(r"Could not override '([\w.]+)'\. Key '(\w+)' not in '(\w+)'", text):
        return _unknown_option(*match.groups())
    if match := re.match(r"Error parsing override '([^']*)' missing EQUAL", text):
        return f"{match[1]} has no value; give it as in {match[1]}=VALUE"
    if match := re.search(r"Could not load 'export/([^']+)'", text):
        formats = ", ".join(sorted(path.stem for path in (conf_folder() / "export").glob("*.yaml")))
        return f"export={match[1]} does not exist; the choices are: {formats}, or several: export=[trl,axolotl]"
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)' Available options in '\1': (.+)", text):
        group, name, choices = match[1], match[2], match[3].split()
        close = difflib.get_close_matches(name, choices, n=1)
        meant = f"did you mean {close[0]}? The" if close else "the"
        return f"{group}={name} does not exist; {meant} choices are: {', '.join(choices)}"
    return text


def _unknown_option(option: str, key: str, schema: str) -> str:
    """Return the message for an unknown option.

    It suggests a similar option. If there is none, it names the group's choices that have this option, or else the
    known options.
    """
    parts = option.split(".")[: option.split(".").index(key) + 1]
    group, place = parts[0], ".".join(parts[:-1])
    text = f"{'.'.join(parts)} is no option" + (f" of the {place} that is chosen" if place else "")
    known = _options_of(getattr(config_module, schema, None))
    if close := difflib.get_close_matches(key, known, n=1):
        return f"{text}; did you mean {'.'.join([*parts[:-1], close[0]])}?"
    having = []
    for file in sorted((conf_folder() / group).glob("*.yaml")) if len(parts) == 2 else ():
        match = re.search(r"/schema/\w+@_here_: (\w+)", file.read_text(encoding="utf-8"))
        if match and key in _options_of(SCHEMAS[group].get(match[1])):
            having.append(f"{group}={file.stem}")
    if having:
        return f"{text}; it is one of {', '.join(having)}"
    return f"{text}; known: {', '.join(known)}" if known else text


def _options_of(schema: Any) -> list[str]:
    return [field.name for field in fields(schema)] if is_dataclass(schema) else []
