"""Whether one difference is a summand of another: a factor that lives on in a residual stream.

The stream can be so much larger than what is added to it that it agrees whatever that was scaled
by; and its own rounding can be as large as all that is added. So the errors themselves are held
together, channel by channel: where the one is in the other, it is there as it is.
"""

from typing import TypeAlias

import numpy as np

from qvtrace.metrics.elements import Floats, Readable, reader

Sides: TypeAlias = tuple[Readable, Readable]

_TOKENS = 64  # that are looked at, from all over the arrays
_COUNTED = 0.01  # of the mean, from which on a channel's error energy counts
_ABOUT_ONE = 0.5, 2.0  # how often the one error is in the other, in a channel that has it
_MOST = 0.5  # share of the channels that have it


def is_summand(part: Sides, whole: Sides) -> bool:
    """Whether the error of the whole (candidate minus reference) has that of the part in it.

    All four arrays are real and of one shape.
    """
    return holds(errors_of(whole), errors_of(part))


def errors_of(sides: Sides) -> Floats:
    """Candidate minus reference by token and channel, of some tokens; 0 where something is not
    finite. Both are real and of one shape."""
    with np.errstate(all="ignore"):
        reference, candidate = map(_some_tokens, sides)
        return np.nan_to_num(candidate - reference, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def holds(whole: Floats, part: Floats) -> bool:
    """Whether an error has another one in it; both are what `errors_of` gives, of one shape."""
    with np.errstate(all="ignore"):
        energies = np.einsum("ij,ij->j", part, part)
        counted = energies > _COUNTED * energies.mean()
        if not counted.any():
            return False
        times = np.einsum("ij,ij->j", part, whole)[counted] / energies[counted]
        have_it = (times > _ABOUT_ONE[0]) & (times < _ABOUT_ONE[1])
        return float(have_it.mean()) >= _MOST


def _some_tokens(array: Readable) -> Floats:
    channels = array.shape[-1] if array.shape else 1
    tokens = array.size // channels
    count = min(tokens, _TOKENS)
    read = reader(array)
    places = [(2 * number + 1) * tokens // (2 * count) for number in range(count)]
    pieces = [read(place * channels, (place + 1) * channels) for place in places]
    return np.concatenate(pieces).astype(np.float64).reshape(count, channels)
