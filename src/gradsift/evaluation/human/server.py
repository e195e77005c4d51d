"""The pages on which raters vote: plain forms that work without scripts, served on loopback only.

Security: the address contains a random secret, so neither another user of the machine nor another page in the rater's
browser can guess it. The Host header must name this machine, and a form must come from a page of the same origin. Every
text is escaped, and a strict content security policy is sent. With `--unblind`, raters who have finished see which
answers are the model's; nobody else does.
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from gradsift.errors import ConfigError
from gradsift.evaluation.human.pairs import Pairs
from gradsift.evaluation.human.votes import COMMENT_LENGTH, NAME_LENGTH, Choice, Rater, Votes
from gradsift.evaluation.pws import summarise
from gradsift.pages import presentable, templates

LOOPBACK = "127.0.0.1"
_STATIC = Path(__file__).with_name("static")
_MAX_FORM = 16_384  # bytes; one character of a comment takes up to 12
_MAX_MARKDOWN = 100_000  # characters; longer texts are shown without rendering
_CHOICES: dict[str, Choice] = {"first": "first", "tie": "tie", "bad": "tie", "second": "second"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",  # a cached page would show an earlier vote
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # the address is a secret
    "X-Content-Type-Options": "nosniff",
}


class Pages:
    """Serves the pages and stores the votes."""

    def __init__(self, votes: Votes, pairs: Pairs, *, invited: Sequence[str], unblind: bool, plain: bool) -> None:
        self.votes = votes
        self.pairs = pairs
        self.invited = [votes.join(name).name for name in invited]
        self.unblind = unblind
        self.markdown = None
        if not plain:
            # HTML is escaped, and links and images are shown as text: answers must not load anything from other sites
            rules = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
            self.markdown = rules.disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
        self.root = f"/{votes.about['address']}"
        self.templates = templates("gradsift.evaluation.human", "pages")
        self.templates.globals["root"] = self.root

    def app(self) -> ASGIApp:
        routes = [
            Route("/", self.start),
            Route("/raters", self.join, methods=["POST"]),
            Route("/r/{rater:int}", self.next),
            Route("/r/{rater:int}/{item:int}", self.pair),
            Route("/r/{rater:int}/{item:int}", self.vote, methods=["POST"]),
            Route("/r/{rater:int}/done", self.done),
            Route("/r/{rater:int}/done", self.finish, methods=["POST"]),
            Mount("/static", StaticFiles(directory=_STATIC)),
        ]
        return Starlette(
            routes=[Mount(self.root, routes=routes)],
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=_guard),
                Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"], www_redirect=False),
                Middleware(RequestBodyLimitMiddleware, max_body_size=_MAX_FORM),
            ],
            exception_handlers={sqlite3.Error: _not_stored},
        )

    async def start(self, request: Request, error: str | None = None) -> Response:
        page = self.templates.get_template("start.html").render(
            error=error, count=len(self.votes.keys), invited=self.invited, limit=NAME_LENGTH
        )
        return HTMLResponse(page, 400 if error else 200)

    async def join(self, request: Request) -> Response:
        name = (await _form(request)).get("name", "")
        try:
            if self.invited and name not in self.invited:
                raise ConfigError("this name was not invited; choose a name below")
            rater = self.votes.join(name)
        except ConfigError as error:
            return await self.start(request, str(error))
        return self._next(rater)

    async def next(self, request: Request) -> Response:
        return self._next(self._rater(request))

    async def pair(self, request: Request) -> Response:
        rater, item = self._rater(request), self._item(request)
        votes = self.votes.of(rater)
        vote = votes[item - 1]
        pair = self.pairs.items[vote.key]
        answers = (pair.model, pair.reference) if vote.model_first else (pair.reference, pair.model)
        return self._page(
            "pair.html",
            rater,
            item=item,
            count=len(votes),
            rated=sum(one.choice is not None for one in votes),
            choice="bad" if vote.bad else vote.choice,
            comment=vote.comment,
            comment_length=COMMENT_LENGTH,
            instruction=self._shown(pair.instruction),
            input=self._shown(pair.input),
            answers=[self._shown(answer) for answer in answers],
        )

    async def vote(self, request: Request) -> Response:
        rater, item = self._rater(request), self._item(request)
        form = await _form(request)
        given = form.get("choice", "")
        if given not in _CHOICES:
            raise HTTPException(400, "A vote must be first, tie, bad or second; go back and choose one.")
        comment = presentable(form.get("comment", "").strip())
        self.votes.vote(rater, item, _CHOICES[given], bad=given == "bad", comment=comment)
        return self._next(rater, after=item)

    async def done(self, request: Request) -> Response:
        rater = self._rater(request)
        votes = self.votes.of(rater)
        if any(vote.choice is None for vote in votes):
            return self._next(rater)
        if not rater.finished:
            return self._page("done.html", rater, count=len(votes))
        cell = summarise({vote.key: vote.outcome for vote in votes}, confidence=0.95)["pooled"]
        names = (self.votes.about["model"], self.votes.about["reference"]) if self.unblind else None
        return self._page("counts.html", rater, cell=cell, revealed=votes if self.unblind else [], names=names)

    async def finish(self, request: Request) -> Response:
        rater = self._rater(request)
        self.votes.finish(rater)
        return self._next(rater)

    def _shown(self, text: str) -> str:
        """Return a text as HTML, rendered from Markdown.

        With `--plain`, or if the text is very long, return plain text instead, which the template escapes.
        """
        if self.markdown is None or len(text) > _MAX_MARKDOWN:
            return presentable(text)
        return Markup(self.markdown.render(presentable(text)))  # noqa: S704 - the renderer escapes HTML

    def _page(self, name: str, rater: Rater, **values: Any) -> Response:
        here = f"{self.root}/r/{rater.number}"
        return HTMLResponse(self.templates.get_template(name).render(values, rater=rater, here=here))

    def _next(self, rater: Rater, after: int = 0) -> Response:
        """Redirect to the first unrated item whose number is above `after`.

        If there is none, redirect to the first unrated item; if all items are rated, redirect to the last page.
        """
        missing = [vote.item for vote in self.votes.of(rater) if vote.choice is None]
        page = next((item for item in missing if item > after), missing[0] if missing else "done")
        return RedirectResponse(f"{self.root}/r/{rater.number}/{page}", 303)

    def _rater(self, request: Request) -> Rater:
        number = request.path_params["rater"]
        for rater in self.votes.raters():
            if rater.number == number:
                return rater
        raise HTTPException(404, "This rater does not exist; begin at the first page.")

    def _item(self, request: Request) -> int:
        item: int = request.path_params["item"]
        if item not in self.votes.keys:
            raise HTTPException(404, f"Pair {item} does not exist; pairs have the numbers 1 to {len(self.votes.keys)}.")
        return item


async def _form(request: Request) -> dict[str, str]:
    return dict(parse_qsl((await request.body()).decode("utf-8", "replace")))


async def _not_stored(request: Request, error: Exception) -> Response:
    return PlainTextResponse(
        f"The file of votes cannot be used ({error}). Your click was not stored; free some disk space or wait, then go "
        "back and try again.",
        503,
    )


async def _guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Refuse forms that another site's page sent, and add `_HEADERS` to every response."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    foreign = origin is not None and origin.lower() != f"http://{request.headers['host']}".lower()
    if request.method not in ("GET", "HEAD") and (foreign or site not in (None, "same-origin")):
        response: Response = PlainTextResponse("This form was sent by another site's page.", 403)
    else:
        response = await call_next(request)
    response.headers.update(_HEADERS)
    return response


def listen(port: int) -> socket.socket:
    """Return a socket that listens on loopback, on `port` or, if that is 0, on a free port.

    Raises:
        ConfigError: the port cannot be used.
    """
    try:
        return socket.create_server((LOOPBACK, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: {error}; give another port, or 0 for a free one") from error


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=2
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
