"""Another verdict on a comparison that was made before: other gates, or an earlier comparison."""

from collections.abc import Sequence
from dataclasses import replace

from qvtrace.comparison.comparison import Comparison
from qvtrace.errors import UsageError
from qvtrace.judging.baselines import differences, why_unlike
from qvtrace.judging.decision import Case, decide
from qvtrace.judging.gates import Gate, Scope, parse_gates
from qvtrace.judging.regression import Baseline, RegressionLimit, changes, parse_limits


def judge(
    comparison: Comparison,
    *,
    fail_on: str | Sequence[str | Gate] = (),
    baseline: Comparison | None = None,
    max_regression: str | Sequence[str | RegressionLimit] = (),
) -> Comparison:
    """The same comparison, judged by these gates, and by how much worse it is than `baseline`.

    Raises `UsageError` for what is no gate or no limit, for a baseline without limits and limits
    without one, for a comparison that `top` or `metrics` cut, and for two of other rows.
    """
    if not comparison.complete:
        raise UsageError(
            f"{comparison.file or 'comparison'}: was cut by --top or --metrics; compare without"
        )
    gates = parse_gates((fail_on,) if isinstance(fail_on, str) else fail_on)
    since = _since(comparison, baseline, parse_limits(max_regression))
    scope = Scope.of(comparison.rows, comparison.coverage, comparison.logits)
    findings = comparison.verdict.findings
    case = Case(scope, findings, comparison.coverage.compared, _doubt(comparison) is None)
    decision = decide(case, gates, since)
    return replace(
        comparison,
        verdict=replace(
            comparison.verdict,
            text=decision.text,
            exit_code=decision.exit_code,
            gates=decision.gates,
        ),
        options=replace(comparison.options, fail_on=gates),
        changes=None if since is None else changes(scope, since),
    )


def _since(
    comparison: Comparison, earlier: Comparison | None, limits: tuple[RegressionLimit, ...]
) -> Baseline | None:
    if earlier is None:
        if limits:
            fault = "needs an earlier result to hold this one against; add --baseline FILE"
            raise UsageError(f"--max-regression {limits[0].text!r}: {fault}")
        return None
    file = earlier.file or "the baseline"
    if not limits:
        raise UsageError(f"--baseline {file}: needs a limit; add --max-regression 'peir 1.2x'")
    if not earlier.complete:
        raise UsageError(f"--baseline {file}: was cut by --top or --metrics; compare without")
    asked = _asked(earlier, comparison), _asked(comparison, earlier)
    if asked[0] != asked[1]:
        fault = f"was compared with {asked[0]}, this with {asked[1]}; compare both alike"
        raise UsageError(f"--baseline {file}: {fault}")
    return Baseline(
        file,
        Scope.of(earlier.rows, earlier.coverage),
        limits,
        _doubt(earlier) or why_unlike(earlier, comparison),
        tuple(differences(earlier, comparison)),
    )


def _asked(comparison: Comparison, other: Comparison) -> str:
    """What decides which rows there are, as it would be typed; several samples are pooled unless
    that was asked for, and one alone stands for itself either way."""
    path = comparison.options.path
    given = [comparison.options.filters, f"--path {path}" if path == "all" else ""]
    if comparison.has_row_per_sample and other.has_pooled_rows:
        given.append("--per-sample")
    return " ".join(filter(None, given)) or "no filter"


def _doubt(comparison: Comparison) -> str | None:
    """Why no gate can be judged by a comparison."""
    if not comparison.comparable.same_inputs:
        return "its inputs differ"
    if comparison.comparable.swapped:
        return "its archives look swapped"
    if not (comparison.reference.complete and comparison.candidate.complete):
        return "one of its archives is incomplete"
    return None
