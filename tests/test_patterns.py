"""Patterns on module names: exact names first, then case-sensitive fnmatch."""

import pytest

from qvtrace.errors import UsageError
from qvtrace.patterns import match, require_matches, select, shown

NAMES = ["", "layers.1", "layers.10", "layers.1.mlp", "m[0]", "m0", "Mlp", "a*b", "axb", "a?"]


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("layers.1", {"layers.1"}),
        ("layers.1*", {"layers.1", "layers.10", "layers.1.mlp"}),
        ("layers.?", {"layers.1"}),
        ("m[0]", {"m[0]"}),
        ("m[0-9]", {"m0"}),
        ("m[[]0]", {"m[0]"}),
        ("a*b", {"a*b"}),
        ("a?", {"a?"}),
        ("mlp", set()),
        ("*mlp", {"layers.1.mlp"}),
        ("MLP", set()),
        ("(root)", {""}),
        ("", {""}),
        ("*", set(NAMES)),
        ("nothing", set()),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_pattern_is_an_exact_name_first(pattern: str, fits: set[str]) -> None:
    assert match(NAMES, pattern) == fits


def test_without_patterns_everything_is_selected() -> None:
    assert select(NAMES) == set(NAMES)


def test_any_of_several_patterns_may_fit() -> None:
    assert select(NAMES, include=["m0", "layers.*"]) == {
        "m0",
        "layers.1",
        "layers.10",
        "layers.1.mlp",
    }


def test_what_is_excluded_is_left_out_even_where_it_is_included() -> None:
    assert select(NAMES, include=["layers.*"], exclude=["layers.1"]) == {
        "layers.10",
        "layers.1.mlp",
    }


def test_excluding_alone_takes_from_everything() -> None:
    assert select(NAMES, exclude=["(root)"]) == set(NAMES) - {""}


def test_a_pattern_that_fits_nothing_is_named_with_its_option() -> None:
    with pytest.raises(UsageError, match=r"--exclude 'layer\.\*': matches none of 10 modules"):
        require_matches(NAMES, ["layers.*", "layer.*"], "--exclude")


def test_patterns_that_all_fit_are_no_error() -> None:
    require_matches(NAMES, ["layers.*", "(root)", "m[0]"], "--include")


def test_the_root_has_a_name_on_screen() -> None:
    assert [shown(""), shown("layers.1")] == ["(root)", "layers.1"]
