"""Datasets of the Hugging Face hub to rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gradsift.data.examples import SourceRow
from gradsift.errors import DataError

_PATIENCE = 10.0  # seconds for an answer of the hub before a run


def require_dataset(id: str, revision: str | None) -> None:
    """Ask the hub whether a dataset can be read, before the slow imports; not if HF_HUB_OFFLINE=1.

    Raises:
        DataError: the dataset or the revision does not exist, or is gated; or the hub cannot be reached, and the local
            cache has nothing of the dataset.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE or Path(id).exists():
        return
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        if api.dataset_info(id, revision=revision, timeout=_PATIENCE).gated:
            api.auth_check(id, repo_type="dataset")
    except GatedRepoError as error:
        raise _gated(id) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _missing(id, revision) from error
    except (http_error, OSError) as error:
        if not _may_be_cached(id):
            raise _unreachable(id, error) from error


def load_hub(
    id: str, revision: str | None, split: str, subset: str | None = None, first: int | None = None
) -> Iterator[SourceRow]:
    """Return the rows of a hub dataset, loaded with `datasets`; from the local cache if HF_HUB_OFFLINE=1.

    Code that comes with a dataset is never run.

    Args:
        first: read this many rows from the start without downloading the others.

    Raises:
        DataError: the dataset, subset, revision or split does not exist, is gated, or cannot be reached; or the dataset
            has several subsets, which the message lists, and none is named.
    """
    if Path(id).exists():  # `datasets` would load this instead
        raise DataError(
            f"data.id={id} is a file or folder here; take data=json data.path=FILE, or another folder to run in"
        )
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]  # httpx's, or that of httpx2 in later versions
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(id, subset, revision=revision, split=split, streaming=first is not None)
        rows = dataset if first is None else list(islice(dataset, first))
    except DatasetNotFoundError as error:
        raise (_gated(id) if "gated" in str(error).lower() else _missing(id, revision)) from error
    except HFValidationError as error:
        raise DataError(f"data.id={id} is no name of a hub dataset; give it as OWNER/NAME") from error
    except DataFilesNotFoundError as error:
        raise DataError(f"data.id={id} holds no files of rows that can be read; check the name") from error
    except (OfflineModeIsEnabled, http_error, OSError) as error:
        raise _unreachable(id, error) from error
    except (DatasetsError, ValueError, RuntimeError) as error:  # an unknown split or subset, or a script
        raise DataError(f"data.id={id}: {_advice(str(error), split, subset)}") from error
    return (SourceRow(row, content) for row, content in enumerate(rows))


def _gated(id: str) -> DataError:
    return DataError(f"data.id={id} is gated: accept its terms on its hub page, then log in with `hf auth login`")


def _missing(id: str, revision: str | None) -> DataError:
    at = f" at data.revision={revision}" if revision else ""
    return DataError(
        f"data.id={id}{at} is no dataset of the hub (or a private one: log in with `hf auth login`); check the name"
    )


def _unreachable(id: str, error: Exception) -> DataError:
    return DataError(
        f"data.id={id} is not in the local cache and the hub cannot be reached ({_first_line(error)}); connect once "
        "(with HF_HUB_OFFLINE unset), or take data=json data.path=FILE"
    )


def _may_be_cached(id: str) -> bool:
    """Return whether the caches of huggingface_hub and datasets have anything of a dataset, or of its owner's."""
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    owner, _, name = id.rpartition("/")
    pattern = f"{owner}___*" if owner else f"{name.lower()}*"  # datasets writes a name in another case
    return Path(constants.HF_HUB_CACHE, f"datasets--{id.replace('/', '--')}").is_dir() or any(prepared.glob(pattern))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _advice(message: str, split: str, subset: str | None) -> str:
    names = re.search(r"(?:available configs|Available): \[([^]]*)\]", message)
    if names:
        problem = f"it has no subset {subset!r}" if subset else "it has several subsets"
        return f"{problem}; give data.subset=NAME, one of: {names[1].replace(chr(39), '')[:1000]}"
    if "script" in message:
        return (
            "its rows are made by a script, which is not run; give data.revision=refs/convert/parquet if the hub has "
            "converted it, or take data=json data.path=FILE"
        )
    return f"data.split={split}: {' '.join(message.split())[:300]}; check it, or take data=json data.path=FILE"
