"""A trial of an adapter on a model, before hours of training depend on it.

Two short rows of random tokens pass forward and backward through the adapted model: first both rows together, then the
shorter row alone. The matrix B of a fresh LoRA adapter is zero, so the adapter must change neither the outputs of any
layer nor the logits. The shorter row must have the same loss alone as beside the longer row. The trial changes neither
the model nor the global random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, GradsiftError
from gradsift.gradients.per_sample import attached
from gradsift.gradients.probes import NormProbe
from gradsift.training import lora
from gradsift.training.adapted import AdaptedLinear, layer_path
from gradsift.training.device import is_out_of_memory
from gradsift.training.head import ResponseLosses

# exceptions of torch, transformers and peft if a model and an adapter do not fit each other
_ERRORS = (GradsiftError, RuntimeError, AttributeError, TypeError, ValueError, LookupError)


def require_adaptable(model: Any, config: LoraConfig, option: str, *, norms: bool) -> None:
    """Refuse an adapter that cannot train on this model.

    Args:
        model: a frozen causal language model without adapters; the trial runs on its device.
        option: the option that `config` comes from, such as `proxy.lora`.
        norms: whether it must also be possible to compute the per-sample gradients of the adapter.

    Raises:
        ConfigError: the model fails even without an adapter, or the adapter cannot be used on one of its layers. In the
            second case the message gives the reason, and names targets that work in the same trial.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rng = np.random.default_rng(0)
    rows = [
        Encoded(row, row, rng.integers(vocabulary, size=length).astype(np.int32), np.arange(length) > 0)
        for row, length in enumerate((7, 5))
    ]
    try:
        with torch.no_grad(), lora.evaluating(model):
            logits = _logits(model, rows)
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
    if isinstance(failure, ConfigError):  # raised by `add_adapter`
        reason = str(failure).removeprefix(f"lora.targets={config.targets} ")
    else:
        reason = f"cannot be used with {type(model).__name__}: {_first_line(failure)}"
    head = model.get_output_embeddings()
    heads = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head}
    others = [n for n in lora.linear_layer_names(model) if n not in heads and [n] != config.targets]
    usable = [name for name in others if not _failure(model, replace(config, targets=[name]), rows, logits, norms)]
    remedy = f"targets that work: {option}.targets=[{','.join(usable)}]" if usable else "no layer of this model works"
    raise ConfigError(f"{option}.targets=[{','.join(config.targets)}] {reason}; {remedy}") from failure


def _first_line(error: Exception) -> str:
    text = (str(error) or "no message").splitlines()[0][:300]
    return text if isinstance(error, GradsiftError) else f"{type(error).__name__}: {text}"


def _logits(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    batch = collate(rows, 0).to(next(model.parameters()).device)
    logits: torch.Tensor = model(**batch.model_inputs(), use_cache=False).logits
    return logits


def _failure(
    model: Any, config: LoraConfig, rows: Sequence[Encoded], logits: torch.Tensor, norms: bool
) -> Exception | None:
    """Return the exception that the trial of an adapter raises, or None if it raises none.

    Args:
        logits: (B, T, V), the logits of `rows` without an adapter.
        norms: see `require_adaptable`.
    """
    try:
        adapted = lora.add_adapter(model, config, seed=0)
    except ConfigError as error:
        return error
    try:
        adapted.to(logits.device)
        with lora.evaluating(adapted):
            if norms:
                with attached(adapted, NormProbe()):  # refuses layers whose per-sample gradient is not known
                    pass
            adapted_logits = _compared_logits(adapted, rows, all_take_part=norms)
            _require_equal(adapted_logits, logits, f"{type(model).__name__} gives other logits with a fresh adapter")
            together, alone = (_losses(adapted, part, norms) for part in (rows, rows[1:]))
            _require_equal(together[1:], alone, "a row beside a longer row has another loss than alone")
    except _ERRORS as error:
        if is_out_of_memory(error):
            raise
        return error
    finally:
        adapted.unload()
    return None


def _losses(adapted: Any, rows: Sequence[Encoded], norms: bool) -> torch.Tensor:
    """Pass `rows` forward and backward through the model, and return their losses (B,).

    Args:
        norms: whether the backward pass also computes the norms of the per-sample gradients.
    """
    with torch.enable_grad(), attached(adapted, NormProbe()) if norms else nullcontext() as probe:
        losses = ResponseLosses(adapted)(collate(rows, 0).to(next(adapted.parameters()).device))
        if probe is None:
            losses.sum().backward()
        elif (count := len(probe.backward(losses)[0])) != len(rows):
            raise GradsiftError(f"{len(rows)} rows gave {count} gradient norms: its layers mix the rows")
    return losses.detach()


def _compared_logits(adapted: Any, rows: Sequence[Encoded], *, all_take_part: bool) -> torch.Tensor:
    """Return the logits of `rows`, after a check that each adapted layer's outputs equal those of its base layer.

    Raises:
        GradsiftError: the outputs differ, the pass fails or, if `all_take_part`, a layer is never called and so has no
            per-sample gradient; the message names the layer.
    """
    entered: list[str] = []

    def compare(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        expected = layer.get_base_layer()(*inputs)
        _require_equal(output, expected, f"{layer.path} gives other outputs with a fresh adapter, which adds zero")

    layers = {layer_path(name): layer for name, layer in lora.lora_layers(adapted)}
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: entered.append(name))
        for name, layer in layers.items()
    ]
    hooks += [layer.register_forward_hook(compare) for layer in layers.values() if isinstance(layer, AdaptedLinear)]
    try:
        with torch.no_grad():
            logits = _logits(adapted, rows)
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
    return logits


def _require_equal(computed: torch.Tensor, expected: torch.Tensor, failure: str) -> None:
    """Raise a `GradsiftError` if |computed - expected| / |expected| (L2) exceeds the square root of the dtype's eps."""
    error = torch.linalg.vector_norm((computed - expected).double()) / torch.linalg.vector_norm(expected.double())
    if not float(error) <= torch.finfo(expected.dtype).eps ** 0.5:
        raise GradsiftError(f"{failure} (relative difference {float(error):.1e})")
