"""The web application of the inspector: routes, what every answer carries, and errors in words.

All state of a page stands in its address. Pages are made on the server and need no script, but for the sliders.
Answers forbid foreign content (Content-Security-Policy); requests for another host or from another page are refused,
so that a page of the web cannot reach the inspector through a browser (DNS rebinding, forged requests).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from pysteer.app import pages
from pysteer.app.live import Live
from pysteer.app.research import Adapters, Histories, heat_png
from pysteer.app.store import PICTURES, NotFound, Results
from pysteer.errors import InputError, PysteerError

HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
LONGEST_QUERY, LARGEST_BODY = 8_000, 64_000
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
_KINDS = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".svg": "image/svg+xml",
    ".csv": "text/csv; charset=utf-8", ".json": "application/json", ".txt": "text/plain; charset=utf-8",
    ".yaml": "text/plain; charset=utf-8", ".html": "text/html; charset=utf-8",
}  # fmt: skip


class Inspector:
    """Routes of the application.

    Args:
        results: the folder that is shown.
        live: the generator of the live page.
        hosts: names under which it may be reached.
    """

    def __init__(self, results: Results, live: Live, hosts: Sequence[str] = LOOPBACK) -> None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        self.results, self.live, self.hosts = results, live, tuple(hosts)
        self.histories, self.adapters = Histories(results), Adapters(results)
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self.templates.filters["address"] = address
        self.templates.globals["link"] = link

    def application(self) -> Any:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles

        routes: list[Any] = [
            Route(path, self._page(name)) for path, name in (
                ("/", "runs"), ("/compare", "compare"), ("/run", "run"), ("/rows", "rows"), ("/grid", "grid"),
                ("/curves", "curves"), ("/features", "features"), ("/dynamics", "dynamics"), ("/weights", "weights"),
                ("/live", "live"),
            )
        ]  # fmt: skip
        routes += [
            Route("/file/{name:path}", self._file),
            Route("/thumb/{name:path}", self._thumb),
            Route("/heat.png", self._heat),
            Route("/rows.csv", self._csv),
            Route("/live/{action}", self._live, methods=["POST"]),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]
        found = Starlette(routes=routes, exception_handlers={404: self._nothing})
        return _Guard(found, self)

    # -- pages

    def _page(self, name: str) -> Callable[[Any], Any]:
        """A route that runs in a thread of its own; what the user gave wrong becomes a page that says so."""
        make = getattr(pages, f"{name}_page")

        def answer(request: Any) -> Any:
            from starlette.responses import HTMLResponse

            try:
                query = dict(request.query_params.multi_items())
                query["runs"] = ",".join(request.query_params.getlist("pick"))
                facts = make(self, pages.Query(query))
                text = self._render(f"{name}.html", page=name, **facts)
            except PysteerError as error:
                return self._said(error, name)
            return HTMLResponse(text)

        return answer

    def _render(self, template: str, **facts: Any) -> str:
        return self.templates.get_template(template).render(folder=self.results.folder.name, **facts)

    def _said(self, error: PysteerError, page: str = "") -> Any:
        from starlette.responses import HTMLResponse

        text = self._render("problem.html", page=page, title="This cannot be shown", problem=str(error))
        return HTMLResponse(text, 404 if isinstance(error, NotFound) else 400)

    async def _nothing(self, request: Any, error: Any) -> Any:
        return self._said(NotFound("page", value=request.url.path, allowed="those of the menu"))

    # -- files

    def _file(self, request: Any) -> Any:
        from starlette.responses import FileResponse

        try:
            path = self.results.served(request.path_params["name"])
        except PysteerError as error:
            return self._said(error)
        suffix = path.suffix.lower()
        policy = _REPORT_POLICY if suffix in (".html", ".svg") else _POLICY
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
        return FileResponse(path, media_type=_KINDS[suffix], headers=headers)

    def _thumb(self, request: Any) -> Any:
        """A picture made small enough; small ones come as they are."""
        from starlette.responses import FileResponse, Response

        try:
            path = self.results.served(request.path_params["name"])
            size = pages.Query(dict(request.query_params)).whole("s", 96, 16, 1024)
            if path.suffix.lower() not in PICTURES:
                raise NotFound("picture", value=path.name, allowed=", ".join(sorted(PICTURES)))
            small = thumbnail(path, size)
        except PysteerError as error:
            return self._said(error)
        headers = {"Cache-Control": "private, max-age=600"}
        if small is None:
            return FileResponse(path, media_type=_KINDS[path.suffix.lower()], headers=headers)
        return Response(small, media_type="image/png", headers=headers)

    def _heat(self, request: Any) -> Any:
        from starlette.responses import Response

        query = pages.Query(dict(request.query_params))
        try:
            place = [query.text(name) for name in ("run", "training", "site", "stat")]
            _, values = self.histories.series(*place)
        except PysteerError as error:
            return self._said(error)
        return Response(heat_png(values.T, 6), media_type="image/png")

    def _csv(self, request: Any) -> Any:
        """The rows that a page shows, all of them, as CSV."""
        from starlette.responses import Response

        try:
            text = pages.rows_csv(self, pages.Query(dict(request.query_params)))
        except PysteerError as error:
            return self._said(error)
        headers = {"Content-Disposition": 'attachment; filename="rows.csv"'}
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)

    # -- live

    async def _live(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse

        body = await request.body()
        try:
            given = json.loads(body or b"{}")
            if not isinstance(given, dict):
                raise InputError("request", value=type(given).__name__, allowed="a JSON object")
            return await run_in_threadpool(pages.live_action, self, request.path_params["action"], given)
        except (ValueError, TypeError, PysteerError) as error:  # JSON, numbers, and what the user gave
            return JSONResponse({"problem": str(error)}, 404 if isinstance(error, NotFound) else 400)


class _Guard:
    """Around the application: refuses other hosts, forged and huge requests, and adds the headers every answer has."""

    def __init__(self, inner: Callable[..., Awaitable[None]], inspector: Inspector) -> None:
        self.inner, self.hosts = inner, inspector.hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        refused = self._refused(scope)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                names = {name.lower() for name, _ in headers}
                for name, value in (
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                ):
                    if name not in names:
                        headers.append((name, value))
            await send(message)

        if refused:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse(refused[1], refused[0])(scope, receive, with_headers)
            return
        await self.inner(scope, receive, with_headers)

    def _refused(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if "*" not in self.hosts and _name(host) not in self.hosts:
            return 421, f"this inspector does not answer for host {host[:80]!r}; give --host to allow another"
        if len(scope.get("query_string", b"")) > LONGEST_QUERY:
            return 414, f"the address is too long; allowed are {LONGEST_QUERY} characters"
        if scope["method"] == "POST":
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                return 403, "requests from other pages are refused"
            if not headers.get("content-type", "").startswith("application/json"):
                return 415, "send JSON"
            length = headers.get("content-length", "")
            if not length.isdigit() or int(length) > LARGEST_BODY:
                return 413, f"the request is too large; allowed are {LARGEST_BODY} bytes"
        return None


def _name(host: str) -> str:
    """Host of a header without the port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


def thumbnail(path: Path, size: int) -> bytes | None:
    """PNG of a picture of at most `size` pixels a side; None where it is small enough as it is.

    Raises:
        InputError: it cannot be read, or is absurdly large.
    """
    import io
    import warnings

    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if max(image.size) <= size:
                    return None
                image.thumbnail((size, size))
                out = io.BytesIO()
                image.convert("RGB").save(out, "png", compress_level=1)
                return out.getvalue()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError("picture cannot be read", value=path.name, fix="run the command again") from error


def address(path: str) -> str:
    """A path inside the results as part of an address."""
    return quote(path.removeprefix("./"))


def link(page: str, query: Mapping[str, Any] | None = None, /, **changes: Any) -> str:
    """Address of a page with a query; values that are None or "" are left out."""
    values = {**(query or {}), **changes}
    words = urlencode({name: value for name, value in values.items() if value not in (None, "")})
    return f"{page}?{words}" if words else page


def serve_in_background(results: Path) -> str:
    """Serve a folder of results on a free port of 127.0.0.1 for as long as this process lives; returns the address."""
    import threading

    opened, found = threading.Event(), []

    def told(address: str) -> None:
        found.append(address.rstrip("/"))
        opened.set()

    threading.Thread(
        target=serve, args=(Inspector(Results(results), Live()), "127.0.0.1", 0, told), daemon=True
    ).start()
    if not opened.wait(120):
        raise InputError("inspector", value=str(results), allowed="one that answers within two minutes")
    return found[0]


def serve(inspector: Inspector, host: str, port: int, opened: Callable[[str], None] = lambda address: None) -> None:
    """Serve until interrupted. Port 0 takes a free one; `opened` is told the address once it answers."""
    import importlib
    import socket
    import threading

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
        except OSError as error:
            raise InputError(
                "address of the inspector", value=f"{host}:{port}", allowed="one that is free", fix="give --port 0"
            ) from error  # fmt: skip
        door.listen(64)
        shown = f"[{host}]" if ":" in host else host
        opened(f"http://{shown}:{door.getsockname()[1]}/")
        # What later pages need takes seconds to import; the first page does not wait for it.
        threading.Thread(target=importlib.import_module, args=("pysteer.metrics.rates",), daemon=True).start()
        config = uvicorn.Config(inspector.application(), log_level="warning", lifespan="off", access_log=False)
        try:
            uvicorn.Server(config).run(sockets=[door])
        finally:
            inspector.live.close()
