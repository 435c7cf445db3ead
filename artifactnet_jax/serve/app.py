"""The HTTP API (OpenAPI 3.1 at /openapi.json), and the page if the package has one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from artifactnet_jax import __version__, results
from artifactnet_jax.serve.answers import (
    HANDLERS,
    ApiError,
    Batch,
    Health,
    Info,
    Upload,
    Uploaded,
    problem,
    problems,
)
from artifactnet_jax.serve.service import RateLimit, Service
from artifactnet_jax.serve.store import LOCAL, Key, StateError
from artifactnet_jax.serve.uploads import Multipart

PAGE = Path(__file__).parent / "page"
FEED_BYTES = 2**20  # of a body that are collected before they are written
EVENTS_S = 15.0  # between signs of life of an event stream
EVENT_GAP_S = 0.2  # between looks for news
ROWS = 200  # read from the database at once
METHODS = ("GET", "HEAD", "POST", "DELETE")
ID_PATTERN = "[0-9a-f]{32}"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
JSON_LINES = "application/jsonl"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _check_same_site(request: Request) -> None:
    """Without tokens a page of another site, open in a browser here, must not get in.

    Its requests have its Origin, or, if its name was made to point here, its Host.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        local = urlsplit(f"//{host}").hostname in LOOPBACK
        local = local and (origin is None or urlsplit(origin).netloc == host)
    except ValueError:
        local = False
    if not local or request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        text = "without tokens only this machine's own requests are served: make a token"
        raise ApiError(403, "cross-site", text)


_bearer = HTTPBearer(auto_error=False, description="made by `artifactnet-jax token`")


def _owner(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str:
    """The id of the token that came with a request; LOCAL where none is needed."""
    service = _service(request)
    owner = None if given is None else service.store.owner(given.credentials)
    if given is None and service.local and not service.store.has_tokens():
        _check_same_site(request)
        owner = LOCAL
    client = f"token {owner}" if owner else f"address {_client(request)}"
    if wait := request.app.state.rate.wait_s(client):
        seconds = math.ceil(wait)
        text = f"too many requests: wait {seconds} s"
        raise ApiError(429, "rate", text, {"retry-after": str(seconds)})
    if owner is None:
        text = "no valid bearer token: make one with artifactnet-jax token"
        raise ApiError(401, "token", text, {"www-authenticate": "Bearer"})
    return owner


Here = Annotated[Service, Depends(_service)]
Owner = Annotated[str, Depends(_owner)]
BatchId = Annotated[str, PathParameter(pattern=f"^{ID_PATTERN}$", description="of the batch")]
IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        max_length=255,
        pattern="^[!-~]*$",
        description="a request that is sent again under its key counts once",
    ),
]


def _body(field: str, text: str, many: bool) -> dict[str, Any]:
    """OpenAPI of a multipart body."""
    one = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema = {"type": "array", "minItems": 1, "items": one} if many else one
    form = {
        "type": "object",
        "required": [field],
        "properties": {field: schema},
        "additionalProperties": False,
    }
    content = {"multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "description": text, "content": content}}


class _IdConvertor(Convertor[str]):
    """Other paths are no batch: "create" above all."""

    regex = ID_PATTERN

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("batch", _IdConvertor())


def _busy(service: Service) -> None:
    if service.store.count_waiting() >= service.limits.waiting:
        text = "too many files wait: try again in a minute"
        raise ApiError(429, "busy", text, {"retry-after": "60"})


@contextlib.asynccontextmanager
async def _reading(request: Request, service: Service, most: int) -> AsyncIterator[Multipart]:
    """The body, read to its end; what is not kept is removed, whatever happens."""
    limits, more = service.limits, True
    kind = request.headers.get("content-type", "")
    parts, buffer = Multipart(kind, service.disk, most, limits.file_bytes), bytearray()
    try:
        while more:
            try:
                message = await asyncio.wait_for(request.receive(), limits.stall_s)
            except asyncio.TimeoutError:
                text = f"no byte for {limits.stall_s:g} s: send again"
                raise ApiError(408, "stalled", text, {"connection": "close"}) from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "disconnect", "the client went away")  # which nobody reads
            buffer += message.get("body", b"")
            more = message.get("more_body", False)
            if len(buffer) >= FEED_BYTES or not more:
                await run_in_threadpool(parts.feed, bytes(buffer))
                buffer.clear()
        yield parts
    finally:
        await run_in_threadpool(parts.discard)


router = APIRouter()


@router.post("/v1/batch/create", status_code=201, response_model=Batch, responses=problems(422))
def create(owner: Owner, service: Here, key: IdempotencyKey = "") -> Any:
    """Open a batch."""
    same = None if not key else Key(owner, "create", key, "")
    batch = None if same is None else service.store.replayed(same)
    if batch is None:
        try:
            batch = service.store.create(owner, same)
        except IntegrityError:  # the same key at the same time
            batch = None if same is None else service.store.replayed(same)
            if batch is None:
                raise
    return service.store.status(owner, batch)


@router.post(
    "/v1/batch/{batch:batch}/files",
    status_code=201,
    response_model=Upload,
    responses=problems(400, 404, 408, 409, 413, 415, 422, 507),
    openapi_extra=_body("files", "one part for each file, with its filename", many=True),
)
async def upload(
    request: Request, batch: BatchId, owner: Owner, service: Here, key: IdempotencyKey = ""
) -> Response:
    """Add files to an open batch, as often as needed. All files of a request count, or none."""
    store, limits = service.store, service.limits

    def add(parts: Multipart) -> str:
        digest = parts.finish()
        same = None if not key else Key(owner, batch, key, digest)
        if same is not None and (reply := store.replayed(same)) is not None:
            return reply
        reply = Upload(files=[Uploaded(**vars(file)) for file in parts.files]).model_dump_json()
        try:
            store.add(owner, batch, parts.files, limits.files, same, reply)
        except IntegrityError:  # the same key at the same time
            earlier = None if same is None else store.replayed(same)
            if earlier is None:
                raise
            return earlier
        except DBAPIError as error:
            if error.connection_invalidated:  # it may have been stored all the same
                parts.keep()
            raise
        parts.keep()
        service.metrics.uploaded.inc(sum(file.bytes for file in parts.files))
        return reply

    have = await run_in_threadpool(store.check_open, owner, batch)
    async with _reading(request, service, limits.files - have) as parts:
        reply = await run_in_threadpool(add, parts)
    return Response(reply, 201, media_type="application/json")


@router.post(
    "/v1/batch/{batch:batch}/commit", response_model=Batch, responses=problems(404, 409, 422)
)
async def commit(batch: BatchId, owner: Owner, service: Here) -> Any:
    """Have the files of a batch scored. A second time changes nothing."""
    await run_in_threadpool(_busy, service)
    await run_in_threadpool(service.store.commit, owner, batch)
    service.wake()
    service.tell(batch)
    return await run_in_threadpool(service.store.status, owner, batch)


@router.get("/v1/batch/{batch:batch}", response_model=Batch, responses=problems(404, 422))
def status(batch: BatchId, owner: Owner, service: Here) -> Any:
    """State and counts of a batch."""
    return service.store.status(owner, batch)


@router.delete("/v1/batch/{batch:batch}", status_code=204, responses=problems(404, 422))
async def delete(batch: BatchId, owner: Owner, service: Here) -> None:
    """Remove a batch: its files, its results, and what of it waits."""
    gone = await run_in_threadpool(service.store.delete, owner, batch)
    await run_in_threadpool(service.disk.remove, gone)
    service.tell(batch)


Form = Literal["jsonl", "csv", "xlsx"]
_MEDIA: dict[str, str] = {"jsonl": JSON_LINES, "csv": "text/csv; charset=utf-8", "xlsx": XLSX}


@router.get(
    "/v1/batch/{batch:batch}/results",
    response_class=Response,
    responses={
        200: {
            "description": "a row for each file, in order of upload",
            "content": {kind: {"schema": {"type": "string"}} for kind in _MEDIA.values()},
        },
        **problems(404, 409, 422),
    },
)
def get_results(
    batch: BatchId,
    owner: Owner,
    service: Here,
    form: Annotated[Form, Query(alias="format")] = "jsonl",
    partial: Annotated[bool, Query(description="the rows so far, of a batch not yet done")] = False,
) -> Response:
    """The results: rows as `artifactnet-jax score` writes them, with the id of the file."""
    state = service.store.status(owner, batch)["state"]
    if state != "done" and not partial:
        text = f"the batch is {state}: wait until it is done, or ask for partial=true"
        raise ApiError(409, "not-done", text)

    def rows() -> Iterator[str]:
        position = -1
        while page := service.store.rows_after(batch, position, ROWS):
            for position, row in page:  # noqa: B007
                if row is not None:
                    yield row

    headers = {"content-disposition": f'attachment; filename="artifactnet-{batch[:8]}.{form}"'}
    if form == "xlsx":
        return Response(_xlsx(rows()), headers=headers, media_type=_MEDIA[form])
    if form == "jsonl":
        lines: Iterator[str] = (row + "\n" for row in rows())
    else:
        lines = itertools.chain(
            [results.to_csv(None)], (results.to_csv(json.loads(row)) for row in rows())
        )
    return StreamingResponse(lines, headers=headers, media_type=_MEDIA[form])


def _xlsx(rows: Iterator[str]) -> bytes:
    """The columns of CSV, for people; text stays text, whatever it begins with."""
    import xlsxwriter

    out = io.BytesIO()
    options = {"in_memory": True, "strings_to_formulas": False, "strings_to_urls": False}
    with xlsxwriter.Workbook(out, options) as book:
        sheet = book.add_worksheet("results")
        sheet.freeze_panes(1, 0)
        sheet.write_row(0, 0, results.CSV_COLUMNS)
        for number, row in enumerate(rows, 1):
            cells = results.to_cells(results.in_words(json.loads(row)))
            sheet.write_row(number, 0, cells)
    return out.getvalue()


_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["result", "progress", "done", "deleted"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "id": {"type": "string"},
    },
}


@router.get(
    "/v1/batch/{batch:batch}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "`result` (a row), `progress` (the batch) and at the end `done` or "
            "`deleted`",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **problems(404, 422),
    },
)
async def events(
    batch: BatchId,
    owner: Owner,
    service: Here,
    last: Annotated[int, Header(alias="Last-Event-ID", ge=0, lt=2**62)] = 0,
) -> Response:
    """Server-sent events: each result as it comes, those so far first, until the batch is done."""
    await run_in_threadpool(service.store.status, owner, batch)
    stream = _events(service, owner, batch, last)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


async def _events(service: Service, owner: str, batch: str, last: int) -> AsyncIterator[str]:
    store = service.store
    with service.watching(batch) as news:
        while not service.stopping:
            news.clear()
            try:
                status = await run_in_threadpool(store.status, owner, batch)
                rows = await run_in_threadpool(store.results_after, batch, last, ROWS)
            except StateError:
                yield "event: deleted\ndata: {}\n\n"
                return
            except DBAPIError:  # the client comes again
                return
            for last, row in rows:
                yield f"id: {last}\nevent: result\ndata: {row}\n\n"
            if len(rows) == ROWS:
                continue
            name = "done" if status["state"] == "done" else "progress"
            yield f"event: {name}\ndata: {json.dumps(status)}\n\n"
            if name == "done":
                return
            await asyncio.sleep(EVENT_GAP_S)
            try:
                await asyncio.wait_for(news.wait(), EVENTS_S)
            except asyncio.TimeoutError:
                yield ": waiting\n\n"


# One file


@router.post(
    "/v1/score",
    responses={
        200: {
            "description": "the row that `artifactnet-jax score` writes",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **problems(400, 408, 413, 415, 422, 504, 507),
    },
    openapi_extra=_body("file", "one part with a filename", many=False),
)
async def score(request: Request, owner: Owner, service: Here) -> Response:
    """Score one file and wait for it; nothing is kept. 422: the row has an `error` instead."""
    store = service.store

    def add(parts: Multipart) -> str:
        parts.finish()
        batch = store.add_single(owner, parts.files[0])
        parts.keep()
        return batch

    await run_in_threadpool(_busy, service)
    async with _reading(request, service, 1) as parts:
        batch = await run_in_threadpool(add, parts)
    try:
        row = await _wait(request, service, batch)
    finally:
        with contextlib.suppress(StateError):
            await delete(batch, owner, service)
    failed = "error" in json.loads(row)
    return Response(row, 422 if failed else 200, media_type="application/json")


async def _wait(request: Request, service: Service, batch: str) -> str:
    """The row of a batch of one file."""
    end = time.monotonic() + service.limits.answer_s
    service.wake()
    with service.watching(batch) as news:
        while time.monotonic() < end:
            news.clear()
            if rows := await run_in_threadpool(service.store.results_after, batch, 0, 1):
                return rows[0][1]
            if service.stopping:
                raise ApiError(503, "stopping", "the service is stopping: send it again later")
            if await request.is_disconnected():
                raise ApiError(400, "disconnect", "the client went away")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), 1.0)
    text = f"no result in {service.limits.answer_s:g} s: use a batch, whose result waits for you"
    raise ApiError(504, "late", text)


# The service itself


@router.get("/v1/info", response_model=Info, responses=problems())
def info(owner: Owner, service: Here) -> Any:
    """What scores here, and the limits."""
    limits = {
        "file_bytes": service.limits.file_bytes,
        "files": service.limits.files,
        "audio_s": service.settings.decode.audio_s,
        "requests_per_minute": service.limits.requests,
        "retention_s": service.limits.retention_s,
    }
    return {"version": __version__, "engine": service.engine, "limits": limits}


@router.get(
    "/healthz",
    response_model=Health,
    responses={503: {"model": Health, "description": "not healthy"}},
)
def healthz(service: Here) -> Any:
    """Whether the service works; needs no token."""
    status = "stopping" if service.stopping else "ok" if service.engine else "no-worker"
    try:
        service.store.has_tokens()
    except DBAPIError:
        status = "no-database"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problems(),
    },
)
def metrics(owner: Owner, service: Here) -> Response:
    """Metrics for Prometheus."""
    service.metrics.waiting.set(service.store.count_waiting())
    service.metrics.disk.set(service.disk.used)
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def create_app(service: Service) -> FastAPI:
    """The application over a service that has been started."""
    app = FastAPI(
        title="artifactnet-jax",
        version=__version__,
        summary="Detects AI-generated music by the residue that neural codecs leave.",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.state.rate = RateLimit(service.limits.requests)
    app.add_middleware(Gate, service=service)
    for kind, handler in {**HANDLERS, HTTPException: _on_http_error}.items():
        app.add_exception_handler(kind, handler)
    app.include_router(router)
    if (PAGE / "index.html").is_file():

        @app.get("/", include_in_schema=False)
        def index() -> FileResponse:
            return FileResponse(PAGE / "index.html")

        app.mount("/static", StaticFiles(directory=PAGE))
    return app


def _on_http_error(request: Request, error: Any) -> Response:
    kind = {404: "not-found", 405: "method"}.get(error.status_code, "http")
    headers = dict(error.headers or {})
    if error.status_code == 405:  # of every route of this path, not the first one's alone
        matching = [
            route
            for route in router.routes
            if isinstance(route, APIRoute) and route.matches(request.scope)[0] != Match.NONE
        ]
        headers["allow"] = ", ".join(sorted({m for route in matching for m in route.methods or ()}))
    return problem(error.status_code, kind, str(error.detail), headers)


class Gate:
    """Around everything: headers of every answer, and its time."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path_format", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            labels = self._service.metrics.requests.labels(method, route, str(status))
            labels.observe(time.perf_counter() - began)
