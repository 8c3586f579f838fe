"""The page with sliders, and what its script asks for."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pysteer.app import live as live_module
from pysteer.app.pages.query import Query
from pysteer.app.store import NotFound
from pysteer.errors import InputError

if TYPE_CHECKING:
    from pysteer.app.server import Inspector


def live_page(app: Inspector, query: Query) -> dict[str, Any]:
    """Sliders over a generator; they come to life by script."""
    from pysteer.methods import REGISTRY

    strengths = {name[2:]: _strength(name, value) for name, value in query.items() if name.startswith("s.")}
    prompts = query.text("prompts", "a large red circle at the left on a white background")
    fits = [path.relative_to(app.results.folder).as_posix() for path in app.results.fits()]
    return {
        "title": "Live", "query": query, "model": app.live.model, "parts": app.live.parts, "strengths": strengths,
        "prompts": prompts, "seed": query.whole("seed", 0, 0, 2**31 - 1), "fits": fits[:200],
        "methods": [m for m in ("mean_difference", "prototype", "linear_act") if m in REGISTRY],
        "most": live_module.MOST_STRENGTH, "slide": live_module.SLIDE,
    }  # fmt: skip


def _strength(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(f"strength {name}", value=value, allowed="a number") from error
    return live_module.checked(number, name)


def live_action(app: Inspector, action: str, given: Mapping[str, Any]) -> Any:
    """What the script of the live page asks for."""
    from starlette.responses import JSONResponse, Response

    if action == "fit":
        pair = f"{given.get('source', '')}->{given.get('target', '')}"
        method, site = str(given.get("method", "")), str(given.get("site", ""))
        part = app.live.add_fit(pair, method, site, int(given.get("pairs", 32)), int(given.get("fit_seed", 0)))
        return JSONResponse({"part": part.name, "groups": part.groups})
    if action == "open":
        part = app.live.add_folder(app.results.path(str(given.get("folder", ""))))
        return JSONResponse({"part": part.name, "groups": part.groups})
    if action == "remove":
        app.live.remove(str(given.get("part", "")))
        return JSONResponse({})
    if action not in ("show", "code", "archive"):
        raise NotFound("action", value=action, allowed="fit, open, remove, show, code, archive")
    prompts, seed, strengths = _wanted(given)
    if action == "code":
        return JSONResponse({"code": app.live.code(prompts, seed, strengths)})
    if action == "archive":
        headers = {"Content-Disposition": 'attachment; filename="pysteer-plan.zip"'}
        return Response(app.live.archive(prompts, seed, strengths), media_type="application/zip", headers=headers)
    shown = app.live.show(prompts, seed, strengths)
    return JSONResponse({
        "steered": [_inline(png) for png in shown.steered], "plain": [_inline(png) for png in shown.plain],
        "seconds": round(shown.seconds, 3), "attached": shown.attached,
    })  # fmt: skip


def _wanted(given: Mapping[str, Any]) -> tuple[list[str], int, dict[str, float]]:
    prompts, strengths = given.get("prompts", ""), given.get("strengths", {})
    if not isinstance(prompts, str) or not isinstance(strengths, dict) or len(strengths) > 200:
        raise InputError("request", value="prompts or strengths", allowed="text, and numbers by name")
    numbers = {str(name): live_module.checked(float(value), str(name)) for name, value in strengths.items()}
    return [line for line in prompts.splitlines() if line.strip()], int(given.get("seed", 0)), numbers


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
