"""Laws of identities: an artifact's fingerprint covers the options that its stage read, and the numerics that ran.

The options are recorded while a stage works, so nobody has to keep a list of them. Each option that was read is
changed, and the fingerprint must change with it.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from gradsift import config as config_package
from gradsift import pipeline, versions
from gradsift.artifacts import Artifact, NotMade, Store
from gradsift.composition import conf_folder, register_schemas
from gradsift.config import ComputeConfig, Config, ModelConfig, NanoConfig, load_config
from gradsift.data import tokens
from gradsift.errors import ConfigError, GradsiftError
from gradsift.gradients.statistics import statistics
from gradsift.manifests import MANIFEST
from gradsift.planning import Planner
from gradsift.runtime import Runtime, unseen
from gradsift.training.backbones import backbone, load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

DATACLASSES = [
    kind for kind in vars(config_package).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
]
# Options that a stage may read although they change no result.
WITHOUT_EFFECT = {
    "compute.device": "results agree between devices to 1e-6 in float32; attention and kernels are in the numerics",
    "compute.devices": "ranks share the work; the law of equal results is in test_ranks.py",
    "compute.num_nodes": "as compute.devices",
    "compute.strategy": "as compute.devices; what it changes of a model is in the numerics",
    "compute.tokens": "batches by budget; the law of equal results is in test_engine.py",
    "compute.kernels": "what it changes of a model is in the numerics",
    "proxy.model.dtype": "what it changes of a model is in the numerics",
    "target.model.dtype": "as proxy.model.dtype",
    "proxy.model.quantization": "as proxy.model.dtype",
    "target.model.quantization": "as proxy.model.dtype",
    "proxy.model.path": "read for messages; the content of a folder or of the hub's commit is in the identity",
    "target.model.path": "as proxy.model.path",
    "proxy.model.trust_remote_code": "of models from outside alone, in whose identity it is",
    "target.model.trust_remote_code": "as proxy.model.trust_remote_code",
    "compute.checkpointing": "computes activations again in the backward pass: test_probing.py",
    "data.scores": "a file, whose hash is in the identity: test_published.py",
    "stop_after": "where the run ends",
    "compute.save_every": "how often the state is saved",
    "compute.threads": "digits may depend on it; README says so",
    "benchmark.batch_size": "answers of a batch do not depend on each other: test_generation.py",
}
CHECKS_ROOM = {"features.checkpoints", "features.dimensions", "features.gradient_params"}  # read by a check of the disk
TINY = ("data.size=60", "data.benchmark_items=13", "target.steps=2", "features.dimensions=16")
TOWARDS = ("target_set=verifiable", "target_set.limit=2", "features.warmup.epochs=2")
LINES = {
    "gsnr": ("scorer=gsnr", "proxy.schedule=linear", "benchmark.general=[verifiable_terse]"),
    "bootstrap": ("scorer=late_loss", "proxy.ensemble=bootstrap", "stop_after=selection"),
    "mc_dropout": ("scorer=gsnr", "proxy.ensemble=mc_dropout", "proxy.lora.dropout=0.1", "stop_after=selection"),
    "during_training": ("scorer=gsnr", "proxy.collect=during_training", "stop_after=selection"),
    "directions": ("scorer=gsnr_direction", "stop_after=selection"),
    "contrast": ("scorer=contrast", "scorer.neighbours=20", "stop_after=selection"),
    "grads": ("method=grads", "embedder=hidden_states", "stop_after=selection"),
    "less": ("method=less", *TOWARDS, "stop_after=selection"),
    "g2is": ("method=g2is", *TOWARDS, "stop_after=selection"),
    "superfiltering_d": ("method=superfiltering_d", "embedder=hidden_states", "stop_after=selection"),
    "rds_plus": ("method=rds_plus", *TOWARDS, "stop_after=selection"),
    "length": ("scorer=length", "scorer.unit=tokens", "stop_after=selection"),
    "deita": ("method=deita", "embedder=hidden_states", "stop_after=selection"),
    "audit": ("scorer=random", "audit.enabled=true", "audit.alphas=[0.2]", "stop_after=selection"),
}


STAGES = {  # of which a unit must have been seen at work
    "gsnr": {"load", "backbone", "member", "norms", "finetune", "generate", "judge", "pws"},
    "bootstrap": {"member", "norms"},
    "mc_dropout": {"member", "norms"},
    "during_training": {"member"},
    "directions": {"direction"},
    "contrast": {"losses"},
    "grads": {"embedding_gradients"},
    "less": {"warmup", "features", "target_set"},
    "g2is": {"warmup", "features", "target_set"},
    "superfiltering_d": {"score", "embeddings"},
    "rds_plus": {"embeddings"},
    "length": {"score"},
    "deita": {"score", "embeddings"},
    "audit": {"load"},
}


def composed(*overrides: str) -> Config:
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return load_config(compose("config", overrides=[*SMOKE, *TINY, *overrides]))


class Recorder:
    """Records the options that each unit of work reads: {"member/m0-e1-...": {"proxy.learning_rate", "seed"}}."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: dict[str, set[str]] = defaultdict(set)
        self._units: list[str] = []  # at work, the innermost last
        self._paths: dict[int, str] = {}
        self._name(config, "")
        for kind in DATACLASSES:
            self._watch(kind, {field.name for field in dataclasses.fields(kind)}, monkeypatch)
        self._watch(Runtime, {"seed"}, monkeypatch)
        monkeypatch.setattr(Store, "_make", self._within(Store._make))

    def _name(self, value: Any, path: str) -> None:
        self._paths[id(value)] = path
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner):
                self._name(inner, f"{path}{field.name}.")

    def _watch(self, kind: type, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
        plain = kind.__getattribute__

        def watched(instance: Any, name: str) -> Any:
            value = plain(instance, name)
            if name in names and self._units and not isinstance(value, dict) and not dataclasses.is_dataclass(value):
                path = "" if kind is Runtime else self._paths.get(id(instance))
                if path is not None:
                    self.reads[self._units[-1]].add(path + name)
            return value

        monkeypatch.setattr(kind, "__getattribute__", watched)

    def _within(self, make: Any) -> Any:
        def made(store: Store, wanted: Artifact, *arguments: Any) -> Artifact:
            self._units.append(str(wanted.path))
            try:
                result: Artifact = make(store, wanted, *arguments)
            finally:
                self._units.pop()
            return result

        return made


class Silent:
    """A display that shows nothing."""

    task = staticmethod(unseen)

    @staticmethod
    def say(text: str) -> None:
        return None


def walk(config: Config, store: Store) -> None:
    pipeline.walk(config, Runtime(store, config.compute, Silent(), config.seed))  # type: ignore[arg-type]


def units_of(config: Config, root: Path) -> set[str]:
    """Return the folders of the units that a run with this config would ask for, without making them."""
    planner = Planner(root, lambda line: None)
    with suppress(NotMade):  # what follows reads something that is not made
        walk(config, planner)
    return {unit["artifact"] for unit in planner.units.values()}


OTHER_WORDS = {
    "constant": "linear",
    "linear": "constant",
    "bucketed": "random",
    "random": "bucketed",
    "alpaca": "plain",
    "nano": "tiny_bytes",
    "gpt2": "llama",
    "llama": "gpt2",
    "float32": "bfloat16",
    "auto": "bfloat16",
    "epoch_end": "during_training",
    "during_training": "epoch_end",
    "lora_seeds": "bootstrap",
    "bootstrap": "lora_seeds",
    "mc_dropout": "bootstrap",
}


def other_value(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.75 if value else 0.25
    if isinstance(value, str):
        return OTHER_WORDS.get(value, f"{value}_other")
    if isinstance(value, list):
        return [*value[:-1], other_value(value[-1])] if value else [1]
    if value is None:
        return 50
    raise TypeError(f"no other value is known for a {type(value).__name__}")


def changed(config: Config, path: str) -> Config:
    """Return the config with another value at `path`, unchecked, because only its identities matter."""
    other = copy.deepcopy(config)
    *groups, name = path.split(".")
    holder: Any = other
    for group in groups:
        holder = getattr(holder, group)
    object.__setattr__(holder, name, other_value(getattr(holder, name)))
    return other


def uncovered(config: Config, root: Path, reads: dict[str, set[str]]) -> dict[str, list[str]]:
    """Return for each unit the options that it reads and whose change does not change its identity."""
    missing = defaultdict(list)
    for path in sorted({path for paths in reads.values() for path in paths} - set(WITHOUT_EFFECT)):
        try:
            after = units_of(changed(config, path), root)
        except ConfigError:
            assert path.endswith((".name", ".kind", ".tasks")), path  # another model, judge or family does not fit
            continue
        for unit, paths in reads.items():
            stage = Path(unit).parent.name
            tries_target = stage in ("member", "norms") and path.startswith(
                "target."
            )  # its adapter, before anything trains
            checked_only = tries_target or (stage == "warmup" and path in CHECKS_ROOM)
            if path in paths and unit in after and not checked_only:
                missing[unit].append(path)
    return dict(missing)


def reads_of_a_unit_of_each_stage(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch, stages: set[str] | None
) -> dict[str, set[str]]:
    """Make everything, then one unit of each of `stages` (None: of all) again by itself, and return what each reads.

    A unit is made again by itself, so that it reads what several stages share in memory.
    """
    walk(config, Store(root, lambda line: None))
    recorder = Recorder(config, monkeypatch)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name != "downloads")
    for stage in [path for path in folders if stages is None or path.name in stages]:
        unit = max(stage.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        if (unit / MANIFEST).is_file():
            shutil.rmtree(unit)
            walk(config, Store(root, lambda line: None))
    monkeypatch.undo()
    return recorder.reads


OFTEN = ("gsnr", "directions", "grads", "less", "rds_plus", "length")  # the other lines are slow tests


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[] if line in OFTEN else pytest.mark.slow) for line in LINES]
)
def test_every_option_that_a_stage_reads_is_in_its_identity(
    line: str, tmp_path: Path, backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(backbones, tmp_path / "store")
    config = composed(*LINES[line], f"artifacts={tmp_path / 'store'}")
    # the line `gsnr` covers the stages that all lines share
    stages = None if line == "gsnr" else STAGES[line] | {"overlap", "score", "select", "statistics"}
    reads = reads_of_a_unit_of_each_stage(config, tmp_path / "store", monkeypatch, stages)
    assert {Path(unit).parent.name for unit in reads} >= STAGES[line]
    assert uncovered(config, tmp_path / "store", reads) == {}


@pytest.mark.parametrize(("schedule", "shared"), [("constant", True), ("linear", False)])
def test_members_of_two_lengths_of_training_are_shared_only_at_a_constant_rate(
    schedule: str, shared: bool, tmp_path: Path, backbones: Path
) -> None:
    shutil.copytree(backbones, tmp_path / "store")
    members = []
    for epochs in (2, 3):
        options = ("scorer=late_loss", f"proxy.schedule={schedule}", f"proxy.epochs={epochs}", "stop_after=scores")
        units = units_of(composed(*options), tmp_path / "store")
        members.append({Path(unit).name for unit in units if Path(unit).parent.name == "member"})
    assert members[0]
    assert bool(members[0] & members[1]) is shared


ENCODING_STAGES = {
    "gsnr": {"member", "norms", "finetune", "heldout", "reference_loss"},
    "less": {"warmup", "features"},
    "rds_plus": {"embeddings"},
    "perplexity": {"score"},
}


@pytest.mark.parametrize("line", ENCODING_STAGES)
def test_artifacts_made_from_other_tokens_are_not_used(
    line: str, tmp_path: Path, backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(backbones, tmp_path / "store")
    config = composed(*LINES.get(line, (f"scorer={line}", "stop_after=selection")))
    units = []
    for encoding in (tokens.ENCODING, tokens.ENCODING + 1):
        monkeypatch.setattr(tokens, "ENCODING", encoding)
        asked_for = units_of(config, tmp_path / "store")
        units.append({unit for unit in asked_for if Path(unit).parent.name in ENCODING_STAGES[line]})
    assert {Path(unit).parent.name for unit in units[0]} == ENCODING_STAGES[line]
    assert not units[0] & units[1]


# ------------------------------------------------------------------------------------------- numerics


def runtime_with(store: Store, **compute: Any) -> Runtime:
    return Runtime(store, ComputeConfig(device="cpu", **compute), Silent(), 0)  # type: ignore[arg-type]


NANO = ModelConfig(kind="nano", nano=NanoConfig(architecture="gpt2", steps=2, batch_size=4))


def child_of(store: Store, model: Artifact) -> Artifact:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "result.txt").write_text("x")
        return {"rows": 1}

    return store.obtain("member", "m0-e1", {"seed": 0}, [model], make, version=1)


def test_artifacts_of_other_numerics_are_named_and_not_used(tmp_path: Path) -> None:
    lines: list[str] = []
    store = Store(tmp_path, lines.append)
    half = backbone(runtime_with(store, precision="bfloat16"), NANO)
    other = dataclasses.replace(half, numerics=half.numerics | {"kernels": "0123456789ab"})  # of another machine
    first, second = child_of(store, other), child_of(store, half)
    assert first.fingerprint != second.fingerprint
    (line,) = [line for line in lines if "is not used" in line]
    assert first.path.name in line
    assert "kernels=0123456789ab (here kernels=off)" in line  # nano models are too small for the kernels of any machine
    assert child_of(store, half).fingerprint == second.fingerprint  # reused without another line
    assert len([line for line in lines if "is not used" in line]) == 1


def test_artifacts_computed_from_a_model_record_its_numerics(tmp_path: Path) -> None:
    store = Store(tmp_path, lambda line: None)
    model = backbone(runtime_with(store), NANO)
    child = child_of(store, model)
    grandchild = store.obtain("norms", "m0-e1", {}, [child], lambda folder: {"rows": 1}, version=1)
    assert grandchild.computed_by == child.computed_by == {model.path.name: dict(model.numerics)}
    assert model.numerics["precision"] == "float32"


def test_an_ensemble_of_two_numerics_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, lambda line: None)
    members = [
        [child_of(store, backbone(runtime_with(store, precision=precision), NANO))]
        for precision in ("float32", "bfloat16")
    ]
    with pytest.raises(GradsiftError, match="norms of one ensemble must be computed alike"):
        statistics(runtime_with(store), members, members, (1, 2), "all", 1)


def test_a_model_whose_numerics_differ_from_its_identity_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, lambda line: None)
    model = backbone(runtime_with(store), NANO)
    with pytest.raises(GradsiftError, match="would be stored as computed with"):
        load_backbone(model, NANO, ComputeConfig(device="cpu", precision="bfloat16"))


def test_the_hash_of_the_code_covers_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gradsift"
    shutil.copytree(Path(versions.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    hashes = set()
    for edit in ("", "// edited"):
        source = package / "cpu" / "kernels.cpp"
        source.write_text(source.read_text(encoding="utf-8") + edit, encoding="utf-8")
        hashes.add(versions.code_hash.__wrapped__())
    assert len(hashes) == 2
