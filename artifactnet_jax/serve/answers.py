"""Answers of the HTTP API: their models, and errors as an HTTP status with a kind and a cure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError

from artifactnet_jax.serve.store import StateError
from artifactnet_jax.serve.uploads import BadUpload, DiskFull
from artifactnet_jax.text import brief, printable


class ApiError(Exception):
    """Ends a request: an HTTP status, a kind for machines, and one line that says what to do."""

    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers or {}


class Cause(BaseModel):
    """A kind for machines, and a message that says what to do."""

    kind: str
    message: str


class Problem(BaseModel):
    """The body of every error."""

    error: Cause


class Counts(BaseModel):
    """Files of a batch by verdict."""

    ai: int
    partly_ai: int = Field(alias="partly-ai")
    unclear: int
    real: int
    undecided: int


class Batch(BaseModel):
    """State and counts of a batch; times are seconds since the epoch."""

    id: str
    state: Literal["open", "running", "done"]
    created: float
    committed: float | None
    finished: float | None
    files: int
    bytes: int
    scored: int
    failed: int
    verdicts: Counts


class Uploaded(BaseModel):
    """A file that is stored. `name` is the client's; control characters in it are escaped."""

    id: str
    name: str
    bytes: int
    sha256: str


class Upload(BaseModel):
    """Files of one request."""

    files: list[Uploaded]


class Info(BaseModel):
    """What scores here (null while the worker is being restarted), and the limits."""

    version: str
    engine: dict[str, Any] | None
    limits: dict[str, float]


class Health(BaseModel):
    """Whether the service works."""

    status: Literal["ok", "no-worker", "no-database", "stopping"]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of what can go wrong, besides what always can."""
    texts = {
        400: "malformed body",
        401: "no valid token",
        403: "a request that another site's page made",
        404: "no such batch",
        408: "the upload stalled",
        409: "not in this state of the batch",
        413: "over a limit",
        415: "not multipart/form-data",
        422: "a parameter or file that cannot be used",
        429: "too many requests, or files waiting: see Retry-After",
        503: "stopping, or no database",
        504: "no result in time",
        507: "disk or quota full",
    }
    always = (401, 403, 429, 503)
    found = {n: {"model": Problem, "description": texts[n]} for n in (*always, *statuses)}
    return dict(sorted(found.items()))


def problem(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The body of an error, with its HTTP status."""
    body = {"error": {"kind": kind, "message": message}}
    return JSONResponse(body, status, dict(headers or {}))


def _on_api_error(_: Request, error: Any) -> Response:
    return problem(error.status, error.kind, str(error), error.headers)


def _on_bad_upload(_: Request, error: Any) -> Response:
    return problem(error.status, error.kind, str(error))


def _on_disk_full(_: Request, error: Any) -> Response:
    return problem(507, "disk-full", str(error))


def _on_state_error(_: Request, error: Any) -> Response:
    status = {"not-found": 404, "too-many": 413}.get(error.kind, 409)
    return problem(status, error.kind, str(error))


def _on_database_error(_: Request, error: Any) -> Response:
    if "disk is full" in str(error) or "No space left" in str(error):
        return problem(507, "disk-full", "the service's disk is full: tell who runs it")
    print(f"artifactnet-jax: database: {printable(brief(error))}", file=sys.stderr)
    text = "the database does not answer: try again later"
    return problem(503, "database", text, {"retry-after": "10"})


def _on_invalid(_: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return problem(422, "invalid", printable(f"{where}: {first['msg']}"))


HANDLERS: dict[Any, Any] = {
    ApiError: _on_api_error,
    BadUpload: _on_bad_upload,
    DiskFull: _on_disk_full,
    StateError: _on_state_error,
    DBAPIError: _on_database_error,
    RequestValidationError: _on_invalid,
}
