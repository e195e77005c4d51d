"""The config folders: gradsift's own `conf/`, and the user's `conf/` in the working directory."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


def conf_folder() -> Path:
    """Return gradsift's own `conf/`: in the folder of an installed package, or beside `src/` in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


class UserConf(SearchPathPlugin):
    """Makes Hydra search `conf/` in the working directory, after gradsift's own `conf/`.

    The path is made absolute here, so the workers of a launcher search the folder in which the sweep was begun.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own, folder = conf_folder(), Path("conf").absolute()
        composes_gradsift = any(element.path == str(own) for element in search_path.get_path())
        if composes_gradsift and folder.is_dir() and folder.resolve() != own.resolve():
            search_path.append("user", str(folder))
            for name in hidden_files(folder):
                print(f"conf/{name} is not used: gradsift has a file of that name; rename yours", file=sys.stderr)


def hidden_files(folder: Path) -> list[str]:
    """Return the files (GROUP/NAME.yaml) of a user's `conf/` that gradsift's files of the same names hide."""
    files = (path.relative_to(folder) for path in sorted(folder.glob("*/*.yaml")))
    return [path.as_posix() for path in files if (conf_folder() / path).is_file()]
