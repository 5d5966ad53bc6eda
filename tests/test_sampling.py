"""The places of a sample follow from how many vectors there are, how many are wanted, a seed."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from qvtrace.sampling import count_vectors, sampled_places

counts = st.integers(1, 5000)
tokens = st.integers(2, 300)


@given(counts, tokens)
def test_as_many_places_are_taken_as_are_wanted_in_order_and_each_once(
    count: int, tokens: int
) -> None:
    places = sampled_places(count, tokens).tolist()

    assert len(places) == min(count, tokens)
    assert places == sorted(set(places))
    assert places[0] == 0
    assert places[-1] == count - 1


@given(counts, tokens, tokens)
def test_a_smaller_sample_lies_within_a_larger_one(count: int, one: int, other: int) -> None:
    fewer, more = sorted((one, other))

    assert set(sampled_places(count, fewer)) <= set(sampled_places(count, more))


def test_the_places_are_the_same_in_every_version() -> None:
    places = [sampled_places(count, 64).tolist() for count in (65, 512, 100_000, 2**40)]

    digest = hashlib.sha256(repr(places).encode()).hexdigest()
    assert digest == "f761c9bc4abe8cf49baa568b8ffcd3a5603596a0b90e8b5edfee61581ecdc9bd"


def test_another_seed_takes_other_places() -> None:
    assert sampled_places(512, 64, 0).tolist() != sampled_places(512, 64, 1).tolist()


def test_places_are_spread_over_all_vectors() -> None:
    quarters = [0, 0, 0, 0]
    for place in sampled_places(10_000, 1000):
        quarters[place // 2500] += 1

    assert min(quarters) > 200


def test_a_tensor_without_a_second_dimension_is_one_vector() -> None:
    assert [count_vectors(shape) for shape in [(), (512,), (2, 3, 8)]] == [1, 1, 6]
