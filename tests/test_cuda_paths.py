"""Laws of CUDA that hold on a machine without a GPU: no pass mixes devices, reads numbers or moves the backbone."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_paths import BROKEN, MODELS, PATHS, SETTINGS, kit, norms_pass, training_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths
from transformers import DynamicCache

from gradsift.config import ComputeConfig
from gradsift.data.batching import collate
from gradsift.evaluation.generation import generate_answers, left_padded
from gradsift.gradients.per_sample import gradient_pass
from gradsift.proxy.collection import collect_norms
from gradsift.scoring import spans
from gradsift.training.device import without_host_reads
from gradsift.training.finetuning import fit
from gradsift.training.head import OutputHead
from gradsift.training.modules import Optimization, ProxyMember, ResponseLosses
from gradsift.training.tiny_bytes import bytes_tokenizer

HERE = Path(__file__).parent
PLAIN_HEADS = [kind for kind in MODELS if kind != "gemma3_text"]  # it scales its embedding

# ------------------------------------------------------------------------------------- fake CUDA tensors


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What fails on fake CUDA, by path, model and precision: one process traces all of them."""
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        if "CI" in os.environ and os.environ.get("GRADSIFT_KERNELS") != "off":
            pytest.fail(f"no C++ compiler {compiler} was found, which CI must have")
        pytest.skip(f"no C++ compiler {compiler} was found: fake CUDA needs a device guard of its own")
    folder = tmp_path_factory.mktemp("cuda")
    library, libraries, out = folder / "fake_cuda.so", Path(torch.__file__).parent / "lib", folder / "out.json"
    includes = [f"-I{path}" for path in include_paths()]
    options = ["-std=c++20", "-shared", "-fPIC", *includes, f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    source = str(HERE / "fake_cuda.cpp")
    command = [*compiler.split(), *options, source, "-o", str(library), "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, timeout=300)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(HERE / "cuda_paths.py"), str(library), str(out)], check=True, timeout=600, env=environment
    )
    outcome: dict[str, str] = json.loads(out.read_text())
    return outcome


@pytest.mark.parametrize(("kind", "precision"), SETTINGS)
@pytest.mark.parametrize("path", PATHS)
def test_a_path_runs_on_cuda(traced: dict[str, str], path: str, kind: str, precision: str) -> None:
    failure = traced[f"{path} {kind} {precision}"]
    if path == "embedding_and_head" and kind not in PLAIN_HEADS:
        assert "scales or caps what its embedding" in failure
    else:
        assert not failure, failure


BREAKS = {
    "reads_a_number": "_local_scalar_dense",
    "reads_a_number_in_backward": "_local_scalar_dense",
    "mixes_devices": "found at least two devices, cuda:0 and cpu",
    "indexes_by_a_mask": "nonzero",
}


@pytest.mark.parametrize("path", BROKEN)
def test_a_broken_path_is_found(traced: dict[str, str], path: str) -> None:
    """The law of the harness itself."""
    assert BREAKS[path] in traced[path]


# --------------------------------------------------------------------------------------- reads by the host

READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero")


class Reads(TorchDispatchMode):
    """Notes operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS and not self._is_step_counter(args):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_step_counter(args: Any) -> bool:
        """AdamW reads its step counters, which are on the CPU whatever the device of the parameters."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.endswith("torch/optim/adam.py"):
                return bool(args[0].dim() == 0)
            frame = frame.f_back
        return False


@functools.cache
def model_of(kind: str) -> Any:
    return kit(kind, "float32")


@pytest.mark.parametrize("kind", MODELS)
def test_a_training_step_reads_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit(kind, "float32")
    head = OutputHead.of(made.adapted)
    monkeypatch.setattr(OutputHead, "of", lambda model: head)  # asked once a training, before its steps
    with Reads() as reads:
        training_step(made)
    assert not reads.seen


@pytest.mark.parametrize("kind", MODELS)
def test_a_norms_pass_reads_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_of(kind)
    head = OutputHead.of(made.adapted)
    monkeypatch.setattr(OutputHead, "of", lambda model: head)
    with Reads() as reads:
        norms_pass(made)
    assert not reads.seen


@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_over_spans_reads_its_losses_alone(kind: str) -> None:
    """They are copied to the CPU once a batch, which is not among the reads that are looked for."""
    made = model_of(kind)
    head = OutputHead.of(made.adapted)
    with Reads() as reads:
        spans._batch_losses(made.backbone, head, made.encoded)
    assert not reads.seen


@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_of_per_sample_gradients_reads_nothing(kind: str) -> None:
    made = model_of(kind)
    with gradient_pass(made.adapted, "lora", 0) as gradients, Reads() as reads:
        gradients(made.encoded)
    assert not reads.seen


@pytest.mark.parametrize("kind", MODELS)
def test_a_decode_step_reads_nothing(kind: str) -> None:
    made = model_of(kind)
    tokens, mask = left_padded([example.input_ids.tolist() for example in made.encoded], 0, "cpu")
    cache = DynamicCache(config=made.adapted.config)
    with torch.no_grad():
        made.adapted(input_ids=tokens, attention_mask=mask, past_key_values=cache)
        with Reads() as reads, without_host_reads():
            logits = made.adapted(
                input_ids=tokens[:, -1:],
                attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1),
                past_key_values=cache,
            ).logits
            logits[:, -1].argmax(-1)
    assert not reads.seen


@pytest.mark.parametrize("kind", MODELS)
def test_generation_asks_once_a_token_whether_all_rows_have_ended(kind: str) -> None:
    """transformers' own question; all else that it reads, it reads once a batch."""
    made = model_of(kind)
    prompts = [example.input_ids.tolist() for example in made.encoded]

    def reads_of(tokens: int) -> int:
        with Reads() as reads:
            generate_answers(made.adapted, bytes_tokenizer(), prompts, max_new_tokens=tokens, batch_size=4)
        return len(reads.seen)

    assert reads_of(9) - reads_of(4) == 5


def test_reads_are_found_in_forward_backward_and_a_plain_model() -> None:
    """The law of the harness: transformers' own search for packed rows is one such read."""
    made = model_of("gpt2")
    batch = collate(made.encoded, 0)
    with Reads() as reads:
        made.adapted(input_ids=batch.input_ids, use_cache=False)
    assert reads.seen == ["_local_scalar_dense"] * 2  # and for padding
    with Reads() as reads, without_host_reads():
        made.adapted(input_ids=batch.input_ids, use_cache=False)
    assert not reads.seen


def test_packed_rows_are_looked_for_again_afterwards() -> None:
    """Models of the same process that do pack several examples into a row are not touched."""
    from transformers import PreTrainedModel, masking_utils

    def functions() -> tuple[Any, ...]:
        warn = PreTrainedModel.warn_if_padding_and_no_attention_mask
        return masking_utils.find_packed_sequence_indices, masking_utils.fast_all, warn

    before = functions()
    with pytest.raises(ZeroDivisionError), without_host_reads(), without_host_reads():
        assert not set(functions()) & set(before)
        raise ZeroDivisionError
    assert functions() == before


def test_losses_do_not_depend_on_the_search() -> None:
    made = model_of("llama")
    batch = collate(made.encoded, 0)
    with torch.no_grad():
        ours = ResponseLosses(made.adapted)(batch)
        logits = made.adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        plain = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[batch.places], batch.targets, reduction="none"
        ).split(batch.counts.long().tolist())
    torch.testing.assert_close(ours, torch.stack([part.mean() for part in plain]))


# -------------------------------------------------------------------------------- the backbone's device


@contextmanager
def moves(of: torch.nn.Module) -> Iterator[list[str]]:
    """The moves of any module that holds weights of `of`, by name and where the call asked to go."""
    seen: list[str] = []
    weights = {id(parameter) for parameter in of.parameters()}
    patched = pytest.MonkeyPatch()
    for name in ("to", "cpu", "cuda", "to_empty"):
        plain = getattr(torch.nn.Module, name)

        def move(self: Any, *where: Any, _plain: Any = plain, _name: str = name, **options: Any) -> Any:
            if any(id(parameter) in weights for parameter in self.parameters()):
                seen.append(" ".join([_name, *map(str, where)]))
            return _plain(self, *where, **options)

        patched.setattr(torch.nn.Module, name, move)
    try:
        yield seen
    finally:
        patched.undo()


def test_a_training_and_a_norms_pass_leave_the_backbone_on_its_device() -> None:
    """Lightning moves a module to the CPU when its trainer ends; later stages would follow the backbone there."""
    made = kit("gpt2", "float32")
    module = ProxyMember(made.adapted, Optimization(1e-3, 0.0, "constant", 0, 2), made.budget, pad_id=0)
    with moves(made.adapted) as seen:
        fit(module, made.encoded, [[0, 1], [2]], compute=ComputeConfig(device="cpu"))
        collect_norms(made.adapted, made.encoded, made.budget, 0, ComputeConfig(device="cpu"))
    assert seen
    assert set(seen) == {"to cpu"}, "only the strategy's moves to the training's own device"


def test_the_recorder_sees_a_move_to_the_cpu() -> None:
    made = model_of("gpt2")
    with moves(made.adapted) as seen:
        torch.nn.Sequential(made.adapted).cpu()
    assert seen == ["cpu"]
