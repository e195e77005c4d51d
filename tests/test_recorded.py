"""The comparison of a sweep with the recorded table, for tables made by hand, and checks of the shipped table."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from gradsift.composition import conf_folder, register_schemas
from gradsift.config import dump_config, load_config
from gradsift.report import recorded as module
from gradsift.report.recorded import RECORDED_FILE, compared, record
from gradsift.report.run_tables import UNTUNED
from gradsift.report.terminal import sweep_finished

REPOSITORY = Path(__file__).parents[1]
PWS = {"gsnr": (0.9, 1.0, 1.1), "random": (0.80, 0.82, 0.84)}  # standard errors of the means: .0577 and .0115


def job(folder: Path, scorer: str, seed: int, pws: float | None, **options: Any) -> Path:
    """Write the run.json and the config of a finished job."""
    folder.mkdir(parents=True)
    cell = {"win": 5, "tie": 3, "lose": 2, "invalid": 0, "pws": pws, "pws_low": None, "pws_high": None}
    run = {
        "status": "finished",
        "scorer": scorer,
        "alpha": 0.1,
        "variant": scorer,
        "data_seed": seed,
        "seed": 0,
        "benchmarks": {"verifiable": cell},
        "pooled": cell,
        "accuracy": {"model": 0.25, "untuned": 0.5},
        "selection": {"rows": 10, "spoilt_share": 0.5, "families": 3.0 + seed},
        "overrides": [],
    }
    values = {
        "alpha": 0.1,
        "data": {"seed": seed},
        "scorer": {"name": scorer},
        "proxy": {"learning_rate": 0.002},
        "compute": {"precision": "float32", "threads": None},
        "tracker": {"name": "none"},
        "artifacts": "artifacts",
        "report": False,
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text(yaml.dump({"values": values | options}))
    return folder / "run.json"


def sweep(folder: Path, pws: Any = PWS, **options: Any) -> list[Path]:
    files = []
    for scorer, values in pws.items():
        files += [job(folder / f"{len(files) + s}-{scorer}", scorer, s, v, **options) for s, v in enumerate(values)]
    return files


def lines(files: list[Path]) -> list[str]:
    return compared(files, [json.loads(file.read_text()) for file in files])


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the table of `PWS`."""
    sweep(tmp_path / "recorded")
    path = tmp_path / "conf" / RECORDED_FILE
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record(tmp_path / "recorded", "a processor, 2 threads")))
    monkeypatch.setattr(module, "conf_folder", lambda: tmp_path / "conf")


def test_the_same_table_agrees(tmp_path: Path) -> None:
    (line,) = lines(sweep(tmp_path / "here"))
    assert line.startswith("agrees with the recorded table (a processor, 2 threads)")


@pytest.mark.parametrize(("shift", "agrees"), [(0.50, True), (-0.50, True), (0.52, False), (-0.52, False)])
def test_means_may_differ_by_what_the_seeds_explain(tmp_path: Path, shift: float, agrees: bool) -> None:
    """By hand: the standard error is sqrt(.01 / 3 + .01 / 3) = .0816. With 15 figures each tail has the probability
    .05 / 30, above which Student's t with 4 degrees of freedom is 6.25."""
    here = PWS | {"gsnr": tuple(value + shift for value in PWS["gsnr"])}
    (line,) = lines(sweep(tmp_path / "here", here))
    if agrees:
        assert line.startswith("agrees")
    else:
        mean = 1 + shift
        expected = f"gsnr, PWS: {mean:.3f} here, 1.000 recorded; the seeds explain 0.511"
        assert line == f"differs from the recorded table (a processor, 2 threads): {expected}"


def test_every_cell_that_differs_is_named(tmp_path: Path) -> None:
    differences = lines(sweep(tmp_path / "here", {"gsnr": (2.9, 3.0, 3.0), "random": (0.1, 0.1, 0.1)}))
    assert [line.split("): ")[1].split(":")[0] for line in differences] == ["gsnr, PWS", "random, PWS"]


def test_equal_values_without_a_spread_agree_and_others_do_not(tmp_path: Path) -> None:
    files = sweep(tmp_path / "here")
    runs = [json.loads(file.read_text()) for file in files]
    runs[0]["accuracy"]["model"] = 0.25 + 1e-9  # recorded values are rounded
    assert compared(files, runs)[0].startswith("agrees")
    for run in runs[:3]:
        run["accuracy"]["model"] = 0.251
    assert "gsnr, accuracy: 0.251 here, 0.250 recorded" in compared(files, runs)[0]


def test_a_missing_value_is_no_agreement(tmp_path: Path) -> None:
    (line,) = lines(sweep(tmp_path / "here", PWS | {"random": (0.80, None, 0.84)}))
    assert line.endswith("random, PWS: 1 of 3 values are missing here, recorded 0.820")


@pytest.mark.parametrize(
    "options",
    [
        {"proxy": {"learning_rate": 0.001}},
        {"compute": {"precision": "bfloat16", "threads": None}},
        {"a_new_option": 1},
    ],
)
def test_other_settings_are_not_compared(tmp_path: Path, options: dict[str, Any]) -> None:
    assert lines(sweep(tmp_path / "here", **options)) == []


def test_other_jobs_are_not_compared(tmp_path: Path) -> None:
    assert lines(sweep(tmp_path / "here")[:5]) == []
    files = sweep(tmp_path / "without configs")
    (files[0].parent / "config.yaml").unlink()
    assert lines(files) == []


def test_what_no_result_depends_on_may_differ(tmp_path: Path) -> None:
    free = {"artifacts": "elsewhere", "tracker": {"name": "wandb"}, "compute": {"precision": "float32", "threads": 1}}
    (line,) = lines(sweep(tmp_path / "here", **free))
    assert line.startswith("agrees")


def test_a_sweep_ends_with_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path / "here")
    assert sweep_finished(tmp_path / "here")
    assert " ".join(capsys.readouterr().out.split()).endswith(
        "no figure differs by more than the seeds explain (t tests, level 0.05 for all 15 together)"
    )


# ------------------------------------------------------------------------------- the shipped table


def shipped() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((conf_folder() / RECORDED_FILE).read_text())
    return table


def test_the_shipped_table_was_recorded_with_the_experiments_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the experiment or a default has changed: run `make run` and record the table again."""
    register_schemas()
    configs = {}
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        for scorer in sorted({entry.split()[0] for entry in shipped()["jobs"]}):
            config = load_config(compose("config", ["experiment=world", f"scorer={scorer}", "alpha=0.1"]))
            values = dump_config(config)["values"]
            for seed in (0, 1, 2):
                configs[Path(f"{scorer}-{seed}")] = values | {"data": values["data"] | {"seed": seed}}
    monkeypatch.setattr(module, "config_values", configs.__getitem__)
    assert module._settings([folder / "run.json" for folder in configs]) == shipped()["settings"]


def test_the_readme_shows_the_shipped_table() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert shipped()["machine"].split(",")[0] in readme
    table = {line.split("  ")[0]: line for line in readme.splitlines() if line.startswith(tuple(shipped()["figures"]))}
    for scorer, figures in shipped()["figures"].items():
        for name, values in figures.items():
            known = [value for value in values if value is not None]
            if known and not (scorer == "full" and name == "pws"):
                digits = {"spoilt_share": 2, "families": 1}.get(name, 3)
                assert f" {fmean(known):.{digits}f}" in table[scorer], (scorer, name)
    assert UNTUNED in table
