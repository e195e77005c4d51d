"""Does the fast suite notice a changed line? A sample of mutmut's mutants, each run against the tests of its line.

    python experiments/2026-11-29-mutants/mutants.py map      # which test passes which line, and how long it takes
    python experiments/2026-11-29-mutants/mutants.py run      # draw the sample and run what has no outcome yet
    python experiments/2026-11-29-mutants/mutants.py named  # four changes by name against their laws
    python experiments/2026-11-29-mutants/mutants.py again  # run the survivors anew: the module's tests, or --tests

It works in a copy of the tree (`--work`), never in the checkout, and goes on from mutants.csv. The process imports
torch and the other packages once, but nothing of this project, and forks for each mutant: a start takes no seconds.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import csv
import difflib
import functools
import importlib
import json
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.file_mutation import Mutation, MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "mutants.csv"
TARGETS = ("gradients", "scoring", "selection", "proxy", "evaluation/pws.py", "artifacts.py")
SEED = 13
SIZE = 330
ARGUMENTS = 0.4  # of the sample: call arguments left out or None, more than half of all, mostly crash
TESTS = (  # nearest first
    *("pws", "selection", "selectors", "scores", "length", "cherry", "per_sample", "norms", "grads", "gradient_scores"),
    *("selection_clusters", "selection_facility_location", "selection_gradient_walk", "selection_gumbel"),
    *("selection_repr_filter", "selection_round_robin", "similarity", "superfilter", "llm_rating", "perplexity"),
    *("artifacts", "trajectory", "embedding_head", "gradient_features", "score_stage", "ensembles", "diagnostics"),
    *("target_set", "laws", "save_point", "shards", "journal", "disk", "concurrency", "cost", "planning", "pipeline"),
    *("neighbours", "embeddings", "outside_json", "paper_tables", "identity", "every_method", "audit", "ranks"),
    *("long_texts", "engine", "corruption", "experiments", "backbones", "export", "world", "scale", "sweep"),
)
FIRST_SECONDS = 20  # of the tests that `run` chooses, by their times without a mutant
LIMIT = 600  # seconds for one mutant
NEAREST = {  # test files of a module, which `again` runs whole
    "artifacts": ("artifacts", "shards", "cost", "disk", "planning"),
    "gradients/adam": ("per_sample",),
    "gradients/callback": ("norms", "finetuning", "ensembles"),
    "gradients/diagnostics": ("diagnostics",),
    "gradients/directions": ("gradient_scores", "gradient_features"),
    "gradients/embedding_head": ("embedding_head",),
    "gradients/norms_table": ("shards",),
    "gradients/per_sample": ("per_sample",),
    "gradients/projection": ("per_sample", "gradient_features"),
    "gradients/statistics": ("scores", "shards"),
    "proxy": ("trajectory", "ensembles", "finetuning", "shards", "save_point"),
    "scoring/agreement": ("gradient_scores",),
    "scoring/full": ("scores",),
    "scoring/g2is": ("gradient_scores",),
    "scoring/gsnr": ("scores", "gradient_scores", "diagnostics"),
    "scoring/gsnr_direction": ("gradient_scores",),
    "scoring/late_loss": ("scores",),
    "scoring/less": ("gradient_scores",),
    "scoring/random": ("scores",),
    "scoring/spans": ("cherry", "superfilter", "long_texts"),
    "scoring/spread": ("similarity",),
    "scoring/stage": ("score_stage", "journal"),
    "selection/budget": ("selection", "selection_clusters"),
    "selection/candidates": ("selectors",),
    "selection/clusters": ("selection_clusters", "selectors"),
    "selection/core_knowledge": ("selection_gradient_walk",),
    "selection/diagnostics": ("diagnostics",),
    "selection/products": ("selectors",),
    "selection/stage": ("score_stage", "audit"),
    "selection/topk": ("selectors",),
}
NAMED = (  # changes that the suite once let live: file, before, after, and the law that is to notice
    ("proxy/ensemble.py", '"scheduled_epochs": None if config.schedule == "constant" else config.total_epochs,', "",
     "test_identity.py::test_members_of_two_lengths_of_training_are_shared_only_at_a_constant_rate"),
    ("config/models.py", "learning_rate: float = 5e-5", "learning_rate: float = 5e-4",
     "test_laws.py::test_the_proxys_hyperparameters_are_the_papers"),
    ("config/models.py", "learning_rate: float = 2e-4", "learning_rate: float = 2e-5",
     "test_laws.py::test_the_targets_recipe_is_as_documented"),
    ("line.py", "early, late = (self.norms", "late, early = (self.norms",
     "test_laws.py::test_scores_are_eq_5_of_the_norm_files_with_g_s_early_and_g_t_and_v_t_late"),
)  # fmt: skip
PRELOADED = (
    "torch", "lightning", "peft", "datasets", "hydra", "sklearn.cluster", "scipy.stats", "safetensors.torch", "wandb",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "transformers.trainer_utils",
    "pyarrow.parquet", "pyarrow.compute", "pytest", "hypothesis", "hypothesis.extra.numpy", "tokenizers", "yaml",
    "jinja2", "rich.progress", "filelock", "openai", "matplotlib.pyplot", "coverage", "torch._dynamo",
)  # fmt: skip


@dataclass
class Mutant:
    """One change of one file, and what became of it."""

    file: str  # in src/gradsift
    line: int
    before: str
    after: str
    outcome: str = ""  # killed, survived or equivalent
    by: str = ""  # the first test that failed, or why the mutant is equivalent
    tests: int = 0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.file, self.line, self.before, self.after


# ------------------------------------------------------------------------------------------- the sample


class EveryFunction(MutationVisitor):
    """mutmut's visitor, which passes decorated functions too: the file is changed in place, without trampolines."""

    METADATA_DEPENDENCIES = (*MutationVisitor.METADATA_DEPENDENCIES, ParentNodeProvider)

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            return False
        if isinstance(node, cst.Raise) or (isinstance(node, cst.Call) and _name(node.func) in ("say", "warn")):
            return True  # messages
        return bool(super()._skip_node_and_children(node))

    def _should_mutate_node(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.SimpleString) and " " in node.value:
            return False  # a sentence
        return bool(super()._should_mutate_node(node))


def _name(function: cst.BaseExpression) -> str:
    if isinstance(function, cst.Attribute):
        return str(function.attr.value)
    return str(function.value) if isinstance(function, cst.Name) else ""


def mutations_of(file: Path) -> Iterator[tuple[bool, Callable[[], tuple[Mutant, str]]]]:
    """For each of a file's mutants whether it is one of a call's arguments, and what makes it and the mutated text."""
    text = file.read_text(encoding="utf-8")
    visitor = EveryFunction(mutation_operators, IgnoredCode(set(), set(), set()))
    wrapper = MetadataWrapper(cst.parse_module(text))
    module = wrapper.visit(visitor)
    positions, parents = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider)
    name = file.relative_to(ROOT / "src/gradsift").as_posix()

    def made(mutation: Mutation) -> tuple[Mutant, str]:
        node = mutation.original_node
        mutated = module.deep_replace(node, mutation.mutated_node).code  # type: ignore[union-attr]
        place = positions.get(node) or positions[parents[node]]
        return Mutant(name, place.start.line, *_changed(text, mutated)), mutated

    for mutation in visitor.mutations:
        yield isinstance(mutation.original_node, cst.Call), functools.partial(made, mutation)


def _changed(text: str, mutated: str) -> tuple[str, str]:
    """The lines that differ, joined."""
    lines = list(difflib.unified_diff(text.splitlines(), mutated.splitlines(), n=0, lineterm=""))[3:]
    return tuple(" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")  # type: ignore[return-value]


def sample() -> list[tuple[Mutant, str]]:
    """The mutants to run, in a random order, with the mutated texts."""
    kinds: dict[bool, list[Callable[[], tuple[Mutant, str]]]] = {True: [], False: []}
    for target in TARGETS:
        path = ROOT / "src/gradsift" / target
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            for is_argument, make in mutations_of(file):
                kinds[is_argument].append(make)
    rng = random.Random(SEED)
    count = round(SIZE * ARGUMENTS)
    chosen = rng.sample(kinds[True], count) + rng.sample(kinds[False], SIZE - count)
    rng.shuffle(chosen)
    print(f"{len(kinds[True])} mutants of arguments, {len(kinds[False])} others; {len(chosen)} drawn", flush=True)
    return [make() for make in chosen]


# ------------------------------------------------------------------------------------------- a run of tests


class Watch:
    """A pytest plugin: writes how long each test took, and the first that failed; tells `coverage` which test runs."""

    def __init__(self, report: Path, coverage: Any = None) -> None:
        self._report, self._coverage = report, coverage
        self._seconds: dict[str, float] = defaultdict(float)
        self._failed: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self._coverage is not None:
            self._coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            self._failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed.append(f"{report.nodeid} (collection)")

    def pytest_sessionfinish(self) -> None:
        self._report.write_text(json.dumps({"seconds": self._seconds, "failed": self._failed}))


def forked(work: Path, seconds: float, body: Callable[[], int]) -> int | None:
    """The exit code of `body` in a process of its own in the copied tree; None if it took longer than `seconds`."""
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            log = os.open(work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(work / "tree")
            sys.path[:0] = [str(work / "tree/src"), str(work / "tree")]
            code = int(body())
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it left running
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_tests(work: Path, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """Outcome, and the first test that failed."""
    report = work / "report.json"
    report.unlink(missing_ok=True)

    def body() -> int:
        import pytest

        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={work / 'tmp'}"]
        return pytest.main([*options, *tests], plugins=[Watch(report)])

    code = forked(work, seconds, body)
    if code == 0:
        return "survived", ""
    if code in (4, 5):
        raise SystemExit(f"pytest did not find some of {tests}; map their files again")
    if code is None:
        return "killed", "time limit"
    if code == 70 or not report.exists():
        return "killed", f"the process ended with {code}"
    return "killed", (json.loads(report.read_text())["failed"] or [f"pytest ended with {code}"])[0]


def copy_tree(work: Path) -> None:
    """A fresh copy of the checkout; its compiled files are valid by content, since a mutant may not change a size."""
    shutil.rmtree(work / "tree", ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", "mutants.csv")
    shutil.copytree(ROOT, work / "tree", ignore=ignored)
    checked = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(work / "tree/src", quiet=1, invalidation_mode=checked)


# ------------------------------------------------------------------------------------------- which tests


def make_map(work: Path, names: Sequence[str]) -> None:
    """Add to the map which tests pass which line of the targets, from one run of each test file."""
    path = work / "map.json"
    known = json.loads(path.read_text()) if path.exists() else {"lines": {}, "seconds": {}}
    lines, seconds = known["lines"], known["seconds"]
    for file in (work / f"tree/tests/test_{name}.py" for name in names):
        began = time.monotonic()
        (work / "report.json").unlink(missing_ok=True)
        code = forked(work, 600, lambda file=file: _traced(work, file))
        report = json.loads((work / "report.json").read_text())
        print(f"{file.name}: {code}, {time.monotonic() - began:.0f} s, failed: {report['failed']}", flush=True)
        seconds |= {test: taken for test, taken in report["seconds"].items() if test not in report["failed"]}
        for by_line in lines.values():  # what the map said of this file before its tests were mended
            for line, tests in by_line.items():
                by_line[line] = [test for test in tests if not test.startswith(f"tests/{file.name}::")]
        for name, by_line in json.loads((work / "lines.json").read_text()).items():
            for line, tests in by_line.items():
                lines.setdefault(name, {}).setdefault(line, []).extend(test for test in tests if test in seconds)
        (work / "map.json").write_text(json.dumps(known))


def _traced(work: Path, file: Path) -> int:
    import coverage
    import pytest

    source = [str(work / "tree/src/gradsift" / target) for target in TARGETS]
    include = [f"{path}/*" if not path.endswith(".py") else path for path in source]
    tracer = coverage.Coverage(data_file=None, include=include)
    tracer.start()
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={work / 'tmp'}"]
    code = pytest.main([*options, str(file.relative_to(work / "tree"))], plugins=[Watch(work / "report.json", tracer)])
    tracer.stop()
    data = tracer.get_data()
    found = {
        Path(name).relative_to(work / "tree/src/gradsift").as_posix(): {
            str(line): [test for test in tests if test] for line, tests in data.contexts_by_lineno(name).items()
        }
        for name in data.measured_files()
    }
    (work / "lines.json").write_text(json.dumps(found))
    return int(code)


def _in_function(mutant: Mutant) -> bool:
    """Whether its line runs when a function is called, and not when the module is imported."""
    tree = ast.parse((ROOT / "src/gradsift" / mutant.file).read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return any(node.body[0].lineno <= mutant.line <= (node.end_lineno or 0) for node in functions)


def tests_of(mutant: Mutant, known: dict[str, Any]) -> list[str]:
    """The tests that pass the mutant's line (at module level: its file), nearest and quickest first."""
    by_line, seconds = known["lines"].get(mutant.file, {}), known["seconds"]
    statement = max((int(line) for line in by_line if int(line) <= mutant.line and by_line[line]), default=0)
    passing = set(by_line.get(str(mutant.line), ()) or by_line.get(str(statement), ()))
    if not passing or not _in_function(mutant):
        passing = {test for tests in by_line.values() for test in tests}

    def order(test: str) -> tuple[bool, float]:
        return Path(mutant.file).stem not in test.split("::")[0], seconds[test]

    found, total = [], 0.0
    for test in sorted(passing, key=order):
        total += seconds[test] + 0.01
        if total <= FIRST_SECONDS:
            found.append(test)
    return found


def files_of(mutant: Mutant) -> list[str]:
    """The test files of its module."""
    name = mutant.file.removesuffix(".py")
    own = (Path(name).name, f"selection_{Path(name).name}")
    words = next((NEAREST[key] for key in (name, name.split("/")[0]) if key in NEAREST), own)
    found = [f"tests/test_{word}.py" for word in words if (ROOT / f"tests/test_{word}.py").exists()]
    if not found:
        raise SystemExit(f"NEAREST names no tests of {name}")
    return found


# ------------------------------------------------------------------------------------------- the work


def read_results() -> dict[tuple[str, int, str, str], Mutant]:
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="", encoding="utf-8") as stream:
        rows = [Mutant(**{**row, "line": int(row["line"])}) for row in csv.DictReader(stream)]
    return {row.key: row for row in rows}


def write_results(results: Sequence[Mutant]) -> None:
    with RESULTS.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Mutant)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(mutant) for mutant in sorted(results, key=lambda mutant: mutant.key))


def run(work: Path, again: bool, files: Sequence[str], named: Sequence[str]) -> None:
    path = work / "map.json"
    known = json.loads(path.read_text()) if path.exists() else None
    results = read_results()
    for number, (mutant, text) in enumerate(sample(), 1):
        before = results.get(mutant.key)
        if before is not None and not (again and before.outcome == "survived"):
            continue
        if files and not any(file in f"{mutant.file}:{mutant.line}" for file in files):
            continue
        file = work / "tree/src/gradsift" / mutant.file
        original = file.read_bytes()
        began = time.monotonic()
        try:
            file.write_text(text, encoding="utf-8")
            tests = list(named) or (tests_of(mutant, known) if known and not again else files_of(mutant))
            mutant.outcome, mutant.by = run_tests(work, tests, LIMIT)
            mutant.tests = len(tests)
        finally:
            file.write_bytes(original)
        mutant.seconds = round(time.monotonic() - began, 1)
        results[mutant.key] = mutant
        write_results(list(results.values()))
        print(f"{number} {mutant.outcome} {mutant.seconds} s {mutant.file}:{mutant.line} {mutant.by}", flush=True)
        if mutant.outcome == "survived":
            print(f"    - {mutant.before}\n    + {mutant.after}   ({mutant.tests} tests)", flush=True)


def run_named(work: Path) -> None:
    for name, before, after, law in NAMED:
        file = work / "tree/src/gradsift" / name
        original = file.read_text(encoding="utf-8")
        if original.count(before) != 1:
            raise SystemExit(f"{name} no longer has one line {before!r}")
        file.write_text(original.replace(before, after), encoding="utf-8")
        outcome, by = run_tests(work, [f"tests/{law}"], 600)
        file.write_text(original, encoding="utf-8")
        print(f"{name}: {before} -> {after or 'nothing'}: {outcome} {by}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("map", "run", "again", "named"))
    parser.add_argument("names", nargs="*", help="tests to map, such as `laws`, or files to mutate; all by default")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gradsift-mutants")
    parser.add_argument(
        "--tests", nargs="+", default=(), help="in place of those of the map, such as tests/test_laws.py"
    )
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {  # as tests/conftest.py sets them before the packages are imported
        "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(work / "tree/src"), "CI": "true",
    }  # fmt: skip
    copy_tree(work)
    for name in PRELOADED:
        importlib.import_module(name)
    if options.step == "map":
        make_map(work, options.names or TESTS)
    elif options.step == "named":
        run_named(work)
    else:
        run(work, options.step == "again", options.names, options.tests)


if __name__ == "__main__":
    main()
