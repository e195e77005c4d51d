"""A trial of an adapter on a model, before hours of training depend on it.

Two short rows of random tokens pass forward and backward through the adapted model, together and then the shorter one
alone. A fresh adapter adds zero (its B is zero), so each layer, and the logits, must be what they are without it; a
difference is a layer that is computed wrongly. A row must have the same loss alone and beside another one. The model
is left as it was, and no random state is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradsift.config import LoraConfig
from gradsift.data.batching import Batch, collate
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.gradients.norms import PerSampleNorms
from gradsift.training import lora
from gradsift.training.adapted import AdaptedLinear, layer_path
from gradsift.training.device import is_out_of_memory
from gradsift.training.modules import ResponseLosses

_LENGTHS = (7, 5)  # tokens of the two rows
# what torch, transformers or peft raise where a model and an adapter do not fit each other
_ERRORS = (GradsiftError, RuntimeError, AttributeError, TypeError, ValueError, LookupError)


def require_adaptable(model: Any, config: LoraConfig, option: str, *, norms: bool) -> None:
    """Refuse an adapter that cannot train on this model, or whose per-sample gradients cannot be told apart.

    Args:
        model: a frozen causal language model without adapters; the trial runs on the device where it is.
        option: where `config` stands, for the message, such as `proxy.lora`.
        norms: whether per-sample gradients are wanted, as of the proxy.

    Raises:
        ConfigError: names the layer, the reason, and targets that were tried and work.
    """
    rows = _rows(model)
    try:
        with torch.no_grad(), lora.evaluating(model):
            logits = _logits(model, _batch(model, rows))
    except _ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{option}: {type(model).__name__} itself fails, without any adapter ({_first_line(error)}); take another "
            "model"
        ) from error
    failure = _failure(model, config, rows, logits, norms)
    if failure is None:
        return
    alone = [name for name in _target_names(model) if [name] != config.targets]
    usable = [name for name in alone if not _failure(model, replace(config, targets=[name]), rows, logits, norms)]
    remedy = f"targets that work: {option}.targets=[{','.join(usable)}]" if usable else "no layer of this model works"
    raise ConfigError(
        f"{option}.targets=[{','.join(config.targets)}] {_reason(failure, config, model)}; {remedy}"
    ) from failure


def _target_names(model: Any) -> list[str]:
    """What `lora.targets` may name below the output head."""
    head = model.get_output_embeddings()
    heads = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head}
    return [name for name in lora.linear_layer_names(model) if name not in heads]


def _reason(error: Exception, config: LoraConfig, model: Any) -> str:
    if isinstance(error, ConfigError):  # of `add_adapter`
        return str(error).removeprefix(f"lora.targets={config.targets} ")
    return f"cannot be used with {type(model).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = (str(error) or "no message").splitlines()[0][:300]
    return text if isinstance(error, GradsiftError) else f"{type(error).__name__}: {text}"


def _rows(model: Any) -> list[Encoded]:
    """Two rows of random tokens, of which all but the first are predicted."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rng = np.random.default_rng(0)
    return [
        Encoded(row, row, rng.integers(vocabulary, size=length).astype(np.int32), np.arange(length) > 0)
        for row, length in enumerate(_LENGTHS)
    ]


def _batch(model: Any, rows: Sequence[Encoded]) -> Batch:
    return collate(rows, 0).to(next(model.parameters()).device)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(**batch.model_inputs(), use_cache=False).logits
    return logits


def _failure(
    model: Any, config: LoraConfig, rows: Sequence[Encoded], logits: torch.Tensor, norms: bool
) -> Exception | None:
    """What goes wrong with an adapter on this model, or None.

    Args:
        logits: (B, T, V), of the rows by the model without an adapter.
    """
    try:
        adapted = lora.add_adapter(model, config, seed=0)
    except ConfigError as error:
        return error
    try:
        adapted.to(logits.device)
        with lora.evaluating(adapted):
            if norms:
                PerSampleNorms(adapted)  # refuses layers without a known per-sample gradient
            with torch.no_grad(), _watched(adapted, norms):
                found = _logits(adapted, _batch(adapted, rows))
            _require_equal(found, logits, f"{type(model).__name__} gives other logits with a fresh adapter")
            together, alone = (_losses(adapted, part, norms) for part in (rows, rows[1:]))
            _require_equal(together[1:], alone, "a row has another loss beside a longer one than alone")
    except _ERRORS as error:
        if is_out_of_memory(error):
            raise
        return error
    finally:
        lora.remove_adapter(adapted)
    return None


def _losses(adapted: Any, rows: Sequence[Encoded], norms: bool) -> torch.Tensor:
    """Losses (B,), after a backward pass from them."""
    with torch.enable_grad(), PerSampleNorms(adapted) if norms else nullcontext() as probe:
        losses = ResponseLosses(adapted)(_batch(adapted, rows))
        losses.sum().backward()
        if probe is not None and (count := len(probe.take()[0])) != len(rows):
            raise GradsiftError(f"{len(rows)} rows gave {count} gradient norms, so its layers do not see row by row")
    return losses.detach()


@contextmanager
def _watched(adapted: Any, all_take_part: bool) -> Iterator[None]:
    """Compare each adapted layer with its base layer while a fresh adapter is passed, and name the one that fails.

    Args:
        all_take_part: whether an adapter that is never passed is an error: it has no per-sample gradient.
    """
    entered: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, inputs: entered.append(name)

    def compare(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        expected = layer.get_base_layer()(*inputs)
        _require_equal(output, expected, f"{layer.path} gives other outputs with a fresh adapter, which adds zero")

    layers = {layer_path(name): layer for name, layer in lora.lora_layers(adapted)}
    hooks = [layer.register_forward_pre_hook(enter(name)) for name, layer in layers.items()]
    hooks += [layer.register_forward_hook(compare) for layer in layers.values() if isinstance(layer, AdaptedLinear)]
    try:
        yield
    except GradsiftError:
        raise
    except _ERRORS as error:
        if is_out_of_memory(error) or not entered:
            raise
        kind = type(layers[entered[-1]].get_base_layer()).__name__
        raise GradsiftError(f"the pass fails in or after {entered[-1]}, a {kind} ({_first_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()
    if all_take_part and (idle := layers.keys() - set(entered)):
        raise GradsiftError(
            f"{min(idle)} takes no part in a forward pass ({len(idle)} of {len(layers)} adapted layers), so it has no "
            "gradient"
        )


def _require_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Up to rounding: half of the precision's digits, relative and by norm."""
    error = torch.linalg.vector_norm((found - expected).double()) / torch.linalg.vector_norm(expected.double())
    if not float(error) <= torch.finfo(expected.dtype).eps ** 0.5:
        raise GradsiftError(f"{what} (relative difference {float(error):.1e})")
