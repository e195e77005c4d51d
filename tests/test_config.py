"""Laws of the config: every YAML composes, and wrong values are refused before anything heavy is imported."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradsift.composition import conf_folder, register_schemas
from gradsift.config import Config, dump_config, load_config, restore_config
from gradsift.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in conf_folder().glob("*/*.yaml")
    if path.parent.name != "hydra" and path.stem != "catalog"
)
OF_GROUP = {group: [choice for g, choice in CHOICES if g == group] for group, _ in CHOICES}
FOREIGN = ("proxy=gpt2", "target=llama2_7b", "benchmark=vicuna", "judge=local")  # for data outside the embedded world


def _rows() -> list[list[str]]:
    """Return overrides that together name every choice, in few compositions: choices of several groups share one."""
    together = ("scorer", "selector", "embedder", "features", "proxy", "compute", "tracker", "benchmark")
    needed = ["target_set=verifiable", "target=llama2_7b", "judge=openai"]
    rows = [["selector=round_robin", "scorer=less", "target_set=verifiable"]]
    for number in range(max(len(OF_GROUP[group]) for group in together)):
        row = [f"{group}={OF_GROUP[group][number % len(OF_GROUP[group])]}" for group in together]
        rows.append([*(choice for choice in row if choice != "selector=round_robin"), *needed])
    targets, judges = OF_GROUP["target"], OF_GROUP["judge"]
    for number in range(max(len(targets), len(judges))):
        rows.append([f"target={targets[number % len(targets)]}", f"judge={judges[number % len(judges)]}"])
    rows += [[f"target_set={name}"] for name in OF_GROUP["target_set"] if name != "json"]
    rows += [["target_set=json", "target_set.path=x.json"], ["data=json", "data.path=x.json", *FOREIGN]]
    rows += [["data=hub", "data.id=a/b", *FOREIGN], ["data=mixture", "data.sources={a: {path: x.json}}", *FOREIGN]]
    rows += [[f"generator={name}"] for name in OF_GROUP["generator"] if name != "openai"]
    rows += [["generator=openai", "generator.base_url=http://127.0.0.1:8000/v1"]]
    rows += [[f"export={name}"] for name in OF_GROUP["export"]]
    own = ("json", "hub", "mixture", "verifiable")
    rows += [[f"data={name}", *FOREIGN] for name in OF_GROUP["data"] if name not in own] + [["data=verifiable"]]
    rows += [[f"{group}={choice}"] for group in ("method", "experiment") for choice in OF_GROUP[group]]
    return [
        [*row, *(f"{group}.model.path=a/b" for group in ("proxy", "target") if f"{group}=hf" in row)] for row in rows
    ]


def _is_choice(key: str) -> bool:
    return "/" in key or (conf_folder() / key).is_dir()


def composed(*overrides: str) -> Config:
    """Return the checked config of these overrides.

    Hydra takes half a second to compose, so equal choices share a composition, and plain values are set in it.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [each for each in parsed if each.type is OverrideType.CHANGE and not _is_choice(each.key_or_group)]
    choices = [each.input_line or "" for each in parsed if each not in values]
    config = _of_choices(tuple(choices))
    if not values:
        return load_config(config)
    config = copy.deepcopy(config)
    try:
        for each in values:
            OmegaConf.update(config, each.key_or_group, each.value(), merge=True)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException(str(error)) from error  # as Hydra does
    return load_config(config)


@functools.cache
def _of_choices(choices: tuple[str, ...]) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", overrides=list(choices))


@pytest.mark.parametrize("overrides", _rows(), ids=" ".join)
def test_every_yaml_composes(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSIFT_DATA", "somewhere")
    config = composed(*overrides)
    for group, choice in dict(override.split("=") for override in overrides).items():
        node = getattr(config, group, None)
        if isinstance(node, dict):  # a scorer or selector whose constants have no dataclass
            node = SimpleNamespace(**node)
        if getattr(node, "name", None) is not None and choice not in ("hub", "hf"):  # which are named after the id
            assert node.name == choice  # the file, the choice and the name are the same word
        if group in ("scorer", "selector"):  # and so is the function, with two exceptions
            functions = {"length": "length_in_tokens", "superfilter_low": "superfilter"}
            assert node._target_.rpartition(".")[2] == functions.get(choice, choice)
            assert getattr(node, "keep", "") != "high" or choice != "superfilter_low"


def test_every_choice_is_composed() -> None:
    named = {override for row in _rows() for override in dict.fromkeys(row)}
    assert {f"{group}={choice}" for group, choice in CHOICES} <= named


def test_the_help_names_every_choice() -> None:
    text = (conf_folder() / "help.txt").read_text()
    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()} - {"hydra"}
    groups |= {f"hydra/{path.name}" for path in (conf_folder() / "hydra").iterdir()}
    assert all(f"  {group} " in text for group in groups)
    words = text.replace(",", " ").replace(":", " ").split()
    hydras = [("hydra", path.stem) for path in conf_folder().glob("hydra/*/*.yaml")]
    assert [choice for _, choice in [*CHOICES, *hydras] if choice not in words] == []


@pytest.mark.slow
def test_proxy_options_have_the_same_name_for_every_scorer() -> None:
    for group, choice in CHOICES:
        if group == "scorer":
            config = composed(f"scorer={choice}", "target_set=verifiable", "proxy.members=3", "proxy.snapshots=[1,3]")
            assert (config.proxy.members, config.proxy.snapshots) == (3, [1, 3])


def test_the_command_line_wins_over_method_and_experiment() -> None:
    assert composed("method=superfiltering").scorer_name == "superfilter"
    assert composed("method=superfiltering", "scorer=random").scorer_name == "random"
    assert composed("experiment=smoke", "proxy.members=4").proxy.members == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["alpha=0"], "alpha=0.0 is out of range"),
        (["alpha=-0.1"], "alpha=-0.1 is out of range"),
        (["alpha=1.5"], "alpha=1.5 is out of range"),
        (["alpha=nan"], "alpha=nan is out of range"),
        (["proxy.members=1"], "divides by a variance over members"),
        (["proxy.members=0"], "proxy.members=0 is out of range"),
        (["proxy.snapshots=[2,1]"], "two increasing epochs"),
        (["proxy.snapshots=[1,1]"], "two increasing epochs"),
        (["proxy.snapshots=[0,2]"], "two increasing epochs"),
        (["proxy.snapshots=[1]"], "two increasing epochs"),
        (["proxy.snapshots=[1,3]", "proxy.epochs=2"], "reach beyond proxy.epochs=2; raise proxy.epochs to 3"),
        (["proxy.collect=sometimes"], "choose one of: epoch_end, during_training"),
        (["proxy.norm_scope=C"], "choose one of: all, A, B"),
        (["proxy.learning_rate=0"], "give a finite number above 0"),
        (["scorer.eps=0"], "scorer.eps=0.0 is out of range"),
        (["scorer=superfilter", "scorer.fidelity=exact"], "choose one of: original, fixed"),
        (["scorer=superfilter", "scorer.keep=middle"], "choose one of: high, low"),
        (["scorer=superfilter", "scorer.keep=low", "scorer.fidelity=original"], "take scorer.fidelity=fixed"),
        (["scorer=cherry", "scorer.fidelity=no"], "choose one of: original, fixed"),
        (["scorer=cherry", "scorer.max_length=1"], "scorer.max_length=1 is out of range"),
        (["scorer=perplexity", "scorer.prefer=best"], "choose one of: low, high, middle"),
        (["scorer=length", "scorer.unit=words"], "choose one of: tokens, characters"),
        (["scorer=length", "scorer.part=all"], "choose one of: response, prompt, both"),
        (["scorer=length", "scorer.prefer=high"], "choose one of: long, short"),
        (["scorer=length", "data=json", "data.path=x", "stop_after=selection"], "proxy=nano (choose proxy=smollm2"),
        (["data.dedup=some"], "choose one of: none, exact, near"),
        (["data.dedup_threshold=0.4"], "data.dedup_threshold=0.4 is out of range"),
        (["data.dedup_threshold=nan"], "data.dedup_threshold=nan is out of range"),
        (
            ["selector=facility_location", "alpha=0.3"],
            "selector.candidates=0.2 gives fewer candidates than alpha=0.3",
        ),
        (
            ["selector=facility_location", "stop_after=selection", "audit.enabled=true", "audit.alphas=[0.05,0.3]"],
            "selector.candidates=0.2 gives fewer candidates than audit.alphas=0.3",
        ),
        (["selector=facility_location", "selector.candidates=2"], "selector.candidates=2.0 is out of range"),
        (["selector=facility_location", "selector.similarity=dot"], "choose one of: exp_distance, cosine"),
        (["selector=repr_filter", "selector.threshold=90"], "selector.threshold=90.0 is out of range"),
        (["selector=clusters", "selector.clusters=0"], "selector.clusters=0 is out of range"),
        (["selector=clusters", "selector.allocation=fair"], "choose one of: proportional, equal"),
        (
            ["selector=round_robin_queries", "target_set=verifiable", "selector.fidelity=exact"],
            "choose one of: original, fixed",
        ),
        (["selector=gumbel", "selector.temperature=0"], "selector.temperature=0.0 is out of range"),
        (["selector=gradient_walk", "selector.explained=0"], "selector.explained=0.0 is out of range"),
        (["selector=gradient_walk", "selector.keep=1.2"], "selector.keep=1.2 is out of range"),
        (["selector=gradient_walk", "selector.fill=some"], "choose one of: strict, topup"),
        (["selector=gradient_walk", "selector.neighbours=0"], "selector.neighbours=0 is out of range"),
        (["stop_after=lunch"], "choose one of: load, statistics"),
        (["data=json"], "data.path is not set"),
        (["data=json", "data.path=x"], "proxy=nano (choose proxy=smollm2"),
        (["benchmark.sets=[nowhere]"], "'nowhere', not in benchmark.catalog"),
        (["benchmark=vicuna", "target=smollm2"], "judge=verifier needs reference answers"),
        (["benchmark=vicuna", "judge=openai"], "target=nano knows the embedded world's words alone"),
        (["benchmark.sets=[]"], "benchmark.sets=[] must name at least one"),
        (["benchmark.sets=[verifiable,verifiable]"], "and each once"),
        (["benchmark.general=[bbh_navigate,bbh_navigate]"], "and each once"),
        (["benchmark.general=[nowhere]"], "benchmark.general names 'nowhere', not in"),
        (["benchmark.general=[verifiable]"], "is in benchmark.sets too"),
        (["benchmark.general=[vicuna]"], "benchmark.general=['vicuna'] has no reference answers"),
        (["benchmark.general=[bbh_navigate]"], "cannot answer ['bbh_navigate']"),
        (["benchmark.lm_eval_tasks=[arc_easy]"], "cannot answer ['arc_easy']"),
        (["benchmark.lm_eval_folder=x"], "benchmark.lm_eval_tasks names none"),
        (["benchmark=vicuna", "benchmark.wordnet_dir=x"], "METEOR, which needs reference answers"),
        (["+benchmark.catalog.vicuna.match=fuzzy"], "choose one of: exact, number, choice"),
        (["+benchmark.catalog.vicuna.reference_after=x"], "has no field to look in"),
        (
            ["data=json", "data.path=x", "proxy=smollm2", "target=smollm2", "benchmark.sets=[verifiable_terse]"],
            "benchmark sets ['verifiable_terse']",
        ),
        (["scorer=gsnr_variance_normalized", "proxy.members=1"], "divides by a variance"),
        (["experiment=smollm2_alpaca"], "the environment variable GRADSIFT_DATA is not set"),
        (["target.model.kind=tiny_bytes"], "target.model.kind=tiny_bytes has random weights"),
        (["judge=local", "judge.model.path=folder"], "or give model.kind=pretrained too"),
        (["judge=local", "judge.model.kind=tiny_bytes"], "judge.model.kind=tiny_bytes has random weights"),
        (["experiment=full_size"], "the environment variable GRADSIFT_DATA is not set"),
        (["target.epochs=2"], "either target.epochs or target.steps"),
        (["target.steps=null"], "either target.epochs or target.steps"),
        (["target.loss=word"], "choose one of: token, example"),
        (["target.schedule=step"], "choose one of: constant, linear, cosine"),
        (["target.max_grad_norm=0"], "target.max_grad_norm=0.0 is out of range"),
        (["target.warmup_ratio=1"], "target.warmup_ratio=1.0 is out of range"),
        (["target.warmup_ratio=0.1", "target.warmup_steps=2"], "either target.warmup_steps or target.warmup_ratio"),
        (["target.warmup_steps=200"], "target.warmup_steps=200 warms up over 200 of 200 optimiser steps"),
        (["target.warmup_ratio=0.999"], "target.warmup_ratio=0.999 warms up over 200 of 200 optimiser steps"),
        (["data.spoilt=1"], "data.spoilt=1.0 is out of range"),
        (["compute.device=tpu"], "choose one of: auto, cpu, cuda"),
        (["compute.save_every=-1"], "give a finite number of at least 0"),
        (["judge.confidence=1"], "judge.confidence=1.0"),
        (["budget_base=all"], "choose one of: accepted, scored"),
        (["proxy.lora.rank=0"], "lora.rank=0 is out of range"),
        (["embedder.pooling=max"], "embedder.pooling='max' is not known; choose one of: mean, weighted_mean, last"),
        (["embedder.text=answer"], "embedder.text='answer' is not known; choose one of: prompt_and_response"),
        (["embedder.max_length=1"], "embedder.max_length=1 is out of range"),
        (
            ["embedder=sentence_transformers", "embedder.text=prompt_and_response"],
            "choose one of: instruction_input",
        ),
        (["scorer=sbert", "scorer.over=median"], "scorer.over='median' is not known; choose one of: mean, max"),
        (["data=json", "data.path=x", "scorer=sbert", "stop_after=scores"], "proxy=nano (choose proxy=smollm2"),
        (["data.delayed=0.6"], "data.delayed=0.6 is out of range"),
        (["data.corruption.share=1"], "data.corruption.share=1.0 is out of range"),
        (["data.corruption.share=-0.1"], "data.corruption.share=-0.1 is out of range"),
        (["data.corruption.share=nan"], "data.corruption.share=nan is out of range"),
        (["data.corruption.kinds=[shuffled]"], "data.corruption.kinds='shuffled' is not known; choose one of: wrong"),
        (["data.corruption.kinds=[]"], "must name at least one, and each once; known: wrong"),
        (["data.corruption.kinds=[garbled,garbled]"], "and each once"),
        (["data.corruption.seed=-1"], "data.corruption.seed=-1 is out of range"),
        (["audit.alphas=[]"], "audit.alphas=[] must name at least one"),
        (["audit.alphas=[0.1,2]"], "audit.alphas=2.0 is out of range"),
        (["audit.clusters=1"], "audit.clusters=1 is out of range"),
        (["experiment=audit", "stop_after=scores"], "stop_after=scores; take stop_after=selection"),
        (["experiment=audit", "data.corruption.share=0", "data.spoilt=0"], "as in data.corruption.share=0.3"),
        (
            ["audit.enabled=true", "data=json", "data.path=x", "proxy=gpt2", "stop_after=selection"],
            "data.corruption.share",
        ),
        (["experiment=audit_smollm2"], "the environment variable GRADSIFT_DATA is not set"),
        (["tracker.mode=loud"], "choose one of: offline, online"),
        (["+alpah=0.2"], "alpah is no option; known: data, target_set, proxy"),
        (["++proxy.lora.rnk=3"], "proxy.lora.rnk is no option; known: rank, alpha, dropout"),
        (["+scorer.epsilon=1"], "scorer.epsilon is no option; known: _target_, name, eps"),
        (["judge=openai", "judge.timeout=1e10"], "judge.timeout=10000000000.0 is out of range"),
        (["judge=openai", "judge.max_wait=1e300"], "judge.max_wait=1e+300 is out of range"),
        (["proxy.model.nano.instructed_share=nan"], "model.nano.instructed_share=nan is out of range"),
        (["objective=loss"], "objective='loss' is not known; choose one of: pws, accuracy, heldout_loss"),
    ],
)
def test_an_invalid_value_is_named_with_the_remedy(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADSIFT_DATA", raising=False)
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_constant_without_a_value_in_a_users_yaml_is_named() -> None:
    config = copy.deepcopy(_of_choices(()))
    config.scorer = {"_target_": "mine.scorer", "name": "mine", "constant": "???"}
    with pytest.raises(ConfigError, match=r"scorer.constant is not set; give it as in scorer.constant=VALUE"):
        load_config(config)


def test_alpha_may_exceed_the_candidates_if_it_is_a_share_of_the_scored_rows() -> None:
    config = composed("selector=facility_location", "alpha=0.3", "budget_base=scored")
    assert config.selector.candidates == 0.2


def test_characters_of_any_data_can_be_counted_without_a_proxy() -> None:
    config = composed("scorer=length", "scorer.unit=characters", "data=json", "data.path=x", "stop_after=selection")
    assert config.scorer._target_ == "gradsift.scoring.length.length_in_characters"


NOT_THE_PROXYS = {"count", "examples", "task", "rater"}
NOT_THE_ENCODERS = NOT_THE_PROXYS | {"embeddings", "target_embeddings"}


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        pytest.param(*pair, marks=[] if pair[1] in ("gsnr", "rds_plus", "length", "clusters") else pytest.mark.slow)
        for pair in CHOICES
        if pair[0] in ("scorer", "selector")
    ],
)
def test_a_proxy_that_does_not_know_the_data_is_refused_for_the_methods_that_use_it(group: str, choice: str) -> None:
    """Compares with the functions' signatures."""
    import inspect
    from importlib import import_module

    scorer = ["scorer=random"] if group == "selector" else []
    if choice == "round_robin":
        scorer = ["scorer=sbert"]  # which has a score a task
    stop = "stop_after=selection" if group == "selector" else "stop_after=scores"
    bare = [*scorer, f"{group}={choice}", "judge=openai", stop]
    chosen = [*bare, "target_set=json", "target_set.path=t.json"]
    node = getattr(composed(*chosen), group)
    module, _, function = node._target_.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters.values()
    asked = {p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY} - {"scores", "size"}
    if scorer == ["scorer=sbert"]:
        asked.add("embeddings")
    encoders = {"hidden_states": NOT_THE_PROXYS}
    if "embeddings" in asked:
        encoders["sentence_transformers"] = NOT_THE_ENCODERS
    for encoder, without_proxy in encoders.items():
        foreign = ["data=json", "data.path=x.json", *chosen, f"embedder={encoder}"]
        if asked <= without_proxy:
            assert composed(*foreign).proxy.model.kind == "nano"
        else:
            with pytest.raises(ConfigError, match="proxy=nano"):
                composed(*foreign)
    if any(name.startswith("target_") for name in asked) or choice == "round_robin":  # which here has scorer=sbert
        with pytest.raises(ConfigError, match=r"target_set=none, and .* selects towards a target set"):
            composed(*bare)
    else:
        composed(*bare)


@pytest.mark.parametrize("ends", [["stop_after=statistics"], ["scorer=full"], ["stop_after=scores"]])
def test_a_selector_that_the_run_does_not_reach_needs_no_target_set(ends: list[str]) -> None:
    assert composed("selector=gradient_walk", *ends).target_set.name == "none"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["judge=local", "judge.dry_run=true"],
            "the judge that is chosen; it is one of judge=alpaca_eval, judge=five_point",
        ),
        (["target_set.path=x"], "target_set.path is no option of the target_set that is chosen; it is one of"),
        (
            ["judge=local", "judge.modle=x"],
            "judge.modle is no option of the judge that is chosen; did you mean judge.model?",
        ),
        (["judge.foo.bar=1"], "judge.foo is no option of the judge that is chosen; known: name, confidence"),
        (["proxy.lora.zzz=1"], "proxy.lora.zzz is no option of the proxy.lora that is chosen; known: rank"),
        (["nosuch=1"], "nosuch is no option; known: data, target_set"),
    ],
)
def test_an_unknown_option_is_reported_with_the_choices_that_have_it(
    overrides: list[str], message: str, gradsift: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gradsift(*overrides) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_ends_before_the_proxy_needs_none() -> None:
    foreign = ("data=json", "data.path=x.json", "scorer=random")
    assert composed(*foreign, "stop_after=load").proxy.model.kind == "nano"
    with pytest.raises(ConfigError, match="proxy=nano"):
        composed(*foreign, "stop_after=statistics")


RECIPES = {
    "gradfiltering": {"scorer": "gsnr", "scorer.eps": 1e-8, "proxy.members": 5, "proxy.snapshots": [1, 2]},
    "contrast": {"scorer": "contrast", "scorer.neighbours": 50, "scorer.end_share": 0.33, "scorer.saturation": 0.2}
    | {"scorer.prompt_weight": 4.0, "scorer.like_length": 100},
    "superfiltering": {"scorer": "superfilter", "scorer.max_length": 1024, "scorer.keep": "high"},
    "superfiltering_d": {"scorer": "superfilter", "selector": "facility_location", "selector.candidates": 0.2}
    | {"scorer.keep": "high", "selector.similarity": "exp_distance"},
    "cherry": {"scorer": "cherry", "scorer.max_length": 512, "scorer.fidelity": "fixed", "budget_base": "scored"},
    "less": {"scorer": "less", "target_set": "verifiable"},
    "g2is": {"scorer": "g2is", "selector": "gradient_walk", "target_set": "verifiable", "selector.fill": "topup"}
    | {"selector.graph": True, "selector.explained": 0.5, "selector.keep": 0.8, "scorer.explained": 0.5},
    "g2is_no_graph": {"scorer": "g2is", "selector": "gradient_walk", "target_set": "verifiable"}
    | {"selector.graph": False, "selector.fill": "strict", "selector.explained": 0.5},
    "g2is_topk": {"scorer": "g2is", "target_set": "verifiable"},
    "grads": {"scorer": "grads", "scorer.weights": [1, 1, 1], "scorer.region": "high", "scorer.neighbours": 1},
    "rds_plus": {"scorer": "rds_plus", "selector": "round_robin_queries", "target_set": "verifiable"}
    | {"embedder": "rds_plus", "embedder.pooling": "weighted_mean", "embedder.text": "prompt_and_response"},
    "sbert": {"scorer": "sbert", "scorer.over": "mean", "target_set": "verifiable"},
    "deita": {"scorer": "llm_rating", "scorer.style": "deita", "selector": "repr_filter", "selector.threshold": 0.9},
    "random": {"scorer": "random", "scorer.seed": 0},
    "full": {"scorer": "full"},
}
STANDARD = {"selector": "topk", "target_set": "none", "embedder": "hidden_states", "budget_base": "accepted"}


@pytest.mark.parametrize("method", [choice for group, choice in CHOICES if group == "method"])
def test_a_method_is_the_recipe_of_its_paper(method: str) -> None:
    config = composed(f"method={method}")
    for option, value in (STANDARD | RECIPES[method]).items():
        chosen = functools.reduce(getattr, option.split("."), config)
        assert getattr(chosen, "name", chosen) == value, option


def test_the_budget_of_cherry_is_a_share_of_the_scored_rows() -> None:
    config = composed("method=cherry")
    assert (config.scorer_name, config.budget_base) == ("cherry", "scored")
    assert composed("method=cherry", "budget_base=accepted").budget_base == "accepted"


def test_full_needs_no_usable_judge() -> None:
    assert composed("scorer=full", "benchmark=vicuna", "target=smollm2").judge.name == "verifier"


@pytest.mark.parametrize("scorer", ["gsnr", "superfilter", "late_loss"])
def test_random_weights_take_any_data_for_scores(scorer: str) -> None:
    foreign = ("data=json", "data.path=x.json", "proxy=tiny_bytes", f"scorer={scorer}")
    assert composed(*foreign, "stop_after=selection").proxy.model.kind == "tiny_bytes"
    assert composed("proxy=tiny_bytes", "target.model.kind=tiny_bytes", "stop_after=selection")  # a target never made


@pytest.mark.parametrize("scorer", ["rds_plus", "sbert"])
def test_with_a_sentence_encoder_similarity_does_not_use_the_proxy(scorer: str) -> None:
    towards = ("target_set=json", "target_set.path=t.json", f"scorer={scorer}", "stop_after=selection")
    foreign = ("data=json", "data.path=x.json", *towards)
    assert composed(*foreign, "embedder=sentence_transformers").proxy.model.kind == "nano"


@pytest.mark.parametrize("scorer", ["gsnr", "superfilter"])
def test_full_size_is_one_experiment_for_both_scorers(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSIFT_DATA", "somewhere")
    config = composed("experiment=full_size", f"scorer={scorer}")
    proxy = config.proxy
    assert (proxy.members, proxy.collect, proxy.max_length) == (2, "during_training", 256)
    assert (config.stop_after, config.tracker.name, config.data.limit) == ("selection", "none", None)


def test_one_member_is_enough_for_scores_without_a_variance() -> None:
    assert composed("proxy.members=1", "scorer=late_loss").proxy.members == 1


@pytest.mark.parametrize("override", ["proxy.memberz=3", "scorer.eps=abc", "scorer=nowhere", "data.limit=many"])
def test_names_and_types_are_refused_while_composing(override: str) -> None:
    with pytest.raises(Exception, match=r"memberz|eps|nowhere|limit"):
        composed(override)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["scorer=superfilter", "alpha=0.05"],
        ["scorer=random", "judge=openai"],
        ["scorer=length"],
    ],
)
def test_a_dumped_config_comes_back_as_it_was(overrides: list[str]) -> None:
    config = composed(*overrides)
    text = OmegaConf.to_yaml(OmegaConf.create(dump_config(config)))
    again: Any = OmegaConf.to_container(OmegaConf.create(text))
    assert restore_config(again) == config


@pytest.mark.parametrize("dumped", [{}, {"schemas": [], "values": {}}, {"schemas": {}, "values": 3}])
def test_a_damaged_dump_is_refused(dumped: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no readable schemas and values"):
        restore_config(dumped)


def test_a_foreign_dump_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read by this version"):
        restore_config({"schemas": {"data": "nowhere"}, "values": {}})


HELP_AND_ERRORS = """
import contextlib, io, json, sys
from gradsift import cli
from hydra.core.global_hydra import GlobalHydra
for arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    cli._failed = False
    GlobalHydra.instance().clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["run.py", *arguments]
        try:
            cli.main()
        except SystemExit as ending:
            code = ending.code
    print(json.dumps([code, err.getvalue()]))
print(sorted({"torch", "transformers", "lightning", "wandb", "pyarrow"} & set(sys.modules)))
"""


def test_help_and_config_errors_import_nothing_heavy(tmp_path: Path) -> None:
    wrong = ["alpha=2", "proxy.memberz=1", "scorer=nowhere", "alpha=abc"]
    commands = json.dumps([["--help"], *([override] for override in wrong)])
    program = [sys.executable, "-c", HELP_AND_ERRORS, commands]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=True)
    *endings, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    (code, error), *others = map(json.loads, endings)
    assert (code, error) == (0, "")
    for override, (code, error) in zip(wrong, others, strict=True):
        assert code == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        assert override.split("=")[0].rpartition(".")[2] in error


def test_the_console_script_and_the_wheel_carry_the_configuration() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert 'gradsift = "gradsift.cli:main"' in project
    assert 'conf = "gradsift/conf"' in project


def test_the_store_may_lie_in_the_home_folder_and_needs_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GRADSIFT_ARTIFACTS", "~/store")
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        assert load_config(compose("config")).artifacts == str(tmp_path / "store")
        assert load_config(compose("config", ["artifacts=${oc.env:HOME}"])).artifacts == str(tmp_path)
        monkeypatch.setenv("GRADSIFT_ARTIFACTS", "")
        with pytest.raises(ConfigError, match="artifacts names no folder; give one, as in artifacts=DIR"):
            load_config(compose("config"))
