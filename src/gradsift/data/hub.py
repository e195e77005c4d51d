"""Datasets of the Hugging Face hub to rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gradsift.data.examples import SourceRow
from gradsift.errors import DataError


def load_hub(id: str, revision: str | None, split: str) -> Iterator[SourceRow]:
    """Return the rows of a hub dataset, loaded with `datasets`; from the local cache if HF_HUB_OFFLINE=1.

    Code that comes with a dataset is never run.

    Raises:
        DataError: the dataset, revision or split does not exist, is gated, or cannot be reached.
    """
    if Path(id).exists():  # `datasets` would load this instead
        raise DataError(
            f"data.id={id} is a file or folder here; take data=json data.path=FILE, or another folder to run in"
        )
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(id, revision=revision, split=split)
    except DatasetNotFoundError as error:
        if "gated" in str(error).lower():
            raise DataError(
                f"data.id={id} is gated: accept its terms on its hub page, then log in with `hf auth login`"
            ) from error
        at = f" at data.revision={revision}" if revision else ""
        raise DataError(
            f"data.id={id}{at} is no dataset of the hub (or a private one: log in with `hf auth login`); check the name"
        ) from error
    except HFValidationError as error:
        raise DataError(f"data.id={id} is no name of a hub dataset; give it as OWNER/NAME") from error
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError, OSError) as error:
        raise DataError(
            f"data.id={id} is not in the local cache and the hub cannot be reached ({_first_line(error)}); connect "
            "once (with HF_HUB_OFFLINE unset), or take data=json data.path=FILE"
        ) from error
    except (DatasetsError, ValueError, RuntimeError) as error:  # an unknown split or configuration, or a script
        raise DataError(
            f"data.id={id}, data.split={split}: {_first_line(error)}; check them, or take data=json data.path=FILE"
        ) from error
    return (SourceRow(row, content) for row, content in enumerate(dataset))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
