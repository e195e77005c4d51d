"""The interface to Hydra: schemas, config folders, configs from overrides, and one-line messages for Hydra's errors."""

from __future__ import annotations

import copy
import difflib
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf.errors import OmegaConfBaseException

from gradsift import config as config_module
from gradsift.config import KNOWN_MODELS, SCHEMAS, CompareConfig, Config, Root, load_root, require_no_typed_secret
from gradsift.errors import ConfigError

COMPARED = ("benchmark", "judge", "compute", "model")  # the groups of a `CompareConfig`
_SHORT = {"model": "model.path", "quantization": "model.quantization"}  # short options of proxy and target
_TEMPLATES = ("proxy.template", "target.template")
_TEMPLATE_OF_BOTH = ("template", "template.file")
_MOST_DIGITS = 1000  # of a number in an override; Python reads up to 4,300, and no option needs a hundred


def conf_folder() -> Path:
    """Return gradsift's own `conf/`: in the folder of an installed package, or beside `src/` in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


class UserConf(SearchPathPlugin):
    """Makes Hydra search `conf/` in the working directory, after gradsift's own `conf/`.

    The folder's path is made absolute here, because a launcher's workers may start in another folder than the sweep.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own, folder = conf_folder(), Path("conf").absolute()
        composes_gradsift = any(element.path == str(own) for element in search_path.get_path())
        if not composes_gradsift or not folder.is_dir() or folder.resolve() == own.resolve():
            return
        search_path.append("user", str(folder))
        for path in sorted(folder.glob("*/*.yaml")):
            name = path.relative_to(folder).as_posix()
            if (own / name).is_file():
                print(f"conf/{name} is not used: gradsift has a file of that name; rename yours", file=sys.stderr)


def register_schemas(groups: Collection[str] = SCHEMAS) -> None:
    """Register the dataclasses with Hydra as `schema/<group>/<name>`, and the known models as proxies and targets.

    A `CompareConfig` needs only the groups `COMPARED`; registering all groups takes longer. After this call Hydra also
    searches the user's `./conf`.
    """
    store = ConfigStore.instance()
    Plugins.instance().register(UserConf)  # the first call of instance() loads the plugins and their settings
    if "schema.yaml" in store.repo:  # registered before in this process
        return
    for file in (conf_folder() / "hydra").glob("*/*.yaml"):  # these replace settings of the plugins
        store.repo["hydra"].get(file.parent.name, {}).pop(file.name, None)  # Hydra refuses two of one name
    store.store(name="compare_schema", node=CompareConfig)
    for group in groups:
        for name, node in SCHEMAS[group].items():
            store.store(group=f"schema/{group}", name=name, node=node)
    if groups == COMPARED:
        return
    store.store(name="schema", node=Config)
    for name, path in KNOWN_MODELS.items():  # as if there were files proxy/NAME.yaml and target/NAME.yaml
        content = {"defaults": ["hf", "_self_"], "name": name, "model": {"path": path}, "template": "chat"}
        for group in ("proxy", "target"):
            store.store(group=group, name=name, node=content)


def compose_config(overrides: Sequence[str]) -> Config:
    """Return the checked config of a run with these overrides.

    If the caller is itself a Hydra application, its Hydra state is restored afterwards.

    Raises:
        ConfigError: a group, an option or a value cannot be used; the command line would print the same message.
    """
    return compose_root("config", Config, overrides)


def compose_root(file: str, kind: type[Root], overrides: Sequence[str]) -> Root:
    """Return the config of class `kind` that `conf/<file>.yaml` and the overrides describe (see `compose_config`)."""
    overrides = in_full(overrides)
    require_readable(overrides)
    Plugins.instance()  # the first call adds the plugins' settings to the store; they must be part of the copy below
    store, outer = ConfigStore.instance(), GlobalHydra.instance()
    repo, hydra_of_caller = copy.deepcopy(store.repo), outer.hydra
    outer.clear()
    try:
        register_schemas(COMPARED if kind is CompareConfig else SCHEMAS)
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return load_root(hydra.compose(file, overrides=list(overrides)), kind)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(in_one_line(error)) from None  # Hydra's traceback does not help the caller
    finally:
        store.repo = repo
        GlobalHydra.instance().hydra = hydra_of_caller


def in_full(arguments: Sequence[str]) -> list[str]:
    """Return the command-line arguments, with full names instead of short options.

    For example, `proxy.model.path=ID` replaces `proxy.model=ID`.

    `template=NAME` and `template.file=FILE.jinja` set the template of both the proxy and the target.

    Raises:
        ConfigError: the arguments set the template of both models, and another argument sets the template of a model
            again.
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
                raise ConfigError(f"{argument} sets the template of proxy and target; give it or {other}, not both")
        # the target refers to the proxy's template, so each job of a sweep over templates uses one template for both
        spelt += [f"{_TEMPLATES[0]}={value}", f"{_TEMPLATES[1]}=${{{_TEMPLATES[0]}}}"]
    return spelt


def require_readable(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a group set to null, a number of more than 1,000 digits, or a secret that is typed out.

    For a group set to null and for a number that is too long, Hydra's own errors would not name the option.
    """
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or argument.startswith("-"):
            continue
        group = key.lstrip("+~")
        require_no_typed_secret(group, value)
        if (longest := max((len(digits) for digits in re.findall(r"\d+", value)), default=0)) > _MOST_DIGITS:
            raise ConfigError(f"{group} is given a number of {longest:,} digits; give one that fits into 64 bits")
        names = [] if value.startswith("{") else re.split(r"[\s,()\[\]]+", value.lower())  # of a choice, list or sweep
        group = group.split("@")[0]
        if "null" in names and group and (conf_folder() / group).is_dir():
            choices = ", ".join(sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")))
            raise ConfigError(f"{group}=null is not a choice; leave {group} out, or choose one of: {choices}")


def quoted(text: str) -> str:
    """Return a text in single quotes, as a value of a Hydra override.

    Quotes in the text are escaped, and backslashes before a quote or at the end are doubled.
    """
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), text) + "'"


def in_one_line(error: Exception) -> str:
    """Return the message of a Hydra or OmegaConf error as one line, with the valid names if a name is unknown."""
    message = f"{error}\n{error.__cause__ or ''}"
    kept = message.split("Config search path:")[0].split("full_key:")[0]
    text = " ".join(part.strip() for part in kept.splitlines() if part.strip() and "To append" not in part)
    if match := re.search(r"Could not override '([\w.]+)'\. Key '(\w+)' not in '(\w+)'", text):
        return _unknown_option(*match.groups())
    if match := re.match(r"Error parsing override '([^']*)' missing EQUAL", text):
        return f"{match[1]} has no value; give it as in {match[1]}=VALUE"
    if isinstance(error, OverrideParseException) and not text.startswith("Error parsing"):
        example = f"'{error.override.partition('=')[0].strip()}=\"VALUE\"'"
        return f"{error.override} cannot be read; check it, or put the value in two pairs of quotes, as in {example}"
    if match := re.match(r"Error merging override ([\w.]+)=.* Invalid type assigned", text):
        return f"{match[1]} is a group of options and takes no value; give one of them, as in {match[1]}.NAME=VALUE"
    if match := re.search(r"Could not load 'export/([^']+)'", text):
        formats = ", ".join(sorted(path.stem for path in (conf_folder() / "export").glob("*.yaml")))
        return f"export={match[1]} does not exist; the choices are: {formats}, or several: export=[trl,axolotl]"
    if match := re.search(r"Could not find '([\w/]+?)/([^']+)' Available options in '\1': (.+)", text):
        group, name, choices = match[1], match[2], match[3].split()
        close = difflib.get_close_matches(name, choices, n=1)
        meant = f"did you mean {close[0]}? The" if close else "the"
        return f"{group}={name} does not exist; {meant} choices are: {', '.join(choices)}"
    return text


def _unknown_option(option: str, key: str, schema: str) -> str:
    """Return the message for an unknown option.

    The message suggests an option with a similar name. If no name is similar, the message lists the group's choices
    that have the option; if no choice has it, the message lists the known options.
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
