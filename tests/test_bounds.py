"""Laws of bounds: numbers and sweeps that only a typing error asks for are refused."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from conftest import SMOKE
from test_config import composed
from test_sweep import hydra_ready, master  # noqa: F401 - a fixture

from gradsift import config as config_module
from gradsift.composition import conf_folder, require_readable
from gradsift.config import MOST, Config, Group, require_bound
from gradsift.errors import ConfigError
from gradsift.evaluation import records
from gradsift.sweep import MOST_JOBS, jobs_of

UNBOUNDED = {  # whole numbers that cost nothing however large they are
    "limit": "rows are drawn from those that there are",
    "holdout": "more than there are is refused",
    "rows": "more than there are is all",
    "neighbours": "more than there are is refused, or all",
    "like_length": "more than there are is all",
    "together": "more than there are members is all",
    "max_calls": "a cap",
    "give_up": "a cap",
    "give_up_unreadable": "a cap",
}


@pytest.fixture(scope="module")
def config() -> Config:
    return composed()


def test_every_whole_number_of_the_config_has_a_bound_or_a_reason_to_have_none() -> None:
    kinds = [kind for kind in vars(config_module).values() if dataclasses.is_dataclass(kind)]
    names = {f.name for kind in kinds for f in dataclasses.fields(kind) if str(f.type) in INTEGERS}
    assert len(names) > 25
    assert names - {name.rpartition(".")[2] for name in MOST} - set(UNBOUNDED) == set()


INTEGERS = ("int", "int | None", "list[int]")


def test_every_class_with_a_whole_number_checks_it() -> None:
    kinds = [kind for kind in vars(config_module).values() if dataclasses.is_dataclass(kind)]
    with_numbers = [kind for kind in kinds if any(str(f.type) in INTEGERS for f in dataclasses.fields(kind))]
    assert len(with_numbers) > 15
    groups = [kind for kind in kinds if issubclass(kind, Group)]
    # options that several groups share are checked in those
    unchecked = [kind for kind in with_numbers if not any(issubclass(group, kind) for group in groups)]
    assert unchecked == []
    assert config_module.EndpointOptions in with_numbers


@pytest.mark.parametrize("name", ["members", "max_length", "batch_size"])
def test_the_largest_value_is_taken_and_the_next_is_refused(config: Config, name: str) -> None:
    most, why = MOST[name]
    assert getattr(replace(config.proxy, **{name: most}), name) == most
    require_bound("target_set.limit", 1_000_000)
    with pytest.raises(ConfigError, match=rf"proxy\.{name}={most + 1} is more than {most:,}, {why[:20]}.*give less"):
        replace(config.proxy, **{name: most + 1})


def test_a_number_of_hundreds_of_digits_is_not_printed(config: Config) -> None:
    for digits in (900, 5000):  # Python refuses to print the second
        with pytest.raises(ConfigError, match=r"^seed=\(a number of more than 30 digits\) is more than 4,294,967,295"):
            replace(config, seed=10**digits)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("proxy.members", "1000000000"),
        ("lora.rank", "100000"),
        ("proxy.snapshots", "[1,1000000000]"),
    ],
)
def test_a_number_that_would_fill_the_memory_is_refused_on_the_command_line(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option}=1.* is more than "):
        composed(f"{option.replace('lora', 'proxy.lora')}={value}")


@pytest.mark.parametrize("wrong", ["0", "1", "nan", "-0.5"])
def test_a_confidence_that_is_no_probability_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert records.main(["nothing.jsonl", f"--confidence={wrong}"]) == 2
    assert "give a finite number above 0 and below 1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the command line


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        require_readable(arguments)
    return str(error.value)


def test_every_group_that_is_null_is_refused_with_its_choices() -> None:
    for group in {path.name for path in conf_folder().iterdir() if path.is_dir()} - {"hydra"}:
        lists = (f"{group}=a, null", f"{group}=[null]", f"{group}=choice(null,a)", f"{group}@{group}=null")
        for written in (f"{group}=null", f"+{group}=NULL", *lists):
            assert refused("-m", written).startswith(f"{group}=null is not a choice; leave {group} out, or choose")
    assert "gsnr, gsnr_direction" in refused("scorer=null")
    assert "basic" not in refused("hydra/launcher=null") and "joblib" in refused("hydra/launcher=null")


def test_other_nulls_and_other_arguments_pass() -> None:
    fine = [
        "data.limit=null",
        "proxy.epochs=null",
        "~scorer",
        "-m",
        "--cfg=null",
        "seed=" + "1" * 1000,
        "scorer=nullable",
        "+scorer={_target_: a.b, name: b, top: null, bottom: 1}",
    ]
    require_readable(fine)


def test_a_number_of_thousands_of_digits_is_refused_by_its_option() -> None:
    assert refused("alpha=0.1", f"seed={'9' * 5000}") == (
        "seed is given a number of 5,000 digits; give one that fits into 64 bits"
    )


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        (f"seed={'9' * 5000}", "give one that fits into 64 bits"),
        ("scorer=null", "choose one of: cherry, "),
        ("proxy=null", "choose one of: gpt2, "),
        ("data.path=mine (1).jsonl", "data.path=mine (1).jsonl cannot be read; check it, or put"),
        ("data.path=~/mine.jsonl", """as in 'data.path="VALUE"'"""),
        ("alpha=nosuch(3)", "Unknown function"),
    ],
)
def test_a_refused_argument_ends_with_one_line_and_exit_code_2(
    argument: str, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from gradsift import cli

    monkeypatch.setattr("sys.argv", ["run.py", argument])
    monkeypatch.setattr(cli, "_failed", False)
    monkeypatch.setenv(cli.TRACE, "0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and remedy in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- sweeps


HUGE = ("range(0,1e9)", "range(0,1000000000)", "sort(range(0,1e9))", "shuffle(range(0,1e18))", f"range(0,{'9' * 900})")


@pytest.mark.parametrize("text", [*HUGE, "range(0,inf)"])
@pytest.mark.parametrize("searches", [False, True])
@pytest.mark.usefixtures("hydra_ready")
def test_a_sweep_of_too_many_jobs_is_refused_without_listing_them(text: str, searches: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"sweep has at least 10,001 jobs to check, and at most 10,000 are possible; alpha"
    ):
        jobs_of(master(f"alpha={text}", "seed=0"), searches)


@pytest.mark.usefixtures("hydra_ready")
def test_jobs_are_counted_over_all_options() -> None:
    assert len(jobs_of(master("alpha=range(0,100)", "seed=range(0,100)"), searches=False)) == MOST_JOBS
    with pytest.raises(ConfigError, match=r"sweep has at least 10,100 jobs .*; seed has the most values"):
        jobs_of(master("alpha=range(0,100)", "seed=range(0,101)"), searches=False)
    # a search needs each value only once
    assert len(jobs_of(master("alpha=range(0,100)", "seed=range(0,101)"), searches=True)) == 101


def test_a_sweep_of_too_many_jobs_starts_none(gradsift: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsift.sweep.MOST_JOBS", 2)
    assert gradsift("-m", *SMOKE, "seed=0,1,2", "stop_after=load") == 2
    assert "sweep has at least 3 jobs" in capsys.readouterr().err
    assert gradsift.runs() == []


@pytest.mark.parametrize("text", ["range(0,1,0)", "range(0,1,0.0)", "range(0,nan)"])
def test_a_range_without_an_end_starts_no_job(gradsift: Any, capsys: Any, text: str) -> None:
    assert gradsift("-m", *SMOKE, f"alpha={text}", "stop_after=load") == 2
    assert "no job was started" in capsys.readouterr().err
    assert gradsift.runs() == []
