"""A model whose layers are divided over the ranks (FSDP2), for a target that one GPU cannot hold.

A rank holds a part of every weight of every layer. The parts of a layer are gathered from all ranks only while the
layer computes, so every rank must make the same passes. Embeddings, head, last normalisation layer and adapters are
whole on every rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from gradsift.config import ComputeConfig
from gradsift.errors import ConfigError, GradsiftError
from gradsift.training import parallel
from gradsift.training.device import device_of

_MARK = "_is_fsdp_managed_module"  # makes transformers' `generate` go on until the answers of all ranks have ended
_HOOK = "maybe_distribute_model"  # called by `from_pretrained` between building a model on `meta` and reading files


def divides(compute: ComputeConfig) -> bool:
    """Return whether the target is divided over the ranks that share the current work."""
    return compute.strategy == "fsdp" and parallel.size() > 1


def is_divided(model: Any) -> bool:
    """Return whether the layers of a causal language model, adapted or not, are divided over the ranks."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(causal, _MARK, False))


def layers_of(model: Any) -> list[Any]:
    """Return the layers of a causal language model of transformers.

    Raises:
        ConfigError: the model does not say which of its modules are layers (`_no_split_modules`).
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"compute.strategy=fsdp cannot tell the layers of {type(model).__name__}; take compute.strategy=ddp"
        )
    return layers


@contextmanager
def in_parts(compute: ComputeConfig, wanted: bool) -> Iterator[dict[str, Any]]:
    """Make transformers divide the models that it loads in this context; yield the options for `from_pretrained`.

    transformers builds the model without memory (on `meta`), and reads only this rank's part of each divided weight.
    If `wanted` is False, models are loaded whole, and the options are empty.

    Raises:
        GradsiftError: this version of transformers cannot divide a model while loading.
    """
    if not wanted:
        yield {}
        return
    from transformers import PreTrainedModel

    if not hasattr(PreTrainedModel, _HOOK):
        raise GradsiftError(
            "compute.strategy=fsdp needs a newer transformers (5.23 is known to do); update it, or take "
            "compute.strategy=ddp"
        )
    from transformers.distributed import DistributedConfig

    device = device_of(compute)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    def divided(kind: type, model: Any, *settings: Any) -> Any:
        _divide(model, device)
        return model

    own = vars(PreTrainedModel).get(_HOOK)  # None if a parent class defines it
    setattr(PreTrainedModel, _HOOK, classmethod(divided))
    try:
        yield {"distributed_config": DistributedConfig(), "device_map": {"": device}}
    finally:
        delattr(PreTrainedModel, _HOOK)
        if own is not None:
            setattr(PreTrainedModel, _HOOK, own)


def _divide(model: Any, device: torch.device) -> None:
    """Divide the layers of a causal language model on torch's meta device over all ranks, in place."""
    # imported here, because this takes half a second and most runs divide nothing
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layers = layers_of(model)
    # GPT-2's last hidden states are a view, which nothing here changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(model.base_model, mesh=mesh, ignored_params=rest)  # lets FSDP fetch the next layer's weights ahead
    setattr(model, _MARK, True)
