"""Fit a method from activations on disk, or from moments, one site at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pysteer.capture.fitted import Fitted, stack_fits
from pysteer.capture.moments import Moments
from pysteer.capture.store import ActivationStore
from pysteer.errors import InputError
from pysteer.methods import Method, SiteFit
from pysteer.methods.base import TokenSets, check_choice
from pysteer.steering.site import did_you_mean

Stored = ActivationStore | Moments
Progress = Callable[[int, int], object]


def fit_stored(
    method: Method,
    source: Stored,
    target: Stored,
    *,
    negatives: ActivationStore | None = None,
    sites: Iterable[str] | None = None,
    paired: bool = False,
    rows: str = "cond",
    fit_seed: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """Fit `method` at every site and step that `source` and `target` have.

    Memory is that of one site: `n D` for activations, `O(D)` for moments.

    Args:
        method: the method with its configuration.
        source, target: what `capture` wrote (`store.where("label")` chooses a class), or moments.
        negatives: activations that should stay as they are, for methods that can.
        sites: some of the captured sites, None for all.
        paired: whether prompt i of the source belongs to prompt i of the target, token by token.
        rows: rows that a plan steers by default: "cond", "uncond" or "both".
        fit_seed: seed of the method.
        progress: told `(done, total)` after every fitted (site, step).

    Raises:
        InputError: source and target of different kinds, no common site, a method that cannot do what is asked.
    """
    check_choice("rows to steer", rows, ("cond", "uncond", "both"))
    if isinstance(source, Moments) != isinstance(target, Moments):
        raise InputError("source and target", value="activations and moments", allowed="two of the same kind")
    places = _places(source, target, sites)
    fits: dict[str, dict[int, SiteFit]] = {}
    for done, (site, step) in enumerate(places, start=1):
        fits.setdefault(site, {})[step] = _fit(method, source, target, negatives, site, step, paired, fit_seed)
        if progress is not None:
            progress(done, len(places))
    lasting = _lasting(source)
    parameters = [stack_fits(site, method.op, own, lasting=site in lasting) for site, own in fits.items()]
    meta = {"sites": list(fits), "rows": rows, "paired": paired, "fit_seed": fit_seed, "stored": True}
    return Fitted(method, parameters, meta)


def _known(stored: Stored) -> list[tuple[str, int]]:
    return list(stored.values if isinstance(stored, Moments) else stored.pieces)


def _lasting(stored: Stored) -> set[str]:
    if isinstance(stored, Moments):
        return stored.lasting
    return {site["name"] for site in stored.config["sites"] if site["lasting"]}


def _layout(stored: ActivationStore, site: str) -> str:
    return next((str(each["layout"]) for each in stored.config["sites"] if each["name"] == site), "tokens")


def _places(source: Stored, target: Stored, sites: Iterable[str] | None) -> list[tuple[str, int]]:
    theirs = set(_known(target))
    common = [place for place in _known(source) if place in theirs]
    if not common:
        raise InputError("sites of source and target", value="none in common", fix="capture the same sites of both")
    if sites is None:
        return common
    names = {site for site, _ in common}
    for site in (wanted := list(sites)):
        if site not in names:
            raise InputError("site to fit", value=site, allowed=", ".join(sorted(names)), fix=did_you_mean(site, names))
    return [place for place in common if place[0] in wanted]


def _fit(
    method: Method,
    source: Stored,
    target: Stored,
    negatives: ActivationStore | None,
    site: str,
    step: int,
    paired: bool,
    seed: int,
) -> SiteFit:
    if isinstance(source, Moments):
        assert isinstance(target, Moments)
        return method.fit_moments(source.of(site, step), target.of(site, step))
    assert isinstance(target, ActivationStore)
    x, y = _samples(source, site, step, method.pooled), _samples(target, site, step, method.pooled)
    means = {}
    if method.needs_rows:
        stored = (source, target, *([] if negatives is None else [negatives]))
        rows = [torch.cat(_samples(each, site, step, True)) for each in stored]
        means["rows"] = TokenSets(rows[0], rows[1], None if negatives is None else rows[2])
    if paired and [len(row) for row in x] != [len(row) for row in y]:
        raise InputError(f"paired activations of {site}", value="other numbers of tokens", fix="pass paired=False")
    rest = None if negatives is None else torch.cat(_samples(negatives, site, step, method.pooled))
    fitted = method.fit_site(torch.cat(x), torch.cat(y), negatives=rest, paired=paired, seed=seed, **means)
    fitted.options.update(method.options_of_layout(_layout(source, site)))
    return fitted


def _samples(store: ActivationStore, site: str, step: int, pooled: bool) -> list[Tensor]:
    """What each prompt puts into the fit, `[n, D]`."""
    rows = [row for _, row in store.rows(site, step) if len(row)]
    if not rows:
        raise InputError(f"captured activations of {site}", value="none", fix="capture more prompts")
    return [row.float().mean(0, keepdim=True) for row in rows] if pooled else rows
