"""Which calls belong together: names, wrappers, aliases, maps, counts of calls."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from qvtrace.comparison.alignment import Alignment, align, unwrapped
from qvtrace.errors import UsageError
from qvtrace.manifest import (
    CallEntry,
    InputsInfo,
    Manifest,
    ModelInfo,
    ModuleEntry,
    Skipped,
    VariantInfo,
)


def trace(
    *calls: str | tuple[str, int], aliases: dict[str, tuple[str, ...]] | None = None
) -> Manifest:
    """A trace of these calls, in this order; a step goes with a name as `(name, step)`."""
    aliases = aliases or {}
    named = [(call, 0) if isinstance(call, str) else call for call in calls]
    counts: dict[str, int] = {}
    entries = []
    for name, step in named:
        index = counts.get(name, 0)
        counts[name] = index + 1
        entries.append(CallEntry(name, index, 0, step, None, None, None, None, (), None))
    return Manifest(
        qvtrace="0",
        created="2026-01-01T00:00:00+00:00",
        complete=True,
        error=None,
        recorded_by="library",
        model=ModelInfo(),
        variant=VariantInfo(),
        inputs=InputsInfo(),
        contains=(),
        environment={},
        settings={},
        modules=tuple(
            ModuleEntry(name, "Linear", None, aliases.get(name, ()), count)
            for name, count in counts.items()
        ),
        calls=tuple(entries),
        tensors=(),
        skipped=Skipped(),
    )


def pairs(alignment: Alignment) -> list[tuple[str, str, str]]:
    """Name and index of both calls, and the rule."""
    return [(called(pair.reference), called(pair.candidate), pair.rule) for pair in alignment.pairs]


def called(call: CallEntry) -> str:
    return f"{call.module}#{call.index}"


def names(calls: Iterable[CallEntry]) -> list[str]:
    return [called(call) for call in calls]


def test_equal_names_are_paired_whatever_the_order_of_execution():
    alignment = align(trace("q", "k", "norm"), trace("norm", "k", "q"))

    assert pairs(alignment) == [
        ("q#0", "q#0", "exact"),
        ("k#0", "k#0", "exact"),
        ("norm#0", "norm#0", "exact"),
    ]
    assert [pair.order for pair in alignment.pairs] == [0, 1, 2]


def test_a_name_that_begins_like_another_is_another():
    alignment = align(trace("layers.1"), trace("layers.10", "xlayers.1"))

    assert not alignment.pairs
    assert names(alignment.only_in_reference) == ["layers.1#0"]
    assert names(alignment.only_in_candidate) == ["layers.10#0", "xlayers.1#0"]


def test_calls_are_paired_by_index_and_none_is_cut_off():
    alignment = align(trace("a", "a", "a"), trace("a", "a"))

    assert pairs(alignment) == [("a#0", "a#0", "exact"), ("a#1", "a#1", "exact")]
    assert names(alignment.only_in_reference) == ["a#2"]


def test_a_call_missing_in_one_step_does_not_shift_the_next_step():
    reference = trace(("expert", 0), ("expert", 0), ("expert", 1))
    candidate = trace(("expert", 0), ("expert", 1))

    alignment = align(reference, candidate)

    assert [(one, other) for one, other, _ in pairs(alignment)] == [
        ("expert#0", "expert#0"),
        ("expert#2", "expert#1"),
    ]


@pytest.mark.parametrize(
    ("candidate", "rule"),
    [
        pytest.param("_orig_mod.layers.0.fc", "prefix _orig_mod.", id="compiled"),
        pytest.param("layers.0._orig_mod.fc", "prefix _orig_mod.", id="compiled-inside"),
        pytest.param("module.layers.0.fc", "prefix module.", id="data-parallel"),
        pytest.param(
            "module._orig_mod.layers.0.fc", "prefix _orig_mod., prefix module.", id="both"
        ),
        pytest.param("wrapped.layers.0.wrapped.fc", "suffix .wrapped", id="quantizer"),
    ],
)
def test_declared_wrappers_are_taken_off_and_named(candidate, rule):
    reference = trace("layers.0.fc")

    assert pairs(align(reference, trace(candidate))) == [("layers.0.fc#0", f"{candidate}#0", rule)]
    assert pairs(align(trace(candidate), reference)) == [(f"{candidate}#0", "layers.0.fc#0", rule)]


def test_a_root_that_only_wraps_leaves_its_contents_to_be_paired():
    alignment = align(trace("fc", ""), trace("_orig_mod.fc", "_orig_mod", ""))

    assert pairs(alignment) == [
        ("fc#0", "_orig_mod.fc#0", "prefix _orig_mod."),
        ("#0", "#0", "exact"),
    ]
    assert names(alignment.only_in_candidate) == ["_orig_mod#0"]
    assert alignment.candidate_wrappers == {"_orig_mod"}


def test_an_exact_name_wins_over_a_wrapped_one():
    alignment = align(trace("fc"), trace("module.fc", "fc"))

    assert pairs(alignment) == [("fc#0", "fc#0", "exact")]
    assert names(alignment.only_in_candidate) == ["module.fc#0"]
    assert not alignment.candidate_wrappers


def test_a_module_that_is_named_like_a_wrapper_keeps_its_name():
    reference = trace("enc.wrapped.fc", "enc.fc")
    candidate = trace("_orig_mod.enc.wrapped.fc", "_orig_mod.enc.fc")

    alignment = align(reference, candidate)

    assert pairs(alignment) == [
        ("enc.wrapped.fc#0", "_orig_mod.enc.wrapped.fc#0", "prefix _orig_mod."),
        ("enc.fc#0", "_orig_mod.enc.fc#0", "prefix _orig_mod."),
    ]


def test_of_nested_wrappers_the_outer_one_is_paired_and_none_twice():
    candidate = trace("wrapped.fc.wrapped", "wrapped.fc", "wrapped", "")

    alignment = align(trace("fc", ""), candidate)

    assert pairs(alignment) == [
        ("fc#0", "wrapped.fc#0", "suffix .wrapped"),
        ("#0", "#0", "exact"),
    ]
    assert alignment.candidate_wrappers == {"wrapped.fc.wrapped", "wrapped"}


def test_of_nested_wrappers_one_with_other_calls_is_passed_over():
    candidate = trace("fc.wrapped", "fc.wrapped", "wrapped.fc")

    alignment = align(trace("fc", "fc"), candidate)

    assert [other for _, other, _ in pairs(alignment)] == ["fc.wrapped#0", "fc.wrapped#1"]


def test_a_wrapper_that_was_never_called_leaves_the_inner_module_to_be_paired():
    alignment = align(
        trace("pos_embed"), trace("wrapped.module.pos_embed", "wrapped.pos_embedding")
    )

    assert pairs(alignment) == [
        ("pos_embed#0", "wrapped.module.pos_embed#0", "prefix module., suffix .wrapped")
    ]


def test_a_shared_module_is_paired_through_its_alias():
    reference = trace("encoder.embed", aliases={"encoder.embed": ("shared",)})
    candidate = trace("shared", aliases={"shared": ("encoder.embed",)})

    assert pairs(align(reference, candidate)) == [("encoder.embed#0", "shared#0", "alias")]


def test_a_shared_module_is_paired_with_one_module_under_each_of_its_names():
    shared = trace("a", "a", aliases={"a": ("b",)})
    apart = trace("a", "b")

    assert pairs(align(shared, apart)) == [("a#0", "a#0", "exact"), ("a#1", "b#0", "alias")]
    assert pairs(align(apart, shared)) == [("a#0", "a#0", "exact"), ("b#0", "a#1", "alias")]


def test_calls_of_a_shared_module_are_left_alone_where_their_number_differs():
    alignment = align(trace("a", "a", "a", aliases={"a": ("b",)}), trace("a", "b"))

    assert pairs(alignment) == [("a#0", "a#0", "exact")]
    assert names(alignment.only_in_candidate) == ["b#0"]


def test_maps_rename_the_candidate_one_after_the_other():
    maps = [r"^net\.=model.", r"\.proj$=.linear"]

    alignment = align(trace("model.0.linear"), trace("net.0.proj"), maps)

    (pair,) = alignment.pairs
    assert pair.rule == r"map ^net\.=model., map \.proj$=.linear"
    assert not alignment.warnings


def test_a_map_is_followed_by_taking_wrappers_off():
    (pair,) = align(trace("model.fc"), trace("_orig_mod.net.fc"), ["net=model"]).pairs

    assert pair.rule == "map net=model, prefix _orig_mod."


def test_a_map_leaves_names_alone_that_the_reference_has():
    alignment = align(trace("self_attn", "attn2"), trace("self_attn", "attn"), ["attn$=attn2"])

    assert [(one, other) for one, other, _ in pairs(alignment)] == [
        ("self_attn#0", "self_attn#0"),
        ("attn2#0", "attn#0"),
    ]


@pytest.mark.parametrize(
    "maps",
    [["^a=b", "^b=a"], ["^a=spare", "^b=a", "^spare=b"], [r"^a\b=b", r"^b\b=a"]],
    ids=["two", "through-a-third", "words"],
)
def test_maps_may_swap_two_names(maps):
    alignment = align(trace("a", "b", "a.fc"), trace("b", "a", "b.fc"), maps)

    assert [(one, other) for one, other, _ in pairs(alignment)] == [
        ("a#0", "b#0"),
        ("b#0", "a#0"),
        ("a.fc#0", "b.fc#0"),
    ]
    assert not alignment.warnings


def test_a_map_may_give_a_name_that_both_have_to_a_module_of_another_name_of_both():
    alignment = align(trace("a", "b"), trace("a"), ["a=b"])

    assert pairs(alignment) == [("b#0", "a#0", "map a=b")]


def test_a_map_takes_no_name_away_that_the_candidate_keeps():
    names = trace("layer", "layer.base", "other")

    alignment = align(names, names, [r"\.base$="])

    assert {rule for _, _, rule in pairs(alignment)} == {"exact"}
    assert alignment.warnings == (r"--map '\\.base$=' changed no name",)


def test_maps_stop_at_a_name_of_the_reference():
    maps = ["^x=layers.0", "^layers.0=layers.1"]

    (pair,) = align(trace("layers.0", "layers.1"), trace("x"), maps).pairs

    assert (pair.reference.module, pair.rule) == ("layers.0", "map ^x=layers.0")


def test_a_map_onto_the_root_is_told_of():
    alignment = align(trace("", "a"), trace("", "a", "c"), ["c="])

    assert [(one, other) for one, other, _ in pairs(alignment)] == [("#0", "#0"), ("a#0", "a#0")]
    assert alignment.warnings == ("--map 'c=' gives c the name of the root",)


def test_a_pattern_with_lookahead_may_hold_an_equals_sign():
    (pair,) = align(trace("model.fc"), trace("fc"), [r"^(?=fc)=model."]).pairs

    assert pair.candidate.module == "fc"


def test_a_map_that_gives_two_modules_one_name_is_refused():
    with pytest.raises(UsageError, match=r"--map .*layers\.0 and layers\.1 .*layers"):
        align(trace("layers"), trace("layers.0", "layers.1"), [r"\.\d+$="])


def test_a_map_onto_a_name_that_the_candidate_has_is_refused():
    with pytest.raises(UsageError, match=r"--map 'b=a': gives a and b .* narrower"):
        align(trace("a"), trace("a", "b"), ["b=a"])


def test_a_map_that_changes_nothing_is_told_of():
    assert align(trace("a"), trace("a"), ["x=y"]).warnings == ("--map 'x=y' changed no name",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("no equals", "no 'PATTERN=REPLACEMENT'", id="no-equals"),
        pytest.param("=x", "no 'PATTERN=REPLACEMENT'", id="no-pattern"),
        pytest.param("(=x", "no regular expression", id="bad-pattern"),
        pytest.param(r"b=\7", "no replacement", id="bad-group"),
        pytest.param(r"b=\g<none>", "no replacement", id="unknown-group"),
    ],
)
def test_a_map_that_cannot_be_read_is_a_usage_error_that_names_it(text, message):
    with pytest.raises(UsageError, match=f"^--map .*{message}"):
        align(trace("a"), trace("b"), [text])


def test_wrappers_are_path_components_and_no_parts_of_words():
    assert unwrapped("unwrapped.submodule.module.fc") == "unwrapped.submodule.module.fc"
    assert unwrapped("module.module.wrapped.fc.wrapped") == "fc"


def test_a_float_name_comes_after_every_other_rule():
    reference = trace("fc", "act")
    candidate = trace("fc", "x.fc", "x.act")
    modules = tuple(
        replace(entry, float_name=entry.name.removeprefix("x.")) for entry in candidate.modules
    )

    alignment = align(reference, replace(candidate, modules=modules))

    assert pairs(alignment) == [("fc#0", "fc#0", "exact"), ("act#0", "x.act#0", "fp_name")]


def test_names_in_a_reference_of_wrappers_are_read_too():
    reference = trace("parts.0")
    modules = tuple(replace(entry, float_name="fc") for entry in reference.modules)

    alignment = align(replace(reference, modules=modules), trace("fc"))

    assert pairs(alignment) == [("parts.0#0", "fc#0", "fp_name")]


def test_modules_that_a_quantizer_added_are_wrappers():
    alignment = align(trace("fc"), trace("fc", "fc.activation_post_process", "fc.other"))

    assert alignment.candidate_wrappers == {"fc.activation_post_process"}
