"""Activation checkpointing: a block keeps only its inputs, and its backward pass recomputes its activations.

transformers' own `gradient_checkpointing_enable` works in training mode only, while the frozen backbone stays in
evaluation mode here. So torch's `checkpoint` (`use_reentrant=False`) wraps the blocks that transformers marks as
`GradientCheckpointingLayer`. Gradients, their norms and dropout masks stay the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gradsift.errors import ConfigError


def checkpoint_blocks(model: nn.Module) -> None:
    """Make the blocks of a causal language model compute their activations again in the backward pass.

    Raises:
        ConfigError: no module of this model is a `GradientCheckpointingLayer`.
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


def is_checkpointed(model: nn.Module) -> bool:
    """Return whether `checkpoint_blocks` has changed the model."""
    return any(isinstance(module, _Checkpointed) for module in model.modules())


class _Checkpointed:
    """A block whose forward pass is checkpointed if gradients are enabled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return block(*args, **kwargs)
        return checkpoint(block, *args, use_reentrant=False, **kwargs)


@functools.cache
def _with_checkpoint(kind: Any) -> type:
    return type(kind.__name__, (_Checkpointed, kind), {})  # the same name: `divided.layers_of` finds layers by it
