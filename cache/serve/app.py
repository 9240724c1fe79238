"""The application: a page for people, `/healthz`, and `/NAME/KEY` for every file that a manifest names.

It is an ASGI application on Starlette; `serve` runs it on uvicorn. Files are sent by pieces from the disk with ranges,
so that memory does not grow with shards. An ETag is the sha256 of the bytes, which is compared before a file is sent
first: so a reader need not fetch all of a shard to trust a part of it. Nothing is written, nothing is listed but what
manifests name, and what the disk no longer holds as the manifest says is an error and not an answer.
"""

import contextlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from html import escape
from pathlib import Path

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from darht.cache.format.mixture import describe_sources
from darht.cache.serve.catalogue import Catalogue, Served
from darht.core.errors import DarhtError

_FOR_EVER = 365 * 24 * 3600  # seconds; what HTTP caches take for "never changes"
Answer = Callable[[Request], Awaitable[Response]]


def make_app(catalogue: Catalogue, token: str | None = None) -> Starlette:
    """The ASGI application.

    Args:
        catalogue: what is served.
        token: bearer token that every request but `/healthz` must bring; None for none.
    """
    comparing = anyio.CapacityLimiter(1)  # one file at a time; who waits for the same one finds it compared

    async def check(request: Request, answer: Answer) -> Response:
        given = request.headers.get("authorization", "")
        if token is None or request.url.path == "/healthz":
            return await answer(request)
        if hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):  # in constant time
            return await answer(request)
        says = "a token is needed: set DARHT_TOKEN, or send 'Authorization: Bearer TOKEN'\n"
        return PlainTextResponse(says, 401, headers={"www-authenticate": "Bearer"})

    async def index(request: Request) -> Response:
        served = {name: await anyio.to_thread.run_sync(look, name) for name in catalogue.names()}
        return HTMLResponse(_page(served, str(request.base_url).rstrip("/")))

    def look(name: str) -> Served | None:
        with contextlib.suppress(DarhtError):
            return catalogue.get(name)
        return None

    async def file(request: Request) -> Response:
        try:
            served = await anyio.to_thread.run_sync(catalogue.get, request.path_params["name"])
        except DarhtError as error:  # it is damaged now, or being written
            return PlainTextResponse(f"{error}\n", 503, headers={"retry-after": "10"})
        if served is None:
            return PlainTextResponse("no such cache\n", 404)
        return await _send(request, served, request.path_params["key"], comparing, private=token is not None)

    routes = [
        Route("/", index, methods=["GET", "HEAD"]),
        Route("/healthz", _healthz, methods=["GET", "HEAD"]),
        Route("/{name}/{key:path}", file, methods=["GET", "HEAD"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=check)])


async def _healthz(request: Request) -> Response:
    return PlainTextResponse("ok\n")


async def _send(
    request: Request, served: Served, key: str, comparing: anyio.CapacityLimiter, *, private: bool
) -> Response:
    item = served.items.get(key)
    if item is None:
        return PlainTextResponse(f"{served.name} has no such file\n", 404)
    path, tag = served.folder / key, f'"{item.sha256}"'
    try:
        found = path.stat()
        if found.st_size != item.size:
            return PlainTextResponse(f"{key} has {found.st_size} bytes, its manifest says {item.size}\n", 503)
        if not await anyio.to_thread.run_sync(served.holds, key, found, limiter=comparing):
            return PlainTextResponse(f"{key} does not have the sha256 that its manifest names\n", 503)
    except OSError:
        return PlainTextResponse(f"{key} is gone from the disk\n", 503)
    reach = "private" if private else "public"
    headers = {
        "etag": tag,
        "cache-control": f"{reach}, max-age={_FOR_EVER}, immutable" if item.fixed else f"{reach}, no-cache",
        "x-content-type-options": "nosniff",
    }
    if tag in (given.strip() for given in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    _drop_many_ranges(request)
    kind = "application/json" if key.endswith(".json") else "application/octet-stream"
    return FileResponse(path, headers=headers, media_type=kind, stat_result=found)


def _drop_many_ranges(request: Request) -> None:
    """A request for several ranges gets the whole file, as HTTP allows: no reader of caches sends one."""
    scope = request.scope
    scope["headers"] = [pair for pair in scope["headers"] if not (pair[0] == b"range" and b"," in pair[1])]


def _page(served: Mapping[str, Served | None], url: str) -> str:
    """The caches by name, None for those that cannot be read now."""
    rows = "".join(_unread(name) if one is None else _row(one, url) for name, one in served.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Caches</title><style>{_STYLE}</style><h1>Caches</h1>{rows}</html>\n"
    )


def _row(served: Served, url: str) -> str:
    spec = served.cache.spec
    teachers = ", ".join(f"{name} ({teacher.arch})" for name, teacher in spec.teachers.items()) or "none"
    of = "several sources" if spec.data.sources else f"{spec.data.source} {spec.data.split}"
    facts = {
        "data": f"{of}, {spec.data.rows:,} rows, {len(spec.data.classes)} classes",
        **{f"source {number}": text for number, text in enumerate(describe_sources(spec.data.sources))},
        "teachers": teachers,
        "attacks": ", ".join(spec.attacks) or "none",
        "size": f"{served.size / 1e6:,.1f} MB in {len(served.items):,} files",
        "root hash": served.cache.root_hash,
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    command = escape(f"darht-train --shards {url}/{served.name} --out run")
    return f"<section><h2>{escape(served.name)}</h2><dl>{listed}</dl><pre>{command}</pre></section>"


def _unread(name: str) -> str:
    return f"<section><h2>{escape(name)}</h2><p>being written, or damaged: nothing of it is served now</p></section>"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1c2128 }
section { border-top: 1px solid #d0d7de; padding: 0.5rem 0 1rem }
dl { display: grid; grid-template-columns: 6rem 1fr; gap: 0.25rem 1rem } dt { color: #57606a }
dd { margin: 0; overflow-wrap: anywhere }
pre { background: #f6f8fa; padding: 0.75rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.5rem 0 0 }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: 0.5rem } }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3 } dt { color: #9198a1 } pre { background: #161b22 }
  section { border-color: #30363d }
}
""".strip()


def read_token(path: Path) -> str:
    """The token in a file, without white space around it.

    Raises:
        DarhtError: it cannot be read, or holds no token of at least 16 printable characters.
    """
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DarhtError(f"{path} cannot be read as a token: {error}; write one line of ASCII characters") from error
    if len(token) < 16 or not token.isprintable() or " " in token:
        raise DarhtError(f"{path} holds {len(token)} characters; a token has at least 16 and no white space")
    return token


def serve(catalogue: Catalogue, *, host: str, port: int, token: str | None = None) -> None:
    """Serve until a signal ends it; requests that are under way get their answers first.

    Raises:
        DarhtError: the address cannot be bound.
    """
    import socket

    import uvicorn

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise DarhtError(f"cannot serve at {host}:{port}: {error.strerror or error}; choose another --port") from error
    config = uvicorn.Config(
        make_app(catalogue, token), log_level="info", server_header=False, timeout_graceful_shutdown=30
    )
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
