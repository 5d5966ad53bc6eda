"""How elements and errors are spread."""

import ml_dtypes
import numpy as np
import pytest

from qvtrace.metrics.comparing import compare
from qvtrace.metrics.details import compare_in_detail, details_all
from qvtrace.metrics.elements import Rearranged
from qvtrace.metrics.histograms import BINS, SAMPLE, Histogram
from qvtrace.metrics.spreads import Axes
from qvtrace.metrics.statistics import statistics


def histograms(reference, candidate):
    (details,) = details_all([(reference, candidate)])
    return details.histograms


def noisy(*shape, dtype=np.float32):
    generator = np.random.default_rng(0)
    reference = generator.standard_normal(shape).astype(dtype)
    return reference, (reference.astype(np.float64) + 0.01).astype(dtype)


def test_every_element_of_a_small_array_is_counted():
    reference, candidate = noisy(8, 16)

    found = histograms(reference, candidate)

    assert (found.counted, found.left_out, found.step) == (128, 0, 1)
    for histogram in (found.reference, found.candidate, found.error):
        assert sum(histogram.counts) == 128


def test_both_sides_have_bins_of_numpys_borders():
    reference, candidate = noisy(64, 64)
    low, high = min(reference.min(), candidate.min()), max(reference.max(), candidate.max())

    found = histograms(reference, candidate)

    expected, _ = np.histogram(reference.astype(np.float64), BINS, (low, high))
    assert found.reference == Histogram(low, high, tuple(expected.tolist()))
    assert (found.candidate.low, found.candidate.high) == (low, high)


def test_the_error_is_signed_and_zero_is_in_the_middle_of_a_bin():
    reference = np.arange(100, dtype=np.float32)

    found = histograms(reference, reference + np.float32(0.5))

    assert (found.error.low, found.error.high) == (-0.5, 0.5)
    assert len(found.error.counts) % 2 == 1
    assert found.error.counts[-1] == 100


def test_of_a_large_array_every_channel_is_looked_at():
    reference = np.zeros((1, SAMPLE, 8), np.float32)
    reference[..., 3] = 5.0

    found = histograms(reference, reference)

    assert found.step % 2 == 1
    assert found.counted <= SAMPLE
    assert found.reference.counts[-1] == pytest.approx(found.counted / 8, rel=0.01)


def test_few_elements_are_not_told_apart():
    assert len(histograms(*noisy(16)).reference.counts) == 4


def test_masks_and_what_is_not_finite_are_left_out_and_counted():
    reference, candidate = noisy(4, 8)
    reference[0, 0] = np.finfo(np.float32).min
    candidate[0, 1] = np.nan
    candidate[0, 2] = np.inf

    found = histograms(reference, candidate)

    assert (found.counted, found.left_out) == (29, 3)
    assert found.reference.low > -10


@pytest.mark.parametrize(
    ("array", "counts"),
    [
        (np.array([True, False, True, True]), (1, 3)),
        (np.array([0, 1, 2, 2, 2, 2, 2, 2, 2], np.int64), (1, 1, 7)),
        (np.full(9, 3.0, np.float32), (9,)),
        (np.array([1, 2, 448, 448]).astype(ml_dtypes.float8_e4m3fn), (2, 2)),
        (np.array([1 + 2j, 2 + 2j]), (1, 3)),
    ],
    ids=["bool", "integers", "constant", "float8", "complex"],
)
def test_any_dtype_has_a_histogram(array, counts):
    assert histograms(array, array).reference.counts == counts


@pytest.mark.parametrize(
    "array", [np.empty((2, 0), np.float32), np.full((2, 8), np.nan)], ids=["empty", "NaN"]
)
def test_where_nothing_can_be_counted_there_is_no_histogram(array):
    found = histograms(array, array)

    assert (found.reference, found.candidate, found.error, found.counted) == (None, None, None, 0)


def test_a_range_beyond_float64_has_no_histogram():
    array = np.array([-1.7e308, 1.7e308])

    assert histograms(array, array).reference is None


def test_arrays_of_different_shapes_have_no_histogram():
    assert histograms(np.zeros((2, 3)), np.zeros((3, 2))) is None


def numbers(found):
    core = found.to_json()
    return {name: value for name, value in core.items() if value is not None}


PAIRS = {
    "float32": noisy(700, 1024),
    "float64": noisy(7, 16, dtype=np.float64),
    "bfloat16": noisy(300, 256, dtype=ml_dtypes.bfloat16),
    "integers": (np.arange(6), np.arange(6) + 1),
    "complex against real": (np.array([1j, 2]), np.array([1.0, 2.0])),
    "empty": (np.empty((0, 8)), np.empty((0, 8))),
    "transposed": tuple(side.T for side in noisy(9, 12)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_details_change_no_metric_and_say_what_statistics_say(pair):
    ((difference, details),) = compare_in_detail([(*pair, Axes(), None)])

    assert difference == compare(*pair)
    for found, array in zip((details.reference, details.candidate), pair, strict=True):
        assert numbers(found) == pytest.approx(numbers(statistics(array)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_arrays_that_are_not_compared_have_details_too(pair):
    (apart,) = details_all([pair])
    ((_, together),) = compare_in_detail([(*pair, Axes(), None)])

    assert apart.histograms == together.histograms
    assert apart.candidate.max == together.candidate.max


def test_an_array_in_another_layout_has_the_details_that_it_has_in_its_own():
    reference, candidate = noisy(9, 12)
    rearranged = Rearranged(candidate.T.copy().T, (9, 12))

    assert compare_in_detail([(reference, rearranged, Axes(), None)]) == compare_in_detail(
        [(reference, candidate, Axes(), None)]
    )


def test_an_array_against_itself_is_looked_at_once():
    array, _ = noisy(4, 8)

    (found,) = details_all([(array, array)])

    assert found.candidate is found.reference
