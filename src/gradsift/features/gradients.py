"""Gradient features: one vector per example, computed from the example's gradients.

The inner product of two vectors is the similarity of the two examples in LESS (arXiv 2402.04333, section 4):

    row_i = [ sqrt(w_1) u_i1, ..., sqrt(w_C) u_iC ],   u_ic = R Gamma_ic / |R Gamma_ic|
    <row_i, row_j> = sum_c w_c cos(R Gamma_ic, R Gamma_jc)

The sum is over the C checkpoints of the warm-up. w_c is the mean learning rate of the epoch that ended at checkpoint c,
and the w_c are scaled so that their sum is 1. R is the random projection (`gradsift.gradients.projection`). For an
example of the pool, Gamma_ic is Adam's update for the example's gradient at checkpoint c (`AdamState`), or the gradient
itself if features.adam=false. For an example of the target set, Gamma_ic is always the gradient. With
features.normalise=false, u_ic = R Gamma_ic, and the inner products are not cosines.

If an example's gradient at a checkpoint is zero, its row is zero in the columns of this checkpoint. An example
without a response token has a row of zeros and is listed in `Features.silent`.

The warm-up trains an adapter on a few random rows. One seed determines the rows, their order and the initial LoRA
weights A. (In LESS's published code, the choice of the rows does not depend on the seed.)

Shape letters: N examples, C checkpoints, P parameters, D dimensions per checkpoint, B rows of a block.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from gradsift.artifacts import Artifact
from gradsift.config import FeaturesConfig, ProxyConfig, WarmupConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import Encoded, encoding_settings
from gradsift.errors import GradsiftError
from gradsift.features.vectors import fill_block, finish_features, open_features, unit_rows
from gradsift.gradients.per_sample import GradientPass, gradient_pass
from gradsift.gradients.projection import Projection
from gradsift.proxy.epochs import OPTIMIZER_FILE, Epoch, ProxyInputs, adapter, train_epoch
from gradsift.runtime import Advance, Runtime, derive_seed
from gradsift.training import lora
from gradsift.training.device import device_of
from gradsift.training.head import require_finite
from gradsift.training.optimization import BETAS, Optimization

VERSION = 2
WARMUP_VERSION = 3
_BLOCK_BYTES = 2 * 2**30  # of a block of gradients, on a CPU; large, because each block draws the projection again
_MOST_ROWS = 512  # of a block, because an interrupted run computes its last block again
_EPS = 1e-8


@dataclass(frozen=True)
class FeatureInputs:
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
    """Return an artifact with the features of `examples` (a pool or a target set) at the warm-up's checkpoints `chain`.

    Args:
        load: returns the proxy's backbone and the examples; called only if the artifact has to be made.
        adam: whether to replace the gradients by Adam's updates.

    Raises:
        GradsiftError: a gradient is not finite; the message names the rows.
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
        size = parameter_count(runtime, config, rows.inputs)
        _write(runtime, config, checkpoints, rows, size, folder, adam)
        shape = {"rows": len(rows.ids), "checkpoints": len(checkpoints), "dimensions": config.dimensions or size}
        return {**shape, "parameters": size}

    parents, size = [*checkpoints, examples], len(checkpoints) * (examples.size or 0)
    return runtime.store.obtain("features", slug, settings, parents, make, version=VERSION, size=size)


def parameter_count(runtime: Runtime, config: FeaturesConfig, inputs: ProxyInputs) -> int:
    """Return P, the number of parameters with respect to which gradients are taken.

    Raises:
        ConfigError: features.gradient_params=full, and the adapter cannot be merged into the model.
    """
    of_model = int(inputs.backbone.model.num_parameters())  # counted before the adapter adds its parameters
    with adapter(inputs.backbone, config.warmup.lora, 0, runtime.compute) as adapted:
        if config.gradient_params == "full":
            lora.require_mergeable(adapted)
            return of_model
        return sum(parameter.numel() for parameter in lora.trainable_parameters(adapted).values())


def require_room(runtime: Runtime, config: FeaturesConfig, rows: FeatureInputs, checkpoints: int) -> None:
    """Check that the features of `rows` can be computed, and that the disk has room for them.

    Args:
        checkpoints: the number of checkpoints at which the features are computed.

    Raises:
        ConfigError: see `parameter_count`.
        GradsiftError: the disk has no room.
    """
    parameters = parameter_count(runtime, config, rows.inputs)
    dimensions = config.dimensions or parameters
    size = 4 * len(rows.ids) * checkpoints * dimensions
    free = shutil.disk_usage(runtime.store.root).free
    if size > free:
        raise GradsiftError(
            f"the gradient features take {size / 1e9:.1f} GB ({len(rows.ids):,} rows x {checkpoints} checkpoints x "
            f"{dimensions:,} dimensions x 4 bytes), but {runtime.store.root} has only {free / 1e9:.1f} GB free; lower "
            "features.dimensions, take features.checkpoints=last, or give another folder with artifacts=DIR"
        )


def block_rows(size: int, device: torch.device) -> int:
    """Return B, the number of rows of a block, such that B gradients of `size` numbers each fit in memory.

    B is a power of two, so that a resumed run usually has the same blocks even if its free memory differs a little.
    """
    # a quarter of a GPU's free memory; the projection and the backward passes need the rest
    free = int(torch.cuda.mem_get_info(device)[0]) // 4 if device.type == "cuda" else _BLOCK_BYTES
    fitting = max(1, free // (4 * size))
    return min(_MOST_ROWS, 1 << (fitting.bit_length() - 1))


def checkpoint_weights(checkpoints: Sequence[Artifact]) -> np.ndarray:
    """Return the weights w (C,) float64 of the checkpoints: their mean learning rates, scaled so that the sum is 1."""
    rates = np.array([checkpoint.info["learning_rate"] for checkpoint in checkpoints], dtype=np.float64)
    weights: np.ndarray = rates / rates.sum()
    return weights


def _write(
    runtime: Runtime,
    config: FeaturesConfig,
    checkpoints: Sequence[Artifact],
    rows: FeatureInputs,
    size: int,
    folder: Path,
    adam: bool,
) -> None:
    inputs, count, device = rows.inputs, len(rows.ids), device_of(runtime.compute)
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


@dataclass(frozen=True)
class AdamState:
    """Adam's first and second moments, (P,) float32 each, in the order of the columns of a `GradientPass`."""

    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def read(cls, path: Path, parameters: Mapping[str, nn.Parameter], device: torch.device) -> AdamState:
        """Return the moments of `parameters` in the file `path`, which `lora.save_optimizer` wrote."""
        tensors = load_file(path)
        moments = []
        for kind in ("exp_avg", "exp_avg_sq"):
            parts = []
            for name, parameter in parameters.items():
                moment = tensors.get(f"{kind}:{name}")
                if moment is None or moment.shape != parameter.shape:
                    raise GradsiftError(f"{path.name} has no Adam moments of {name}; delete {path.parent.name}")
                parts.append(moment.flatten())
            moments.append(torch.cat(parts).to(device, torch.float32))
        return cls(*moments)

    def adjust(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return Adam's updates Gamma (B, P) for `gradients` (B, P) float32. The tensor `gradients` is overwritten.

            m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2,   Gamma = m' / sqrt(v' + eps)

        g is the gradient of one example, and m and v are Adam's moments `first` and `second`. As in LESS's published
        code, eps is inside the square root and there is no bias correction. An example whose gradient is zero gets the
        update 0 and not b1 m / sqrt(v' + eps), because m comes from other examples.
        """
        silent = ~gradients.any(1)
        # a second (B, P) copy might not fit in memory, so the numerator overwrites g, after the denominator has used it
        roots = gradients.square().mul_(1 - BETAS[1]).add_(self.second, alpha=BETAS[1]).add_(_EPS).sqrt_()
        adjusted = gradients.mul_(1 - BETAS[0]).add_(self.first, alpha=BETAS[0]).div_(roots)
        adjusted[silent] = 0.0
        return adjusted


def gradient_block(
    inputs: ProxyInputs, gradients: GradientPass, adam: AdamState | None, start: int, stop: int, advance: Advance
) -> torch.Tensor:
    """Return the gradients of the examples `start` to `stop - 1`, or Adam's updates if `adam` is given, (B, P) float32.

    An example without a response token has a row of zeros.
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


def warm_up(
    runtime: Runtime,
    config: WarmupConfig,
    proxy_config: ProxyConfig,
    proxy: Artifact,
    loaded: Artifact,
    load: Callable[[], ProxyInputs],
) -> list[Artifact]:
    """Return one checkpoint (adapter and Adam's state) for each epoch of the warm-up.

    The `info` of a checkpoint has the mean learning rate of its epoch as `learning_rate`. `load` is called only if an
    epoch has to be trained.
    """
    seed = runtime.seed if config.seed is None else config.seed
    drawn = draw_rows(config, int(loaded.info["rows"]), seed)
    chain: list[Artifact] = []
    for epoch in range(1, config.epochs + 1):
        previous = chain[-1] if chain else None

        def make(folder: Path, epoch: int = epoch, previous: Artifact | None = previous) -> Mapping[str, Any]:
            return _warm_up_epoch(runtime, folder, config, load(), drawn, seed, epoch, previous)

        settings = asdict(config) | {
            "lora": config.lora.settings,
            "share": None,
            "rows": len(drawn),
            "epochs": None if config.schedule == "constant" and not config.warmup_ratio else config.epochs,
            "epoch": epoch,
            "seed": seed,
            **encoding_settings(proxy_config.template, proxy_config.max_length),
            "tokens": runtime.compute.mask_batches if config.lora.dropout else None,
        }
        parents = [previous] if previous else [proxy, loaded]
        options: Any = {"version": WARMUP_VERSION, "size": len(drawn), "divided": True}
        chain.append(runtime.store.obtain("warmup", f"{len(drawn)}rows-e{epoch}", settings, parents, make, **options))
    return chain


def warmup_rows(config: WarmupConfig, rows: int) -> int:
    """Return the number of rows on which the warm-up trains if the pool has `rows` rows.

    The number is `config.rows` (at most `rows`), or the share `config.share` of `rows` if `config.rows` is None.

    Raises:
        GradsiftError: there would be no row to train on.
    """
    count = min(config.rows, rows) if config.rows is not None else math.floor((config.share or 0) * rows + 1e-9)
    if count < 1:
        raise GradsiftError(
            f"features.warmup.share={config.share} of {rows:,} rows is less than one row; give a larger share, or "
            "features.warmup.rows=NUMBER"
        )
    return count


def draw_rows(config: WarmupConfig, rows: int, seed: int) -> np.ndarray:
    """Draw the warm-up's rows from a pool of `rows` rows, and return their positions in ascending order."""
    rng = np.random.default_rng(derive_seed(seed, "warmup rows"))
    return np.sort(rng.permutation(rows)[: warmup_rows(config, rows)])


def _warm_up_epoch(
    runtime: Runtime,
    folder: Path,
    config: WarmupConfig,
    inputs: ProxyInputs,
    drawn: np.ndarray,
    seed: int,
    epoch: int,
    previous: Artifact | None,
) -> dict[str, Any]:
    from gradsift.training.finetuning import ShowProgress

    rows = set(drawn.tolist())
    inputs = inputs._replace(encoded=[example for example in inputs.encoded if example.row in rows])
    if not inputs.encoded:
        raise GradsiftError(
            f"none of the {len(drawn):,} warm-up rows has a response token; raise features.warmup.share (or .rows)"
        )
    lengths = [len(example.input_ids) for example in inputs.encoded]
    plan = epoch_batches(lengths, config.batch_size, "random", derive_seed(seed, "warmup order", epoch))
    total = len(plan) * config.epochs
    optimization = Optimization(config.learning_rate, 0.0, config.schedule, config.warmup_of(total), total_steps=total)
    first_step = len(plan) * (epoch - 1)
    label = f"warm-up, epoch {epoch}/{config.epochs}"
    with runtime.display.task(label, len(inputs.encoded)) as advance:
        training = Epoch(
            plan,
            optimization,
            first_step,
            lora_seed=derive_seed(seed, "warmup lora"),
            dropout_seed=derive_seed(seed, "warmup dropout", epoch),
            previous=previous,
            folder=folder,
            callbacks=[ShowProgress(advance)],
        )
        info = train_epoch(inputs, training, config.lora, runtime.compute)
    return info | {"learning_rate": optimization.mean_rate(first_step, first_step + len(plan))}
