"""Activation checkpointing: a block keeps its inputs alone, and its backward pass computes the rest once more.

transformers' own `gradient_checkpointing_enable` works in training mode only. Here the frozen backbone stays in
evaluation mode, so its blocks are checkpointed by torch directly (`use_reentrant=False`), in either mode. What a
block is says transformers: a `GradientCheckpointingLayer`. Norms, gradients and dropout masks stay the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gradsift.errors import ConfigError

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def checkpoint_blocks(model: nn.Module) -> None:
    """Have the blocks of a causal language model compute their activations again in the backward pass.

    Raises:
        ConfigError: transformers marks no module of this model as such a block.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError(
            f"compute.checkpointing=true, but transformers does not know the blocks of {type(model).__name__}; "
            "leave it out, or take another model"
        )
    for block in blocks:
        if not isinstance(block, _Checkpointed):
            kind: Any = type(block)
            block.__class__ = _with_checkpoint(kind)


def is_recomputing() -> bool:
    """Whether this forward pass is the second one of a block, within the backward pass."""
    return _recomputing.get()


class _Checkpointed:
    """A block whose forward pass is checkpointed wherever gradients are wanted."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return block(*args, **kwargs)
        return checkpoint(block, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


@functools.cache
def _with_checkpoint(kind: Any) -> type:
    return type(kind.__name__, (_Checkpointed, kind), {})  # the same name: `TargetFinetuning` finds layers by it


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _second_pass()


@contextmanager
def _second_pass() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)
