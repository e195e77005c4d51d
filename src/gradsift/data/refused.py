"""The rows of the pool that a chat template cannot render, printed and written to a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.data.examples import Rejected, write_rejected
from gradsift.data.tokens import EncodeReport
from gradsift.runtime import Runtime

VERSION = 1
REFUSED_FILE = "refused.jsonl"


def say_refused(runtime: Runtime, refused: Iterable[Rejected], rows: int, group: str, what: str = "rows") -> None:
    """Print which rows the chat template of `group` cannot render, with a line for each reason.

    Args:
        refused: the rows that cannot be rendered.
        rows: the number of all rows.
        group: proxy or target.
        what: name of the rows in the message.
    """
    by_reason: dict[str, list[int]] = {}
    for rejected in refused:
        by_reason.setdefault(rejected.reason, []).append(rejected.row)
    for reason, sources in by_reason.items():
        runtime.display.say(
            f"  {len(sources):,} of {rows:,} {what} are left out, because {group}.template cannot show them: {reason} "
            f"(rows {', '.join(map(str, sources[:10]))}{', ...' if len(sources) > 10 else ''})"
        )


def refused_rows(
    runtime: Runtime,
    slug: str,
    settings: Mapping[str, Any],
    model: Artifact,
    loaded: Artifact,
    report: Callable[[], EncodeReport],
) -> Artifact:
    """Return the artifact with the rows of the pool that the template cannot render, as `write_rejected` writes them.

    Args:
        settings: the settings of the encoding.
        model: the model whose tokenizer is used.
        report: function that tokenises the pool, unless that was done before, and returns the report.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        refused = report().refused
        write_rejected(folder / REFUSED_FILE, list(refused.values()))
        return {"refused": len(refused)}

    return runtime.store.obtain("refused", slug, settings, [model, loaded], make, version=VERSION)
