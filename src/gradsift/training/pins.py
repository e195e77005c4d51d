"""Pins, which identify the weights of pretrained models by the hashes of a folder's files or by a commit on the hub.

This module does not import torch or transformers, so that a missing model is reported within a second.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact, Store
from gradsift.config import ModelConfig
from gradsift.errors import ConfigError, DataError, first_line
from gradsift.manifests import file_hash
from gradsift.names import slug_of_path
from gradsift.outside_json import loads
from gradsift.runtime import Display

VERSION = 2  # of the backbone stage
_TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_ARCHITECTURES = ("auto_mappings.py", "configuration_auto.py")  # transformers' lists of architectures, in 5 and in 4
_OWN_CODE = ("AutoConfig", "AutoModelForCausalLM")
_MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")


def pin(store: Store, display: Display, config: ModelConfig) -> Artifact:
    """Return the artifact of a pretrained model.

    The artifact holds the hashes of the model's files or, for a model of the hub, its commit and config.json.
    """
    folder = folder_of(config)
    settings = _hub_settings(config)
    if folder is not None:
        _require_config(config, folder)
        files = sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES and p.is_file())
        hashes = {}
        with display.task(f"check the files of {folder.name}", len(files)) as advance:
            for file in files:
                hashes[file.name] = file_hash(file)
                advance(1)
        settings = {"files": hashes, **_trusted(config)}

    def make(part: Path) -> Mapping[str, Any]:
        pinned = settings
        if folder is None:
            cached = config_on_hub(config)
            shutil.copyfile(cached, part / "config.json")
            pinned = settings | {"revision": cached.parent.name}  # the cache names folders by commit
        (part / "source.json").write_text(json.dumps(pinned, indent=1), encoding="utf-8")
        revision = pinned.get("revision")
        return {"optimizer_steps": 0, "revision": revision, "content": revision or ""}

    slug = slug_of_path(str(config.path))
    return store.obtain("backbone", slug, settings, [], make, version=VERSION, light=True)


def require_model(store: Store, config: ModelConfig) -> None:
    """Raise an error if the model does not exist, or is to be quantised and the package bitsandbytes is missing.

    The hub is asked only if the store has no pin of the model.
    """
    require_bitsandbytes(config)
    if config.kind != "pretrained":
        return
    folder = folder_of(config)
    if folder is not None:
        _require_config(config, folder)
    elif not store.has("backbone", slug_of_path(str(config.path)), _hub_settings(config), [], version=VERSION):
        config_on_hub(config)


def require_chat_template(config: ModelConfig, option: str) -> None:
    """Raise ConfigError, with `option`=chat in the message, if the model's tokenizer has no chat template.

    A tokenizer whose files are not on this machine is not checked.
    """
    if config.kind == "smollm2":
        return
    if config.kind == "pretrained":
        settings, *templates = (_file_here(config, name) for name in _TEMPLATE_FILES)
        if settings is None or any(templates) or '"chat_template' in settings.read_text("utf-8", errors="replace"):
            return
    raise ConfigError(
        f"{option}=chat needs a tokenizer with a chat template, and the tokenizer of {config.path or config.kind} has "
        f"none; choose {option}=alpaca, {option}=plain, or a template of your own, as in {option}=FILE.jinja"
    )


def _file_here(config: ModelConfig, name: str) -> Path | None:
    folder = folder_of(config)
    if folder is not None:
        return folder / name if (folder / name).exists() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(config.path), name, revision=config.revision)
    return Path(cached) if isinstance(cached, str) else None


def require_bitsandbytes(config: ModelConfig) -> None:
    if config.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization={config.quantization} needs the package bitsandbytes; "
            "pip install 'gradsift[quantization]'"
        )


def folder_of(config: ModelConfig) -> Path | None:
    """Return the local folder that `model.path` names, or None for a hub id."""
    folder = Path(str(config.path)).expanduser()
    return folder if folder.is_dir() else None


def require_known(config: ModelConfig, described: Mapping[str, Any]) -> None:
    """Raise DataError if a model needs code of its own repository that `model.trust_remote_code` does not allow.

    The code is not needed if transformers supports the architecture. The supported architectures are read from
    transformers' files, because importing transformers would take seconds.

    Args:
        described: the content of the model's config.json.
    """
    own = described.get("auto_map")
    package = importlib.util.find_spec("transformers")
    if config.trust_remote_code or not isinstance(own, dict) or package is None or package.origin is None:
        return
    lists = [Path(package.origin).parent / "models/auto" / name for name in _ARCHITECTURES]
    kind = f'"{described.get("model_type")}"'
    if own.keys().isdisjoint(_OWN_CODE) or any(kind in each.read_text("utf-8") for each in lists if each.is_file()):
        return
    raise DataError(
        f"model.path={config.path} needs the code that comes with it, as transformers has no model_type={kind}; "
        "model.trust_remote_code=true runs the code, if you trust it"
    )


def _require_config(config: ModelConfig, folder: Path) -> None:
    """Raise DataError if config.json is missing or is no JSON object, or if `require_known` refuses the model."""
    if not (folder / "config.json").is_file():
        adapter = " but with an adapter: give its base model" if (folder / "adapter_config.json").is_file() else ""
        raise DataError(
            f"model.path={config.path} is a folder without config.json"
            f"{adapter or '; give one that transformers can load'}"
        )
    try:
        described = loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise DataError(f"model.path={config.path}: config.json is not JSON ({first_line(error)})") from error
    if not isinstance(described, dict):
        raise DataError(
            f"model.path={config.path}: config.json is not an object with the model's settings: {str(described)[:40]}"
        )
    require_known(config, described)


def config_on_hub(config: ModelConfig) -> Path:
    """Check that a model of the hub can be used, and return the path of its config.json in the local cache.

    The name of the file's folder is the commit of the model.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    path = str(config.path)
    with hub_errors(config):
        if not isinstance(try_to_load_from_cache(path, "config.json", revision=config.revision), str):
            # a missing file is reported at once, while a download would be retried for 24 s
            get_hf_file_metadata(hf_hub_url(path, "config.json", revision=config.revision))
            for name in _TEMPLATE_FILES:  # read by `require_chat_template`
                with suppress(EntryNotFoundError):
                    hf_hub_download(path, name, revision=config.revision)
        file = Path(hf_hub_download(path, "config.json", revision=config.revision))
    _require_config(config, file.parent)
    return file


def _hub_settings(config: ModelConfig) -> dict[str, Any]:
    return {"hub": str(config.path), "revision": config.revision, **_trusted(config)}


def _trusted(config: ModelConfig) -> dict[str, Any]:
    return {"trust_remote_code": True} if config.trust_remote_code else {}


@contextmanager
def hub_errors(config: ModelConfig) -> Iterator[None]:
    """Turn exceptions of the hub's client, and those that broken files cause, into a `DataError` with the remedy."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of httpx, or of httpx2 in later versions
    try:
        yield
    except (OSError, http_error, ValueError, SafetensorError) as error:
        if isinstance(error, errors.GatedRepoError):
            problem = "is gated: accept its licence on its hub page, then log in with `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            problem = (
                "is neither a folder here nor a model of the hub; check the name, or log in with `hf auth login` if "
                "the model is private"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            problem = "has no such revision; check model.revision"
        elif isinstance(error, errors.RemoteEntryNotFoundError):
            problem = (
                "has no config.json on the hub, as GGUF files and adapters have none; give the model that they were "
                "made from"
            )
        else:
            problem = (
                f"could not be loaded ({first_line(error)}): the hub cannot be reached and the local cache does not "
                "have it, or it is not a whole model with safetensors and a tokenizer; give the folder of a whole model"
            )
        raise DataError(f"model.path={config.path or config.kind} {problem}") from error
