"""Pushes the selection and a dataset card to the Hugging Face hub (`export.push_to_hub=OWNER/NAME`).

The token is read from HF_TOKEN and is never written. Only `selection.jsonl` and the card are sent. The run's config is
not sent, because it may name folders of this machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from gradsift import __version__
from gradsift.config import Config, HubDataConfig, MixtureDataConfig
from gradsift.errors import ConfigError, GradsiftError, first_line
from gradsift.run_folder import RUN_FILE
from gradsift.selection.stage import SELECTION_FILE

TOKEN = "HF_TOKEN"  # noqa: S105 - the name of the environment variable


def require_access(dataset: str) -> None:
    """Raise GradsiftError, before the work begins, if there is no token or the hub does not accept it."""
    if not os.environ.get(TOKEN):
        raise ConfigError(
            f"export.push_to_hub={dataset} needs a token with write access; put one into the environment variable "
            f"{TOKEN}"
        )
    with _failures(dataset, "nothing was started"):
        _api().whoami()


def push(config: Config, run: Path) -> str:
    """Send the selection of a finished run and its card in one commit, and return the address of the dataset.

    A dataset that does not exist is created. In an existing dataset, only `selection.jsonl` and the card are replaced.

    Raises:
        GradsiftError: the hub cannot be reached, or refuses the name, the token or the files.
    """
    dataset = str(config.export.push_to_hub)
    record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    selection = CommitOperationAdd(SELECTION_FILE, run / SELECTION_FILE)
    readme = CommitOperationAdd("README.md", card(config, record).encode("utf-8"))
    with _failures(dataset, "the run is finished, and the same command sends it again"):
        api = _api()
        address = api.create_repo(dataset, repo_type="dataset", private=config.export.private, exist_ok=True)
        message = f"Selection by {record['name']}"
        api.create_commit(dataset, [selection, readme], commit_message=message, repo_type="dataset")
    return str(address)


def _api() -> HfApi:
    return HfApi(token=os.environ.get(TOKEN), library_name="gradsift", library_version=__version__)


@contextmanager
def _failures(dataset: str, state: str) -> Iterator[None]:
    """Turn an error of the hub's client into a GradsiftError with one line, which ends with `state` (what was done)."""
    import httpx2

    name = f"export.push_to_hub={dataset}"
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{name} is no dataset of the hub ({first_line(error)}); give OWNER/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answers with status {status}"
        if status in (401, 403):
            reason = f"the hub refuses the token in {TOKEN} (status {status}); give one that may write to {dataset}"
        raise GradsiftError(f"{name}: {reason}; {state}") from error
    except (httpx2.HTTPError, OSError) as error:
        raise GradsiftError(f"{name}: the hub cannot be reached ({first_line(error)}); {state}") from error


def card(config: Config, record: Mapping[str, Any]) -> str:
    """Return the dataset card: how the rows were selected, the run's results, and the limits of the data and results.

    `record` is the content of the run's `run.json`.
    """
    files = [{"split": "train", "path": SELECTION_FILE}]
    head = {"configs": [{"config_name": "default", "data_files": files}], "tags": ["gradsift", "data-selection"]}
    selected, rows = record["selection"]["rows"], record["data"]["rows"]
    dataset = str(config.export.push_to_hub)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {dataset.split('/')[1]}",
        f"{selected:,} of {rows:,} rows of {_source(config)}, selected with gradsift {__version__}. Every row is as it "
        "was in the source; the column `gradsift` holds its rank (1 is best), its score, its id and its row there.",
        f"```python\ndatasets.load_dataset({dataset!r}, split='train')\n```",
        "## Method",
        _table(_method(config, record)),
        "## Figures",
        _table(_figures(record)),
        "## Limits",
        _limits(config, record),
    ]
    return "\n\n".join(parts) + "\n"


def _source(config: Config) -> str:
    """Return a description of the run's data without paths of this machine."""
    data = config.data
    if isinstance(data, HubDataConfig):
        subset = f", subset {data.subset}" if data.subset else ""
        return f"`{data.id}`{subset}, split {data.split}" + (f", revision {data.revision}" if data.revision else "")
    if isinstance(data, MixtureDataConfig):
        return "a mixture of " + ", ".join(f"`{source.id or name}`" for name, source in data.sources.items())
    return f"`{data.name}`"


def _method(config: Config, record: Mapping[str, Any]) -> dict[str, Any]:
    model = config.proxy.model
    public = model.path if model.kind == "pretrained" and not Path(str(model.path)).expanduser().exists() else None
    return {
        "scorer": config.scorer_name,
        "selector": config.selector_name,
        "alpha": f"{config.alpha:g} of the {config.budget_base} rows",
        "seed": f"{config.seed} (data: {config.data.seed})",
        "proxy (of methods that use one)": f"{public or config.proxy.name}, {config.proxy.members} members, "
        f"epochs {config.proxy.snapshots}",
        "embedder (of methods that use one)": config.embedder.name,
        "rows rejected as unusable": f"{record['data']['rejected']:,}",
        "rows without a score": f"{record['scores']['rows'] - record['scores']['statuses'].get('scored', 0):,}",
        "missing from the budget": f"{record['selection']['shortfall']:,}",
    }


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's results by name, or an entry that says that the run ended before the evaluation."""
    pooled = record.get("pooled") or {}
    figures: dict[str, Any] = {}
    if pooled.get("pws") is not None:
        interval = f"{pooled['pws_low']:.3f} to {pooled['pws_high']:.3f}"
        figures["PWS against the target on all rows (1 is equal)"] = f"{pooled['pws']:.3f}, interval {interval}"
        figures |= {"items judged": pooled["n"], "target": record["target"], "judge": record["judge"]}
    models = {"model": "on the selection", "reference": "on all rows", "untuned": "before finetuning"}
    for name, values in (("held-out loss", record.get("heldout_loss")), ("accuracy", record.get("accuracy"))):
        for model, finetuned in models.items():
            if values and values.get(model) is not None:
                figures[f"{name}, {finetuned}"] = f"{values[model]:.4f}"
    return figures or {"evaluation": "none: the run ended before it"}


def _limits(config: Config, record: Mapping[str, Any]) -> str:
    points = [
        "The rows have the licence of the source and may contain its errors and personal data; read its card first.",
        "Another method, model or seed selects other rows.",
    ]
    if config.scorer_name == "published":
        points[1] = "The scores were published by others; nothing was computed for them here."
    if not record.get("pooled"):
        points.append("Nothing here shows that training on these rows is better than training on random rows.")
    diagnostics = (record.get("diagnostics") or {}).values()
    points += [str(each["message"]) for each in diagnostics if each["verdict"] == "warning"]
    return "\n".join(f"- {' '.join(point.split())}" for point in points)


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
