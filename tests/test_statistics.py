"""What one tensor is in numbers and in JSON."""

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from qvtrace.metrics.elements import elements_json
from qvtrace.metrics.statistics import Statistics, statistics

FINITE = st.floats(-1e300, 1e300).filter(lambda value: value == 0 or abs(value) > 1e-300)


def assert_close(found: float | None, expected: float, scale: float) -> None:
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-13 * scale)


@given(nps.arrays(np.float64, nps.array_shapes(min_dims=0, max_side=30), elements=FINITE))
def test_statistics_agree_with_long_doubles(array: np.ndarray) -> None:
    exact = array.astype(np.longdouble)

    found = statistics(array)

    scale = float(abs(array).max())
    assert (found.min, found.max) == (array.min(), array.max())
    assert_close(found.mean, float(exact.mean()), scale)
    assert_close(found.stddev, float(np.sqrt(((exact - exact.mean()) ** 2).mean())), scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_a_large_array_agrees_with_long_doubles(dtype: Any) -> None:
    array = (np.random.default_rng(0).standard_normal((70, 20_000)) + 50).astype(dtype)
    exact = array.astype(np.float64)

    found = statistics(array)

    assert_close(found.mean, exact.mean(), 1.0)
    assert_close(found.stddev, exact.std(), 1.0)
    assert (found.min, found.max) == (exact.min(), exact.max())


def test_a_spread_that_is_tiny_against_the_mean_keeps_its_digits() -> None:
    array = 1e8 + np.tile([0.0, 1e-3], 1000)

    assert statistics(array).stddev == pytest.approx(array.astype(np.longdouble).std(), rel=1e-6)


def test_the_largest_values_of_float64_have_finite_statistics() -> None:
    found = statistics(np.array([1.7e308, -1.7e308, 1.7e308]))

    assert found.mean == pytest.approx(1.7e308 / 3)
    assert found.stddev == pytest.approx(1.7e308 * (math.sqrt(8) / 3))


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    array = np.array([math.nan, math.inf, -math.inf, -math.inf, 0.0, 4.0, math.nan], np.float32)

    assert statistics(array) == Statistics(
        count=7,
        min=0.0,
        max=4.0,
        mean=2.0,
        stddev=2.0,
        nan=2,
        positive_inf=1,
        negative_inf=2,
        zeros=1,
    )


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf]], ids=str)
def test_without_a_finite_element_there_is_no_number(values: list[float]) -> None:
    found = statistics(np.array(values))

    assert (found.min, found.max, found.mean, found.stddev) == (None, None, None, None)
    assert found.nan + found.positive_inf + found.negative_inf == len(values)


def test_a_mask_is_an_element_like_any_other() -> None:
    lowest = float(np.finfo(np.float32).min)

    assert statistics(np.array([lowest, 0.0], np.float32)).min == lowest


@pytest.mark.parametrize("extremes", [(-(2**63), 2**63 - 1), (2**63 - 1, 2**63 - 2)], ids=str)
def test_extremes_of_integers_are_exact(extremes: tuple[int, int]) -> None:
    found = statistics(np.array(extremes))

    assert (found.min, found.max) == (min(extremes), max(extremes))


@pytest.mark.parametrize(
    ("array", "low", "high", "mean"),
    [
        (np.array([2**64 - 1], np.uint64), 2**64 - 1, 2**64 - 1, 2.0**64),
        (np.array([True, False]), 0, 1, 0.5),
        (np.array([-8, 7]).astype(ml_dtypes.int4), -8, 7, -0.5),
        (np.array([1, 448]).astype(ml_dtypes.float8_e4m3fn), 1.0, 448.0, 224.5),
        (np.array(3 + 4j), 3.0, 4.0, 3.5),
        (np.arange(6.0).reshape(2, 3).T, 0.0, 5.0, 2.5),
    ],
    ids=["uint64", "bool", "int4", "float8", "complex", "transposed"],
)
def test_any_dtype_has_statistics(array: np.ndarray, low: float, high: float, mean: float) -> None:
    found = statistics(array)

    assert (found.min, found.max, found.mean) == (low, high, mean)


def test_a_read_only_array_at_an_odd_offset_has_statistics() -> None:
    array = np.frombuffer(b"x" + np.arange(5.0).tobytes(), offset=1)

    assert statistics(array).mean == 2.0


def test_text_has_no_statistics() -> None:
    with pytest.raises(TypeError, match="no dtype of numbers"):
        statistics(np.array(["text"]))


def test_the_json_of_statistics_is_the_four_numbers_when_nothing_is_odd() -> None:
    assert statistics(np.array([1.0, 3.0])).to_json() == {
        "mean": 2.0,
        "min": 1.0,
        "max": 3.0,
        "stddev": 1.0,
    }


def test_the_json_of_statistics_is_strict_and_counts_what_is_odd() -> None:
    report = statistics(np.array([math.nan, math.inf, 0.0])).to_json()

    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["nan"], report["positive_inf"], report["zeros"]) == (1, 1, 1)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16], ids=str)
def test_elements_that_are_not_finite_become_text(dtype: Any) -> None:
    array = np.array([[1.5, math.nan], [math.inf, -math.inf]]).astype(dtype)

    assert elements_json(array, 4).values == [[1.5, "NaN"], ["Infinity", "-Infinity"]]


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (np.array(2.5, np.float32), 2.5),
        (np.zeros((2, 0)), [[], []]),
        (np.array([True]), [True]),
        (np.array([2**64 - 1], np.uint64), [2**64 - 1]),
        (np.array([-8, 7]).astype(ml_dtypes.int4), [-8, 7]),
        (np.array([1 + 2j, complex(math.nan, 0)]), [[1.0, 2.0], ["NaN", 0.0]]),
    ],
    ids=["scalar", "empty", "bool", "uint64", "int4", "complex"],
)
def test_elements_keep_their_nesting_and_their_kind(array: np.ndarray, values: Any) -> None:
    found = elements_json(array, 4)

    assert found.values == values
    assert found.cut == 0


def test_elements_beyond_the_limit_are_cut_and_counted() -> None:
    found = elements_json(np.arange(6).reshape(2, 3), 4)

    assert found.values == [0, 1, 2, 3]
    assert found.cut == 2


def test_the_first_elements_of_a_transposed_array_are_its_own_first() -> None:
    assert elements_json(np.arange(6).reshape(2, 3).T, 3).values == [0, 3, 1]
