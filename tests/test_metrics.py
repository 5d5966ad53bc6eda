"""Every number of a pair, against arithmetic written down naively in long doubles."""

import itertools
import json
import math
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from qvtrace.metrics import blocks
from qvtrace.metrics.comparing import compare, compare_all
from qvtrace.metrics.differences import Difference, Peak, identical
from qvtrace.metrics.names import PAIR_METRICS, Metrics, badness
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.metrics.pooling import pool

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [
    np.dtype(kind)
    for kind in (
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float4_e2m1fn,
    )
]
INTEGERS = [np.dtype(kind) for kind in "?bBhHiIqQ"]
settings.register_profile("metrics", deadline=None)  # the first call of a shape is slow
settings.load_profile("metrics")

TOKENS = ("token_sqnr_p50", "token_sqnr_p5", "token_sqnr_min")


def dtype_name(dtype: np.dtype) -> str:
    return dtype.name


def numbers(difference: Difference) -> dict[str, Any]:
    return {name: getattr(difference.metrics, name) for name in PAIR_METRICS}


def random_floats(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def naive_token_sqnr(reference: np.ndarray, error: np.ndarray) -> dict[str, float | None]:
    signal = (reference**2).sum(axis=-1).ravel()
    noise = (error**2).sum(axis=-1).ravel()
    ratios = sorted(
        10 * np.log10(s / n) if n else math.inf for s, n in zip(signal, noise, strict=True) if s
    )
    if not ratios:
        return {}
    ranks = [math.ceil(len(ratios) / share) - 1 for share in (2, 20)]
    found = ratios[ranks[0]], ratios[ranks[1]], ratios[0]
    return {name: None if math.isinf(v) else v for name, v in zip(TOKENS, found, strict=True)}


def naive_metrics(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float | None]:
    """All positions count. Long doubles have the range for any float64's square."""
    reference, candidate = reference.astype(np.longdouble), candidate.astype(np.longdouble)
    error = candidate - reference
    peak, interval = abs(error).max(), reference.max() - reference.min()
    signal, noise = (reference**2).sum(), (error**2).sum()
    other = (candidate**2).sum()
    result: dict[str, float | None] = {
        "max_abs_error": peak,
        "mean_abs_error": abs(error).mean(),
        "min_abs_error": abs(error).min(),
        "stddev_abs_error": np.sqrt(((abs(error) - abs(error).mean()) ** 2).mean()),
        "mean_error": error.mean(),
        "peir": 0.0 if not peak else peak / interval if interval else None,
        "sqnr": 10 * np.log10(signal / noise) if noise and signal else None,
        "cosine": None,
        "relative_l2": np.sqrt(noise / signal) if signal else None,
    }
    if signal and other:
        result["cosine"] = (reference * candidate).sum() / np.sqrt(signal) / np.sqrt(other)
    if reference.ndim >= 2 and reference.shape[-1] >= 8:
        result |= naive_token_sqnr(reference, error)
    return result


def assert_agrees(reference: np.ndarray, candidate: np.ndarray, *, rounding: float = 0.0) -> None:
    """`rounding`: what float64 itself may be off by where terms cancel, relative to the errors."""
    found = numbers(compare(reference, candidate))
    expected = naive_metrics(reference, candidate)
    scale = float(abs(candidate.astype(np.float64) - reference.astype(np.float64)).max())
    slack = {"mean_error": scale, "stddev_abs_error": scale, "cosine": 1, "sqnr": 10}
    slack |= dict.fromkeys(TOKENS, 10)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            tolerance = rounding * slack.get(name, 0)
            assert found[name] == pytest.approx(float(value), rel=1e-6, abs=tolerance), name


# Elements of moderate exponents, whose differences float64 holds with digits to spare.
MODERATE = st.floats(-1e6, 1e6, width=32).filter(lambda value: value == 0 or abs(value) > 1e-6)


def pairs_of(dtype: Any, elements: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    shapes = nps.array_shapes(min_dims=0, max_dims=3, max_side=12)
    return shapes.flatmap(
        lambda shape: st.tuples(*(nps.arrays(dtype, shape, elements=elements),) * 2)
    )


@given(pairs_of(np.float32, MODERATE))
def test_all_metrics_of_float32_agree_with_long_doubles(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    assert_agrees(*pair, rounding=1e-13)


@given(
    pairs_of(np.float64, st.floats(-10, 10).filter(lambda value: value == 0 or abs(value) > 1e-3)),
    st.sampled_from([5e-324 * 2**30, 1e-300, 1e-160, 1e-80, 1.0, 1e80, 1e155, 1e300, 1e306]),
)
def test_all_metrics_of_float64_agree_at_any_scale(
    pair: tuple[np.ndarray, np.ndarray], scale: float
) -> None:
    assert_agrees(pair[0] * scale, pair[1] * scale, rounding=1e-9 if scale < 1e-310 else 1e-13)


@given(
    st.sampled_from(
        [(70_000,), (3, 30_000), (2, 600_000), (700, 100), (1, 1, 524_289), (40, 1733)]
    ),
    st.sampled_from([1e-40, 1e-20, 1.0, 1e20, 1e30]),
    st.sampled_from([1e-7, 1e-2, 1.0, 1e3]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_large_arrays_agree_whatever_the_scale_and_the_noise(
    shape: tuple[int, ...], scale: float, noise: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    reference = generator.standard_normal(shape) * scale
    candidate = reference + generator.standard_normal(shape) * (noise * scale)

    assert_agrees(reference.astype(np.float32), candidate.astype(np.float32), rounding=1e-13)


@pytest.mark.parametrize("candidate", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("reference", FLOATS, ids=dtype_name)
def test_any_two_float_dtypes_are_compared_as_floats(
    reference: np.dtype, candidate: np.dtype
) -> None:
    values = np.linspace(-3, 3, 40, dtype=np.float32).reshape(4, 10)

    assert_agrees(values.astype(reference), (values[::-1] / 2).astype(candidate), rounding=1e-13)


def test_large_bfloat16_agrees_with_long_doubles() -> None:
    reference = random_floats((64, 1100)).astype(BFLOAT16)
    candidate = (reference.astype(np.float32) * 1.02).astype(BFLOAT16)

    assert_agrees(reference, candidate)


def test_a_constant_shift_has_the_spread_of_its_rounding_alone() -> None:
    reference = random_floats((50, 4000))

    assert_agrees(reference, reference + np.float32(0.1))


def test_errors_that_cancel_leave_their_exact_mean() -> None:
    reference = np.ones((100, 1000), np.float32)
    candidate = np.where(np.arange(1000) % 2, np.float32(1e10), np.float32(-1e10))

    difference = compare(reference, np.broadcast_to(candidate, reference.shape))

    assert difference.metrics.mean_error == -1.0


def test_uncorrelated_sides_have_their_exact_cosine() -> None:
    assert_agrees(random_floats((300, 500), seed=1), random_floats((300, 500), seed=2))


def test_one_row_of_another_scale_keeps_its_token_figures() -> None:
    reference = np.vstack([np.ones(8), np.full(8, 1e-200), np.full(8, 1e200)])
    candidate = reference * np.array([[1.1], [1.2], [1.3]])

    assert_agrees(reference, candidate)


def test_float32_near_the_mask_threshold_stays_finite() -> None:
    reference = np.full((300, 300), 1.6e38, np.float32)
    reference[0] = -1.6e38

    difference = compare(reference, -reference)

    assert difference.status == "ok"
    assert difference.metrics.peir == pytest.approx(1.0)
    assert difference.metrics.sqnr == pytest.approx(-20 * math.log10(2))


def test_an_error_beyond_float64_is_undefined_not_infinite() -> None:
    reference = np.full(4, 8e307)

    difference = compare(reference, np.full(4, -1.7e308))

    assert difference.undefined["max_abs_error"] == "too large"
    assert_strict(difference)


def test_a_cosine_whose_sides_are_out_of_range_is_undefined_not_zero() -> None:
    reference = np.array([1.0, 2.0, 3.0, 4.0])
    candidate = np.array([1.0, 2.0, 1.79e308, 1.79e308])

    difference = compare(reference, candidate)

    assert difference.metrics.cosine is None
    assert difference.undefined["cosine"] == "too large"
    assert_strict(difference)


@given(
    st.sampled_from(FLOATS[:4]).flatmap(
        lambda dtype: pairs_of(
            np.float64, st.floats(width=32) | st.sampled_from([math.inf, -math.inf, 65504.0])
        ).map(lambda pair: tuple(side.astype(dtype) for side in pair))
    )
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_any_elements_give_strict_json_and_a_reason_for_each_null(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    assert_strict(compare(*pair))


def assert_strict(difference: Difference) -> None:
    shown = {name: value for name, value in asdict(difference).items() if name != "sums"}
    json.dumps(shown, allow_nan=False)
    nulls = {name for name, value in numbers(difference).items() if value is None}
    assert set(difference.undefined) == nulls


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BFLOAT16], ids=["f16", "f32", "bf16"])
def test_nan_is_counted_and_left_out(dtype: Any) -> None:
    reference = np.arange(32, dtype=np.float32).reshape(4, 8)
    candidate = reference + 1
    reference[0, :2] = math.nan
    candidate[0, 1:4] = math.nan

    difference = compare(reference.astype(dtype), candidate.astype(dtype))

    found = difference.nonfinite
    assert found is not None
    assert (found.reference_nan, found.candidate_nan, found.new_nan, found.lost_nan) == (2, 3, 2, 1)
    assert difference.status == "nonfinite"
    assert difference.metrics.mean_error == 1.0
    assert difference.sums is not None and difference.sums.count == 28


def test_nan_at_the_same_places_is_no_finding() -> None:
    array = np.array([1.0, math.nan, 3.0])

    assert compare(array, array + 1).status == "ok"


def test_one_nan_in_a_large_array_changes_nothing_else() -> None:
    reference = random_floats((100, 1000))
    candidate = reference + random_floats((100, 1000), seed=1) * np.float32(0.01)
    whole = numbers(compare(reference, candidate))
    candidate[50, 500] = math.nan

    difference = compare(reference, candidate)

    assert difference.nonfinite is not None and difference.nonfinite.new_nan == 1
    assert difference.metrics.mean_abs_error == pytest.approx(whole["mean_abs_error"], rel=1e-4)
    assert difference.metrics.sqnr == pytest.approx(whole["sqnr"], rel=1e-4)


def test_equal_infinities_match_and_others_do_not() -> None:
    reference = np.array([math.inf, -math.inf, math.inf, 1.0, 2.0])
    candidate = np.array([math.inf, -math.inf, -math.inf, math.inf, 2.5])

    difference = compare(reference, candidate)

    assert difference.nonfinite is not None
    assert difference.nonfinite.inf_mismatches == 2
    assert difference.nonfinite.new_inf == 2
    assert difference.nonfinite.equal_inf == 2
    assert difference.nonfinite.sentinel_mismatches == 0
    assert difference.status == "nonfinite"
    assert difference.metrics.max_abs_error == 0.5
    assert compare(reference[:2], candidate[:2]).status == "ok"


def test_an_infinity_that_the_candidate_lacks_is_none_that_it_introduced() -> None:
    difference = compare(np.array([math.inf, 1.0, 2.0]), np.array([0.5, 1.0, 2.0]))

    assert difference.nonfinite == Nonfinite(inf_mismatches=1)
    assert difference.nonfinite.introduced == 0


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, BFLOAT16], ids=["f16", "f32", "f64", "bf16"]
)
def test_a_mask_of_finfo_min_does_not_hide_an_error(dtype: Any) -> None:
    lowest = float(ml_dtypes.finfo(dtype).min)
    reference = np.array([lowest, 0.0, 1.0, 2.0]).astype(dtype)
    candidate = np.array([lowest, 0.0, 1.0, 2.5]).astype(dtype)

    difference = compare(reference, candidate)

    assert difference.metrics.peir == 0.25
    assert difference.status == "ok"


def test_masks_of_two_dtypes_are_the_same_constant() -> None:
    masks = [
        np.array([float(ml_dtypes.finfo(dtype).min), 1.0]).astype(dtype) for dtype in FLOATS[:4]
    ]

    for reference, candidate in itertools.permutations(masks, 2):
        assert compare(reference, candidate).status == "ok"


def test_masks_that_differ_by_rounding_to_the_other_dtype_are_the_same_constant() -> None:
    reference = np.array([-3e38, 1.0], np.float32)

    assert compare(reference, reference.astype(BFLOAT16)).status == "ok"


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [(-3e38, 0.0), (0.0, -3e38), (-3e38, 3e38), (-3e38, -math.inf), (math.inf, 3e38)],
    ids=["lost", "new", "sign", "mask-inf", "inf-mask"],
)
def test_a_mask_against_anything_else_is_counted_once(reference: float, candidate: float) -> None:
    difference = compare(
        np.array([reference, 1.0], np.float32), np.array([candidate, 1.0], np.float32)
    )

    assert difference.status == "nonfinite"
    assert difference.nonfinite == Nonfinite(sentinel_mismatches=1)


def test_large_activations_of_float16_are_no_masks() -> None:
    reference = np.array([60000, -60000], np.float16)

    difference = compare(reference, np.array([60000, 0], np.float16))

    assert difference.metrics.peir == 0.5
    assert difference.status == "ok"


def test_float8_has_no_masks() -> None:
    reference = np.array([-448, 448], np.float32).astype(ml_dtypes.float8_e4m3fn)

    assert compare(reference, reference[::-1]).metrics.max_abs_error == 896


def test_float16_is_upcast_before_it_is_subtracted() -> None:
    reference = np.array([60000, 1], np.float16)

    assert compare(reference, -reference).metrics.max_abs_error == 120000


def test_no_finite_position_leaves_every_metric_undefined() -> None:
    difference = compare(np.full((2, 8), math.nan), np.zeros((2, 8)))

    assert difference.undefined == dict.fromkeys(PAIR_METRICS, "no finite position")
    assert difference.status == "nonfinite"
    assert difference.peak is None


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 8)])
def test_an_empty_pair_leaves_every_metric_undefined(shape: tuple[int, ...]) -> None:
    difference = compare(np.zeros(shape, np.float32), np.zeros(shape, BFLOAT16))

    assert difference.undefined == dict.fromkeys(PAIR_METRICS, "empty")
    assert difference.status == "ok"


def test_a_scalar_is_compared() -> None:
    difference = compare(np.array(2.0), np.array(3.0))

    assert difference.metrics.max_abs_error == 1.0
    assert difference.peak == Peak((), 2.0, 3.0)
    assert difference.undefined["peir"] == "constant reference"


def test_a_constant_reference_without_error_has_a_peir_of_zero() -> None:
    assert compare(np.ones(3, np.float32), np.ones(3)).metrics.peir == 0.0


def test_equal_elements_of_unequal_dtypes_are_undefined_where_better_than_any_number() -> None:
    reference = np.arange(16, dtype=np.float32).reshape(2, 8)

    difference = compare(reference, reference.astype(np.float64))

    identical_ones = {name for name, why in difference.undefined.items() if why == "identical"}
    assert identical_ones == {"sqnr", *TOKENS}
    assert difference.metrics.relative_l2 == 0.0
    assert difference.metrics.cosine == pytest.approx(1.0)


def test_a_reference_of_zeros_has_no_ratio_to_it() -> None:
    difference = compare(np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32))

    assert difference.undefined["sqnr"] == "zero reference"
    assert difference.undefined["relative_l2"] == "zero reference"
    assert difference.undefined["cosine"] == "zero reference"
    assert difference.undefined["token_sqnr_min"] == "zero reference"
    assert difference.zero_tokens == 2


def test_zeros_on_both_sides_are_equal() -> None:
    difference = compare(np.zeros((2, 8), np.float32), np.zeros((2, 8)))

    assert difference.undefined["sqnr"] == "identical"
    assert difference.undefined["token_sqnr_p50"] == "identical"


def test_a_candidate_of_zeros_has_no_cosine() -> None:
    difference = compare(np.ones(3), np.zeros(3))

    assert difference.undefined["cosine"] == "zero candidate"
    assert difference.metrics.sqnr == 0.0


def test_cosine_is_clamped() -> None:
    reference = np.full(3, 0.1)

    assert compare(reference, reference * 3).metrics.cosine <= 1.0


def test_gain_and_offset_are_seen() -> None:
    reference = random_floats((4, 16))

    difference = compare(reference, 100 * reference + 7)

    assert difference.metrics.sqnr < -39
    assert difference.metrics.mean_error == pytest.approx(
        7 + 99 * float(reference.mean()), rel=1e-5
    )


def test_sqnr_is_relative_to_the_reference() -> None:
    reference, candidate = np.array([1.0, 1.0]), np.array([100.0, 100.0])

    assert compare(reference, candidate).metrics.sqnr == pytest.approx(-39.9127, abs=1e-4)
    assert compare(candidate, reference).metrics.sqnr == pytest.approx(0.0873, abs=1e-4)


def test_mean_error_is_candidate_minus_reference() -> None:
    assert compare(np.zeros(4), np.ones(4)).metrics.mean_error == 1.0


def test_the_peak_is_the_largest_absolute_error_not_the_largest() -> None:
    difference = compare(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.5, 2.0], [0.0, 4.0]]))

    assert difference.peak == Peak((1, 0), 3.0, 0.0)
    assert difference.metrics.max_abs_error == 3.0


def test_the_peak_is_the_first_of_equal_ones_and_never_a_masked_one() -> None:
    reference = np.array([math.nan, 1.0, 1.0])

    difference = compare(reference, np.array([5.0, 1.0, 1.0]))

    assert difference.peak == Peak((1,), 1.0, 1.0)


def test_the_peak_of_a_large_array_is_found_in_its_last_block() -> None:
    reference = random_floats((3, 500_000))
    candidate = reference.copy()
    candidate[2, 499_999] += 9

    difference = compare(reference, candidate)

    assert difference.peak is not None
    assert difference.peak.index == (2, 499_999)
    assert difference.metrics.max_abs_error == abs(
        difference.peak.candidate - difference.peak.reference
    )


@pytest.mark.parametrize("shape", [(8,), (4, 7), ()])
def test_short_or_single_vectors_have_no_token_axis(shape: tuple[int, ...]) -> None:
    difference = compare(np.ones(shape), np.zeros(shape))

    assert {difference.undefined[name] for name in TOKENS} == {"no token axis"}


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 40, 41, 60, 140])
def test_percentiles_are_nearest_ranks(count: int) -> None:
    reference = np.ones((count, 8))
    noise = np.arange(count, 0, -1)[:, np.newaxis] * 0.001  # the first token is the worst

    difference = compare(reference, reference + noise)

    ascending = -20 * np.log10(np.arange(count, 0, -1) * 0.001)
    found = difference.metrics
    assert found.token_sqnr_p50 == pytest.approx(ascending[math.ceil(count / 2) - 1])
    assert found.token_sqnr_p5 == pytest.approx(ascending[-(-count * 5 // 100) - 1])
    assert found.token_sqnr_min == pytest.approx(ascending[0])
    assert difference.worst_token == (0,)


def test_a_percentile_that_falls_on_an_exact_token_is_identical() -> None:
    reference = np.ones((3, 8))
    candidate = reference.copy()
    candidate[2] = 2

    difference = compare(reference, candidate)

    assert difference.undefined["token_sqnr_p50"] == "identical"
    assert difference.metrics.token_sqnr_min == 0.0
    assert difference.worst_token == (2,)


def test_tokens_of_zeros_are_left_out_and_counted() -> None:
    reference = np.ones((2, 3, 8), np.float32)
    reference[0, :2] = 0
    candidate = reference + np.float32(0.5)
    candidate[1, 1] += 1

    difference = compare(reference, candidate)

    assert difference.zero_tokens == 2
    assert difference.worst_token == (1, 1)


def test_one_large_token_does_not_hide_the_others() -> None:
    reference = random_floats((100, 64))
    reference[0] *= 1000
    candidate = reference.copy()
    candidate[1:] += random_floats((99, 64), seed=1)

    difference = compare(reference, candidate)

    assert difference.metrics.peir < 0.002
    assert difference.metrics.sqnr > 35
    assert difference.metrics.token_sqnr_p50 == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("candidate", INTEGERS, ids=dtype_name)
@pytest.mark.parametrize("reference", INTEGERS, ids=dtype_name)
@given(data=st.data())
@settings(max_examples=10)
def test_integers_are_compared_exactly(
    reference: np.dtype, candidate: np.dtype, data: st.DataObject
) -> None:
    shape = data.draw(nps.array_shapes(max_dims=2, max_side=5))
    left = data.draw(nps.arrays(reference, shape))
    right = data.draw(nps.arrays(candidate, shape))
    exact = [abs(int(r) - int(c)) for r, c in zip(left.ravel(), right.ravel(), strict=True)]

    difference = compare(left, right)

    assert difference.metrics.max_abs_error == max(exact)
    assert difference.metrics.mismatches == sum(error > 0 for error in exact)
    assert difference.status == ("mismatch" if any(exact) else "exact")
    assert difference.peak is not None
    assert exact[np.ravel_multi_index(difference.peak.index, shape)] == max(exact)


@pytest.mark.parametrize(
    ("dtype", "reference", "candidate", "error"),
    [
        (np.uint8, 3, 5, 2),
        (np.uint8, 1, 2, 1),
        (np.int8, -128, 127, 255),
        (np.int64, 2**24 + 1, 2**24, 1),
        (np.int64, -(2**63), 2**63 - 1, 2**64 - 1),
        (np.uint64, 0, 2**64 - 1, 2**64 - 1),
        (bool, True, False, 1),
        (ml_dtypes.int4, -8, 7, 15),
    ],
    ids=["u8-down", "u8-up", "i8", "beyond-float32", "i64", "u64", "bool", "int4"],
)
def test_integers_never_wrap_around(dtype: Any, reference: int, candidate: int, error: int) -> None:
    pair = (np.array([value]).astype(dtype) for value in (reference, candidate))

    assert compare(*pair).metrics.max_abs_error == error


def test_the_difference_of_uint64_and_int64_can_need_65_bits() -> None:
    difference = compare(np.array([2**64 - 1], np.uint64), np.array([-(2**63)]))

    assert difference.metrics.max_abs_error == 2**64 - 1 + 2**63


def test_integers_have_no_peir_and_say_why() -> None:
    difference = compare(np.array([1, 2]), np.array([1, 4]))

    assert difference.metrics.max_abs_error == 2
    assert difference.undefined["peir"] == "integer"
    assert difference.nonfinite is None
    assert difference.peak == Peak((1,), 2, 4)


def test_floats_have_no_mismatches_and_say_why() -> None:
    assert compare(np.ones(2), np.zeros(2)).undefined["mismatches"] == "floating point"


def test_bools_stay_bools_at_the_peak() -> None:
    assert compare(np.array([True]), np.array([False])).peak == Peak((0,), True, False)


def test_empty_integers_are_exact() -> None:
    difference = compare(np.zeros(0, np.int32), np.zeros(0, np.int64))

    assert difference.status == "exact"
    assert difference.metrics.mismatches == 0


def test_integers_against_floats_are_compared_as_floats() -> None:
    assert_agrees(np.arange(16).reshape(2, 8), np.arange(16, dtype=np.float32).reshape(2, 8) / 2)


def test_complex_numbers_are_compared_as_pairs_of_reals() -> None:
    reference = np.array([[1 + 2j, 3 - 4j]], np.complex64)
    candidate = np.array([[1 + 2j, 3 - 7j]], np.complex64)

    difference = compare(reference, candidate)
    reals = compare(reference.view(np.float32), candidate.view(np.float32))

    assert numbers(difference) == numbers(reals)
    assert difference.peak == Peak((0, 1), -4.0, -7.0)


def test_large_complex_numbers_of_two_widths_are_compared() -> None:
    parts = random_floats((300, 2002))
    reference = parts.view(np.complex64)
    candidate = (reference * np.complex64(1 + 0.01j)).astype(np.complex128)

    difference = compare(reference, candidate)

    expected = naive_metrics(parts, candidate.view(np.float64))
    assert difference.metrics.token_sqnr_p50 == pytest.approx(float(expected["token_sqnr_p50"]))
    assert difference.metrics.sqnr == pytest.approx(40.0)


def test_a_complex_against_a_real_array_compares_the_imaginary_part_with_zero() -> None:
    assert compare(np.array([1 + 2j]), np.array([1.0])).metrics.max_abs_error == 2.0


def test_unequal_shapes_are_never_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(280, 64, 1\) and \(1, 280, 64\) differ"):
        compare(np.zeros((280, 64, 1)), np.zeros((1, 280, 64)))


def test_text_is_no_number() -> None:
    with pytest.raises(TypeError, match="no dtype of numbers"):
        compare(np.array(["a"]), np.array(["b"]))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=dtype_name)
def test_a_read_only_array_at_an_odd_offset_is_compared(dtype: np.dtype) -> None:
    values = np.arange(6).astype(dtype)
    buffer = b"x" + values.tobytes()
    unaligned = np.frombuffer(buffer, dtype, count=6, offset=1)

    assert numbers(compare(unaligned, values[::-1])) == numbers(compare(values, values[::-1]))


def test_a_large_array_at_an_odd_offset_is_compared() -> None:
    values, others = random_floats((100, 1000)), random_floats((100, 1000), seed=1)
    unaligned = np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1).reshape(100, 1000)

    assert numbers(compare(unaligned, others)) == numbers(compare(values, others))


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.int64, BFLOAT16])
def test_a_transposed_array_is_compared_in_its_own_order(dtype: Any) -> None:
    reference = random_floats((20, 30)).astype(dtype)
    candidate = (random_floats((30, 20), seed=1) * 10).astype(dtype)

    found = compare(reference, candidate.T)

    assert numbers(found) == numbers(compare(reference, np.ascontiguousarray(candidate.T)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, candidate = random_floats((1000, 1500)), random_floats((1000, 1500), seed=1)
    expected = compare(reference, candidate)
    monkeypatch.setattr(blocks, "_thread_count", lambda: threads)

    for _ in range(3):
        assert compare(reference, candidate) == expected


def test_an_error_in_one_thread_reaches_the_caller() -> None:
    class Failing:
        def __init__(self) -> None:
            self.blocks = blocks.cut(20, 100_000)

        def part(self, block: blocks.Block) -> int:
            if block.start:
                raise RuntimeError("a block that cannot be read")
            return 0

        def result(self, parts: Any) -> int:
            return len(parts)

    with pytest.raises(RuntimeError, match="cannot be read"):
        blocks.run([Failing()])


def test_many_callers_at_once_do_not_disturb_each_other() -> None:
    pairs = [(random_floats((200, 500), n), random_floats((200, 500), n + 9)) for n in range(4)]
    expected = [compare(*pair) for pair in pairs]
    found: dict[int, Difference] = {}

    def work(number: int) -> None:
        found[number] = compare(*pairs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [found[number] for number in range(4)] == expected


def test_pairs_compared_together_are_as_those_compared_alone() -> None:
    pairs = [
        (random_floats((400, 800)), random_floats((400, 800), seed=1)),
        (np.arange(5), np.arange(5)),
        (np.zeros((0, 4)), np.zeros((0, 4))),
        (np.ones((2, 8)), np.zeros((2, 8))),
    ]

    assert compare_all(pairs) == [compare(*pair) for pair in pairs]


@given(st.integers(1, 60), st.integers(1, 70))
@settings(max_examples=30)
def test_blocks_cover_everything_once_and_every_row_alike(rows: int, length: int) -> None:
    rows, length = rows * 97, length * 9973

    cuts = blocks.cut(rows, length)

    assert cuts[0].start == 0 and cuts[-1].stop == rows * length
    assert all(left.stop == right.start for left, right in itertools.pairwise(cuts))
    assert all(0 < block.size <= blocks.BLOCK for block in cuts)
    assert sum(block.rows for block in cuts) % rows == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_an_identical_float_pair_has_no_error_and_no_noise(dtype: np.dtype) -> None:
    difference = identical(dtype, (2, 8))

    zero = {name for name, value in numbers(difference).items() if value == 0.0}
    assert zero == {*PAIR_METRICS[:6], "relative_l2"}
    assert {difference.undefined[name] for name in ("sqnr", "cosine", *TOKENS)} == {"identical"}
    assert difference.undefined["mismatches"] == "floating point"
    assert (difference.status, difference.peak, difference.nonfinite) == ("identical", None, None)


@pytest.mark.parametrize("dtype", INTEGERS, ids=dtype_name)
def test_an_identical_integer_pair_has_no_mismatch_and_no_peir(dtype: np.dtype) -> None:
    difference = identical(dtype, ())

    assert difference.status == "identical"
    assert difference.metrics.mismatches == 0
    assert difference.undefined["peir"] == "integer"


@pytest.mark.parametrize("cuts", [[0, 5, 10], [0, 1, 3, 10], [0, 10]])
def test_pooling_parts_gives_the_figures_of_the_whole(cuts: list[int]) -> None:
    reference, candidate = random_floats((10, 16)), random_floats((10, 16), seed=1)
    parts = [
        compare(reference[start:stop], candidate[start:stop])
        for start, stop in itertools.pairwise(cuts)
    ]

    pooled, whole = pool(parts), compare(reference, candidate).metrics

    for name in (
        "max_abs_error",
        "mean_abs_error",
        "min_abs_error",
        "stddev_abs_error",
        "mean_error",
        "sqnr",
        "cosine",
        "relative_l2",
        "token_sqnr_min",
    ):
        assert getattr(pooled, name) == pytest.approx(getattr(whole, name), rel=1e-12), name
    assert pooled.peir == max(part.metrics.peir for part in parts)


def test_pooling_does_not_hide_the_worst_call_in_a_mean() -> None:
    fine = [compare(np.array([0.0, 1.0]), np.array([0.0, 1.0001])) for _ in range(99)]
    bad = compare(np.array([0.0, 1.0]), np.array([0.0, 3.0]))

    assert pool([*fine, bad]).peir == 2.0


def test_pooling_keeps_an_undefined_peir_undefined() -> None:
    constant = compare(np.ones(3), np.zeros(3))

    assert pool([constant, compare(np.arange(3.0), np.arange(3.0) + 1)]).peir is None


def test_pooled_identical_calls_count_in_the_mean() -> None:
    pooled = pool([identical(np.dtype(np.float32), (2,)), compare(np.arange(2.0), np.ones(2) * 2)])

    assert pooled.mean_abs_error == 0.75
    assert pooled.max_abs_error == 2.0


def test_pooling_only_identical_calls_has_no_error() -> None:
    pooled = pool([identical(np.dtype(np.float32), (2,))] * 2)

    assert (pooled.max_abs_error, pooled.peir, pooled.sqnr) == (0.0, 0.0, None)


def test_pooling_integers_adds_their_mismatches() -> None:
    pooled = pool(
        [compare(np.array([1, 2]), np.array([1, 4])), compare(np.array([0]), np.array([9]))]
    )

    assert (pooled.mismatches, pooled.max_abs_error) == (2, 9)


def test_pooling_pairs_without_a_position_has_nothing_to_say() -> None:
    assert pool([compare(np.zeros(0), np.zeros(0))]) == Metrics()


@pytest.mark.parametrize(
    ("metric", "best_to_worst"),
    [
        ("peir", [(None, "identical"), (0.0, None), (0.5, None), (None, "constant reference")]),
        ("sqnr", [(None, "identical"), (40.0, None), (-3.0, None), (None, "zero reference")]),
        ("mean_error", [(0.0, None), (0.1, None), (-0.2, None), (None, "empty")]),
        ("mismatches", [(None, "floating point"), (0, None), (2**64, None)]),
        ("token_sqnr_p5", [(None, "integer"), (None, "identical"), (1.0, None), (0.5, None)]),
    ],
)
def test_sorting_by_badness_puts_the_worst_last(
    metric: str, best_to_worst: list[tuple[float | None, str | None]]
) -> None:
    ranks = [badness(metric, value, reason) for value, reason in best_to_worst]

    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_memory_is_bounded_by_the_blocks(make: Callable[..., np.ndarray]) -> None:
    import tracemalloc

    reference, candidate = make((128, 100_000), np.float32), np.ones((128, 100_000), np.float32)
    reference[0, 0] = 2
    compare(reference, candidate)

    tracemalloc.start()
    compare(reference, candidate)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < reference.nbytes / 2
