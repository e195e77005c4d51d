"""A stand-in for the Hugging Face hub on this machine: repositories of datasets and models from
folders, one of them gated.

`serving(folder)` serves each folder `OWNER/NAME` of `folder` at one revision. A repository with a file `.gated` answers
as a gated one does. A client with the token `TOKEN` may make dataset repositories there and commit small files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)
TOKEN = "hf_of_the_stand_in"


class _Handler(BaseHTTPRequestHandler):
    root: Path
    page: str | None

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.page is not None:
            self._send(200, self.page.encode())
        else:
            self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        *_, action, last = ["", *urlsplit(self.path).path.split("/")]
        if action in ("preupload", "commit") or last == "create":
            self._write(action, body)
        else:
            self._answer(parse_qs(body))

    def _write(self, action: str, body: str) -> None:
        """Answer a request that makes a repository or commits to one."""
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return
        lines = [json.loads(line) for line in body.splitlines()]
        if action == "repos":
            asked = lines[0]
            folder = self.root / asked.get("organization", "owner") / asked["name"]
            address = {"url": f"http://{self.headers['Host']}/datasets/{folder.parent.name}/{folder.name}"}
            if folder.is_dir():
                self._send(409, {"error": "You already created this dataset repo"} | address)
                return
            folder.mkdir(parents=True)
            folder.with_suffix(".made").write_text(json.dumps(asked))
            self._send(200, address)
        elif action == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._send(200, {"files": [{"path": each["path"], **modes} for each in lines[0]["files"]]})
        else:
            folder = self.root.joinpath(*urlsplit(self.path).path.split("/")[3:5])
            for file in (line["value"] for line in lines if line["key"] == "file"):
                (folder / file["path"]).write_bytes(base64.b64decode(file["content"]))
            address = f"http://{self.headers['Host']}/datasets/{folder.parent.name}/{folder.name}/commit/{COMMIT}"
            self._send(200, {"commitUrl": address, "commitOid": COMMIT})

    def _answer(self, form: dict[str, list[str]] | None = None) -> None:
        if self.path == "/api/whoami-v2":
            known = self.headers["Authorization"] == f"Bearer {TOKEN}"
            self._send(200 if known else 401, {"name": "owner"} if known else {"error": "Invalid user token."})
            return
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        parts = parts[2:] if parts[0] == "api" else parts[parts[0] == "datasets" :]  # a model has no prefix of its own
        folder = self.root.joinpath(*parts[:2])
        action, revision, *rest = [*parts[2:], "", ""]
        if not folder.is_dir():
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif action == "auth-check":
            if (folder / ".gated").exists():
                self._send(403, {"error": "Access to it is restricted"}, {"X-Error-Code": "GatedRepo"})
            else:
                self._send(200, {})
        elif action and revision not in REVISIONS:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        elif action == "resolve" and (folder / ".gated").exists():
            self._send(403, {"error": "Access to it is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif action == "resolve":
            self._send_file(folder / Path(*filter(None, rest)))
        elif action == "tree":
            under = folder.joinpath(*filter(None, rest))
            if not under.is_dir():
                self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            elif "recursive=true" in self.path.lower():
                self._send(200, [each for each in self._entries(folder) if under in (folder / each["path"]).parents])
            else:
                self._send(200, [_entry(path, folder) for path in sorted(under.iterdir()) if path.name != ".gated"])
        elif action == "paths-info":
            wanted = (form or {}).get("paths", [])
            self._send(200, [each for each in self._entries(folder) if each["path"] in wanted])
        else:
            files = [{"rfilename": each["path"]} for each in self._entries(folder)]
            about = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": files, "private": False, "tags": []}
            self._send(200, about | {"gated": "auto" if (folder / ".gated").exists() else False})

    def _entries(self, folder: Path) -> list[dict[str, Any]]:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".gated")
        return [_entry(path, folder) for path in files]

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            place = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            self._send(206, content[start : end + 1], place)
            return
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    content = path.read_bytes() if path.is_file() else name.encode()
    kind = "file" if path.is_file() else "directory"
    oid = hashlib.sha1(content).hexdigest()  # noqa: S324 - as Git names contents
    return {"type": kind, "path": name, "size": len(content), "oid": oid}


@contextmanager
def serving(root: Path, page: str | None = None) -> Iterator[str]:
    """Serve the repositories below `root`; yields the address for HF_ENDPOINT.

    Args:
        page: the answer to all that is read, instead.
    """
    handler = type("Handler", (_Handler,), {"root": root, "page": page})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def printed_by_client(code: str, address: str, folder: Path, asked: Iterable[Any] = (), *arguments: str) -> str:
    """Return what Python code prints in a process whose hub is at `address`, run in `folder`.

    The libraries read the hub's address when they are imported, hence the process.

    Args:
        asked: given to its standard input, one JSON value a line.
    """
    network = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "no_proxy": "127.0.0.1", "GRADSIFT_ARTIFACTS": "store"}
    client = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input="".join(json.dumps(each) + "\n" for each in asked),
        env={**os.environ, **network, **own},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert client.returncode == 0, (client.stdout + client.stderr)[-3000:]
    return client.stdout
