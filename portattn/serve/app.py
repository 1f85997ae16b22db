"""The application: JSON under ``/v1``, pages beside it. It reads only, and bounds its answers."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from portattn import __version__
from portattn.errors import TuningError
from portattn.report import html
from portattn.serve import pages
from portattn.serve.exchange import Bests, TooManyError

if TYPE_CHECKING:
    from portattn.report.reader import Reader

_SHA = r"^[0-9a-f]{64}$"
DeviceInPath = Annotated[str, Path(pattern=_SHA, description="a device's fingerprint")]
ProblemInPath = Annotated[str, Path(pattern=_SHA, description="a bucket's key")]
DeviceOrAny = Annotated[
    str, Query(pattern=r"^([0-9a-f]{64})?$", description="a fingerprint; any if left out")
]
FamilyOrAny = Annotated[
    str, Query(max_length=256, description='such as "cuda-sm_90"; any if left out')
]
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_log = logging.getLogger("portattn.serve")
_Next = Callable[[Request], Awaitable[Response]]
_Answer = Callable[..., Response]
_Added = Callable[[_Answer], _Answer]
_Route = Callable[[str], _Added]


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build(reader: Reader, *, names: frozenset[str] | None = LOCAL_NAMES) -> FastAPI:
    """The application for one database.

    Args:
        reader: of the database.
        names: hosts that a request may name; other ones come from a page of another site that
            reached this machine through a name of its own. None for any.
    """
    app = FastAPI(
        title="portattn", version=__version__, docs_url=None, redoc_url=None,
        openapi_url="/v1/openapi.json",
    )  # fmt: skip
    _guard(app, names)

    def get(path: str) -> _Added:
        def add(answer: _Answer) -> _Answer:
            app.head(path, include_in_schema=False)(answer)
            app.get(path)(answer)
            return answer

        return add

    _add_api(get, reader)
    _add_pages(get, reader)
    return app


def _guard(app: FastAPI, names: frozenset[str] | None) -> None:
    """What holds for every answer: names, headers, and what errors say."""

    @app.middleware("http")
    async def guard(request: Request, call_next: _Next) -> Response:
        if names is not None and request.url.hostname not in names:
            response: Response = JSONResponse({"error": "this name is not served here"}, 421)
        else:
            response = await call_next(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(TuningError)
    def unreadable(_: Request, error: Exception) -> Response:
        if isinstance(error, TooManyError):
            return JSONResponse({"error": str(error)}, 400)
        _log.warning("%s", error)  # it may name files and hosts: not for who asks
        return JSONResponse({"error": "the database cannot be read now"}, 503)


def _add_api(get: _Route, reader: Reader) -> None:
    """The JSON."""
    bests = Bests(reader)

    @get("/v1/best")
    def best(request: Request, device: DeviceOrAny = "", family: FamilyOrAny = "") -> Response:
        """Best configs in the exchange format; with ETag and If-None-Match."""
        answer = bests.answer(device, family)
        headers = {"ETag": answer.etag}
        if _matches(request.headers.get("if-none-match", ""), answer.etag):
            return Response(status_code=304, headers=headers)
        return Response(answer.body, headers=headers, media_type="application/json")

    @get("/v1/devices")
    def devices() -> Response:
        """The devices that something is known of."""
        return JSONResponse([dataclasses.asdict(one) for one in reader.devices()])

    @get("/v1/devices/{device}/problems")
    def problems(device: DeviceInPath) -> Response:
        """What is known of a device: its problems with their kernels' bests."""
        return JSONResponse([dataclasses.asdict(one) for one in reader.problems(device)])

    @get("/v1/devices/{device}/problems/{problem}/courses")
    def courses(device: DeviceInPath, problem: ProblemInPath) -> Response:
        """The newest search of each kernel on a problem."""
        return JSONResponse([dataclasses.asdict(one) for one in reader.courses(device, problem)])


def _add_pages(get: _Route, reader: Reader) -> None:
    """The pages and their files."""

    @get("/static/{name}")
    def static(name: str) -> Response:
        """The pages' own files."""
        types = {"style.css": "text/css", "page.js": "text/javascript"}
        if name not in types:
            raise HTTPException(404)
        return Response(html.static(name), media_type=types[name])

    @get("/")
    def first_page() -> Response:
        """The devices."""
        return HTMLResponse(pages.devices(reader))

    @get("/devices/{device}")
    def device_page(device: DeviceInPath) -> Response:
        """One device's problems and gains."""
        return _page_or_404(pages.device(reader, device))

    @get("/devices/{device}/problems/{problem}")
    def problem_page(device: DeviceInPath, problem: ProblemInPath) -> Response:
        """One problem: its kernels, and the course of the searches."""
        return _page_or_404(pages.problem(reader, device, problem))


def _page_or_404(text: str | None) -> Response:
    if text is None:
        raise HTTPException(404, "nothing is known of it")
    return HTMLResponse(text)


def _matches(header: str, etag: str) -> bool:
    """Whether If-None-Match names an entity (RFC 9110, section 13.1.2; weak comparison)."""
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags
