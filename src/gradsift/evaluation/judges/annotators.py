"""alpaca_eval's annotators, read from their files without importing the package.

An annotator is a folder with a `configs.yaml`. This file names a prompt with slots such as {instruction}, a model with
its parameters, and the parser that finds a preference in a reply. An annotator is refused if it cannot judge each pair
in both orders through a chat endpoint, for example if its prompt is for completion models or shows several pairs. A
file with a pool of annotators is refused too, because each annotator of a pool judges only a random part of the
questions.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from gradsift.errors import ConfigError
from gradsift.evaluation.judges import content_hash

PARSERS = (
    *("regex_parser", "lmsys_parser", "ranking_parser", "json_parser", "eval_parser", "replace_parser"),
    *("logprob_parser", "pipeline_meta_parser"),
)
SLOT = re.compile(r"{([^ \s]+?)}")  # what alpaca_eval treats as a slot
_NEEDED = ("instruction", "output_1", "output_2")
_KNOWN_SLOTS = (*_NEEDED, "input")
_FILE = "configs.yaml"
_START, _END = "<|im_start|>", "<|im_end|>"
_ROLES = ("system", "user", "assistant")
# options of a completion that configure alpaca_eval's own client and are not parameters of a request
_CLIENT_OPTIONS = (
    *("model_name", "max_tokens", "temperature", "is_strip", "is_chat", "requires_chatml"),
    *("is_skip_multi_tokens_to_avoid", "num_procs", "batch_size", "price_per_token", "client_kwargs"),
    *("client_config_path", "sleep_time", "n_retries"),
)
_READING_ALONE = ("ChainOfThoughtProcessor", "JsonKeysToColumnProcessor")  # add columns, change no preference


@dataclass(frozen=True)
class Annotator:
    """A prompt, the parameters of the requests that send it, and the parser of the replies.

    `messages` are pairs of a role and a text with slots. `parameters` are sent with each request, in addition to the
    model, `max_tokens` and `temperature`. `price` is in USD per million tokens; it is None if the annotator's file
    gives no price.
    """

    name: str
    messages: tuple[tuple[str, str], ...]
    model: str
    max_tokens: int
    temperature: float
    parameters: Mapping[str, Any]
    parser: str
    parser_options: Mapping[str, Any]
    reads_choice: bool  # the parser gets the whole choice, with log-probabilities, instead of its text
    base_url: str | None
    price: float | None

    @property
    def content(self) -> str:
        """A hash of everything that affects the requests or the way in which replies are read."""
        return content_hash({key: value for key, value in asdict(self).items() if key != "price"})


def shipped() -> dict[str, Path]:
    """Return the folders of the annotators that come with the package alpaca_eval, by name."""
    package = importlib.util.find_spec("alpaca_eval")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("judge=alpaca_eval needs the package alpaca-eval; install it with `pip install alpaca-eval`")
    root = Path(package.submodule_search_locations[0]) / "evaluators_configs"
    return {file.parent.name: file.parent for file in sorted(root.glob(f"*/{_FILE}"))}


def read_annotator(name_or_path: str) -> Annotator:
    """Read an annotator, given by its name in alpaca_eval or by the path of its folder or of its `configs.yaml`.

    Raises:
        ConfigError: alpaca_eval is not installed, there is no such annotator, its file is broken, or it is refused (see
            the module's docstring).
    """
    folders, path = shipped(), Path(name_or_path).expanduser()
    if name_or_path in folders:
        path = folders[name_or_path]
    elif not path.exists():
        raise ConfigError(
            f"judge.annotators={name_or_path!r} is neither a folder nor an annotator of alpaca_eval, which has "
            f"{', '.join(folders)}"
        )
    try:
        return _annotator(path / _FILE if path.is_dir() else path)
    except ConfigError as reason:
        raise ConfigError(f"judge.annotators={name_or_path!r}: {reason}") from reason


def _annotator(file: Path) -> Annotator:
    name, entry = _entry(file)
    options = _mapping(entry, "completions_kwargs")
    _require_one_pair_per_chat_request(entry, options)
    model, client = options.get("model_name"), _mapping(options, "client_kwargs")
    if not isinstance(model, str):
        raise ConfigError("completions_kwargs.model_name is missing or not text; name the model there")
    if unknown := sorted(set(client) - {"base_url"}):
        raise ConfigError(
            f"client_kwargs holds {unknown}, and only base_url is understood; give the key in the environment variable "
            "that judge.api_key_env names"
        )
    parser, reading = entry.get("fn_completion_parser", "regex_parser"), _mapping(entry, "completion_parser_kwargs")
    for used in (parser, *_mapping(reading, "parsers_to_kwargs")):
        if used not in PARSERS:
            raise ConfigError(f"the parser {used!r} is not known; choose one of {', '.join(PARSERS)}")
    price = _number(options, "price_per_token", 0)
    return Annotator(
        name=name,
        messages=_messages(file, entry.get("prompt_template")),
        model=model,
        # defaults are alpaca_eval's own
        max_tokens=int(_number(options, "max_tokens", 2048)),
        temperature=_number(options, "temperature", 0.7),
        parameters={"top_p": 1.0} | {k: v for k, v in options.items() if k not in _CLIENT_OPTIONS},
        parser=parser,
        parser_options=reading,
        reads_choice=entry.get("completion_key") == "completions_all",
        base_url=client.get("base_url"),
        price=price * 1e6 if price else None,
    )


def _entry(file: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the options of the annotator in a file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()) or not content:
        raise ConfigError(f"{file} holds no annotator; it must be NAME: {{prompt_template: ..., ...}}")
    if len(content) > 1:
        raise ConfigError(
            f"it is a pool of {len(content)} annotators, each of which gets a random part of the questions; copy the "
            "annotator to use into a file of its own"
        )
    ((name, entry),) = content.items()
    return str(name), entry


def _require_one_pair_per_chat_request(entry: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    asks, pairs = entry.get("fn_completions", "openai_completions"), entry.get("batch_size", 1)
    if asks != "openai_completions":
        raise ConfigError(
            f"it asks through {asks}, and only openai_completions is supported; choose another annotator, or copy its "
            "folder and name an endpoint that speaks OpenAI's chat protocol (judge.base_url)"
        )
    if pairs != 1:
        raise ConfigError(
            f"it puts {pairs} pairs into one prompt, where they influence each other; choose one with batch_size: 1"
        )
    if (read := entry.get("completion_key", "completions")) not in ("completions", "completions_all"):
        raise ConfigError(f"its completion_key={read!r} is unknown; choose completions or completions_all")
    for name in ("tokens_to_favor", "tokens_to_avoid"):
        if options.get(name):
            raise ConfigError(f"{name} needs the model's own tokenizer; give the request's logit_bias instead")
    for name in _mapping(entry, "processors_to_kwargs"):
        if name not in _READING_ALONE:
            raise ConfigError(f"processors_to_kwargs names {name}, which changes prompts; remove it")


def _messages(file: Path, template: Any) -> tuple[tuple[str, str], ...]:
    """Return the (role, text) messages of a prompt; `template` is the prompt or the path of its file.

    A prompt is split into messages before its slots are filled, so that markup in an answer cannot end a message.
    """
    if not isinstance(template, str):
        raise ConfigError("prompt_template is missing or not text; give the prompt or the path of its file")
    text = template
    if not SLOT.search(template):
        path = file.parent.parent / template  # relative to the folder that holds the annotator's folder
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"its prompt_template {path} cannot be read ({error})") from error
    slots = SLOT.findall(text)
    for name in _NEEDED:
        if slots.count(name) != 1:
            raise ConfigError(f"its prompt has the slot {{{name}}} {slots.count(name)} times, not once")
    if unknown := sorted(set(slots) - set(_KNOWN_SLOTS)):
        raise ConfigError(f"its prompt has the slot {{{unknown[0]}}}; known are {', '.join(_KNOWN_SLOTS)}")
    text = text.strip()
    if not (text.startswith(_START) and text.endswith(_END)):
        raise ConfigError(
            f"its prompt is for a completion model; for a chat model, begin it with {_START}user and a line end, and "
            f"end it with {_END}"
        )
    messages = []
    for part in text.split(_START)[1:]:
        role, _, content = part.partition("\n")
        if role.strip() not in _ROLES:
            raise ConfigError(f"its prompt has a message by {role.strip()!r}; known are {', '.join(_ROLES)}")
        messages.append((role.strip(), content.split(_END, 1)[0].strip()))
    return tuple(messages)


def _mapping(options: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = options.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is of type {type(value).__name__}, and must be a mapping")
    return value


def _number(options: Mapping[str, Any], key: str, default: float) -> float:
    value = options.get(key, default)
    if isinstance(value, int | float):
        return value  # unchanged: a request says 1 and not 1.0
    try:
        return float(value)  # YAML reads 15e-6 as text
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r} is not a number") from error
