"""Which reshape and transpose brings one array's elements into another's places."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import Returning

from qvtrace.comparison.diffing import diff
from qvtrace.metrics import blocks
from qvtrace.metrics.comparing import compare
from qvtrace.metrics.elements import Rearranged, reader
from qvtrace.metrics.layouts import find_layout, reshaped
from qvtrace.recording.recorder import record


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noisy(array: np.ndarray, share: float = 0.05) -> np.ndarray:
    """As a quantizer leaves it."""
    return array + share * values(*array.shape, seed=1)


def heads(array: np.ndarray) -> np.ndarray:
    """Heads before positions, as attention works on them."""
    return np.ascontiguousarray(array.transpose(0, 2, 1, 3))


HIDDEN = values(2, 24, 4, 8)  # batch, positions, heads, channels


@pytest.mark.parametrize(
    ("candidate", "text"),
    [
        pytest.param(heads(HIDDEN), "permute(0, 2, 1, 3)", id="heads-first"),
        pytest.param(HIDDEN.reshape(2, 24, 32), "reshape(2, 24, 4, 8)", id="merged-heads"),
        pytest.param(HIDDEN[..., None, None], "reshape(2, 24, 4, 8)", id="axes-of-size-one"),
        pytest.param(
            np.ascontiguousarray(HIDDEN.transpose(1, 0, 3, 2)).reshape(24, 2, 32),
            "reshape(24, 2, 8, 4).permute(1, 0, 3, 2)",
            id="split-and-transposed",
        ),
        pytest.param(
            heads(HIDDEN)[:, None],
            "reshape(2, 4, 24, 8).permute(0, 2, 1, 3)",
            id="transposed-with-one-axis-more",
        ),
    ],
)
def test_the_layout_that_explains_the_values_is_found_and_written_as_torch_has_it(candidate, text):
    layout = find_layout(HIDDEN, noisy(candidate))

    assert str(layout) == text
    moved = eval(f"candidate.{layout}", {"candidate": torch.from_numpy(candidate)})
    assert np.array_equal(moved.numpy(), HIDDEN)


def test_heads_are_merged_into_the_channels_of_a_reference_that_has_them_so():
    merged = HIDDEN.reshape(2, 24, 32)

    layout = find_layout(merged, noisy(heads(HIDDEN)))

    assert str(layout) == "permute(0, 2, 1, 3).reshape(2, 24, 32)"


def test_a_shape_that_fits_is_no_layout_where_the_values_do_not():
    assert find_layout(HIDDEN, values(2, 4, 24, 8, seed=5)) is None
    assert find_layout(HIDDEN, values(2, 24, 32, seed=5)) is None
    assert find_layout(values(4, 1), values(1, 4, seed=5)) is None


def test_values_that_are_few_have_to_be_equal():
    few = values(2, 3)

    assert str(find_layout(few, np.ascontiguousarray(few.T))) == "permute(1, 0)"
    assert find_layout(few, np.ascontiguousarray(few.T) * 1.5) is None


def test_a_factor_and_a_few_huge_values_do_not_hide_the_layout():
    outliers = HIDDEN.copy()
    outliers[:, 0, :, 3] *= 1000
    outliers[..., 5] += 4

    layout = find_layout(outliers, noisy(heads(outliers)) / np.float32(5.6))

    assert str(layout) == "permute(0, 2, 1, 3)"


def test_layouts_that_explain_the_values_equally_well_are_not_chosen_among():
    same_everywhere = np.broadcast_to(values(8), (2, 24, 4, 8))
    assert find_layout(same_everywhere, noisy(heads(same_everywhere), 0.2)) is None


def test_masks_with_infinities_are_told_apart_by_where_these_are():
    mask = np.triu(np.full((16, 12), -np.inf, np.float32), 1)
    assert str(find_layout(mask, np.ascontiguousarray(mask.T)[None])) == (
        "reshape(12, 16).permute(1, 0)"
    )


def test_integers_and_complex_numbers_have_layouts():
    ids = np.arange(48).reshape(3, 16)
    rotations = values(6, 8) + 1j * values(6, 8, seed=3)

    assert str(find_layout(ids, np.ascontiguousarray(ids.T))) == "permute(1, 0)"
    assert str(find_layout(rotations, np.ascontiguousarray(rotations.T))) == "permute(1, 0)"


def test_a_complex_candidate_is_held_against_a_real_reference():
    real = values(6, 8)
    turned = np.ascontiguousarray(real.T)

    assert str(find_layout(real, turned.astype(np.complex64))) == "permute(1, 0)"
    assert find_layout(real, 1j * values(8, 6, seed=4)) is None


def test_integers_have_a_layout_only_where_they_are_equal_in_it():
    ids = np.arange(280)[:, None] + np.array([0, 1, 48, 49])
    other_order = ids.reshape(10, 2, 7, 2, 4).transpose(0, 2, 1, 3, 4).reshape(280, 4)
    two_differ = ids.T.copy()
    two_differ[0, :2] += 1

    assert find_layout(ids, np.ascontiguousarray(other_order.T)) is None
    assert str(find_layout(ids, two_differ)) == "permute(1, 0)"


def test_of_equal_shapes_only_a_clear_transpose_is_taken():
    square = values(3, 16, 16)
    transposed = np.ascontiguousarray(square.transpose(0, 2, 1))

    assert str(find_layout(square, noisy(transposed))) == "permute(0, 2, 1)"
    assert find_layout(square, noisy(transposed, 2.0)) is None
    assert find_layout(square, noisy(square)) is None
    symmetric = square + transposed
    assert find_layout(symmetric, -symmetric) is None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_transpose_of_up_to_five_axes_is_undone(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    reference = values(*shape)
    candidate = np.ascontiguousarray(reference.transpose(order))

    layout = find_layout(reference, candidate)

    if reference.shape == candidate.shape and layout is None:
        return
    assert layout is not None
    moved = layout.of(candidate)
    assert moved.shape == reference.shape
    assert np.array_equal(reader(moved)(0, moved.size), reference.reshape(-1))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_range_of_a_rearranged_array_is_that_of_its_copy(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    view = values(*shape).transpose(data.draw(st.permutations(range(len(shape)))))
    start, stop = sorted(data.draw(st.lists(st.integers(0, view.size), min_size=2, max_size=2)))

    read = reader(Rearranged(view, (view.size,)))(start, stop)

    assert np.array_equal(read, view.reshape(-1)[start:stop])


def test_metrics_are_those_of_a_copy_in_the_reference_s_layout(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 512)
    candidate = noisy(heads(HIDDEN))
    layout = find_layout(HIDDEN, candidate)
    assert layout is not None
    copied = np.ascontiguousarray(candidate.transpose(0, 2, 1, 3))

    assert compare(HIDDEN, layout.of(candidate)) == compare(HIDDEN, copied)


def test_elements_in_one_order_need_no_evidence():
    assert str(reshaped((280, 64, 1, 1, 1), (1, 280, 64))) == "reshape(280, 64, 1, 1, 1)"


def compared(tmp_path, reference, candidate):
    files = [tmp_path / "reference.st", tmp_path / "candidate.st"]
    for file, output in zip(files, (reference, candidate), strict=True):
        model = Returning()
        with record(model, file):
            model(torch.from_numpy(output))
    return diff(*files)


def test_a_row_in_another_layout_is_compared_and_names_it(tmp_path):
    comparison = compared(tmp_path, HIDDEN, noisy(heads(HIDDEN)))

    (row,) = comparison.rows
    assert (row.status, row.layout) == ("ok", "permute(0, 2, 1, 3)")
    assert row.shape == ((2, 24, 4, 8), (2, 4, 24, 8))
    assert 20 < row.metrics.sqnr < 30
    assert comparison.coverage.compared == 1
    assert "1 row compared in another layout" in comparison.verdict.text


def test_equal_elements_in_another_shape_have_no_error(tmp_path):
    (row,) = compared(tmp_path, HIDDEN, HIDDEN.reshape(2, 24, 32)).rows

    assert (row.status, row.layout) == ("ok", "reshape(2, 24, 4, 8)")
    assert (row.metrics.peir, row.metrics.max_abs_error) == (0, 0)


def test_a_transposed_square_is_compared_after_the_transpose(tmp_path):
    square = values(32, 32)

    (row,) = compared(tmp_path, square, np.ascontiguousarray(square.T)).rows

    assert (row.status, row.layout, row.metrics.peir) == ("ok", "permute(1, 0)", 0)


def test_unrelated_values_of_as_many_elements_stay_a_difference_of_shapes(tmp_path):
    comparison = compared(tmp_path, HIDDEN, values(2, 4, 24, 8, seed=7))

    (row,) = comparison.rows
    assert (row.status, row.layout) == ("shape", None)
    assert row.reason == "[2, 24, 4, 8] against [2, 4, 24, 8]"
    assert comparison.verdict.exit_code == 3


def test_empty_tensors_of_unequal_shapes_have_no_layout(tmp_path):
    (row,) = compared(tmp_path, values(0, 5), values(0, 7)).rows

    assert row.status == "shape"
