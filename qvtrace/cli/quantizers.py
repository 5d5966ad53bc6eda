"""`qvtrace quantizers`: what `--quantizer` takes."""

import json
from typing import Annotated

from qvtrace.cli.options import OUTPUT, flag
from qvtrace.cli.terminal import output_width, print_lines


def quantizers(
    as_json: Annotated[bool, flag(OUTPUT, "A list of JSON objects.", "--json")] = False,
) -> None:
    """List the quantizers: schemes (the default first), installed or not, calibration or not."""
    from qvtrace.models.chatter import quiet
    from qvtrace.models.quantizers.listing import quantizers as listed
    from qvtrace.reports.quantizers import quantizer_lines, quantizers_json

    with quiet():
        found = listed()
    if as_json:
        print(json.dumps(quantizers_json(found), indent=2))
    else:
        print_lines(quantizer_lines(found, output_width()))
