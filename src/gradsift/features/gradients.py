"""Gradients of examples as vectors whose inner products are those of LESS.

    row_i = [ sqrt(w_1) u_i1, ..., sqrt(w_C) u_iC ],   u_ic = R Gamma_ic / |R Gamma_ic|

C checkpoints of the warm-up with their mean learning rates w_c (which sum to 1), R the random projection,
Gamma the gradient as Adam would turn it for the pool and the plain gradient for the target set. So

    <row_i, row_j> = sum_c w_c cos(R Gamma_ic, R g_jc)

An example without a gradient at a checkpoint has zeros there; one without any response token has a row of
zeros, and is listed.

Shape letters: N examples, C checkpoints, P parameters, D dimensions of a checkpoint, B rows of a block.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsift.artifacts import Artifact
from gradsift.config import FeaturesConfig, ProxyConfig
from gradsift.cost import duration
from gradsift.data.tokens import Encoded, encoding_settings
from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.vectors import FEATURES_FILE, FilledBlocks, open_features, unit_rows, write_ids
from gradsift.gradients.adam import AdamState
from gradsift.gradients.per_sample import GradientPass, gradient_pass
from gradsift.gradients.projection import Projection
from gradsift.proxy.epochs import OPTIMIZER_FILE, ProxyInputs, adapter
from gradsift.runtime import Advance, Runtime
from gradsift.training import lora
from gradsift.training.device import device_of
from gradsift.training.finetuning import require_finite

VERSION = 1
_BLOCK_BYTES = 2 * 2**30  # of gradients that wait for the projection, whose signs are spelt out once a block
_MOST_ROWS = 512  # of a block: what an interrupted run may have to do again
_FEW_ROWS = 25  # of a block: with fewer, drawing the signs takes longer than to multiply with them
_LONG = 60  # seconds of projecting that are worth a word
_MOST_UNPROJECTED = 4 * 10**9  # numbers, 16 GB


@dataclass(frozen=True)
class FeatureInputs:
    """The examples whose gradients are wanted."""

    inputs: ProxyInputs  # of those that have a response token
    ids: Sequence[str]  # (N,) of all
    tasks: Sequence[str] = ()  # (N,) of a target set


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
    """The features of `examples` (a pool or a target set) at the checkpoints of the warm-up.

    Written block by block; a run that was interrupted goes on after its last whole block.

    Args:
        chain: what `warm_up` returned.
        load: called only if there is something to be done.
        adam: turn the gradients as Adam would.

    Raises:
        ConfigError: features.dimensions=null where the unprojected gradients are too large.
        GradsiftError: the disk has no room, or a gradient is not finite; names the rows.
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
        given = load()
        require_room(runtime, config, given, len(checkpoints), folder)
        return _write(runtime, config, checkpoints, given, folder, adam)

    parents = [*checkpoints, examples]
    size = len(checkpoints) * (examples.size or 0)
    return runtime.store.obtain("features", slug, settings, parents, make, version=VERSION, keep_part=True, size=size)


def require_room(
    runtime: Runtime, config: FeaturesConfig, given: FeatureInputs, checkpoints: int, folder: Path | None = None
) -> None:
    """Say how much disk the features take, and refuse now what would fail after hours.

    Args:
        folder: what an interrupted run may have written part of them to.

    Raises:
        ConfigError: features.dimensions=null where the unprojected gradients are too large, or full gradients of a
            model that the adapter cannot be merged into.
        GradsiftError: the disk has no room.
    """
    parameters = parameter_count(runtime, config, given.inputs)
    dimensions = config.dimensions or parameters
    numbers = len(given.ids) * checkpoints * dimensions
    size = f"{len(given.ids):,} rows x {checkpoints} checkpoints x {dimensions:,} dimensions"
    if config.dimensions is None and numbers > _MOST_UNPROJECTED:
        raise ConfigError(
            f"features.dimensions=null keeps gradients as they are, here {size}, more than {_MOST_UNPROJECTED:,} "
            "numbers; project them as in features.dimensions=8192"
        )
    file = folder / FEATURES_FILE if folder is not None else None
    there = file.stat().st_blocks * 512 if file is not None and file.exists() else 0
    free = shutil.disk_usage(runtime.store.root).free
    if 4 * numbers - there > free:
        raise GradsiftError(
            f"the gradient features take {4 * numbers / 1e9:.1f} GB ({size} x 4 bytes), and {runtime.store.root} has "
            f"{free / 1e9:.1f} GB free; lower features.dimensions, take features.checkpoints=last, or give another "
            "folder with artifacts=DIR"
        )
    if folder is not None:
        runtime.display.say(f"  gradient features: {size} x 4 bytes = {4 * numbers / 1e9:.2f} GB on disk")


def parameter_count(runtime: Runtime, config: FeaturesConfig, inputs: ProxyInputs) -> int:
    """P."""
    of_all = int(inputs.backbone.model.num_parameters())
    with adapter(inputs.backbone, config.warmup.lora, 0, runtime.compute) as adapted:
        if config.gradient_params == "full":
            lora.require_mergeable(adapted)
            return of_all
        return sum(parameter.numel() for parameter in lora.trainable_parameters(adapted).values())


def block_rows(size: int, device: torch.device) -> int:
    """B, where a gradient has `size` numbers; a GPU's signs and passes need the rest of its memory."""
    room = int(torch.cuda.mem_get_info(device)[0]) // 4 if device.type == "cuda" else _BLOCK_BYTES
    return min(_MOST_ROWS, max(1, room // (4 * size)))


def checkpoint_weights(checkpoints: Sequence[Artifact]) -> np.ndarray:
    """w (C,) float64: mean learning rates, with sum 1."""
    rates = np.array([checkpoint.info["learning_rate"] for checkpoint in checkpoints], dtype=np.float64)
    weights: np.ndarray = rates / rates.sum()
    return weights


def _write(
    runtime: Runtime,
    config: FeaturesConfig,
    checkpoints: Sequence[Artifact],
    given: FeatureInputs,
    folder: Path,
    adam: bool,
) -> dict[str, Any]:
    inputs = given.inputs
    size = parameter_count(runtime, config, inputs)
    dimensions = config.dimensions or size
    projection = Projection(size, dimensions, config.projection_seed) if config.dimensions is not None else None
    if projection is not None:
        _say_cost(runtime, projection, len(given.ids), len(checkpoints))
    table = _Table(folder, len(given.ids), dimensions, len(checkpoints), runtime.display.say)
    label = f"gradients of {len(inputs.encoded):,} examples at {len(checkpoints)} checkpoints"
    with (
        adapter(inputs.backbone, config.warmup.lora, 0, runtime.compute) as adapted,
        runtime.display.task(label, len(checkpoints) * len(given.ids)) as advance,
    ):
        advance(table.rows_done)
        for index, weight in enumerate(checkpoint_weights(checkpoints)):
            if table.first_missing(index) == len(given.ids):
                continue
            lora.load_adapter(adapted, checkpoints[index].path)
            state = _adam_state(runtime, checkpoints[index], adapted) if adam else None
            with gradient_pass(adapted, config.gradient_params, inputs.backbone.pad_id) as gradients:
                blocks = _Blocks(inputs, gradients, state, projection, config.normalise, device_of(runtime.compute))
                while (start := table.first_missing(index)) < len(given.ids):
                    rows = blocks.vectors(start, min(start + blocks.rows, len(given.ids)), advance)
                    table.write(index, rows * np.float32(weight**0.5))
    with_response = {example.row for example in inputs.encoded}
    silent = [row for row in range(len(given.ids)) if row not in with_response]
    write_ids(folder, given.ids, given.tasks, silent)
    return {"rows": len(given.ids), "checkpoints": len(checkpoints), "dimensions": dimensions, "parameters": size}


def _say_cost(runtime: Runtime, projection: Projection, rows: int, checkpoints: int) -> None:
    """How long the projection of all rows takes: with adapters of a high rank it may be longer than all passes."""
    device = device_of(runtime.compute)
    at_once = min(block_rows(projection.size, device), rows)
    seconds = checkpoints * math.ceil(rows / at_once) * projection.seconds(at_once, device)
    if seconds > _LONG:
        runtime.display.say(
            f"  projecting gradients of {projection.size:,} numbers to {projection.dimensions:,} takes about "
            f"{duration(seconds)} beside the backward passes; less with a smaller features.warmup.lora.rank or "
            "features.dimensions, or features.checkpoints=last"
        )
    if at_once < min(_FEW_ROWS, rows):
        runtime.display.say(
            f"  warning: a gradient has {projection.size:,} numbers, so only {at_once} are projected at once, and "
            "drawing the projection takes most of the time; a smaller features.warmup.lora.rank is faster"
        )


def _adam_state(runtime: Runtime, checkpoint: Artifact, adapted: Any) -> AdamState:
    parameters = lora.trainable_parameters(adapted)
    return AdamState.read(checkpoint.file(OPTIMIZER_FILE), parameters, device_of(runtime.compute))


class _Blocks:
    """Vectors of successive blocks of examples at one checkpoint."""

    def __init__(
        self,
        inputs: ProxyInputs,
        gradients: GradientPass,
        adam: AdamState | None,
        projection: Projection | None,
        normalise: bool,
        device: torch.device,
    ) -> None:
        self.rows = block_rows(gradients.size, device)
        self._inputs = inputs
        self._positions = np.array([example.row for example in inputs.encoded], dtype=np.int64)  # ascending
        self._gradients = gradients
        self._adam = adam
        self._projection = projection
        self._normalise = normalise
        self._device = device

    def vectors(self, start: int, stop: int, advance: Advance) -> np.ndarray:
        """(B, D) float32 of the examples at positions from `start` to before `stop`; zeros where there is no gradient.

        Raises:
            GradsiftError: a gradient is not finite; names the rows.
        """
        first, last = np.searchsorted(self._positions, [start, stop])
        encoded = self._inputs.encoded[first:last]
        block = torch.zeros(stop - start, self._gradients.size, device=self._device)

        def fill(batch: Sequence[Encoded]) -> None:
            for part, found in self._gradients.parts(batch):
                rows = torch.tensor([example.row - start for example in part], device=self._device)
                block[rows] = found if self._adam is None else self._adam.adjust(found)

        advance((stop - start) - len(encoded))
        for _ in self._inputs.budget.passes(encoded, fill, advance=advance):
            pass
        norms = torch.linalg.vector_norm(block, dim=1).cpu()
        require_finite("gradient", torch.arange(start, stop), norms, encoded)
        projected = (block if self._projection is None else self._projection(block)).cpu().numpy()
        return unit_rows(projected) if self._normalise else projected


class _Table:
    """`features.npy`, filled one checkpoint after another and block by block, and how far it is filled."""

    def __init__(self, folder: Path, rows: int, dimensions: int, checkpoints: int, say: Callable[[str], None]) -> None:
        self._rows = rows
        self._width = dimensions
        self._table = open_features(folder, rows, checkpoints * dimensions)
        self._filled = FilledBlocks(folder, self._block, say)  # places are checkpoint, first row, row behind the last

    def _block(self, place: Sequence[int]) -> np.ndarray:
        index, start, stop = place
        return self._table[start:stop, index * self._width : (index + 1) * self._width]

    @property
    def rows_done(self) -> int:
        """Over all checkpoints."""
        return sum(stop - start for _, start, stop in self._filled.places)

    def first_missing(self, index: int) -> int:
        """The first row that checkpoint `index` has not."""
        return max((stop for at, _, stop in self._filled.places if at == index), default=0)

    def write(self, index: int, block: np.ndarray) -> None:
        """The next rows of a checkpoint."""
        start = self.first_missing(index)
        place = index, start, start + len(block)
        self._block(place)[:] = block
        self._table.flush()
        self._filled.add(place)
