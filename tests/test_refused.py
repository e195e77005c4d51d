"""Laws of rows that a chat template cannot show: they are counted, said and written, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, Cli
from test_gradient_features import line_of, store  # noqa: F401

from gradsift.config import OF_PROXY
from gradsift.report.notes import remarks

ASKED = [f"{'odd' if number % 2 else 'even'} {number}" for number in range(16)]
ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}, yes."}]}
    for text in ASKED
]
REFUSES = "{% if 'odd' in messages[0].content %}{{ raise_exception('no odd ones') }}{% endif %}"


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with `ROWS` and a tiny model whose chat template refuses the odd ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 1,
        "n_positions": 256,
        "vocab_size": len(byte_tokenizer),
        "bos_token_id": None,
    }
    GPT2LMHeadModel(GPT2Config(**size, eos_token_id=None)).save_pretrained(tmp_path / "model")
    byte_tokenizer.chat_template = REFUSES + CHATML
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADSIFT_ARTIFACTS", str(tmp_path / "store"))
    return tmp_path


def run_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    models = [option for group in ("proxy", "target") for option in (f"{group}=hf", f"{group}.model=model")]
    same = ("data=json", "data.path=rows.jsonl", "template=chat", "compute.threads=1", "tracker=none", "report=false")
    assert Cli(folder, monkeypatch)(*same, *models, *options, "hydra.run.dir=run") == 0
    run: dict[str, Any] = json.loads((folder / "run/run.json").read_text())
    return run


def require_listed(run: dict[str, Any], pool: int) -> None:
    """Check that the run names the refused rows of the pool, with reason and content."""
    assert run["refused"]["proxy"] == pool
    listed = Path(run["files"]["rows that proxy.template cannot show"]).read_text()
    rows = [json.loads(line) for line in listed.splitlines()]
    assert len(rows) == pool and all("odd" in ASKED[row["row"]] for row in rows)
    assert all(row["content"] == ROWS[row["row"]] and "no odd ones" in row["reason"] for row in rows)
    assert f"proxy.template cannot show {pool:,} rows" in " ".join(remarks(run))


def test_refused_rows_are_listed_in_the_pool_the_selection_and_the_held_out_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    length = ("target.steps=1", "target.epochs=null", "stop_after=finetune")
    # the second one finds all of its work
    runs = [run_of(folder, monkeypatch, *length, "data.holdout=6", "alpha=1", "scorer=perplexity") for _ in range(2)]
    assert all(stage["reused"] for stage in runs[1]["stages"])
    pool = runs[0]["refused"]["proxy"]
    held_out = 8 - pool
    assert pool and held_out
    said = " ".join(capsys.readouterr().out.split())
    assert f"{held_out} of 6 held-out rows are left out, because target.template cannot show them" in said
    for run in runs:
        assert run["heldout_left_out"] == held_out
        require_listed(run, pool)


@pytest.mark.parametrize("text", ["prompt_and_response", "prompt"])
def test_rows_that_the_embedder_cannot_show_are_listed(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the embeddings reads the pool's tokens here."""
    capsys.readouterr()
    options = (f"embedder.text={text}", "scorer=random", "selector=repr_filter", "stop_after=selection", "alpha=1")
    for _ in range(2):  # the second one finds all of its work
        require_listed(run_of(folder, monkeypatch, *options), 8)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("8 of 16 texts are left out, because proxy.template cannot show them: ") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("embedder.text=instruction_input_output", "selector=repr_filter", "stop_after=selection"),
        ("selector=topk", "stop_after=selection"),
        ("selector=repr_filter", "stop_after=scores"),
    ],
)
def test_a_run_that_shows_the_template_no_row_lists_none(
    options: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(folder, monkeypatch, "scorer=random", *options)
    assert "refused" not in run and not [name for name in run["files"] if "cannot show" in name]


def test_every_source_of_the_proxy_says_that_it_reads_the_pools_tokens(store: Path) -> None:  # noqa: F811
    line = line_of(store)
    reading = {name for name, source in line.sources.items() if source.reads_tokens}
    assert reading == OF_PROXY - {"backbone", "target_gradients"}  # the model alone; the target set's tokens
