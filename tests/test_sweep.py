"""Laws of sweeps: every job is checked before the first one starts."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, Cli
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from gradsift import sweep
from gradsift.composition import conf_folder, register_schemas

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a command line in an empty folder, for commands that are refused before any work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADSIFT_ARTIFACTS", str(tmp_path / "store"))
    return Cli(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["scorer=gsnr,nosuch"], ["job 2 of 2 (", "scorer=nosuch", "the choices are: ", "late_loss"]),
        (["proxy.memberz=3,4"], ["job 1 of 2 (", "and 1 more: ", "did you mean proxy.members?"]),
        (
            ["alpha=0.1,2", "proxy.members=3,x", "target.epochs=null,2"],
            [
                "job 2 of 8 (",
                "either target.epochs or target.steps",
                "job 3 of 8 (",
                "proxy.members=x",
                "'x' of type 'str' could not be converted",
                "job 5 of 8 (",
                "alpha=2.0 is out of range; give a finite number above 0 and up to 1",
            ],
        ),
        (
            ["proxy.members=1,2", "scorer=late_loss,gsnr", "scorer.eps=1e-8"],
            ["job 1 of 4 (", "eps", "and 1 more: ", "job 2 of 4 (", "divides by a variance over members"],
        ),
        (["seed=range(1,9,0)"], ["seed=range(1,9,0) cannot be listed (", "a step other than 0"]),
        (["alpha=range(0,nan,0.1)"], ["alpha=range(0,nan,0.1) cannot be listed (", "give finite numbers"]),
        (["scorer=glob(nosuch*)"], ["scorer=glob(nosuch*) has no values; give at least one"]),
        (["seed=range(0,1e12)"], ["at least 10,001 jobs to check", "seed has the most values"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_sweep_over_an_invalid_value_is_refused_before_the_first_job(
    bare, capsys, overrides: list[str], messages: list[str]
) -> None:
    assert bare("-m", *SMOKE, *overrides) == 2
    captured = capsys.readouterr()
    for message in messages:
        assert message in captured.err
    lines = captured.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert lines[-1] == "error: no job was started"
    assert captured.out == ""
    assert list(bare.folder.iterdir()) == []


@pytest.fixture
def hydra_ready() -> Iterator[None]:
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


def master(*overrides: str) -> DictConfig:
    """Return the config that Hydra passes to `on_multirun_start`."""
    composed = compose("config", return_hydra_config=True)
    composed.hydra.job.config_name = "config"
    composed.hydra.overrides.task = list(overrides)
    return composed


def test_an_override_may_contain_the_jobs_number(hydra_ready) -> None:
    composed = master("tracker.group=${hydra:job.num}", "artifacts=${hydra:runtime.output_dir}", "alpha=0.1,0.2")
    assert sweep.begin(composed).jobs is not None


def test_jobs_are_every_combination_with_the_last_option_turning_fastest(hydra_ready) -> None:
    jobs = sweep.jobs_of(master("scorer=gsnr,random", "alpha=0.1,0.2", "seed=range(10)"), searches=False)
    assert len(jobs) == 40
    assert jobs[1] == ("scorer=gsnr", "alpha=0.1", "seed=1")


def test_the_command_line_wins_over_the_experiments_own_sweep(hydra_ready) -> None:
    composed = compose("config", overrides=["experiment=world"], return_hydra_config=True)
    composed.hydra.job.config_name = "config"
    composed.hydra.overrides.task = ["experiment=world", "data.seed=7"]
    jobs = sweep.jobs_of(composed, searches=False)
    assert len(jobs) == 6
    assert set(jobs) == {
        ("data.seed=7", f"scorer={scorer}", "alpha=0.1", "experiment=world")
        for scorer in ("contrast", "gsnr", "late_loss", "random", "random_clean", "full")
    }


def test_a_missing_plugin_is_named_in_one_line(bare, capsys) -> None:
    assert bare("-m", *SMOKE, "alpha=0.1,0.2", "hydra.launcher._target_=hydra_plugins.hydra_nowhere.Launcher") == 2
    err = capsys.readouterr().err
    assert "hydra/launcher=basic needs a plugin that is not installed; install hydra-nowhere" in err
    assert err.count("\n") == 2


def test_every_plugin_has_an_extra_that_installs_it() -> None:
    extras: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for plugin, extra in sweep._EXTRAS.items():
        assert any(need.startswith(plugin.replace("_", "-")) for need in extras["optional-dependencies"][extra])
    ours = [path for kind in ("launcher", "sweeper") for path in (conf_folder() / "hydra" / kind).glob("*.yaml")]
    for path in ours:
        (target,) = [line for line in path.read_text().splitlines() if line.startswith("_target_: hydra_plugins.")]
        assert target.split(".")[1] in sweep._EXTRAS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.sweeper.params.alpha='interval(0.1,2)'", "proxy.members=choice(2,1)"], "alpha=2.0 proxy.members=1"),
        (["stop_after=scores"], "objective=pws is known after judge, but stop_after=scores"),
    ],
)
def test_a_search_checks_the_ends_of_its_space_first(bare, capsys, overrides: list[str], message: str) -> None:
    pytest.importorskip("optuna")
    assert bare("experiment=search", *overrides) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.endswith("error: no job was started\n")
    assert list(bare.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["it's here", r"a\b", "quote\\'s", "ends in \\", "$y {z}"])
def test_jobs_write_where_the_sweep_was_started(bare, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Holds for a folder of any name, and for workers that compose their job in another folder."""
    place = bare.folder / name
    elsewhere = bare.folder / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(place)
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = master("alpha=0.1,0.2")
        sweep.fix_place(composed)
        monkeypatch.chdir(elsewhere)
        job = GlobalHydra.instance().config_loader().load_sweep_config(composed, ["alpha=0.2"])
    assert Path(job.hydra.sweep.dir).parents[2] == place
    assert job.hydra.job.env_set[sweep.HOME] == str(place)
