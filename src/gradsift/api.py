"""The Python API: row selection without the command line. Import `select`, `Selection` and `gsnr` from `gradsift`."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.composition import compose_config, conf_folder, quoted
from gradsift.config.checks import in_range
from gradsift.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from gradsift.artifacts import Artifact
    from gradsift.config import Config
    from gradsift.line import Line

_REFUSED = {  # options that `select` does not accept, and what to do instead
    "data": "the rows are the first argument",
    "data__path": "the rows are the first argument",
    "stop_after": "select() always ends at the selection",
    "plan": "a plan is made by the command line alone",
    "experiment": "give its options one by one",
    "hydra": "there is no Hydra application here",
    "export": "select() returns the rows; the command line writes them for other tools",
}


@dataclass(frozen=True, repr=False)
class Selection:
    """The result of `select`: the kept rows, and the scores and diagnostics of the run.

    Attributes:
        kept: The K selected rows with their original columns, best first.
        indices: (K,) int64, the positions of the kept rows among the rows given to `select`, best first.
        scores: One row for each input row that could be selected: one that was neither rejected nor left out by options
            such as `data__limit`. Columns: `row_index`, `example_id`, `score` (higher is better), a column for each
            part of the score, `status` (`scored`, `undefined` or `excluded`), `reason`, and `selected`.
        rejected: One row for each input row that was rejected, with the columns `row_index`, `reason`, and `content`,
            the input row as JSON text.
        diagnostics: The run's diagnostics by name, each with `verdict` (`ok`, `warning`, `unknown`), `values` and
            `message`.
        stages: One entry for each unit of work that the call did or reused, as in `run.json`: `name`, `artifact`,
            `reused`, `seconds`, ...
    """

    kept: Dataset
    indices: np.ndarray
    scores: Dataset
    rejected: Dataset
    diagnostics: dict[str, dict[str, Any]]
    stages: list[dict[str, Any]]

    @property
    def warnings(self) -> list[str]:
        """The messages of the diagnostics whose verdict is `warning`."""
        return [entry["message"] for entry in self.diagnostics.values() if entry["verdict"] == "warning"]

    def __repr__(self) -> str:
        return (
            f"Selection({len(self.kept):,} of {len(self.scores):,} rows, {len(self.rejected):,} rejected, "
            f"{len(self.warnings)} warnings)"
        )


def select(
    rows: Sequence[Mapping[str, Any]] | Dataset | str | Path,
    method: str | Callable[..., Any] = "gradfiltering",
    alpha: float = 0.1,
    *,
    proxy: str = "gpt2",
    artifacts: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Selection:
    """Select the rows of an instruction dataset that are worth training on.

    The result is the same as that of the command line with the same options. Both use the same store, so finished work
    is reused, and a repeated call continues the work of an interrupted one. Afterwards, the number of torch threads and
    Hydra's state are as before the call, but transformers' progress bars stay switched off.

    Args:
        rows: Dicts, a `datasets.Dataset`, or the path of a file (.json, .jsonl, .csv, .tsv, .parquet).
        method: The name of a recipe (a file in `conf/method/`, such as `gradfiltering`), the name of a scorer (such as
            `late_loss`), or a scoring function of your own, whose positional parameters name its inputs (see
            `gradsift.scoring`).
        alpha: Share of the rows to keep, above 0 and at most 1.
        proxy: The small model that scores the rows: `gpt2`, `smollm2`, `hf` with `proxy__model="ID_OR_FOLDER"`, or
            `tiny_bytes` (random weights).
        artifacts: Folder of the store, which keeps finished work. The default is the folder that the environment
            variable `GRADSIFT_ARTIFACTS` names or, if it is unset, `./artifacts`.
        progress: Whether to show progress on stderr.
        **options: Any other option of the command line, with `__` in place of a dot: `proxy__members=3`,
            `proxy__snapshots=[1, 2]`, `scorer__eps=1e-6`, `data__limit=1000`, `selector="repr_filter"`, `seed=1`.

    Returns:
        The kept rows, the scores of all rows that could be selected, the rejected rows and the diagnostics.

    Raises:
        ConfigError: an option or its value cannot be used.
        DataError: the rows cannot be read, or none of them can be used.
        GradsiftError: the work failed; the message names the remedy.

    Examples:
        >>> import gradsift
        >>> rows = [{"instruction": f"Add 1 to {n}.", "output": str(n + 1)} for n in range(40)]
        >>> selection = gradsift.select(rows, alpha=0.1, proxy="tiny_bytes", proxy__members=2, progress=False)
        >>> selection
        Selection(4 of 40 rows, 0 rejected, ... warnings)
        >>> selection.kept.column_names
        ['instruction', 'output']
        >>> selection.scores.column_names
        ['row_index', 'example_id', 'score', 'G_s', 'G_t', 'V_t', 'drop', 'status', 'reason', 'selected']
    """
    options |= {"alpha": alpha, "proxy": proxy} | ({} if artifacts is None else {"artifacts": artifacts})
    with tempfile.TemporaryDirectory(prefix="gradsift-rows-") as folder:
        path = Path(rows) if isinstance(rows, str | Path) else _written(rows, Path(folder) / "rows.jsonl")
        if not callable(method):
            return _selected(_config(path, [_chosen(method)], options), progress, rows, None, {})
        constants = {name[8:]: options.pop(name) for name in list(options) if name.startswith("scorer__")}
        if not inspect.isfunction(method) or method.__name__ == "<lambda>":
            raise ConfigError(f"method={method!r} is no function with a name; define a function with def, and pass it")
        name = _spelt("method", method.__name__)
        config = _config(path, ["~scorer", f"+scorer={{_target_: {name}, name: {name}}}"], options)
        return _selected(config, progress, rows, method, constants)


def _config(path: Path, method: Sequence[str], options: Mapping[str, Any]) -> Config:
    for name in options:
        if remedy := _REFUSED.get(next((group for group in ("hydra", "export") if name.startswith(group)), name)):
            raise ConfigError(f"{name} is no option of select(): {remedy}")
    fixed = ["data=json", f"data.path={_spelt('rows', path)}", "stop_after=selection", "tracker=none"]
    given = [f"{name.replace('__', '.')}={_spelt(name, value)}" for name, value in options.items()]
    config = compose_config([*fixed, *method, *given])
    if config.compute.ranks > 1:
        raise ConfigError("select() works in one process; use the command line for several GPUs or machines")
    return config


def _selected(config: Config, progress: bool, rows: Any, function: Any, constants: Mapping[str, Any]) -> Selection:
    import torch
    from rich.console import Console

    from gradsift.artifacts import Store
    from gradsift.disk import guarded
    from gradsift.line import Line
    from gradsift.pipeline import prepare
    from gradsift.report.terminal import RunView
    from gradsift.runtime import Display, Runtime
    from gradsift.scoring.stage import score
    from gradsift.sources import method

    display = Display(Console(stderr=True, highlight=False, quiet=not progress))
    view = RunView(display=display)
    store = Store(Path(config.artifacts), display.say, view.stage_done, view.at_work)
    threads = torch.get_num_threads()
    try:
        prepare(config.compute, joins=not config.plan)
        with guarded(store.root, "the selection", nameless=False):
            line = Line(config, Runtime(store, config.compute, display, config.seed))
            if function is not None:
                target = f"{function.__module__}.{function.__qualname__}"
                config_of_scorer = {"_target_": target, "name": function.__name__}
                line.scorer = method("scorer", config_of_scorer, tuple(line.sources), function, constants)
            line.check()
            scored = score(line.runtime, line.scorer, line.loaded, line.sources, line.diagnose)
            return _read(rows, line, scored, line.select(scored))
    finally:
        torch.set_num_threads(threads)  # as before the call


def _read(rows: Any, line: Line, scored: Artifact, selected: Artifact) -> Selection:
    """Return the `Selection` of the artifacts `scored` (the scores) and `selected` (the selected positions)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.table import InMemoryTable

    from gradsift.data.examples import read_column
    from gradsift.data.load import EXAMPLES_FILE
    from gradsift.diagnostics import read_diagnostics
    from gradsift.scoring.stage import SCORES_FILE
    from gradsift.selection.stage import positions_of

    examples, positions = line.loaded.file(EXAMPLES_FILE), positions_of(selected)
    row_index = read_column(examples, "row_index")
    indices: np.ndarray = row_index.to_numpy()[positions]
    if isinstance(rows, Dataset):
        kept = rows.select(indices)
    else:
        originals = read_column(examples, "original").take(pa.array(positions)).to_pylist()
        try:
            kept = Dataset.from_list([json.loads(row) for row in originals])
        except (pa.ArrowException, TypeError) as error:
            raise DataError(
                f"the kept rows do not fit into one datasets.Dataset ({error}): a column holds values of several "
                "types; make them one type, or leave the column out"
            ) from error
    is_selected = np.zeros(len(row_index), dtype=bool)
    is_selected[positions] = True
    scores = pq.read_table(scored.file(SCORES_FILE))
    scores = scores.add_column(0, "row_index", row_index).append_column("selected", pa.array(is_selected))
    lines = line.loaded.file("rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(text) for text in lines]
    columns = {
        "row_index": [row["row"] for row in rejected],
        "reason": [row["reason"] for row in rejected],
        "content": [json.dumps(row["content"]) for row in rejected],
    }
    diagnostics = read_diagnostics(scored.path) | read_diagnostics(selected.path)
    stages = line.runtime.store.records_as_dicts()
    return Selection(kept, indices, Dataset(InMemoryTable(scores)), Dataset.from_dict(columns), diagnostics, stages)


def _written(rows: Any, path: Path) -> Path:
    """Write rows from memory to `path` as JSON lines, and return `path`.

    Equal rows give the same file, and so the same fingerprint, whether they are dicts or a `datasets.Dataset`.
    """
    from datasets import Dataset

    from gradsift.data.examples import json_value

    if isinstance(rows, Dataset):
        rows = rows.with_format(None)
    elif not isinstance(rows, list | tuple):
        raise DataError(
            f"rows is a {type(rows).__name__}; give a list of dicts, a datasets.Dataset (one split of a DatasetDict), "
            "or the path of a file"
        )
    if not len(rows):
        raise DataError("rows is empty; give at least one row")
    with path.open("w", encoding="ascii") as stream:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"row {number} is a {type(row).__name__}; every row is a dict of its columns")
            values = {}
            for column, value in row.items():
                try:
                    values[str(column)] = json_value(value)
                except TypeError as error:
                    raise DataError(
                        f"row {number}: column {column!r} holds {error}; leave the column out, or make it a text"
                    ) from error
            stream.write(json.dumps(values) + "\n")
    return path


def _chosen(method: str) -> str:
    """Return the override `method=NAME` if there is a recipe of this name, otherwise `scorer=NAME`.

    Raises ConfigError if there is no such recipe or scorer.
    """
    folders = (conf_folder(), Path("conf"))
    recipes, scorers = (
        sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
        for group in ("method", "scorer")
    )
    if method in recipes:
        return f"method={method}"
    if method in scorers:
        return f"scorer={method}"
    close = difflib.get_close_matches(str(method), sorted({*recipes, *scorers}), n=1)
    raise ConfigError(
        f"method={method!r} is neither a recipe ({', '.join(recipes)}) nor a scorer ({', '.join(scorers)})"
        + (f"; did you mean {close[0]}?" if close else "")
    )


def _key(name: str, key: Any) -> str:
    """Return a key of a dict in Hydra's override syntax.

    Special characters are escaped, because Hydra reads no quotes around keys.
    """
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", key) if isinstance(key, str) else _spelt(name, key)


def _spelt(name: str, value: Any) -> str:
    """Return a Python value in Hydra's override syntax.

    Raises:
        ConfigError: the value has a type that an override cannot hold; the message names the option `name`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return quoted(str(value))
    if isinstance(value, list | tuple):
        return "[" + ",".join(_spelt(name, item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(name, key)}:{_spelt(name, item)}" for key, item in value.items()) + "}"
    raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; give a number, a text, a list or a dict of these")


def gsnr(early: Any, late: Any, eps: float = 1e-8) -> np.ndarray:
    """Return the Gradient Signal-to-Noise Ratio of N examples (GRADFILTERING, arXiv 2601.13697, Eq. 5).

        GSNR_i = (G_i^s - G_i^t) / (G_i^s + eps)  x  1 / (V_i^t + eps)

    G_i^s and G_i^t are the means of the early and of the late norms of example i over the members. V_i^t is the
    population variance of the late norms of example i over the members.

    Args:
        early: (M, N) per-sample gradient norms, not negative, of M >= 2 ensemble members at the early snapshot.
        late: (M, N) the norms of the same members and examples at the late snapshot.
        eps: Number above 0 that is added to both denominators, so that neither is 0. The paper gives no value.

    Returns:
        The ratio of each example, (N,) float64; higher is better.

    Raises:
        ConfigError: the shapes differ or are not (M, N), or `eps` is not above 0.
        DataError: a norm is negative or not finite; the message names the first such norm.

    Examples:
        >>> import gradsift
        >>> gradsift.gsnr(early=[[2.0, 4.0], [4.0, 4.0]], late=[[1.0, 3.0], [3.0, 4.0]], eps=0.5)
        array([0.19047619, 0.14814815])
    """
    from gradsift.gradients.statistics import mean_and_variance
    from gradsift.scoring.gsnr import ratio

    in_range("eps", eps, above=0)
    norms = {"early": np.asarray(early, dtype=np.float64), "late": np.asarray(late, dtype=np.float64)}
    for name, values in norms.items():
        if values.ndim != 2 or values.shape != norms["early"].shape or len(values) < 2:
            raise ConfigError(
                f"{name} has the shape {values.shape}; early and late must have one shape (M, N), with M >= 2 members"
            )
        if (bad := np.argwhere(~(np.isfinite(values) & (values >= 0)))).size:
            member, example = bad[0]
            raise DataError(
                f"{name}[{member}, {example}] is {values[member, example]}; a norm is finite and not negative"
            )
    G_s, _ = mean_and_variance(lambda: iter(norms["early"]))
    G_t, V_t = mean_and_variance(lambda: iter(norms["late"]))
    return ratio(G_s, G_t, V_t, eps)
