"""Candidate minus reference, element by element."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qvtrace.metrics.elements import Rearranged
from qvtrace.metrics.subtraction import difference_json, no_difference_json

NAN, INF = math.nan, math.inf


@given(
    arrays.arrays(np.float32, (3, 2), elements=st.floats(width=32, allow_nan=False)),
    arrays.arrays(np.float32, (3, 2), elements=st.floats(width=32, allow_nan=False)),
)
def test_it_is_candidate_minus_reference_in_float64(reference, candidate):
    values = difference_json(reference, candidate).values

    for index in np.ndindex(3, 2):
        one, other = float(reference[index]), float(candidate[index])
        wanted = 0.0 if one == other else other - one
        found = values[index[0]][index[1]]
        assert found == (
            wanted if math.isfinite(wanted) else {INF: "Infinity"}.get(wanted, "-Infinity")
        )


def test_what_is_not_finite_is_a_difference_unless_it_is_equal():
    reference = np.array([INF, -INF, 1.0, INF, NAN, NAN, 1.0])
    candidate = np.array([INF, -INF, INF, -INF, NAN, 1.0, NAN])

    found = difference_json(reference, candidate).values

    assert found == [0, 0, "Infinity", "-Infinity", "NaN", "NaN", "NaN"]


@pytest.mark.parametrize(
    ("reference", "candidate", "wanted"),
    [
        (np.uint8([1, 255]), np.uint8([2, 0]), [1, -255]),
        (np.int64([-(2**63), 2**62]), np.int64([2**63 - 1, 2**62 + 1]), [2**64 - 1, 1]),
        (np.uint64([2**64 - 1]), np.int8([-1]), [-(2**64)]),
        (np.array([True, False]), np.array([False, True]), [-1, 1]),
        (np.int64([3]), np.float32([3.5]), [0.5]),
        (np.float16([60000]), np.float16([-60000]), [-120000.0]),
        (np.complex64([1 + 2j, INF]), np.complex64([2 - 1j, INF]), [[1.0, -3.0], [0.0, 0.0]]),
        (np.array([1.0], ml_dtypes.bfloat16), np.float64([1.001]), [pytest.approx(0.001)]),
    ],
    ids=["uint8", "int64", "uint64", "bool", "mixed", "float16", "complex64", "bfloat16"],
)
def test_no_dtype_gets_in_the_way(reference, candidate, wanted):
    found = difference_json(reference, candidate).values

    assert found == wanted
    json.dumps(found, allow_nan=False)


def test_at_most_so_many_elements_are_given_and_the_others_counted():
    reference, candidate = np.zeros((2, 3)), np.arange(6.0).reshape(2, 3)

    cut = difference_json(reference, candidate, 4)
    whole = difference_json(reference, candidate, 6)

    assert cut.to_json() == {"values": [0, 1, 2, 3], "values_cut": 2}
    assert whole.to_json() == {"values": [[0, 1, 2], [3, 4, 5]]}


def test_a_candidate_in_another_layout_is_read_in_the_reference_s():
    reference = np.arange(6.0).reshape(2, 3)
    candidate = Rearranged((reference.T + 1).T, (2, 3))

    assert difference_json(reference, candidate).values == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("dtype", "shape", "limit", "wanted"),
    [
        (np.int8, (2,), None, {"values": [0, 0]}),
        (np.float32, (), None, {"values": 0.0}),
        (np.float32, (0, 3), None, {"values": []}),
        (np.complex64, (1,), None, {"values": [[0.0, 0.0]]}),
        (np.float32, (2, 2), 3, {"values": [0.0, 0.0, 0.0], "values_cut": 1}),
    ],
    ids=["integers", "scalar", "empty", "complex", "cut"],
)
def test_equal_contents_differ_by_nothing(dtype, shape, limit, wanted):
    assert no_difference_json(np.dtype(dtype), shape, limit).to_json() == wanted
