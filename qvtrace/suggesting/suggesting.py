"""An archive, a request and a target -> which modules to keep float."""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import unwrapped
from qvtrace.errors import UsageError
from qvtrace.manifest import VariantInfo
from qvtrace.models.preparation import prepare
from qvtrace.models.quantizers import choose
from qvtrace.models.request import ModelRequest, PreparedModel
from qvtrace.patterns import above
from qvtrace.recording.budget import parse_size
from qvtrace.replayer import refuse_private
from qvtrace.suggesting.candidates import (
    by_error_per_byte,
    by_local_error,
    quantized_modules,
    with_local_error,
    without_local_error,
)
from qvtrace.suggesting.outcome import reason
from qvtrace.suggesting.search import Order, Search, within
from qvtrace.suggesting.sizes import (
    QuantizedWeights,
    Sizes,
    extra_bytes,
    float_weights,
    quantized_weights,
)
from qvtrace.suggesting.suggestion import Candidate, Step, Suggestion
from qvtrace.suggesting.targets import Target
from qvtrace.suggesting.trials import Trials, target_modules

MAX_RUNS = 16

Tell = Callable[[Step], None]  # called after each run


def suggest(
    archive: Archive | str | os.PathLike[str],
    target: str | Target,
    request: ModelRequest | None = None,
    *,
    max_runs: int = MAX_RUNS,
    budget: int | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tell: Tell | None = None,
) -> Suggestion:
    """Find few modules to keep float, so that the quantized model of `request` reaches `target`.

    `archive` is a recording of the float model with inputs; what the request leaves open is taken
    from it. Each set of modules is really run, at most `max_runs` times. `budget` is how many bytes
    (a number, or `20MB`) they may take beyond what they take quantized; `include` and `exclude` are
    patterns on the modules that may be kept. Memory holds one model at a time.

    Raises `UsageError` for a target, quantizer or pattern that cannot be used, `ModelError` for a
    model that cannot be loaded, quantized or run, and children of `ArchiveError`.
    """
    target = target if isinstance(target, Target) else Target.parse(target)
    if max_runs < 1:
        raise UsageError(f"--max-runs {max_runs}: runs nothing; give a number from 1 on")
    with ExitStack() as opened:
        if not isinstance(archive, Archive):
            archive = opened.enter_context(Archive.open(archive))
        refuse_private(archive)
        _refuse_quantized(archive)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="qvtrace-")))
        trials = Trials(
            replace(_checked(request or ModelRequest(variant="quant")), variant="quant"),
            archive,
            target,
            target_modules(target, archive),
            folder / "run.st",
        )
        most = None if budget is None else parse_size(budget, "--budget")
        return _Suggesting(trials, max_runs, most, (include, exclude), tell).run()


def _refuse_quantized(archive: Archive) -> None:
    quantizer = archive.manifest.variant.quantizer
    if quantizer is not None:
        raise UsageError(
            f"{archive.file}: is of a model that {quantizer} quantized, and what is as near to it "
            "is no better for that; give a recording of the float variant"
        )


def _checked(request: ModelRequest) -> ModelRequest:
    if request.keep_float:
        raise UsageError(
            f"--keep-float {request.keep_float[0]!r}: what to keep is looked for here; leave it "
            "out, or narrow the search with --include and --exclude"
        )
    choose(request.quantizer).check(
        calibration=request.calibration, wrap_only=request.no_quantize, keep_float=("*",)
    )
    if request.no_quantize:
        raise UsageError("--no-quantize: nothing is quantized then; leave it out")
    return request


class _Suggesting:
    """One search, with what is learned of the model in its first run."""

    def __init__(
        self,
        trials: Trials,
        max_runs: int,
        budget: int | None,
        patterns: tuple[Sequence[str], Sequence[str]],
        tell: Tell | None,
    ) -> None:
        self._trials = trials
        self._max_runs = max_runs
        self._budget = budget
        self._patterns = patterns
        self._tell = tell
        self._candidates: tuple[Candidate, ...] = ()
        self._quantized: dict[str, QuantizedWeights] = {}
        self._sizes = Sizes({})
        self._variants: list[VariantInfo] = []  # of each run
        self._warnings: tuple[str, ...] = ()

    def run(self) -> Suggestion:
        started = time.perf_counter()
        search = Search(self._orders, self._size, self._count, self._measure, self._max_runs)
        best = search.run()
        trials = self._trials
        return Suggestion(
            reference=str(trials.archive.file),
            quantizer=self._variants[0].quantizer or "",
            target=trials.target,
            modules=trials.modules,
            reached=search.reached,
            reason=reason(search, trials.target, self._budget),
            keep_float=best.kept,
            extra_bytes=best.extra_bytes,
            figure=best.figure,
            steps=tuple(search.steps),
            max_runs=self._max_runs,
            budget=self._budget,
            minimal=search.minimal,
            candidates=self._candidates,
            left_float=tuple(map(unwrapped, self._variants[best.run - 1].left_float)),
            seconds=time.perf_counter() - started,
            warnings=(*self._warnings, *without_local_error(self._candidates)),
        )

    def _measure(self, step: Step) -> Step:
        measured = self._trials.run(step, self._learn if step.run == 1 else None)
        self._variants.append(self._trials.variant)
        if self._tell is not None:
            self._tell(measured)
        return measured

    def _learn(self, prepared: PreparedModel) -> None:
        """What can only be learned of the model while all of it is quantized."""
        quantizer = prepared.variant.quantizer or ""
        if quantizer.startswith("checkpoint:"):
            raise UsageError(
                f"--model {prepared.info.name}: is already quantized, and its modules cannot be "
                "kept float; quantize its float original with --quantizer"
            )
        self._warnings = prepared.warnings
        candidates = quantized_modules(prepared, *self._patterns)
        if not candidates and any(self._patterns):
            raise UsageError(
                "--include and --exclude: leave none of the modules that "
                f"{quantizer} quantized; widen them"
            )
        if not candidates:
            raise UsageError(
                f"--quantizer {quantizer}: changed no module that may be kept float; choose another"
            )
        file = self._trials.file.with_name("local.st")
        self._candidates = with_local_error(
            candidates, prepared, self._trials.archive, self._trials.file, file
        )
        file.unlink(missing_ok=True)
        self._quantized = quantized_weights(prepared.model, [one.name for one in candidates])

    def _orders(self) -> Iterator[Order]:
        """By local error; where the budget leaves some out, also by what that costs.

        Blocks are kept with all that is in them, and only where what is in them is not enough;
        those that hold nearly everything where no other is.
        """
        self._add_floats()
        self._candidates = tuple(by_local_error(self._candidates))
        names = [one.name for one in self._candidates]
        if any(one.holds for one in self._candidates):
            yield from self._without_large_blocks()
        fitting = within(names, self._budget, self._sizes)
        complete = len(fitting) == len(names)
        yield Order(fitting, "largest local error first", complete)
        if not complete:
            cheap = [one.name for one in by_error_per_byte(self._candidates, self._sizes)]
            yield Order(
                within(cheap, self._budget, self._sizes), "most local error per byte first", False
            )

    def _without_large_blocks(self) -> Iterator[Order]:
        why = "largest local error first"
        leaves = [one.name for one in self._candidates if not one.holds]
        most = self._count([one.name for one in self._candidates]) // 2
        blocks = [
            one.name for one in self._candidates if one.holds and self._count((one.name,)) <= most
        ]
        for names, what in (
            (leaves, "those that hold no others"),
            # All that hold no others were not enough.
            ([*blocks, *leaves] if blocks else [], "all but the largest blocks"),
        ):
            fitting = within(names, self._budget, self._sizes)
            if len(fitting) < len(names):
                yield Order(fitting, why, complete=False)
            elif names:
                yield Order(fitting, why, complete=False, what=what)

    def _add_floats(self) -> None:
        """What the weights take as floats, and which names the float model has: from it itself."""
        gc.collect()
        request = replace(
            self._trials.request, variant="fp", quantizer=None, calibration=None, keep_float=()
        )
        model = prepare(request, self._trials.archive).model
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self._sizes = Sizes(extra_bytes(float_weights(model), self._quantized))
        self._candidates = tuple(
            replace(one, extra_bytes=self._sizes((one.name,)))
            for one in self._candidates
            if one.name in names
        )

    def _count(self, kept: Iterable[str]) -> int:
        """The candidates that are among these or within them."""
        chosen = set(kept)
        return sum(
            one.name in chosen or not chosen.isdisjoint(above(one.name)) for one in self._candidates
        )

    def _size(self, kept: Iterable[str]) -> int:
        return self._sizes(kept)
