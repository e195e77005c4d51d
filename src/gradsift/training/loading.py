"""Loading a causal language model and its tokenizer, with every weight from the files.

transformers fills missing weights with random numbers, ignores weights that have no place in the model, and only prints
a table about both. Here both are errors, because the results would not be those of the named model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gradsift.errors import DataError

# Causal masks and rotary frequencies in old files of GPT-2 and Llama models; transformers computes these constants.
_COMPUTED = re.compile(r"(^|\.)(masked_bias|causal_mask|inv_freq|attn\.bias|attention\.bias)$")
# Raised by transformers and safetensors for files that are broken or do not fit each other. The package tokenizers
# raises plain `Exception`.
_ERRORS = (
    *(ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
_SHOWN = 3  # names of weights in a message


def load_config(source: str, name: str, **options: Any) -> Any:
    """Return the config of a model in a folder or on the hub; `name` stands for the model in error messages.

    Raises:
        DataError: config.json is broken, or describes no model that transformers has.
    """
    from transformers import AutoConfig

    with readable(f"model.path={name}: the model", "config.json"):
        return AutoConfig.from_pretrained(source, **options)


def load_tokenizer(source: str, name: str, **options: Any) -> Any:
    """Return the tokenizer of a model in a folder or on the hub; `name` stands for the model in error messages.

    Raises:
        DataError: files of the tokenizer are missing or broken.
    """
    from transformers import AutoTokenizer

    with readable(f"model.path={name}: its tokenizer", "config.json, tokenizer.json and tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        known, special = set(tokenizer.get_vocab().values()), set(tokenizer.all_special_ids)
    if not known - special:  # transformers makes an empty tokenizer if the files are missing
        raise DataError(
            f"model.path={name} has no tokenizer: its vocabulary holds nothing but special tokens; add the model's "
            "tokenizer.json and tokenizer_config.json"
        )
    return tokenizer


def load_model(source: str, name: str, **options: Any) -> Any:
    """Load a model in a folder or on the hub from safetensors files only; `name` stands for it in error messages.

    Raises:
        DataError: files are broken, or weights are missing, left over or of another shape; the message names some.
    """
    from transformers import AutoModelForCausalLM

    with readable(f"model.path={name}: the model", "config.json and the safetensors files"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if problems := misfits(model, info):
        raise DataError(
            f"model.path={name}: config.json describes a {type(model).__name__} that its weights do not fit: "
            f"{'; '.join(problems)}; give the config.json and the weights of one and the same model"
        )
    return model


def misfits(model: Any, info: Mapping[str, Collection[Any]]) -> list[str]:
    """Return a phrase for each kind of difference between a model and the weights in its files.

    Args:
        info: transformers' loading info; its missing weights do not include weights that are tied to another weight.
    """
    unexpected = [name for name in info["unexpected_keys"] if _belongs(name, model) and not _COMPUTED.search(name)]
    shapes = [f"{name} is {list(there)}, not {list(wanted)}" for name, there, wanted in info["mismatched_keys"]]
    kinds = {
        "missing": list(info["missing_keys"]),
        "without a place in the model": unexpected,
        "of another shape": shapes,
    }
    return [f"{len(names):,} {kind} ({_some(names)})" for kind, names in kinds.items() if names]


def _belongs(name: str, model: Any) -> bool:
    """Return whether a weight belongs to the model's body or head, and not to another task, such as a classifier."""
    root = name.split(".", 1)[0]
    own = {child for module in (model, model.base_model) for child, _ in module.named_children()}
    return root in own


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")


@contextmanager
def readable(subject: str, files: str) -> Iterator[None]:
    """Turn exceptions that broken files cause into a `DataError`, except `OSError`, which `pins.hub_errors` handles."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not (isinstance(error, _ERRORS) or type(error) is Exception):
            raise
        reason = " ".join(str(error).split())[:200] or "no message"
        remedy = f"see whether {files} are whole and of one model"
        if "trust_remote_code" in str(error):
            remedy = "model.trust_remote_code=true runs the code that comes with it, if you trust that"
        raise DataError(f"{subject} could not be loaded ({type(error).__name__}: {reason}); {remedy}") from error
