"""Downloads files at run time, each only once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gradsift.errors import DataError, first_line
from gradsift.names import require_no_link, slug

if TYPE_CHECKING:
    from httpx2 import Request

DOWNLOAD_LIMIT = 200 * 2**20  # bytes; the largest file in use is below 2 MB
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def fetch_url(url: str, folder: Path) -> Path:
    """Download `url` into `folder` unless the file is there already, and return the file's path.

    Only https is allowed, except for addresses of this machine. A partial download has another name than the complete
    file, so a later call never uses it.

    Raises:
        DataError: the address is not https, the download fails, or the file has more than `DOWNLOAD_LIMIT` bytes. The
            message names the path where the user can put the file instead.
    """
    target = folder / _file_name(url)
    if target.is_file():
        return target
    import httpx2 as httpx

    part = require_no_link(target.with_name(f"{target.name}.{os.getpid()}.part"))
    headers = {"User-Agent": "gradsift", "Accept-Encoding": "identity"}
    hooks = {"request": [_require_https]}  # redirects are requests too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            httpx.Client(headers=headers, event_hooks=hooks, follow_redirects=True, timeout=30) as client,
            client.stream("GET", url) as reply,
            part.open("wb") as out,
        ):
            reply.raise_for_status()
            for chunk in reply.iter_raw():
                if out.tell() + len(chunk) > DOWNLOAD_LIMIT:
                    raise ValueError(f"more than {DOWNLOAD_LIMIT // 2**20} MB")
                out.write(chunk)
        part.replace(target)
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise DataError(f"cannot download {url} ({first_line(error)}); put the file at {target}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _file_name(url: str) -> str:
    """Return a safe file name: a hash of the URL, and the URL's last part.

    Thanks to the hash, two URLs with the same last part get different names.
    """
    last = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{slug(last or 'download')[-80:]}"


def _require_https(request: Request) -> None:
    if request.url.scheme != "https" and not (request.url.scheme == "http" and request.url.host in LOOPBACK):
        raise ValueError("only https addresses are fetched")
