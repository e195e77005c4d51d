"""Pages that mkdocs makes from other files: every option from the config dataclasses, and the experiment records."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]

from option_tables import options_page  # noqa: E402 - mkdocs puts sys.path back when the hooks are imported


def on_files(files: Files, config: Any) -> Files:
    """Add the experiments' notebook and records, which stand beside `docs/`."""
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the page of options, and turn links between `docs/` and `experiments/` into links of the site."""
    if page.file.src_uri == "reference/options.md":
        return options_page()
    if page.file.src_uri.startswith("experiments/"):
        return markdown.replace("../docs/", "")
    markdown = re.sub(r"\[(`[^`]+`)\]\(\.\./\.\./(?:src|conf)[^)]*\)", r"\1", markdown)  # the site has no source files
    return markdown.replace("](../experiments/", "](experiments/")
