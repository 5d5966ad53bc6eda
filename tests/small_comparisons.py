"""Comparisons made by hand: what there is to report and to judge, without an archive."""

from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.comparison import Comparison, Side
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.rows import Row
from qvtrace.comparison.verdict import Verdict
from qvtrace.metrics.differences import Peak
from qvtrace.metrics.names import Metrics

MODEL = {"weights_digest": "a" * 32, "class": "Net", "name": "net", "dtype": "float32", "seed": 42}
ENVIRONMENT = {"torch": "2.13.0", "device": "cpu", "attention": "eager"}
LONG = "model.language_model.layers.17.mlp.experts.127.gate_proj_with_a_name_of_its_own"


def row(module="fc", order=0, *, peir=0.03, **changes):
    metrics = Metrics(
        max_abs_error=0.25,
        mean_abs_error=0.125,
        peir=peir,
        sqnr=33.25,
        cosine=0.9995,
        token_sqnr_p50=28.125,
        token_sqnr_p5=21.75,
        token_sqnr_min=11.5,
    )
    values = {
        "call": 0,
        "sample": 0,
        "step": 0,
        "path": "output",
        "type": ("Linear", "Linear"),
        "dtype": ("float32", "float32"),
        "shape": ((1, 84, 64), (1, 84, 64)),
        "matched_by": "exact",
        "status": "ok",
        "metrics": metrics,
        "peak": Peak((0, 17, 40), 1.0, 1.25),
        "worst_token": (0, 3),
        **changes,
    }
    return Row(module=module, order=order, **values)


def compared(*rows, **changes):
    reference = Side("fp.st", MODEL, {"name": "fp"}, ENVIRONMENT)
    candidate = Side(
        "quant.st", MODEL, {"name": "quant", "quantizer": "torchao:int8-dynamic"}, ENVIRONMENT
    )
    values = {
        "reference": reference,
        "candidate": candidate,
        "comparable": Comparable(True),
        "coverage": Coverage(2, 2, 2, len(rows), len(rows), 0, 0),
        "rows": rows,
        "verdict": Verdict("worst: fc, PEIR 0.03", 0),
        **changes,
    }
    return Comparison(**values)
