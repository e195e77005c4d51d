"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import ipaddress
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsing import browser  # noqa: F401 - a fixture
from composing import compose_from_memory
from endpoint import Endpoint, serving
from filelock import FileLock

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "TOKENIZERS_PARALLELISM": "false",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; before torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process of the tests compiles everything anew
sys.dont_write_bytecode = False
collect_ignore = []
if os.environ.get("GRADSIFT_KERNELS") == "off":  # as on a machine without a compiler, for subprocesses too
    os.environ["CXX"] = "no-compiler"
    collect_ignore = ["test_cpu.py"]
compose_from_memory()
SMOKE = ("experiment=smoke", "tracker=none", "compute.threads=1", "report=false")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than cores, because tests wait: for servers, processes, locks and the browser."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS lacks it
    return cores + 1


# They take longest and wait for processes: begun last, they would leave the other workers idle.
FIRST = ["test_concurrency.py", "test_ranks.py", "test_cuda_paths.py", "test_figures.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude modules and tests, which stay for the whole session, from garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def byte_tokenizer() -> Any:
    """Return a byte-level tokenizer with the special tokens <pad>, <eos> and ChatML's two, and a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails any connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise AssertionError(f"a test tried to reach {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one torch thread, so that bytes do not depend on the machine and no test waits for a second core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` fills once for the whole session; xdist's workers wait for the first and share it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the two nano backbones of `experiment=smoke`. Tests must not write to it."""

    def make(folder: Path) -> None:
        import torch

        from gradsift.artifacts import Store
        from gradsift.config import ComputeConfig, ModelConfig, NanoConfig
        from gradsift.runtime import Display, Runtime
        from gradsift.training.backbones import backbone

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a model gains nothing from two threads
        runtime = Runtime(Store(folder / "store"), ComputeConfig(), Display(), seed=0)
        for architecture in ("gpt2", "llama"):
            backbone(runtime, ModelConfig(kind="nano", nano=NanoConfig(architecture=architecture, steps=20)))
        torch.set_num_threads(threads)

    return made_once(tmp_path_factory, "backbones", make) / "store"


_adaptable: set[tuple[Any, ...]] = set()


def adaptable_once(model: Any, config: Any, option: str, *, norms: bool) -> None:
    """Try an adapter only on the first model of its kind in this process; `test_probing.py` tests the trial itself."""
    from gradsift.training.probing import require_adaptable

    kinds = tuple(sorted({f"{type(module)}" for module in model.modules()}))
    tried = (model.config.to_json_string(), str(model.dtype), kinds, repr(config), norms)
    if tried not in _adaptable:
        require_adaptable(model, config, option, norms=norms)
        _adaptable.add(tried)


class Cli:
    """Runs the command line in this process; `store` and `folder` are the test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.store = folder / "store"
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str) -> int:
        """Return the exit code of `python run.py ARGUMENTS`."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra._internal.hydra import Hydra
        from hydra.core.global_hydra import GlobalHydra

        from gradsift import cli, inputs
        from gradsift.training import target
        from gradsift.training.probing import require_adaptable

        experiments = [argument for argument in arguments if "experiment=" in argument]
        if experiments in ([], ["experiment=smoke"]):  # these set no hydra.mode, and looking for one composes it all
            self._monkeypatch.setattr(Hydra, "get_mode", lambda *given, **named: None)

        # gradsift has composed every job of a sweep before Hydra does so again here, which takes 0.2 s per job
        self._monkeypatch.setattr(BasicSweeper, "validate_batch_is_legal", lambda sweeper, batch: None)
        for module in (inputs, target):
            if module.require_adaptable is require_adaptable:  # else the test has something of its own there
                self._monkeypatch.setattr(module, "require_adaptable", adaptable_once)
        GlobalHydra.instance().clear()
        self._monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        self._monkeypatch.setattr(cli, "_failed", False)
        self._monkeypatch.setenv(cli.TRACE, "0")  # main sets it: this puts it back
        try:
            cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    def runs(self) -> list[dict[str, Any]]:
        """Return every `run.json` below the folder, oldest first."""
        files = [*self.folder.glob("outputs/*/*/run.json"), *self.folder.glob("multirun/*/*/*/run.json")]
        return [json.loads(file.read_text()) for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]


def cli_in(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return the command line in `folder`, with a copy of `store`."""
    shutil.copytree(store, folder / "store")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GRADSIFT_ARTIFACTS", str(folder / "store"))
    return Cli(folder, monkeypatch)


@contextmanager
def cli_on_one_thread(folder: Path, store: Path) -> Iterator[Cli]:
    """As `cli_in`, for session fixtures, on one thread, because such small models gain nothing from two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield cli_in(folder, store, monkeypatch)
    torch.set_num_threads(threads)


@pytest.fixture
def gradsift(tmp_path: Path, backbones: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in an empty folder, with a store of its own that already has the nano backbones."""
    return cli_in(tmp_path, backbones, monkeypatch)


@pytest.fixture(scope="session")
def smoke_store(tmp_path_factory: pytest.TempPathFactory, backbones: Path) -> Path:
    """A store with the finished smoke runs of gsnr and of random. Tests must not write to it."""

    def make(folder: Path) -> None:
        with cli_on_one_thread(folder, backbones) as run:
            assert run("-m", *SMOKE, "scorer=gsnr,random") == 0

    return made_once(tmp_path_factory, "smoke", make) / "store"


@pytest.fixture
def after_smoke(tmp_path: Path, smoke_store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in an empty folder, with a store of its own in which the smoke run is done."""
    return cli_in(tmp_path, smoke_store, monkeypatch)


JOBS = {  # of `report_sweep`: what each adds to the smoke run
    "0-gsnr-0.1": ("scorer=gsnr", "seed=0"),
    "1-raw_drop-0.1": ("scorer=gsnr_raw_drop", "seed=0"),
    "2-random-0.1": ("scorer=random", "seed=0"),
    "3-gsnr-0.1": ("scorer=gsnr", "seed=1"),
    "4-members": ("scorer=gsnr", "seed=0", "proxy.members=2"),
    "5-failed": ("scorer=gsnr", "seed=0", "alpha=0.001"),
}


@pytest.fixture(scope="session")
def report_sweep(tmp_path_factory: pytest.TempPathFactory, backbones: Path) -> Path:
    """The folder of a sweep, one of whose jobs failed, with its store beside it. Tests must not write to it."""

    def make(folder: Path) -> None:
        with cli_on_one_thread(folder, backbones) as run:
            for name, overrides in JOBS.items():
                audit = ("proxy.members=3", "audit.enabled=true", "audit.alphas=[0.1,0.2]")
                code = run(*SMOKE, *audit, *overrides, f"hydra.run.dir=sweep/{name}")
                assert code == (2 if name == "5-failed" else 0)

    return made_once(tmp_path_factory, "report", make) / "sweep"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A chat endpoint on this machine, and no key in the environment."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with serving() as ours:
        yield ours
