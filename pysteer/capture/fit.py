"""Fit a method at a list of sites of a model, from generations of two sets of prompts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pysteer.capture.examples import Examples, FitOptions
from pysteer.capture.fitted import Fitted
from pysteer.capture.generation import Generate
from pysteer.capture.sequential import Progress
from pysteer.methods import Method
from pysteer.steering.positions import Positions


def fit(
    pipe: Any,
    method: Method,
    source_prompts: Sequence[str],
    target_prompts: Sequence[str],
    *,
    sites: str | Iterable[str],
    steps: Iterable[int] | None = None,
    sequential: bool = False,
    shared: bool = False,
    seeds: int | Sequence[int] = 0,
    negatives: Sequence[str] | None = None,
    paired: bool = True,
    control: str | None = None,
    rows: str = "cond",
    positions: Positions = "all",
    batch_size: int = 64,
    fit_seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    generate: Generate | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit `method` at every site and step.

    At once: all prompts are generated unsteered, in batches, and every (site, step) is fitted on its own. Memory: the
    recorded activations, `4 (N + M + Q) sum over (site, step) of L D` bytes for N source, M target and Q negative
    prompts; with a method that pools, L is 1.

    Sequential: one generation of all prompts. Whenever a site is reached it is fitted, and from then on the source rows
    are steered by it, so that every site is fitted with the edits of all earlier sites and steps active (including text
    sites). However many sites there are, every prompt runs once. A language model takes the prompts in batches that
    wait for each other at every site. Other pipelines need all prompts in one batch of R = 2 (N + M + Q) rows (half
    that without guidance): for a transformer of `depth` blocks and T tokens over all scales the cache takes
    `8 depth R T D` bytes in fp32.

    Args:
        pipe: a pipeline (or, with `generate`, a model) of a known family.
        method: the method with its configuration, for example `Prototype(clusters=64)`.
        source_prompts: prompts of the class to change, N of them.
        target_prompts: prompts of the class to reach; when `paired`, prompt i is source prompt i with the class word
            changed, and both are generated from the same noise.
        sites: names; "ca_block" stands for all layers. Text and visual sites may be mixed.
        steps: visual steps, None for all. Text sites and `pooled` have step 0 only.
        sequential: fit every site with the earlier ones steered.
        shared: fit one set of parameters per site, from all the steps together; it then serves every step.
        seeds: noise seed of the first prompt, counting up, or one seed per source prompt (and then per target prompt,
            when not paired).
        negatives: prompts of other classes, whose activations should stay as they are (methods that can).
        paired: whether the prompts are pairs.
        control: None, or "shuffled": the labels of the N + M prompts are permuted and pairs dissolved, a fit that must
            not work.
        rows: rows steered during a sequential fit, and by default later: "cond", "uncond" or "both". Parameters are
            always fitted from the conditional rows.
        positions: tokens of every text that enter the fit, see `pysteer.steer`; `slice(1, None)` leaves out the first
            token, whose activations dwarf all others in many language models.
        batch_size: prompts per batch; not used in a sequential fit of an image generator.
        fit_seed: seed of the method and of the shuffle.
        settings: passed on to `pipe(...)`: cfg, tau, top_p, negative_prompts and so on.
        generate: `f(prompts, seeds)` that runs the model; by default `pipe(prompts, seeds=seeds, decode=False,
            **settings)`.
        progress: called as `f(done, total)` after every fitted (site, step).

    Returns:
        The fitted parameters, in the order of the model's execution.

    Raises:
        InputError: unknown sites or steps, prompts that do not pair up, a method that cannot do what is asked.
    """
    examples = Examples(
        pipe, source_prompts, target_prompts, sites=sites, steps=steps, seeds=seeds, negatives=negatives,
        paired=paired, positions=positions, pool="mean" if method.pooled and not sequential else "tokens",
        batch_size=batch_size, settings=settings, generate=generate,
    )  # fmt: skip
    asked = FitOptions(None, sequential, shared, control, rows, fit_seed, progress)
    return examples.fit_with(method, asked, kept=False)
