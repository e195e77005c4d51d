"""Reads the rows of datasets of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gradsift.data.examples import SourceRow
from gradsift.errors import DataError, first_line

_TIMEOUT = 10.0  # seconds that the check before a run waits for the hub
_GATED = "is gated: accept its terms on its hub page, then log in with `hf auth login`"
_UNNAMED = "is no name of a hub dataset; give it as OWNER/NAME"


def require_dataset(id: str, revision: str | None) -> None:
    """Ask the hub whether a dataset can be read.

    A run makes this check before it imports `gradsift.pipeline`, which is slow.

    Raises:
        DataError: see `load_hub`. If the hub cannot be reached, which is always so with HF_HUB_OFFLINE=1, the error is
            raised only if `_may_be_cached` is False.
    """
    from huggingface_hub import HfApi, errors

    _require_no_local(id, "data")
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        if api.dataset_info(id, revision=revision, timeout=_TIMEOUT).gated:
            api.auth_check(id, repo_type="dataset")
    except errors.GatedRepoError as error:
        raise DataError(f"data.id={id} {_GATED}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise _missing(id, revision, "data") from error
    except errors.HFValidationError as error:
        raise DataError(f"data.id={id} {_UNNAMED}") from error
    except (http_error, OSError, ValueError) as error:  # ValueError: the reply is a web page, not the hub's JSON
        if not _may_be_cached(id):
            raise _unreachable(id, error, "data") from error


def load_hub(
    id: str,
    revision: str | None,
    split: str,
    subset: str | None = None,
    first: int | None = None,
    group: str = "data",
) -> Iterator[SourceRow]:
    """Return the rows of a hub dataset.

    The package `datasets` loads the rows; with HF_HUB_OFFLINE=1 it reads them from the local cache. Code that comes
    with a dataset is never run.

    Args:
        first: number of rows to read from the start, without downloading the others; None for all rows.
        group: config group of the options that name the dataset; the error messages use it.

    Raises:
        DataError: the dataset, subset, revision or split does not exist; the dataset is gated or cannot be reached; it
            has several subsets and `subset` is None (the message lists the subsets); or a local file or folder has the
            name `id`.
    """
    _require_no_local(id, group)
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]  # a class of httpx, or of httpx2 in later versions
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(id, subset, revision=revision, split=split, streaming=first is not None)
        rows = dataset if first is None else list(islice(dataset, first))
    except DatasetNotFoundError as error:
        if "gated" in str(error).lower():
            raise DataError(f"{group}.id={id} {_GATED}") from error
        raise _missing(id, revision, group) from error
    except HFValidationError as error:
        raise DataError(f"{group}.id={id} {_UNNAMED}") from error
    except DataFilesNotFoundError as error:
        raise DataError(f"{group}.id={id} holds no files of rows that can be read; check the name") from error
    except (http_error, OSError) as error:
        raise _unreachable(id, error, group) from error
    except (DatasetsError, ValueError, RuntimeError) as error:  # an unknown split or subset, or a script
        raise DataError(f"{group}.id={id}: {_advice(str(error), split, subset, group)}") from error
    return (SourceRow(row, content) for row, content in enumerate(rows))


def _require_no_local(id: str, group: str) -> None:
    """Raise DataError if a local file or folder has the name `id`, since `datasets` would load that instead."""
    if Path(id).exists():
        raise DataError(f"{group}.id={id} is a file or folder here; {_files_instead(group)}, or run in another folder")


def _missing(id: str, revision: str | None, group: str) -> DataError:
    at = f" at {group}.revision={revision}" if revision else ""
    return DataError(
        f"{group}.id={id}{at} is no dataset of the hub (or a private one: log in with `hf auth login`); check the name"
    )


def _unreachable(id: str, error: Exception, group: str) -> DataError:
    return DataError(
        f"{group}.id={id} is not in the local cache and the hub cannot be reached ({first_line(error)}); connect once "
        f"(with HF_HUB_OFFLINE unset), or {_files_instead(group)}"
    )


def _files_instead(group: str) -> str:
    return "take data=json data.path=FILE" if group == "data" else f"give its rows with {group}.path=FILE"


def _may_be_cached(id: str) -> bool:
    """Return whether the local caches may hold a dataset.

    The result may be True although the dataset is missing, for example if the caches hold another dataset of its owner.
    """
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    owner, _, name = id.rpartition("/")
    pattern = f"{owner}___*" if owner else f"{name.lower()}*"  # datasets changes the letter case of a name
    return Path(constants.HF_HUB_CACHE, f"datasets--{id.replace('/', '--')}").is_dir() or any(prepared.glob(pattern))


def _advice(message: str, split: str, subset: str | None, group: str) -> str:
    names = re.search(r"(?:available configs|Available): \[([^]]*)\]", message)
    if names:
        problem = f"it has no subset {subset!r}" if subset else "it has several subsets"
        return f"{problem}; give {group}.subset=NAME, one of: {names[1].replace(chr(39), '')[:1000]}"
    if "script" in message:
        return (
            f"its rows are made by a script, which is not run; give {group}.revision=refs/convert/parquet if the hub "
            f"has converted it, or {_files_instead(group)}"
        )
    return f"{group}.split={split}: {' '.join(message.split())[:300]}; correct it, or {_files_instead(group)}"
