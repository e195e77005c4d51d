"""The project's passes through a model, traced for CUDA on a machine without a GPU.

`python tests/cuda_paths.py LIBRARY OUT.json` runs every path of `PATHS` on tiny models whose weights are fake CUDA
tensors: torch checks devices, shapes and types of every operation, forward and backward, and computes nothing. What
touches no CUDA tensor runs for real. An operation that mixes devices fails, and so does one that makes the host wait
for the GPU: reading a number, boolean indexing, `nonzero`, `unique`. Explicit copies (`.cpu()`) are allowed.

Tracing needs a CUDA device guard, which a CPU build of torch lacks. LIBRARY holds one that does nothing, compiled from
`fake_cuda.cpp`; it has to be loaded before torch, so `test_cuda_paths.py` starts this file in a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, generation

if __name__ == "__main__":  # fake tensors know no inference mode; before any function is decorated with it
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()  # type: ignore

from gradsift.config import ComputeConfig, HiddenStatesConfig, LoraConfig
from gradsift.data.examples import Example
from gradsift.data.tokens import Encoded
from gradsift.evaluation.generation import generate_answers
from gradsift.evaluation.judges.local import LocalJudge
from gradsift.evaluation.stages import losses as heldout
from gradsift.features.embeddings import HiddenStates
from gradsift.features.gradients import AdamState, gradient_block
from gradsift.gradients.callback import NormRecords
from gradsift.gradients.embedding_head import collect_statistics
from gradsift.gradients.per_sample import attached, gradient_pass
from gradsift.gradients.probes import NormProbe
from gradsift.gradients.projection import Projection
from gradsift.journal import Journal
from gradsift.proxy.epochs import ProxyInputs
from gradsift.proxy.member_tables import collect_losses, cosines
from gradsift.proxy.together import Members
from gradsift.runtime import unseen
from gradsift.scoring.perplexity import response_losses
from gradsift.scoring.superfilter import span_losses
from gradsift.training import head, lora, numerics
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget
from gradsift.training.head import ResponseLosses
from gradsift.training.lora import Lanes
from gradsift.training.modules import Optimization, ProxyMember, Step
from gradsift.training.nano import bytes_tokenizer

CUDA = torch.device("cuda")
GENERATE = generation.utils.__file__
LLAMA = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 260, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": LLAMA
    | {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
SETTINGS = [("gpt2", "float32"), *((kind, "bfloat16") for kind in MODELS)]


TARGETS = {"gpt2": ["c_attn"], "others": ["q_proj", "v_proj"]}


class Kit(NamedTuple):
    """A tiny model as it is set up for CUDA, with its adapter, and three rows of unequal length."""

    adapted: Any
    encoded: list[Encoded]
    budget: TokenBudget
    lanes: Any = None  # of members that train side by side

    @property
    def backbone(self) -> Backbone:
        return Backbone(self.adapted, bytes_tokenizer())  # as after a finetune: the adapter is part of it

    @property
    def inputs(self) -> ProxyInputs:
        return ProxyInputs(self.backbone, self.encoded, self.budget)

    @property
    def device(self) -> torch.device:
        return next(self.adapted.parameters()).device  # type: ignore[no-any-return]


def kit(kind: str, precision: str, dropout: float = 0.0) -> Kit:
    """Return a model on the CPU; `prepare` sets it up as for CUDA: no compiled kernels, torch's fused attention."""
    config = AutoConfig.for_model(kind, **MODELS[kind], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision)).eval()
    with mock.patch.object(numerics, "device_of", lambda compute: CUDA):
        numerics.prepare(model.requires_grad_(False), ComputeConfig(precision=precision))
    targets = TARGETS["gpt2" if kind == "gpt2" else "others"]
    adapted = lora.add_adapter(model, LoraConfig(rank=2, alpha=4, dropout=dropout, targets=targets), seed=0)
    rng = np.random.default_rng(0)
    encoded = [
        Encoded(row, row, rng.integers(3, 250, size=length).astype(np.int32), np.arange(length) >= 3)
        for row, length in enumerate((12, 7, 9))
    ]
    return Kit(adapted, encoded, TokenBudget(24 if kind == "gpt2" else 36))  # two batches, or one


def kit_of_members(kind: str, precision: str) -> Kit:
    """Return a kit whose model has two adapters, which drop some of their inputs."""
    made = kit(kind, precision)
    targets = TARGETS["gpt2" if kind == "gpt2" else "others"]
    lanes = Lanes(made.adapted.unload(), LoraConfig(rank=2, dropout=0.1, targets=targets), [0, 1])
    return made._replace(adapted=lanes.adapted, lanes=lanes)


# ---------------------------------------------------------------------------------------------- paths


def module_of(kit: Kit, loss: str = "example") -> ProxyMember:
    """Return our Lightning module without a trainer, which would look for a real GPU."""
    optimization = Optimization(1e-3, 0.0, "linear", 1, 4, loss=loss, max_grad_norm=1.0)
    return without_trainer(ProxyMember(kit.adapted, optimization, kit.budget, pad_id=0), kit.device)


def without_trainer(module: Any, device: torch.device) -> Any:
    module._device = device
    module.trainer = SimpleNamespace(strategy=None, training=True, state=SimpleNamespace(fn="fit"))
    module.configure_optimizers()
    module.manual_backward = lambda loss: loss.backward()
    module._losses = ResponseLosses(module.model)
    return module


def training_step(kit: Kit) -> None:
    """Forward and backward of a step's batches, its norms, and the optimiser's step."""
    module = module_of(kit)
    for index, rows in enumerate((kit.encoded, kit.encoded[:1])):
        with attached(kit.adapted, NormProbe()) as module.gradient_norms:
            module.training_step(Step(rows), index)


def token_loss_step(kit: Kit) -> None:
    module_of(kit, loss="token").training_step(Step(kit.encoded), 0)


def members_side_by_side(kit: Kit) -> None:
    """A step of two members, in one pass over the frozen weights."""
    members = [ProxyMember(kit.adapted, Optimization(1e-3, 0.0, "linear", 1, 4), kit.budget, 0) for _ in range(2)]
    module = without_trainer(Members(kit.lanes, members), kit.device)
    module.training_step(Step([*kit.encoded, replace(kit.encoded[1], lane=1)]), 0)


def norms_under_masks(kit: Kit) -> None:
    """A member of mc_dropout: norms with dropout on."""
    module = module_of(kit)
    module.masks = 7
    with attached(kit.adapted, NormProbe()) as module.gradient_norms:
        module.validation_step(Step(kit.encoded), 0)


def norms_pass(kit: Kit) -> NormRecords:
    module, records = module_of(kit), NormRecords()
    with attached(kit.adapted, NormProbe()) as module.gradient_norms:
        outputs = module.validation_step(Step(kit.encoded), 0)
    records.add(outputs["rows"], 1, outputs["norm_A"], outputs["norm_B"], outputs["losses"])
    return records


def norms_table(kit: Kit) -> None:
    norms_pass(kit).table()


def spans_pass(kit: Kit) -> None:
    span_losses(kit.backbone, kit.encoded, lambda done: None, Journal())


def perplexity(kit: Kit) -> None:
    response_losses(kit.inputs, len(kit.encoded), unseen, Journal())


def answer_losses(kit: Kit) -> None:
    collect_losses(kit.adapted, kit.inputs, lambda done: None, Journal(), seed=0)


def hidden_states(kit: Kit) -> None:
    model = kit.adapted.get_base_model()
    config = HiddenStatesConfig(name="hidden_states", pooling="weighted_mean", text="prompt", max_length=32)
    encoder = HiddenStates(Backbone(model, bytes_tokenizer()), config, "plain")
    encoder.embed(kit.encoded)


def embedding_and_head(kit: Kit) -> None:
    collect_statistics(kit.adapted, kit.encoded, kit.budget, 0)


def gradient_features(kit: Kit) -> None:
    """Per-sample gradients as Adam would turn them, and their projection."""
    with gradient_pass(kit.adapted, "lora", 0) as gradients:
        rows = gradients(kit.encoded)
        moments = torch.ones(gradients.size, device=kit.device)
        adjusted = AdamState(moments, moments).adjust(rows)
        Projection(gradients.size, 32, seed=0)(adjusted).cpu()


def full_gradients(kit: Kit) -> None:
    """Gradients of all weights, of the backbone with the adapter merged into a copy."""
    with gradient_pass(kit.adapted, "full", 0) as gradients:
        gradient_block(kit.inputs, gradients, None, 0, 2, lambda done: None)


def directions(kit: Kit) -> None:
    """The mean gradient, and the cosine of each example's gradient with it."""
    cosines(kit.adapted, kit.inputs, lambda done: None, Journal())


def heldout_losses(kit: Kit) -> None:
    rows = [Example(n, f"row{n}", "", (), "add 2 and 3", "", "5", {}) for n in range(3)]
    runtime: Any = SimpleNamespace(
        compute=ComputeConfig(), display=SimpleNamespace(task=unseen, say=print), journal=lambda folder: Journal()
    )
    config: Any = SimpleNamespace(max_length=48, template="plain")
    with mock.patch.object(heldout, "device_of", lambda compute: kit.device):
        heldout.example_losses(runtime, config, kit.backbone, rows, Path(), "loss", "rows")


def decode(kit: Kit) -> None:
    """Prefill and two steps with the cache; what transformers' `generate` itself reads (see `Tracing`) is left out."""
    steps = iter([True, True, True, False])
    with mock.patch.object(GenerationMixin, "_has_unfinished_sequences", lambda *args, **kwargs: next(steps)):
        prompts = [example.input_ids.tolist() for example in kit.encoded]
        generate_answers(kit.adapted, bytes_tokenizer(), prompts, max_new_tokens=3, batch_size=3)


def local_judge(kit: Kit) -> None:
    judge = LocalJudge(kit.adapted, bytes_tokenizer(), name="tiny", max_length=64, batch_size=2)
    asked: Any = [(None, example.input_ids.tolist()) for example in kit.encoded]
    list(judge._log_probabilities(asked, [[65], [66, 67]]))


PATHS: dict[str, Callable[[Kit], Any]] = {
    path.__name__: path
    for path in (
        *(training_step, token_loss_step, members_side_by_side, norms_table, norms_under_masks, spans_pass, perplexity),
        *(answer_losses, hidden_states, embedding_and_head, gradient_features, full_gradients, directions),
        *(heldout_losses, decode, local_judge),
    )
}


KITS: dict[str, Callable[[str, str], Kit]] = {
    "members_side_by_side": kit_of_members,
    "norms_under_masks": functools.partial(kit, dropout=0.1),
}

# -------------------------------------------------------------------------------- paths that are broken


def reads_a_number(kit: Kit) -> None:
    float(next(kit.adapted.parameters()).sum())


def reads_a_number_in_backward(kit: Kit) -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * gradients[0].sum().item()

    x = torch.ones(3, device=kit.device, requires_grad=True)
    Reads.apply(x).sum().backward()  # type: ignore[no-untyped-call]


def mixes_devices(kit: Kit) -> None:
    weight = next(kit.adapted.parameters())
    _ = weight + torch.ones(weight.shape)


def indexes_by_a_mask(kit: Kit) -> None:
    weight = next(kit.adapted.parameters())
    _ = weight[weight > 0]


BROKEN: dict[str, Callable[[Kit], Any]] = {
    path.__name__: path for path in (reads_a_number, reads_a_number_in_backward, mixes_devices, indexes_by_a_mask)
}


# -------------------------------------------------------------------------------------------- tracing


class Tracing(FakeTensorMode):
    """Fake tensors for CUDA, real ones for the CPU; a copy from the GPU gives ones.

    transformers' `generate` reads a few numbers once a batch, and once a token whether all rows have ended. No caller
    can change that, so those reads give 0.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if "cuda" not in devices and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and _reads_for() == GENERATE:
            return 0
        if any(isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) for leaf in leaves):
            args, kwargs = tree_map(self._made_fake, (args, kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        is_copy = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        return torch.ones(result.shape, dtype=result.dtype) if is_copy else result

    def _made_fake(self, leaf: Any) -> Any:
        is_real = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
        if not is_real:
            return leaf
        return self.fake_tensor_converter.from_real_tensor(self, leaf.clone() if leaf._is_view() else leaf)


def _reads_for() -> str:
    """Return the file of the innermost frame outside torch and this file, if any: whoever reads a number."""
    frame: Any = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_code.co_filename)


@contextmanager
def on_fake_cuda(kit: Kit) -> Iterator[None]:
    """Replace the weights by fake CUDA ones, and trace."""
    plain_head = head.OutputHead.of(kit.adapted) is not None  # asks the real weights, once
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            made: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[id(tensor)] = torch.nn.Parameter(made, tensor.requires_grad) if is_parameter else made
        return fakes[id(tensor)]

    with (
        mock.patch.object(head, "_is_last_step", lambda causal, embedding: plain_head),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**33)),
        Tracing(allow_non_fake_inputs=True),
    ):
        for module in (kit.lanes or kit.adapted).modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
        yield


def trace(path: Callable[[Kit], Any], kind: str, precision: str) -> str:
    """Return why a path fails on CUDA, or nothing."""
    made = KITS.get(path.__name__, kit)(kind, precision)
    try:
        with on_fake_cuda(made):
            path(made)
    except Exception as error:  # noqa: BLE001 - told to the test
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return ""


def main() -> None:
    outcome = {
        f"{name} {kind} {precision}": trace(path, kind, precision)
        for kind, precision in SETTINGS
        for name, path in PATHS.items()
    }
    outcome |= {name: trace(path, "gpt2", "float32") for name, path in BROKEN.items()}
    Path(sys.argv[2]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
