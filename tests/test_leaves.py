"""How two trees are walked side by side."""

from qvtrace.comparison.leaves import Arguments, LeafPair, pair_arguments, pair_nodes
from qvtrace.trees import Container, ContainerKind, Node, OpaqueLeaf, TensorLeaf, ValueLeaf

NONE = ValueLeaf.of(None)


def tensor(digest: str) -> TensorLeaf:
    return TensorLeaf("float32", (2, 3), digest)


def sequence(*children: Node, kind: ContainerKind = "tuple") -> Container:
    items = tuple((str(index), child) for index, child in enumerate(children))
    return Container(kind, kind, items)


def fields(kind: ContainerKind = "dict", class_name: str = "dict", **children: Node) -> Container:
    return Container(kind, class_name, tuple(children.items()))


def pairs(reference: Node, candidate: Node) -> list[LeafPair]:
    return list(pair_nodes(reference, candidate, "output"))


def test_leaves_of_equal_trees_are_paired_by_path():
    tree = fields(hidden=sequence(tensor("a"), tensor("b")), count=ValueLeaf.of(3))

    assert [(pair.path, pair.reference, pair.note) for pair in pairs(tree, tree)] == [
        ("output.hidden.0", tensor("a"), None),
        ("output.hidden.1", tensor("b"), None),
        ("output.count", ValueLeaf.of(3), None),
    ]


def test_a_place_that_is_none_on_both_sides_is_left_out():
    assert [
        pair.path for pair in pairs(sequence(tensor("a"), NONE), sequence(tensor("b"), NONE))
    ] == ["output.0"]


def test_dict_keys_are_paired_by_name_whatever_their_order():
    one, other = fields(a=tensor("a"), b=tensor("b")), fields(b=tensor("c"), a=tensor("d"))

    assert [(pair.path, pair.candidate) for pair in pairs(one, other)] == [
        ("output.a", tensor("d")),
        ("output.b", tensor("c")),
    ]


def test_a_longer_tuple_has_its_further_places_on_one_side():
    (_, further) = pairs(sequence(tensor("a"), tensor("b")), sequence(tensor("a")))

    assert further == LeafPair("output.1", tensor("b"), None)


def test_a_key_of_one_side_stands_beside_nothing_with_all_its_leaves():
    extra = sequence(tensor("b"), NONE, tensor("c"))

    lone = [pair for pair in pairs(fields(), fields(extra=extra)) if pair.reference is None]

    assert [pair.path for pair in lone] == ["output.extra.0", "output.extra.2"]


def test_a_tensor_and_a_tuple_of_one_tensor_are_paired_and_the_tuple_noted():
    (inner,) = pairs(sequence(tensor("a"), NONE), tensor("b"))
    (outer,) = pairs(tensor("a"), sequence(tensor("b")))

    assert inner == LeafPair("output.0", tensor("a"), tensor("b"), "a tuple of 2 against a tensor")
    assert outer == LeafPair("output", tensor("a"), tensor("b"), "a tensor against a tuple of 1")


def test_a_tensor_and_a_tuple_of_two_are_not_taken_apart():
    two = sequence(tensor("a"), tensor("b"))

    assert pairs(tensor("a"), two) == [LeafPair("output", tensor("a"), two)]


def test_fields_without_a_value_may_be_absent():
    full = fields("model_output", "ModelOutput", hidden=tensor("a"), attentions=NONE)
    sparse = fields("model_output", "ModelOutput", hidden=tensor("b"))

    assert [pair.path for pair in pairs(full, sparse)] == ["output.hidden"]


def test_a_model_output_and_a_tuple_are_paired_in_order_of_the_fields_that_are_set():
    output = fields(
        "model_output", "ModelOutput", loss=NONE, logits=tensor("a"), hidden=tensor("b")
    )

    found = pairs(output, sequence(tensor("c"), tensor("d")))

    assert [(pair.path, pair.candidate) for pair in found] == [
        ("output.logits", tensor("c")),
        ("output.hidden", tensor("d")),
    ]
    assert {pair.note for pair in found} == {"ModelOutput against a tuple of 2"}


def test_a_dict_and_a_tuple_are_one_place_that_differs():
    one, other = fields(a=tensor("a")), sequence(tensor("b"), tensor("c"))

    assert pairs(one, other) == [LeafPair("output", one, other)]


def test_the_only_tensor_of_a_dict_and_that_of_a_tuple_are_paired():
    one, other = Container("dict", "dict", (("a", tensor("a")),)), sequence(tensor("b"), NONE)

    assert pairs(one, other) == [
        LeafPair("output.a", tensor("a"), tensor("b"), "a dict of 1 against a tuple of 2")
    ]
    assert pairs(other, one) == [
        LeafPair("output.0", tensor("b"), tensor("a"), "a tuple of 2 against a dict of 1")
    ]


def test_another_class_with_the_same_fields_is_noted():
    one = fields("model_output", "CausalLMOutput", logits=tensor("a"))
    other = fields("model_output", "QuantizedOutput", logits=tensor("b"))

    (pair,) = pairs(one, other)

    assert pair.note == "CausalLMOutput against QuantizedOutput"


def test_caches_are_a_place_of_their_own_and_so_are_their_tensors():
    one = Container("cache", "DynamicCache", (("keys", tensor("a")),), length=3)
    other = Container("cache", "DynamicCache", (("keys", tensor("b")),), length=3)

    assert [pair.path for pair in pairs(one, other)] == ["output", "output.keys"]


def test_tensors_that_only_one_cache_stored_are_no_places_that_differ():
    one = Container("cache", "DynamicCache", (("keys", tensor("a")),), length=3)
    other = Container("cache", "DynamicCache", (), length=3)

    assert pairs(one, other) == [LeafPair("output", one, other)]


def arguments(*inputs: Node, names: tuple[str | None, ...] = (), **kwargs: Node) -> Arguments:
    return Arguments(sequence(*inputs), fields(**kwargs), names)


def test_an_argument_by_position_is_the_one_of_its_parameter_s_name():
    reference = arguments(tensor("a"), names=("hidden",))
    candidate = arguments(hidden=tensor("b"))

    assert list(pair_arguments(reference, candidate)) == [
        LeafPair("inputs.0", tensor("a"), tensor("b"), "inputs.0 against kwargs.hidden")
    ]
    assert [pair.path for pair in pair_arguments(candidate, reference)] == ["kwargs.hidden"]


def test_arguments_of_other_names_are_paired_by_position():
    reference = arguments(tensor("a"), names=("x",))
    candidate = arguments(tensor("b"), names=("hidden_states",))

    assert list(pair_arguments(reference, candidate)) == [
        LeafPair("inputs.0", tensor("a"), tensor("b"))
    ]


def test_swapped_parameters_are_paired_by_name():
    reference = arguments(tensor("a"), tensor("b"), names=("query", "key"))
    candidate = arguments(tensor("c"), tensor("d"), names=("key", "query"))

    assert [pair.candidate for pair in pair_arguments(reference, candidate)] == [
        tensor("d"),
        tensor("c"),
    ]


def test_an_argument_that_is_none_may_be_absent():
    assert not list(pair_arguments(arguments(mask=NONE), arguments()))


def test_an_argument_of_one_side_counts_as_unstored_where_the_other_stored_none():
    (missing,) = pair_arguments(arguments(mask=tensor("a")), arguments())
    (unstored,) = pair_arguments(arguments(mask=tensor("a")), Arguments(None, None, ()))

    assert missing.stored
    assert not unstored.stored


def test_opaque_leaves_are_paired():
    assert pairs(OpaqueLeaf("A"), OpaqueLeaf("B")) == [
        LeafPair("output", OpaqueLeaf("A"), OpaqueLeaf("B"))
    ]
