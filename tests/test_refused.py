"""Laws of rows that a chat template cannot show: they are counted, said and written, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, Cli
from test_gradient_features import line_of, store  # noqa: F401

from gradsift.config.run import OF_PROXY
from gradsift.report.notes import remarks

ASKED = [f"{'odd' if number % 2 else 'even'} {number}" for number in range(16)]
ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}, yes."}]}
    for text in ASKED
]
REFUSES = "{% if 'odd' in messages[0].content %}{{ raise_exception('no odd ones') }}{% endif %}"


def test_refused_rows_are_listed_in_the_pool_the_selection_and_the_held_out_rows(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    capsys.readouterr()
    run_line = Cli(tmp_path, monkeypatch)
    models = [
        option
        for group, model in (("proxy", "gpt2"), ("target", "smollm2"))
        for option in (f"{group}={model}", f"{group}.model.kind=pretrained", f"{group}.model.path=model")
    ]
    length = ("target.steps=1", "target.epochs=null", "stop_after=finetune", "hydra.run.dir=run")
    data = ("data=json", "data.path=rows.jsonl", "data.holdout=6", "alpha=1")
    templates = ("proxy.template=chat", "target.template=chat", "scorer=perplexity", "compute.threads=1")
    runs = []
    for _ in range(2):  # the second one finds all of its work
        assert run_line(*data, *models, *templates, *length, "tracker=none", "report=false") == 0
        runs.append(json.loads((tmp_path / "run/run.json").read_text()))
    assert all(stage["reused"] for stage in runs[1]["stages"])
    pool = runs[0]["refused"]["proxy"]
    held_out = 8 - pool
    assert pool and held_out
    said = " ".join(capsys.readouterr().out.split())
    assert f"{held_out} of 6 held-out rows are left out, because target.template cannot show them" in said
    for run in runs:
        assert run["heldout_left_out"] == held_out
        listed = Path(run["files"]["rows that proxy.template cannot show"]).read_text()
        rows = [json.loads(line) for line in listed.splitlines()]
        assert len(rows) == pool and all("odd" in ASKED[row["row"]] for row in rows)
        assert all(row["content"] == ROWS[row["row"]] and "no odd ones" in row["reason"] for row in rows)
        assert f"proxy.template cannot show {pool:,} rows" in " ".join(remarks(run))


def test_every_source_of_the_proxy_says_that_it_reads_the_pools_tokens(store: Path) -> None:  # noqa: F811
    line = line_of(store)
    reading = {name for name, source in line.sources.items() if source.reads_tokens}
    assert reading == OF_PROXY - {"backbone", "target_gradients"}  # the model alone; the target set's tokens
