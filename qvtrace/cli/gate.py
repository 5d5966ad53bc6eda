"""`qvtrace gate`: another verdict on a comparison that was written as JSON."""

from itertools import chain
from typing import Annotated

import typer

from qvtrace.cli.comparison_flags import GateFlags, ReportFlags
from qvtrace.cli.options import GATES, option, with_flags
from qvtrace.cli.reporting import check_output, write_comparison
from qvtrace.errors import UsageError


@with_flags
def gate(
    *,
    result: Annotated[
        str, typer.Argument(metavar="RESULT", help="What `diff --format json -o RESULT` wrote.")
    ],
    gates: GateFlags,
    baseline: Annotated[
        str | None,
        option(GATES, "An earlier result, to fail on what got worse.", metavar="FILE"),
    ] = None,
    max_regression: Annotated[
        list[str] | None,
        option(
            GATES,
            "How much worse than the baseline a row may be: 'peir 1.2x', 'sqnr 3dB', "
            "'cosine 0.001'; repeatable. (default: max-regression of the configuration)",
            metavar="LIMIT",
        ),
    ] = None,
    report: ReportFlags,
) -> None:
    """Judge the result of a comparison anew, without the archives."""
    from qvtrace.cli.files_read import named, of_gates
    from qvtrace.comparison.results import load_result
    from qvtrace.judging.judge import judge
    from qvtrace.judging.regression import parse_limits

    files = (named(("RESULT", result), ("--baseline", baseline)), of_gates(gates))
    check_output(report.output, chain(*files))
    fail_on = gates.gates()
    limits = parse_limits(max_regression or ())
    if baseline is not None and not limits:
        limits = gates.configuration().max_regression
    if not fail_on and baseline is None and not limits:
        raise UsageError(
            f"gate {result}: nothing to judge by; give --fail-on, or --baseline and "
            "--max-regression"
        )
    judged = judge(
        load_result(result),
        fail_on=fail_on,
        baseline=None if baseline is None else load_result(baseline),
        max_regression=limits,
    )
    write_comparison(judged, report, rows=False)
    raise typer.Exit(judged.verdict.exit_code)
