"""Gradients of examples as vectors whose inner products are LESS's similarities (arXiv 2402.04333, section 4).

    row_i = [ sqrt(w_1) u_i1, ..., sqrt(w_C) u_iC ],   u_ic = R Gamma_ic / |R Gamma_ic|
    <row_i, row_j> = sum_c w_c cos(R Gamma_ic, R Gamma_jc)

The sum is over the C checkpoints of the warm-up. w_c is the mean learning rate of the epoch that ended at checkpoint c
(the w_c are scaled to sum 1), and R is the random projection. For the pool, Gamma is Adam's update for the gradient
(`gradients/adam.py`, unless features.adam=false); for the target set, Gamma is the gradient itself. With
features.normalise=false, u_ic = R Gamma_ic, and the inner products are not cosines.

If an example's gradient at a checkpoint is zero, its row is zero in the columns of this checkpoint. An example
without a response token has a row of zeros and is listed in `Features.silent`.

Shape letters: N examples, C checkpoints, P parameters, D dimensions of a checkpoint, B rows of a block.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsift.artifacts import Artifact
from gradsift.config import FeaturesConfig, ProxyConfig
from gradsift.data.tokens import Encoded, encoding_settings
from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.vectors import FEATURES_FILE, fill_block, finish_features, open_features, unit_rows
from gradsift.gradients.adam import AdamState
from gradsift.gradients.per_sample import GradientPass, gradient_pass
from gradsift.gradients.projection import Projection
from gradsift.manifests import UNFINISHED
from gradsift.proxy.epochs import OPTIMIZER_FILE, ProxyInputs, adapter
from gradsift.runtime import Advance, Runtime
from gradsift.training import lora
from gradsift.training.device import device_of
from gradsift.training.head import require_finite

VERSION = 2
_BLOCK_BYTES = 2 * 2**30  # of gradients that are projected together; each block draws the projection again
_MOST_ROWS = 512  # rows of a block, which an interrupted run may have to compute again
_MOST_UNPROJECTED = 4 * 10**9  # numbers, 16 GB


@dataclass(frozen=True)
class FeatureInputs:
    """The examples whose gradients are computed."""

    inputs: ProxyInputs  # its `encoded` are the examples with a response token, in order
    ids: Sequence[str]  # (N,) example_id of all examples
    tasks: Sequence[str] = ()  # (N,) the task of each row of a target set


def gradient_features(
    runtime: Runtime,
    config: FeaturesConfig,
    proxy_config: ProxyConfig,
    chain: Sequence[Artifact],
    examples: Artifact,
    load: Callable[[], FeatureInputs],
    slug: str,
    adam: bool,
) -> Artifact:
    """Return an artifact with the features of `examples` (a pool or a target set) at the warm-up's checkpoints.

    The features are written block by block; an interrupted run continues after the last block that it finished.

    Args:
        chain: the checkpoints that `warm_up` returned.
        load: called only if the artifact has to be made.
        adam: whether to replace the gradients by Adam's updates.

    Raises:
        ConfigError: see `require_room`.
        GradsiftError: the disk has no room, or a gradient is not finite (the message names the rows).
    """
    checkpoints = [chain[-1]] if config.checkpoints == "last" else list(chain)
    settings = {
        "gradient_params": config.gradient_params,
        "dimensions": config.dimensions,
        "projection_seed": config.projection_seed if config.dimensions is not None else None,
        "adam": adam,
        "normalise": config.normalise,
        **encoding_settings(proxy_config.template, proxy_config.max_length),
    }

    def make(folder: Path) -> Mapping[str, Any]:
        rows = load()
        require_room(runtime, config, rows, len(checkpoints), folder)
        return _write(runtime, config, checkpoints, rows, folder, adam)

    parents = [*checkpoints, examples]
    size = len(checkpoints) * (examples.size or 0)
    return runtime.store.obtain("features", slug, settings, parents, make, version=VERSION, size=size)


def require_room(
    runtime: Runtime, config: FeaturesConfig, rows: FeatureInputs, checkpoints: int, folder: Path | None = None
) -> None:
    """Raise an error before the computation if the features could not be computed or stored.

    Args:
        folder: the artifact's folder, where an interrupted run may have reserved disk space. If it is given, the size
            of the features is printed.

    Raises:
        ConfigError: with features.dimensions=null, the gradients are too large to be stored unprojected; or with
            features.gradient_params=full, the adapter cannot be merged into the model.
        GradsiftError: the disk has no room.
    """
    parameters = parameter_count(runtime, config, rows.inputs)
    dimensions = config.dimensions or parameters
    numbers = len(rows.ids) * checkpoints * dimensions
    size = f"{len(rows.ids):,} rows x {checkpoints} checkpoints x {dimensions:,} dimensions"
    if config.dimensions is None and numbers > _MOST_UNPROJECTED:
        raise ConfigError(
            f"features.dimensions=null keeps gradients as they are, here {size}, more than {_MOST_UNPROJECTED:,} "
            "numbers; project them as in features.dimensions=8192"
        )
    file = folder / UNFINISHED / FEATURES_FILE if folder is not None else None
    reserved = file.stat().st_blocks * 512 if file is not None and file.exists() else 0
    free = shutil.disk_usage(runtime.store.root).free
    if 4 * numbers - reserved > free:
        raise GradsiftError(
            f"the gradient features take {4 * numbers / 1e9:.1f} GB ({size} x 4 bytes), and {runtime.store.root} has "
            f"{free / 1e9:.1f} GB free; lower features.dimensions, take features.checkpoints=last, or give another "
            "folder with artifacts=DIR"
        )
    if folder is not None:
        runtime.display.say(f"  gradient features: {size} x 4 bytes = {4 * numbers / 1e9:.2f} GB on disk")


def parameter_count(runtime: Runtime, config: FeaturesConfig, inputs: ProxyInputs) -> int:
    """Return P, the number of parameters whose gradients are computed, as `config.gradient_params` chooses them."""
    model_size = int(inputs.backbone.model.num_parameters())  # counted before the adapter adds its parameters
    with adapter(inputs.backbone, config.warmup.lora, 0, runtime.compute) as adapted:
        if config.gradient_params == "full":
            lora.require_mergeable(adapted)
            return model_size
        return sum(parameter.numel() for parameter in lora.trainable_parameters(adapted).values())


def block_rows(size: int, device: torch.device) -> int:
    """Return B, the number of rows of a block, for gradients of `size` numbers each.

    B is a power of two, so that a resumed run usually has the same blocks even if the free memory differs a little. A
    block takes at most a quarter of a GPU's free memory; the projection and the backward passes need the rest.
    """
    free = int(torch.cuda.mem_get_info(device)[0]) // 4 if device.type == "cuda" else _BLOCK_BYTES
    fitting = max(1, free // (4 * size))
    return min(_MOST_ROWS, 1 << (fitting.bit_length() - 1))


def checkpoint_weights(checkpoints: Sequence[Artifact]) -> np.ndarray:
    """Return the weights w (C,) float64 of the checkpoints: their mean learning rates, scaled to sum 1."""
    rates = np.array([checkpoint.info["learning_rate"] for checkpoint in checkpoints], dtype=np.float64)
    weights: np.ndarray = rates / rates.sum()
    return weights


def _write(
    runtime: Runtime,
    config: FeaturesConfig,
    checkpoints: Sequence[Artifact],
    rows: FeatureInputs,
    folder: Path,
    adam: bool,
) -> dict[str, Any]:
    inputs, count, device = rows.inputs, len(rows.ids), device_of(runtime.compute)
    size = parameter_count(runtime, config, inputs)
    dimensions = config.dimensions or size
    projection = Projection(size, dimensions, config.projection_seed) if config.dimensions is not None else None
    vectors = open_features(folder, count, len(checkpoints) * dimensions)
    journal, at_once = runtime.journal(folder), block_rows(size, device)
    label = f"gradients of {len(inputs.encoded):,} examples at {len(checkpoints)} checkpoints"
    with (
        adapter(inputs.backbone, config.warmup.lora, 0, runtime.compute) as adapted,
        runtime.display.task(label, len(checkpoints) * count) as advance,
    ):
        for index, weight in enumerate(checkpoint_weights(checkpoints)):
            lora.load_adapter(adapted, checkpoints[index].path)
            state = None
            if adam:
                parameters = lora.trainable_parameters(adapted)
                state = AdamState.read(checkpoints[index].file(OPTIMIZER_FILE), parameters, device)
            columns = slice(index * dimensions, (index + 1) * dimensions)
            with gradient_pass(adapted, config.gradient_params, inputs.backbone.pad_id) as gradients:
                for start in range(0, count, at_once):
                    stop = min(start + at_once, count)

                    def make(
                        start: int = start, stop: int = stop, weight: float = weight, state: AdamState | None = state
                    ) -> np.ndarray:
                        block = gradient_block(inputs, gradients, state, start, stop, advance)
                        projected = (block if projection is None else projection(block)).cpu().numpy()
                        scaled: np.ndarray = unit_rows(projected) if config.normalise else projected
                        return scaled * np.float32(weight**0.5)

                    if not fill_block(journal, vectors, (slice(start, stop), columns), [index, start, stop], make):
                        advance(stop - start)
    silent = np.setdiff1d(np.arange(count), [example.row for example in inputs.encoded]).tolist()
    finish_features(folder, vectors, rows.ids, rows.tasks, silent)
    return {"rows": count, "checkpoints": len(checkpoints), "dimensions": dimensions, "parameters": size}


def gradient_block(
    inputs: ProxyInputs, gradients: GradientPass, adam: AdamState | None, start: int, stop: int, advance: Advance
) -> torch.Tensor:
    """Return the gradients (B, P) float32 of the examples at positions `start` to `stop - 1`.

    With `adam`, the rows are Adam's updates. An example without a response token has a row of zeros.

    Raises:
        GradsiftError: a gradient is not finite; the message names the rows.
    """
    encoded = [example for example in inputs.encoded if start <= example.row < stop]
    device = inputs.backbone.model.device
    block = torch.zeros(stop - start, gradients.size, device=device)

    def fill(batch: Sequence[Encoded]) -> None:
        for part, values in gradients.parts(batch):
            rows = torch.tensor([example.row - start for example in part], device=device)
            block[rows] = values if adam is None else adam.adjust(values)

    advance((stop - start) - len(encoded))
    for _ in inputs.budget.passes(encoded, fill, advance=advance):
        pass
    norms = torch.linalg.vector_norm(block, dim=1).cpu()
    require_finite("gradient", torch.arange(start, stop), norms, encoded)
    return block
