"""LoRA adapters on any causal language model, through peft."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from gradsift.config import LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.errors import ConfigError, first_line
from gradsift.gradients.probes import ADAPTER
from gradsift.training.adapted import fuse
from gradsift.training.masks import PassedRows, drop_by_row

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def add_adapter(model: nn.Module, config: LoraConfig, seed: int) -> Any:
    """Freeze `model` and add a fresh adapter: A is drawn with `seed`, B starts at zero.

    With `all-linear`, a model with experts gets adapters only on its attention and dense layers (see `left_out`).

    Returns:
        The model as a `peft.PeftModel`. Only its LoRA parameters, which are float32, are trainable. Its attribute
        `passed_rows` (`PassedRows`) tells its layers about the rows of a batch. Its method `unload` restores the model.

    Raises:
        ConfigError: `config.targets` names no linear layer of this model, a layer that is not linear, or a layer that
            peft refuses. After this error, the model has no adapter.
    """
    names = linear_layer_names(model)
    targets: Any = list(config.targets)
    if targets == ["all-linear"]:
        # an expert gets tokens of all examples mixed, so the gradients of single examples are not known there
        targets = _dense_layer_names(model) if expert_blocks(model) else "all-linear"
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        use_rslora=config.use_rslora,
        target_modules=targets,
        # GPT-2's Conv1D holds W as (I, O), the transpose of nn.Linear's (O, I); peft transposes B A when it merges
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():  # drawing A must not change the caller's random state
        # peft corrects fan_in_fan_out itself; tied embeddings matter only when merging (`require_mergeable`)
        warnings.filterwarnings("ignore", "(fan_in_fan_out is set|Model has `tie_word_embeddings)", UserWarning)
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, lora)
        except ValueError as error:
            _unwrap(model)
            reason = f"names no linear layer of {type(model).__name__}"
            if config.targets == ["all-linear"] or set(config.targets) & set(names):
                reason = f"is refused by peft for {type(model).__name__}: {first_line(error).rstrip('.')}"
            others = "" if config.targets == ["all-linear"] else ", or take [all-linear]"
            raise ConfigError(
                f"lora.targets={config.targets} {reason}; its layers are {', '.join(names)}{others}"
            ) from error
    for _, layer in lora_layers(adapted):
        if ADAPTER not in layer.lora_A:
            _unwrap(model)
            raise ConfigError(
                f"lora.targets={config.targets} names a layer that is not linear, such as an embedding; "
                f"choose among {', '.join(names)}"
            )
    # The frozen backbone stays in evaluation mode while its adapters train, because its own dropout (GPT-2 has some)
    # would add noise to the norms.
    adapted.passed_rows = drop_by_row(lora_layers(adapted))
    adapted.eval()
    for _, layer in lora_layers(adapted):
        layer.lora_dropout.train()
    fuse(adapted)
    return adapted


def _unwrap(model: nn.Module) -> None:
    """Restore the layers that a failed `get_peft_model` has already wrapped."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in reversed(wrapped):  # the innermost first
        model.set_submodule(name, module.base_layer)


def require_mergeable(adapted: Any) -> None:
    """Raise ConfigError if another module also uses an adapted weight, such as that of a tied output head."""
    if shared := shared_layers(adapted):
        raise ConfigError(
            f"an adapter cannot be merged into a weight that another module uses too ({', '.join(shared[:3])}); leave "
            "these layers out of lora.targets, or take features.gradient_params=lora"
        )


def shared_layers(adapted: Any) -> list[str]:
    """Return the names of the adapted layers whose weight another module uses too."""
    uses = Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))
    layers = [(name, layer.get_base_layer()) for name, layer in lora_layers(adapted)]
    return [name for name, base in layers if uses[id(getattr(base, "weight", None))] > 1]


def lora_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) for each adapted layer, in the order of the model's modules."""
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def linear_layer_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of the linear layers, such as `q_proj`, sorted and without repeats."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def expert_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a mixture-of-experts model that hold its experts, by name.

    transformers stacks the weights of a block's experts in one tensor. So a block is recognised as the parent of a
    module that has a weight of three or more dimensions and is not a convolution.
    """
    blocks = {}
    for name, module in model.named_modules():
        stacked = any(weight.dim() > 2 and len(weight) > 1 for weight in module.parameters(recurse=False))
        if stacked and not isinstance(module, _ConvNd):
            block = name.rpartition(".")[0]
            blocks[block] = model.get_submodule(block)
    return blocks


def _dense_layer_names(model: Any) -> list[str]:
    """Return the last parts of the names of the linear layers outside of expert blocks, without the output head.

    peft adapts all layers with a given name. So a name is left out if it also occurs in an expert block, or if peft
    uses it for stacked experts.
    """
    blocks = tuple(f"{name}." for name in expert_blocks(model))
    head = model.get_output_embeddings()
    names: dict[bool, set[str]] = {True: {"gate_proj", "up_proj", "down_proj"}, False: set()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            names[name.startswith(blocks)].add(name.rsplit(".", 1)[-1])
    return sorted(names[False] - names[True])


def left_out(model: Any, config: LoraConfig, option: str) -> str | None:
    """Return a message about the experts that get no adapter with `config`, or None if there are no such experts.

    Args:
        option: the option that `config` comes from, such as `target.lora`.
    """
    if config.targets != ["all-linear"] or not (blocks := expert_blocks(model)):
        return None
    kinds = ", ".join(sorted({type(block).__name__ for block in blocks.values()}))
    count = sum(weight.numel() for block in blocks.values() for weight in block.parameters())
    share = count / sum(weight.numel() for weight in model.parameters())
    return (
        f"{option}.targets=[all-linear] adapts {', '.join(_dense_layer_names(model))}; {len(blocks):,} blocks of "
        f"experts ({kinds}, {share:.0%} of the weights) have no adapter"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and restore the mode of each module afterwards."""
    # module by module, because the adapters' dropout is in training mode and the backbone in evaluation mode
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def factor_sizes(adapted: nn.Module) -> dict[str, float]:
    """Return the norms of the active adapter's factors A and B, as `size_A` and `size_B`.

    `size_A` is the L2 norm of all entries of A in all layers, `size_B` that of all entries of B.
    """
    squares_a = squares_b = 0.0
    for _, layer in lora_layers(adapted):
        squares_a += float(layer.lora_A[ADAPTER].weight.detach().square().sum())
        squares_b += float(layer.lora_B[ADAPTER].weight.detach().square().sum())
    return {"size_A": squares_a**0.5, "size_B": squares_b**0.5}


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write the adapter in peft's own format (safetensors)."""
    # otherwise peft also writes the whole weight of an output head that has an adapter
    adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):  # made from a set, in an order that differs between processes
        config["target_modules"].sort()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(adapted: Any, folder: Path) -> None:
    """Load into the active adapter the weights that `save_adapter` wrote to `folder`."""
    outcome = peft.set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_FILE), adapter_name=ADAPTER)
    # missing keys are no error: the file does not contain the weights of the backbone
    if outcome.unexpected_keys:
        raise ConfigError(f"the adapter in {folder.name} does not fit this model: {outcome.unexpected_keys[0]}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the optimiser's state on the CPU; keys are `<kind>:<parameter>`, such as `exp_avg:<parameter>`."""
    return {
        f"{kind}:{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put tensors that `optimizer_tensors` returned back into the optimiser's state, on each parameter's device."""
    for key, value in tensors.items():
        kind, name = key.split(":", 1)
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)


def save_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], path: Path) -> None:
    save_file(optimizer_tensors(optimizer, parameters), path)


class Lanes(nn.Module):
    """M adapters (lanes) that train side by side on one frozen model, one for each seed.

    A batch holds rows of all adapters, which pass through the frozen weights together (`gradsift.training.adapted`).
    The peft model `adapted` holds the adapter of one lane at a time, at first that of lane 0; `activate` replaces it by
    the adapter of another lane. Functions that save, load or measure an adapter work on the adapter that `adapted`
    holds at the time.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, seeds: Sequence[int]) -> None:
        super().__init__()
        device = next(model.parameters()).device
        factors: list[list[tuple[nn.Module, nn.Module]]] = []  # for each adapter, (A, B) of each layer
        for lane, seed in enumerate(seeds):
            if lane:
                self.adapted.unload()
            self.adapted: Any = add_adapter(model, config, seed).to(device)
            layers = [layer for _, layer in lora_layers(self.adapted)]
            factors.append([(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers])
        self._layers = layers
        self._factors = factors
        self.parts = nn.ModuleList(part for pairs in factors for pair in pairs for part in pair)
        self.rows: PassedRows = self.adapted.passed_rows
        for place, layer in enumerate(layers):
            pairs = [of_lane[place] for of_lane in factors]
            layer.lanes = (self.rows, [a for a, _ in pairs] + [b for _, b in pairs])
        self.activate(0)

    def __len__(self) -> int:
        return len(self._factors)

    def activate(self, lane: int) -> None:
        """Put the adapter of a lane into the peft model `adapted`, in place of the adapter that it holds."""
        for layer, (a, b) in zip(self._layers, self._factors[lane], strict=True):
            layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = a, b

    def announce(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Tell the layers which adapter each row of the next batch has; return the examples sorted by adapter.

        The rows of the batch must be in the order of the returned examples.
        """
        rows = sorted(examples, key=lambda example: example.lane)
        counts = Counter(example.lane for example in rows)
        device = next(self.parts.parameters()).device
        self.rows.counts = [counts[lane] for lane in range(len(self))]
        self.rows.lanes = torch.tensor([example.lane for example in rows], device=device)
        return rows

    def forget_rows(self) -> None:
        self.rows.lanes = None  # all rows of later passes go through the active adapter

    def close(self) -> None:
        self.adapted.unload()
