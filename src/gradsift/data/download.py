"""Download of files at run time; a file that was downloaded before is used again."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from gradsift.errors import DataError
from gradsift.names import require_no_link, slug

DOWNLOAD_LIMIT = 200 * 2**20  # bytes; the largest file in use is below 2 MB
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def fetch_url(url: str, folder: Path) -> Path:
    """Download `url` into `folder` unless the file is there already, and return the file's path.

    Only https is allowed, except for addresses of this machine. The file gets its name only when it is complete.

    Raises:
        DataError: the address is not https, there is no network, an HTTP error occurs, or the file has more than
            `DOWNLOAD_LIMIT` bytes. The message names the path to which the user can copy the file.
    """
    target = folder / _file_name(url)
    if target.is_file():
        return target
    part = require_no_link(target.with_name(f"{target.name}.{os.getpid()}.part"))
    try:
        _check_scheme(url)
        folder.mkdir(parents=True, exist_ok=True)
        _download(url, part)
        part.replace(target)
    # URLError is an OSError; HTTPException covers replies that end early or are not HTTP
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(f"cannot download {url} ({error}); put the file at {target}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _file_name(url: str) -> str:
    """Return a safe file name: the URL's hash (two files may both be called test.jsonl) and the URL's last part."""
    last = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{slug(last or 'download')[-80:]}"


def _check_scheme(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError("only https addresses are fetched")


class _SameRulesRedirect(urllib.request.HTTPRedirectHandler):
    """Applies `_check_scheme` to redirects too."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, part: Path) -> None:
    opener = urllib.request.build_opener(_SameRulesRedirect)
    request = urllib.request.Request(url, headers={"User-Agent": "gradsift"})  # noqa: S310 - scheme is checked
    with opener.open(request, timeout=DOWNLOAD_TIMEOUT) as reply, part.open("wb") as out:
        announced = reply.headers.get("Content-Length")
        size = 0
        while chunk := reply.read(2**16):
            size += len(chunk)
            if size > DOWNLOAD_LIMIT:
                raise ValueError(f"more than {DOWNLOAD_LIMIT // 2**20} MB")
            out.write(chunk)
    # read(n) does not raise when the connection ends early
    if announced is not None and size != int(announced):
        raise ValueError(f"broke off after {size} of {announced} bytes")
