"""Laws of CUDA that hold on a machine without a GPU: no pass mixes devices, reads numbers or moves the backbone."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMOKE
from cuda_paths import BROKEN, MODELS, PATHS, SETTINGS, kit, norms_pass, training_step, without_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths
from transformers import AutoConfig, DynamicCache

from gradsift import sweep
from gradsift.composition import compose_config
from gradsift.config import ComputeConfig, LoraConfig, ModelConfig
from gradsift.data.batching import capped_batches, collate
from gradsift.evaluation.generation import generate_answers, left_padded
from gradsift.gradients.per_sample import gradient_pass
from gradsift.journal import Journal
from gradsift.pipeline import settings_of
from gradsift.proxy.collection import collect_norms
from gradsift.proxy.together import Members
from gradsift.scoring import superfilter
from gradsift.training import backbones, numerics
from gradsift.training.device import numbers_at_once, without_host_reads
from gradsift.training.finetuning import fit
from gradsift.training.head import OutputHead, ResponseLosses
from gradsift.training.lora import Lanes
from gradsift.training.modules import Optimization, ProxyMember, Step
from gradsift.training.nano import bytes_tokenizer

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
    "reads_a_number": "DataDependentOutputException: aten._local_scalar_dense",
    "reads_a_number_in_backward": "DataDependentOutputException: aten._local_scalar_dense",
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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_of_members_side_by_side_reads_nothing(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit("llama", "float32")
    lanes = Lanes(made.adapted.unload(), LoraConfig(rank=2, dropout=dropout), [0, 1])
    optimization = Optimization(1e-3, 0.0, "linear", 1, 4)
    members = [ProxyMember(lanes.adapted, optimization, made.budget, pad_id=0) for _ in range(2)]
    module = without_trainer(Members(lanes, members), made.device)
    step = Step([replace(example, lane=lane) for lane in (0, 1) for example in made.encoded])
    with Reads() as reads:
        outputs = module.training_step(step, 0)
    assert not reads.seen
    assert [len(outputs[lane]["rows"]) for lane in ("0", "1")] == [3, 3]


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
        superfilter._batch_losses(made.backbone, head, made.encoded)
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


def test_the_proxy_and_the_tuned_target_leave_the_memory_to_the_next_model(gradsift, monkeypatch) -> None:
    """Both stay on their device to their end; a reference that outlives them would keep a GPU half full."""
    models: list[tuple[str, weakref.ref[Any]]] = []
    alive: list[list[str]] = []
    load = backbones.load_backbone

    def noted(artifact: Any, config: Any, compute: Any, **options: Any) -> Any:
        alive.append([name for name, model in models if model() is not None])
        loaded = load(artifact, config, compute, **options)
        models.append((config.nano.architecture, weakref.ref(loaded.model)))
        return loaded

    monkeypatch.setattr(backbones, "load_backbone", noted)
    gc.disable()
    try:
        assert gradsift(*SMOKE, "stop_after=generate") == 0
    finally:
        gc.enable()
    # the target for a trial of its adapter, and the proxy beside it; then the finetune, the held-out loss, the answers
    assert alive == [[], ["llama"], [], [], []]


# ------------------------------------------------------------------------------- options that are for GPUs


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch finds one CUDA device, which multiplies bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Torch's own settings again afterwards."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("torch_settings")
def test_precision_auto_is_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ComputeConfig(device="cpu")
    numerics.set_kernels(compute)
    assert numerics.dtype_of(compute) == torch.float32
    assert "products" not in numerics.numerics_of(kit("gpt2", "float32").adapted.get_base_model())


@pytest.mark.usefixtures("torch_settings", "a_gpu")
def test_precision_auto_is_bfloat16_with_tf32_on_a_gpu_and_in_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ComputeConfig()  # the default
    numerics.set_kernels(compute)
    assert numerics.dtype_of(compute) == torch.bfloat16
    assert torch.get_float32_matmul_precision() == "high"
    config = AutoConfig.for_model("llama", **MODELS["llama"])
    described = numerics.expected_numerics(config, compute, ModelConfig(kind="nano"))
    assert described["precision"] == "bfloat16"
    assert described["products"] == "tf32"
    shown = dict(settings_of(compose_config(["experiment=smoke"])))["compute"]
    assert shown.startswith("cuda, bfloat16 (TF32 for what stays float32)")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert numerics.dtype_of(compute) == torch.float32
    numerics.set_kernels(ComputeConfig(precision="float32"))
    assert torch.get_float32_matmul_precision() == "highest"
    shown = dict(settings_of(compose_config(["experiment=smoke", "compute.precision=float32"])))["compute"]
    assert shown.startswith("cuda, float32, ")


@pytest.mark.usefixtures("torch_settings")
def test_deterministic_kernels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    numerics.set_kernels(ComputeConfig(device="cpu", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    training_step(kit("gpt2", "float32"))


# operations that `torch.use_deterministic_algorithms` refuses on CUDA, of those that a language model might use
NOT_DETERMINISTIC = {"bincount", "histc", "kthvalue", "median", "put", "put_", "nll_loss2d_forward", "scatter_reduce"}


@pytest.mark.parametrize("path", [training_step, norms_pass])
def test_trainings_and_norms_use_operations_that_have_deterministic_kernels(path: Any) -> None:
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            # a cumulative sum is refused for numbers with a fraction alone
            used.add("cumsum of floats" if name == "cumsum" and args[0].is_floating_point() else name)
            return func(*args, **(kwargs or {}))

    used: set[str] = set()
    with Operations():
        path(kit("llama", "bfloat16"))
    assert "bmm" in used
    assert not used & (NOT_DETERMINISTIC | {"cumsum of floats"})


def test_chunks_follow_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert numbers_at_once(torch.device("cpu"), 1000) == 1000
    assert 4 * numbers_at_once(torch.device("cuda"), 1000) == 80 * 2**30 // 128


def test_compute_tokens_bounds_a_pass_over_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_of("gpt2")
    plain, widths = superfilter._batch_losses, []

    def noted(backbone: Any, head: Any, batch: Any) -> Any:
        widths.append(len(batch) * max(len(example.input_ids) for example in batch))
        return plain(backbone, head, batch)

    monkeypatch.setattr(superfilter, "_batch_losses", noted)
    for tokens, most in ((None, 512), (14, 14)):
        widths.clear()
        backbone = replace(made.backbone, tokens=tokens)
        superfilter.span_losses(backbone, made.encoded, lambda done: None, Journal())
        assert max(widths) <= most
        assert len(widths) == (1 if tokens is None else 3)


def test_prompts_are_batched_by_number_and_by_tokens() -> None:
    lengths = [5, 9, 7, 2]
    assert capped_batches(lengths, 3, None) == [[1, 2, 0], [3]]
    assert capped_batches(lengths, 3, 18) == [[1, 2], [0, 3]]
    assert capped_batches(lengths, 1, 18) == [[1], [2], [0], [3]]
    assert capped_batches([], 3, 18) == []


# ----------------------------------------------------------------------------- the GPUs of jobs on one machine


@pytest.mark.parametrize(
    ("number", "devices", "expected"), [(1, 1, "3"), (2, 1, "5"), (3, 1, "3"), (1, 2, "3,5"), (1, 4, "3,5")]
)
def test_a_job_has_gpus_by_its_number(
    monkeypatch: pytest.MonkeyPatch, number: int, devices: int, expected: str
) -> None:
    monkeypatch.setenv(sweep.GPUS, "3,5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of submitit's local executor: no GPU at all
    sweep.take_gpus(number, devices)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_a_worker_that_has_used_a_gpu_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sweep.GPUS, "0,1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    sweep.take_gpus(1, 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_single_run_keeps_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sweep.GPUS, "0,1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    sweep.take_gpus(None, 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


SCORER = """
import os


def whose_gpu(count):
    with open("gpus.txt", "a") as stream:
        stream.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + chr(10))
    return range(count)
"""


@pytest.mark.slow  # each job is a process that imports torch; the tests above have the law without a launcher
@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        ("hydra/launcher=submitit_local",),
    ],
    ids=["joblib", "submitit_local"],
)
def test_jobs_on_one_machine_have_a_gpu_each(gradsift, monkeypatch: pytest.MonkeyPatch, launcher: Any) -> None:
    """The machine is said to have two; the jobs themselves run on the CPU."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    source = str(HERE.parent / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(sweep, "_visible_gpus", lambda: "0,1")
    folder = gradsift.folder
    (folder / "conf/scorer").mkdir(parents=True)
    (folder / "my_gpus.py").write_text(SCORER)
    (folder / "conf/scorer/whose_gpu.yaml").write_text("_target_: my_gpus.whose_gpu\nname: whose_gpu\n")
    options = (*SMOKE, "scorer=whose_gpu", "stop_after=scores", "data.seed=0,1")
    assert gradsift("-m", *options, *launcher) == 0
    assert sorted((folder / "gpus.txt").read_text().split()) == ["0", "1"]
