"""How a search ended, in words."""

from qvtrace.reports.formatting import byte_size, counted, number
from qvtrace.suggesting.search import Search
from qvtrace.suggesting.suggestion import Figure
from qvtrace.suggesting.targets import Target


def reason(search: Search, target: Target, budget: int | None) -> str:
    """Whether the target is reached, by what, and why not where it is not."""
    best = search.best
    figure, kept = figure_text(best.figure, target), best.modules
    if search.reached:
        return _reached(search, figure, kept)
    if search.everything is not None:
        every = search.everything
        return (
            f"cannot be reached: with all {counted(every.modules, 'module')} kept float that "
            f"may be, it is {figure_text(every.figure, target)}; what is left comes from elsewhere"
        )
    best_so_far = f"the best was {figure} with {_kept(kept)}"
    if search.exhausted:
        runs = counted(search.max_runs, "run")
        return f"not reached in {runs}, all that --max-runs allows: {best_so_far}"
    limit = "the budget" if budget is None else byte_size(budget)
    return f"not reached within {limit}: {best_so_far}"


def _reached(search: Search, figure: str, kept: int) -> str:
    if not kept:
        return f"reached with nothing kept float: {figure}"
    text = f"reached with {_kept(kept)}: {figure}"
    if search.minimal:
        return text if kept == 1 else f"{text}; none could be left out when it was tried"
    return f"{text}; fewer may do, which more --max-runs than {search.max_runs} could tell"


def _kept(count: int) -> str:
    return f"{counted(count, 'module')} kept float" if count else "nothing kept float"


def figure_text(figure: Figure, target: Target) -> str:
    """`peir 0.0412`, or what stands in its place."""
    if figure.value is None:
        return figure.reason or "no number"
    return f"{target.metric} {number(figure.value)}"
