"""Laws of several ranks: two processes give the results of one, count every row once, and fail together."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMOKE
from exactness import assert_close_by_norm
from safetensors.numpy import load_file
from test_finetuning import (
    exact_steps,
    nano_examples,
    proxy_config,
    runtime,
    target_config,
    weights_of,
)
from test_norms import loop_norms
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, LoraConfig, ModelConfig, NanoConfig, ProxyConfig, TargetConfig
from gradsift.cost import counting, passed
from gradsift.data.examples import Example
from gradsift.data.tokens import Encoded, encode, encode_prompt
from gradsift.errors import ConfigError, GradsiftError
from gradsift.evaluation.generation import generate_answers
from gradsift.evaluation.stages.losses import example_losses
from gradsift.gradients.callback import COLUMNS
from gradsift.gradients.statistics import read_norms
from gradsift.launch import _rank, node_of, on_all_ranks
from gradsift.proxy.collection import collect_rows
from gradsift.proxy.ensemble import epoch_plan, member_settings, train_members_epoch
from gradsift.proxy.epochs import OPTIMIZER_FILE, ProxyInputs
from gradsift.runtime import Runtime, derive_seed
from gradsift.training import lora, parallel
from gradsift.training.backbones import backbone as nano_backbone
from gradsift.training.backbones import load_backbone, load_model
from gradsift.training.device import TokenBudget
from gradsift.training.modules import Optimization
from gradsift.training.optimization import read_curve
from gradsift.training.parallel import RunEnded, SharedStore, in_parts
from gradsift.training.target import batch_plan, load_target, load_to_answer, load_tuned, train_target

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

REPOSITORY = Path(__file__).parents[1]
ROUNDED: dict[str, Any] = {"precision": "bfloat16", "kernels": "off"}
_MMAP_THRESHOLD = -3  # a parameter of glibc's mallopt
DDP = ComputeConfig(device="cpu", threads=1, strategy="ddp", devices=2)


def everything(
    run: Runtime,
    folder: Path,
    target: tuple[TargetConfig, Artifact, list[Example]],
    proxy: tuple[ProxyConfig, ProxyInputs],
    other: tuple[TargetConfig, Artifact, list[Example]],
) -> dict[str, Any]:
    """Run a finetune, two epochs of a member with the norms of its steps, and a collection pass.

    The second epoch is trained side by side with the first one of another member.
    """
    config, made, chosen = target
    settings, inputs = proxy
    infos: dict[str, Any] = {"ranks": parallel.size()}
    infos["finetune"] = train_target(run, config, load_target(run, config, made), chosen, folder)
    tested = results_of_target(run, target, folder)
    if parallel.size() > 1:
        divided = replace(run, compute=replace(run.compute, strategy="fsdp"))
        infos["fsdp"] = divided_target(divided, target, folder / "fsdp") | {"ddp": tested}
        rounded = replace(run, compute=replace(divided.compute, **ROUNDED, checkpointing=True))
        infos["fsdp"]["gpt2"] = divided_target(rounded, other, folder / "gpt2")["tested"]
    parts = {name: folder / name for name in ("e1", "e2", "other", "norms")}
    for part in parts.values():
        part.mkdir()
    epochs = {"e1": (0, 1), "e2": (0, 2), "other": (1, 1)}
    given = {name: member_settings(settings, run, *epoch) for name, epoch in epochs.items()}
    (infos["e1"],) = train_members_epoch(run, settings, inputs, [(given["e1"], None, parts["e1"])], lambda done: None)
    first = Artifact("member", parts["e1"], "fingerprint", {"info": infos["e1"]})
    units = [(given["e2"], first, parts["e2"]), (given["other"], None, parts["other"])]
    infos["e2"], infos["other"] = train_members_epoch(run, settings, inputs, units, lambda done: None)
    second = Artifact("member", parts["e2"], "fingerprint", {"info": infos["e2"]})
    passed = replace(settings, collect="epoch_end")
    infos["norms"] = collect_rows(run, parts["norms"], passed, inputs, (0, 2, second), 0, "norms")
    return infos


def results_of_target(
    run: Runtime, target: tuple[TargetConfig, Artifact, list[Example]], folder: Path
) -> dict[str, Any]:
    """Return losses and answers of the target with the adapter in `folder`, and the forward tokens of this rank.

    The ranks begin with unequal token budgets, as after memory ran out on one of them.
    """
    config, made, chosen = target
    run = replace(run, compute=replace(run.compute, tokens=(48, 128)[parallel.rank()]))
    given = (run, config, made, Artifact("finetune", folder, "fingerprint", {}))
    tuned = load_tuned(*given)
    with counting() as tokens, tempfile.TemporaryDirectory() as journal:
        parts = example_losses(run, config, tuned, chosen, Path(journal), "held-out loss", "rows")
        to_answer = load_to_answer(*given)
        prompts = [encode_prompt(each.instruction, each.input[:9], tuned.tokenizer, "plain") for each in chosen]
        answers = generate_answers(to_answer.model, tuned.tokenizer, prompts, max_new_tokens=9, batch_size=2)
    losses = {int(row): float(loss) for part in parts for row, loss in zip(*part, strict=True)}
    return {"losses": [losses[row] for row in range(len(chosen))], "answers": answers, "tokens": tokens()}


def divided_target(run: Runtime, target: tuple[TargetConfig, Artifact, list[Example]], folder: Path) -> dict[str, Any]:
    """Train and test the target with its layers divided over two ranks; returns what both find, and what they hold."""
    folder.mkdir()
    config, made, chosen = target
    loaded = load_target(run, config, made)
    with counting() as tokens:
        info = train_target(run, config, loaded, chosen, folder)
    layers = [part for name, part in loaded.model.named_parameters() if "layers" in name and "lora" not in name]
    halves = [isinstance(part, DTensor) and 2 * part.to_local().numel() == part.numel() for part in layers]
    tested = results_of_target(run, target, folder)
    return {"finetune": info, "in parts": bool(halves) and all(halves), "tokens": tokens(), "tested": tested}


def on_a_rank(compute: ComputeConfig, folder: Path, store: Path, backbones: Path) -> tuple[dict[str, Any], int]:
    """Do everything on this rank; returns what its stages counted, and the forward tokens of all ranks."""
    torch.set_num_threads(1)
    parallel.join(compute)
    run = runtime(store)
    run.compute = compute
    with counting() as tokens, tempfile.TemporaryDirectory() as scratch:
        infos = everything(run, Path(scratch) if parallel.rank() else folder, *arguments(backbones))
    return infos, tokens() if parallel.size() == 1 else parallel.total(tokens())


def peak_while(load: Callable[[], Any]) -> int:
    """Return by how many bytes the memory that no file backs grows at most while `load` is called (Linux)."""

    def anonymous() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    def watch() -> None:
        while not ended.wait(0.001):
            seen.append(anonymous())

    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 2**16)  # larger blocks are mapped anew and given back when they are freed
    libc.malloc_trim(0)
    seen, ended = [anonymous()], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load()
    seen.append(anonymous())
    del loaded
    ended.set()
    watcher.join()
    return max(seen) - seen[0]


def peaks_of_loading(source: Path) -> list[int]:
    """Return the peaks of loading a model in parts, and whole."""
    compute = replace(DDP, strategy="fsdp")

    def load(*, in_halves: bool) -> Any:
        with in_parts(compute, in_halves) as options:
            return load_model(str(source), "large", dtype=torch.float32, **options)

    return [peak_while(functools.partial(load, in_halves=in_halves)) for in_halves in (True, False)]


def on_two_ranks(folder: Path, backbones: Path) -> None:
    """Run `on_a_rank` and `walks` and write their results; then rank 1 dies."""
    infos = on_a_rank(DDP, folder / "two", folder / "store", backbones)
    peaks = peaks_of_loading(folder / "large") if sys.platform == "linux" else []
    (folder / f"peaks{parallel.rank()}.json").write_text(json.dumps(peaks))
    if parallel.rank() == 0:
        (folder / "infos.json").write_text(json.dumps(infos))
    walks(folder, "rank 1 dies")


@pytest.fixture(scope="module")
def own_backbones(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with the nano backbones of the tests and `LLAMA`."""
    store = tmp_path_factory.mktemp("backbones") / "store"
    shutil.copytree(backbones, store)
    nano_backbone(runtime(store), LLAMA)
    return store


@pytest.fixture(scope="module")
def two_ranks(own_backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the results of two ranks, whose run ends when rank 1 dies."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "two").mkdir()
    config = LlamaConfig(
        vocab_size=260, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "large")  # 39 MB
    with pytest.raises(GradsiftError, match="rank 1 exited with code 3 without a message"):
        on_all_ranks(DDP, on_two_ranks, folder, own_backbones)
    return folder


# after so few steps the default backbone answers nothing, and answers of one length show no rank that waits
LLAMA = ModelConfig(kind="nano", nano=NanoConfig(architecture="llama", steps=20, instructed_share=0.01))


def arguments(backbones: Path) -> tuple[Any, Any, Any]:
    run, model = runtime(backbones), LLAMA
    made = nano_backbone(run, model)
    examples = nano_examples()
    # 7 rows in steps of 3, 3 and 1: ranks have unequal parts, and in the last step one of them has none
    chosen = [replace(example, row_index=40 + place) for place, example in enumerate([*examples, *examples[:2]])]
    # Adam divides by a gradient's size, so what rounding does to a tiny one grows with the learning rate
    config = target_config(
        model=model,
        epochs=2,
        batch_size=3,
        lora=LoraConfig(rank=2),
        learning_rate=1e-3,
        loss="token",
        max_grad_norm=0.1,
    )
    proxy = proxy_config(model=model, template="plain", batch_size=3, collect="during_training", learning_rate=1e-3)
    backbone = load_backbone(made, model, run.compute)
    encoded, _ = encode(chosen, backbone.tokenizer, "plain", 64)
    of_gpt2 = replace(config, epochs=1, model=ModelConfig(kind="nano", nano=NanoConfig(architecture="gpt2", steps=20)))
    rounded = replace(run, compute=replace(run.compute, **ROUNDED))
    other = (of_gpt2, nano_backbone(rounded, of_gpt2.model), chosen)
    return (config, made, chosen), (proxy, ProxyInputs(backbone, encoded, TokenBudget(64))), other


class Exact:
    """A training in float64: whole steps at once, and each example alone for its norms and loss."""

    def __init__(self, adapted: Any, encoded: Sequence[Encoded], plan: list[list[int]], config: Any) -> None:
        self.adapted = adapted
        shape = (config.learning_rate, config.weight_decay, config.schedule, config.warmup_steps, len(plan))
        by_token = getattr(config, "loss", "example") == "token"  # a proxy has no such option
        options = {"loss": config.loss, "max_grad_norm": config.max_grad_norm} if by_token else {}
        counts = np.array([each.is_response[1:].sum() for each in encoded])
        self.losses: list[float] = []  # of each step
        self.weights: list[dict[str, torch.Tensor]] = []  # before each step, and after the last
        self.norms: list[np.ndarray] = []  # (N, 3) at the weights of each step, and after the last
        for step, exact in enumerate(exact_steps(adapted, encoded, plan, Optimization(*shape, **options))):
            self.weights.append(weights_of(exact))
            self.norms.append(loop_norms(exact, encoded))
            if step < len(plan):
                weights = counts[plan[step]] if by_token else None
                self.losses.append(np.average(self.norms[-1][plan[step], 2], weights=weights))

    def require(self, folder: Path, step: int) -> None:
        """Assert that the adapter in `folder` is the one after `step` steps."""
        lora.load_adapter(self.adapted, folder)
        for name, value in weights_of(self.adapted).items():
            assert_close_by_norm(value, self.weights[step][name], k=1024)


def exact_target(run: Runtime, config: TargetConfig, made: Artifact, chosen: list[Example]) -> Exact:
    backbone = load_backbone(made, config.model, run.compute)
    encoded, _ = encode(chosen, backbone.tokenizer, config.template, config.max_length)
    adapted = lora.add_adapter(backbone.model, config.lora, derive_seed(run.seed, "target lora"))
    return Exact(adapted, encoded, batch_plan([len(each.input_ids) for each in encoded], config, run.seed), config)


class ExactMember:
    """A member of the proxy in float64, and the folders of its epochs."""

    def __init__(
        self, run: Runtime, proxy: tuple[ProxyConfig, ProxyInputs], member: int, folders: Sequence[str]
    ) -> None:
        config, inputs = proxy
        lengths = [len(example.input_ids) for example in inputs.encoded]
        epochs = range(1, len(folders) + 1)
        self.folders = folders
        self.plans = [epoch_plan(config, lengths, run.seed, member, epoch) for epoch in epochs]  # the batches of each
        model = copy.deepcopy(inputs.backbone.model)
        adapted = lora.add_adapter(model, config.lora, derive_seed(run.seed, "lora", member))
        self.exact = Exact(adapted, inputs.encoded, [*chain.from_iterable(self.plans)], config)


def relative(computed: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(computed - expected) / np.linalg.norm(expected))


def test_two_processes_find_what_one_finds(own_backbones: Path, two_ranks: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", two_ranks / "two"
    one.mkdir()
    of_one = on_a_rank(ComputeConfig(device="cpu", threads=1), one, tmp_path / "store", own_backbones)
    infos, counts = zip(of_one, json.loads((two_ranks / "infos.json").read_text()), strict=True)
    assert [info.pop("ranks") for info in infos] == [1, 2]
    for name in ("fsdp", "gpt2"):
        (two / name).rename(tmp_path / name)
    divided = infos[1].pop("fsdp")
    assert divided["finetune"] == infos[0]["finetune"]
    assert counts[0] == counts[1] > 0  # without what two ranks did besides
    rounding = 2 * 1024 * torch.finfo(torch.float32).eps  # between two that are each so near to what is exact
    for name, info in infos[0].items():
        for key, value in info.items():
            expected = pytest.approx(value, rel=rounding) if key in ("size_A", "size_B") else value
            assert infos[1][name][key] == expected
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    states = [load_file(folder / "e2" / OPTIMIZER_FILE) for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(relative(states[1][key], states[0][key]) <= rounding for key in states[0])
    for part in (".", "e1", "e2", "other"):
        curves = [read_curve(folder / part) for folder in (one, two)]
        assert [entry["tokens"] for entry in curves[0]] == [entry["tokens"] for entry in curves[1]]
    target, proxy, other = arguments(own_backbones)
    run = runtime(tmp_path / "store")
    tuned = exact_target(run, *target)
    members = [ExactMember(run, proxy, 0, ["e1", "e2"]), ExactMember(run, proxy, 1, ["other"])]
    for folder, info in zip((one, two), infos, strict=True):
        require_exact(folder, info, tuned, members)
    tuned.require(tmp_path / "fsdp" / "adapter", step=len(tuned.losses))
    require_equal(divided["ddp"], results_of_target(run, target, two), relative=1e-6)
    require_equal(divided["tested"], results_of_target(run, target, tmp_path / "fsdp"), relative=1e-6)
    rounded = replace(run, compute=replace(run.compute, **ROUNDED))
    require_equal(divided["gpt2"], results_of_target(rounded, other, tmp_path / "gpt2"), relative=1e-6)
    assert len({len(answer) for answer in divided["tested"]["answers"]}) > 1  # so one rank had to wait for the other
    assert divided["in parts"]
    assert 0 < divided["tokens"] < divided["finetune"]["tokens"]  # rank 0 has a part of them


def require_equal(of_two: dict[str, Any], of_one: dict[str, Any], relative: float) -> None:
    """Assert that two ranks found the losses and answers of one process, and that each passed a part of the tokens."""
    assert of_two["losses"] == pytest.approx(of_one["losses"], rel=relative)
    assert of_two["answers"] == of_one["answers"]
    assert 0 < of_two["tokens"] < of_one["tokens"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_rank_holds_a_divided_model_whole(two_ranks: Path) -> None:
    """The file is bfloat16 and the model float32, so what is loaded is not a view of the file."""
    for rank in (0, 1):
        in_halves, whole = json.loads((two_ranks / f"peaks{rank}.json").read_text())
        assert in_halves < 0.7 * whole
        assert whole > 75e6


def require_exact(folder: Path, info: dict[str, Any], tuned: Exact, members: Sequence[ExactMember]) -> None:
    """Assert that weights, norms and losses in a folder of `everything` are those of a training in float64."""
    tuned.require(folder / "adapter", step=len(tuned.losses))
    require_losses([folder], tuned)
    for member in members:
        exact, steps = member.exact, len(member.plans[0])
        for epoch, (part, plan) in enumerate(zip(member.folders, member.plans, strict=True)):
            exact.require(folder / part, step=steps * (epoch + 1))
            during = np.empty_like(exact.norms[0])
            for step, rows in enumerate(plan, start=steps * epoch):
                during[rows] = exact.norms[step][rows]
            require_norms(folder / part, info[part], during)
        require_losses([folder / part for part in member.folders], exact)
    require_norms(folder / "norms", info["norms"], members[0].exact.norms[-1])


def require_losses(folders: Sequence[Path], exact: Exact) -> None:
    losses = [entry["loss"] for folder in folders for entry in read_curve(folder)]
    assert_close_by_norm(np.array(losses), np.array(exact.losses), k=128, dim=(), dtype=torch.float32)


def require_norms(folder: Path, info: dict[str, Any], exact: np.ndarray) -> None:
    table = read_norms([Artifact("norms", folder, "", {"info": info})])
    assert table["row"].tolist() == list(range(7))
    computed = np.stack([table[name] for name in COLUMNS], 1)
    known = exact > 1e-3  # before the first step B is zero, and so is the gradient of A
    assert (computed[~known] == 0).all()
    assert_close_by_norm(computed[known], exact[known], k=2048, dim=(), dtype=torch.float32)


def walks(folder: Path, end: str) -> None:
    """Walk three stages with a shared store and note what happened on this rank, which may fail."""
    parallel.join(DDP)
    store, events = SharedStore(folder / "store", lambda line: None), []

    def divided(part: Path) -> dict[str, Any]:
        events.append((parallel.size(), (part / "unfinished").is_dir(), part.parent.parent == store.root))
        passed(10 + parallel.rank())
        return {"rows": 1}

    def own(part: Path) -> dict[str, Any]:
        events.append(parallel.size())
        time.sleep(0.2)  # the other rank waits
        if end == "rank 0 fails":
            raise GradsiftError("the disk is full")
        return {"rows": 2}

    first = store.obtain("norms", "x", {}, [], divided, version=1, divided=True)
    tokens = first.info["forward_tokens"]
    try:
        second = store.obtain("score", "y", {}, [first], own, version=1)
        again = store.obtain("score", "y", {}, [first], lambda part: pytest.fail("it is there"), version=1)
    except RunEnded:
        return
    (folder / f"rank{parallel.rank()}").write_text(json.dumps([events, tokens, second.fingerprint, again.fingerprint]))
    if parallel.rank() == 1 and end == "rank 1 fails":
        raise GradsiftError("row 7 is not to be had")
    if parallel.rank() == 1:
        os._exit(3)
    parallel.gather({"rows": torch.zeros(1)}, 2)  # waits for rank 1


def test_rank_0_decides_makes_and_writes_and_the_others_follow(two_ranks: Path) -> None:
    """A divided stage is made by both ranks, the other one in a copy of the folder; any other by rank 0 alone."""
    first, second = (json.loads((two_ranks / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first == [[[2, True, True], 1], 21, second[2], second[2]]
    assert second == [[[2, True, False]], 21, second[2], second[2]]


def test_a_step_of_several_ranks_that_runs_out_of_memory_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tokens: int) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(GradsiftError, match=r"memory ran out with 64 tokens at once.*compute.tokens"):
        parallel.run(TokenBudget(64), fails, [3])


def test_the_signals_are_handled_as_before_the_ranks(two_ranks: Path) -> None:
    """Otherwise the next job of a sweep would take the closing of its terminal for an exception, and go on."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)]
    assert not [handler for handler in handlers if "torch" in getattr(handler, "__module__", "")]


def test_ranks_may_be_started_outside_of_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *what: lambda *given: {0: "value"})
    with ThreadPoolExecutor() as threads:
        assert threads.submit(on_all_ranks, DDP, pytest.fail).result() == "value"


def test_a_rank_that_is_told_to_end_twice_closes_its_run() -> None:
    """A batch system signals the rank, and so does the launcher, which it signals too."""
    closed = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            closed.append("run.json")

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(GradsiftError, match="the run was told to end"):
            _rank(work, ())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert closed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "message"), [("rank 0 fails", "the disk is full"), ("rank 1 fails", "row 7 is not to be had")]
)
def test_a_rank_that_fails_ends_the_run_with_its_reason(end: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GradsiftError) as failure:
        on_all_ranks(DDP, walks, tmp_path, end)
    assert str(failure.value) == message


def waits(note: Path) -> None:
    if os.environ["RANK"] == "1":
        note.write_text(str(os.getpid()))
    time.sleep(300)


def wait_in_two(folder: Path) -> None:
    on_all_ranks(DDP, waits, folder / "pid")


@pytest.mark.slow
def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=wait_in_two, args=(tmp_path,))
    process.start()
    note, deadline = tmp_path / "pid", time.monotonic() + 240
    while not note.exists() or not note.read_text():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.join()
    other = Path("/proc") / note.read_text()
    while other.exists() and "State:\tZ" not in (other / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


STATISTICS = (*SMOKE, "scorer=late_loss", "proxy.members=1", "stop_after=statistics")


@pytest.mark.slow
def test_a_sweep_on_two_ranks_finds_the_work_of_one_and_the_other_way_round(gradsift) -> None:
    """The number of ranks is in no fingerprint, so the statistics are shared; each job of a sweep starts its ranks."""
    assert gradsift("-m", *STATISTICS, "compute=ddp", "proxy.members=1,2") == 0
    made = [stage["name"] for run in gradsift.runs() for stage in run["stages"] if not stage["reused"]]
    assert made.count("member") == made.count("norms") == 4
    assert gradsift(*STATISTICS, "proxy.members=2") == 0
    assert not [stage for stage in gradsift.runs()[-1]["stages"] if not stage["reused"]]


def require_made_once(gradsift) -> None:
    """Assert that one run was written, that it made the statistics, and that a single process reuses them."""
    (run,) = gradsift.runs()
    made = [stage["name"] for stage in run["stages"] if not stage["reused"]]
    assert made.count("member") == made.count("norms") == 2
    assert gradsift(*STATISTICS) == 0
    assert not [stage for stage in gradsift.runs()[-1]["stages"] if not stage["reused"]]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_two_machines_share_the_work_and_the_first_one_writes(gradsift, tmp_path: Path) -> None:
    """Two processes on this machine, as `srun` would start them: the same command, another NODE_RANK."""
    options = ["compute=ddp", "compute.devices=1", "compute.num_nodes=2"]
    command = [sys.executable, str(REPOSITORY / "run.py"), *STATISTICS, *options]
    machines = []
    for node, port in enumerate([free_port()] * 2):
        shared = {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        folder = f"hydra.run.dir=outputs/both/node{node}"
        machines.append(subprocess.Popen([*command, folder], env={**os.environ, **shared}, cwd=tmp_path))
    assert [machine.wait(300) for machine in machines] == [0, 0]
    require_made_once(gradsift)


@pytest.mark.slow
def test_torchrun_may_start_the_ranks(gradsift, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(REPOSITORY / "run.py"), *STATISTICS, "compute=ddp"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    require_made_once(gradsift)


def test_torchrun_with_another_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"torchrun started 3 processes, but compute.devices=2"):
        on_all_ranks(DDP, pytest.fail, "it runs")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "NODE_RANK or GROUP_RANK or SLURM_NODEID does not give"),
        ({"NODE_RANK": "2"}, r"'2' is set"),
        ({"SLURM_NODEID": "1"}, "needs MASTER_ADDR"),
    ],
)
def test_a_machine_that_does_not_know_its_number_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        node_of(replace(DDP, num_nodes=2))


def test_ranks_need_a_strategy_and_are_part_of_what_masks_depend_on() -> None:
    with pytest.raises(ConfigError, match="take compute=ddp"):
        ComputeConfig(devices=2)
    assert ComputeConfig(tokens=64).mask_batches == 64
    assert replace(DDP, tokens=64).mask_batches == {"tokens": 64, "ranks": 2}
