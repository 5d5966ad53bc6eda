"""Made `format_1.st`: an archive of format 1 that every later qvtrace must be able to read.

    python tests/data/make_format_1.py

It stays as it is: a newer format gets a file and a script of its own.
"""

from collections import namedtuple
from pathlib import Path

import torch
from torch import Tensor, nn

from qvtrace.recording.recorder import record

Pair = namedtuple("Pair", ["left", "right"])


class Pick(nn.Module):
    """Returns a named tuple of what it is given, and an object that cannot be stored."""

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Pair:
        return Pair(hidden[:1, :2].bfloat16(), iter([mask]))


class Model(nn.Module):
    """Calls one module twice, and returns a bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3)
        self.pick = Pick()
        self.unused = nn.Linear(3, 3)

    def forward(self, hidden: Tensor) -> dict[object, object]:
        first = self.up(hidden)
        second = self.up(first)
        return {
            "first": first,
            "second": [second, second.sum().double()],
            "a.b": self.pick(second, mask=hidden > 0),
            1: (True, 2**70, float("inf"), None),
            "note": "ok",
        }


if __name__ == "__main__":
    torch.manual_seed(0)
    file = Path(__file__).with_name("format_1.st")
    with record(Model(), file, variant="fp", overwrite=True) as recording, torch.no_grad():
        recording._model(torch.arange(6.0).reshape(2, 3))
