"""Pairs of contents, each looked at once, whatever the places where they stand."""

from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from qvtrace.archive import Archive
from qvtrace.comparison.detailed_pairs import AxesOf, DetailedPairs
from qvtrace.comparison.inner_rotating import Standing, find_inner_rotations
from qvtrace.comparison.leaf_pairs import (
    Contents,
    Leaves,
    contents_of,
    has_to_be_read,
    same_contents,
)
from qvtrace.comparison.noise import noise_of, rounding_of
from qvtrace.comparison.outcomes import (
    Outcome,
    measured,
    shapes_differ,
    unlike,
)
from qvtrace.comparison.padding import Padding
from qvtrace.comparison.permuting import find_permutations
from qvtrace.comparison.portions import Portions
from qvtrace.comparison.rotating import (
    FEWEST_ALIKE,
    Rotations,
    find_rotations,
    is_like_a_turned_one,
    may_be_turned,
    state_of,
    turned_back,
)
from qvtrace.comparison.routing import Vectors, vector_digests
from qvtrace.comparison.streams import State
from qvtrace.comparison.surroundings import Output
from qvtrace.manifest import CallEntry, has_several_samples
from qvtrace.metrics.additions import Parts, parts_of
from qvtrace.metrics.comparing import compare_all
from qvtrace.metrics.details import Details
from qvtrace.metrics.differences import Difference, identical
from qvtrace.metrics.elements import Array, ElementsJson, Flags, Floats, Readable, format_of, reader
from qvtrace.metrics.factors import ScaleFactor
from qvtrace.metrics.inner_rotations import AnyRotation
from qvtrace.metrics.layouts import Layout, find_layout, may_be_transposed, reshaped
from qvtrace.metrics.logits import Ids, LogitsPair, TokenLogits, compare_logits
from qvtrace.metrics.permutations import Permutation
from qvtrace.metrics.rotations import Rotation
from qvtrace.metrics.scaling import Scaling, find_scaling, scaling_like
from qvtrace.metrics.sharing import Sides, is_summand
from qvtrace.metrics.sizes import Sizes, sizes_of
from qvtrace.metrics.spreads import Axes, Spread, spread
from qvtrace.metrics.subtraction import difference_json, no_difference_json
from qvtrace.sampling import Places
from qvtrace.trees import Node, TensorLeaf

# Below, in dB, elements of equal shapes may be in other places.
_UNLIKE = 3.0
_GLANCE = 4096  # elements that tell whether a tensor is zero
_TOGETHER = 4096  # pairs compared at once: each is some objects until it is done

Found = TypeVar("Found")


class ContentPairs:
    """All that a comparison reads of the elements of two archives."""

    def __init__(
        self, reference: Archive, candidate: Archive, portions: Portions | None = None
    ) -> None:
        self.reference = reference
        self.candidate = candidate
        self.portions = portions or Portions(reference, candidate)
        self.detailed = DetailedPairs(reference, candidate, self.portions)
        self.padding = Padding(reference)
        self._wanted: dict[Contents, Leaves] = {}
        self._outcomes: dict[Contents, Outcome] = {}
        self._identical_outcomes: dict[str, Outcome] = {}
        self.rotations = Rotations()
        self.has_unexplained = False  # whether vectors look turned, and no rotation explains them

    def want(self, reference: Node | None, candidate: Node | None) -> None:
        """Compare two leaves with all others, if they are tensors that differ."""
        if (
            isinstance(reference, TensorLeaf)
            and isinstance(candidate, TensorLeaf)
            and self._has_to_be_read(reference, candidate)
        ):
            self._wanted.setdefault(contents_of(reference, candidate), (reference, candidate))

    def show(
        self, call: CallEntry, reference: Node | None, candidate: Node | None, axes: AxesOf
    ) -> None:
        """Have details of two leaves of a call, if they are tensors; `axes` tells what theirs
        are."""
        if isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf):
            kept = self.kept(call, reference, candidate)
            self.detailed.want((reference, candidate), axes, kept)

    def compare(self) -> None:
        """Look at everything that is wanted and was not looked at yet.

        Raises `DamagedArchiveError` for contents that are missing.
        """
        wanted = [item for item in self._wanted.items() if item[0] not in self._outcomes]
        for start in range(0, len(wanted), _TOGETHER):
            self._compare(wanted[start : start + _TOGETHER])
        self.detailed.look_apart()

    def has_turned(self) -> bool:
        """Whether anything looks turned by what is known so far."""
        outcomes = self._outcomes
        return any(
            is_like_a_turned_one(outcomes[key], *leaves)
            for key, leaves in self._wanted.items()
            if key in outcomes
        )

    def permute_within_layers(self, standing: Sequence[Standing]) -> None:
        """Explain what differs by permutations that what takes it undoes."""
        found = find_permutations(standing, self._untouched)
        self._turn_by({contents_of(*leaves): (leaves, order) for leaves, order in found})

    def turn_back(
        self, declared: Sequence[Rotation], doubt: Callable[[], Collection[Hashable]]
    ) -> None:
        """Explain what was looked at by rotations: those declared, and those found in what looks
        turned but for the contents that `doubt` tells."""
        outcomes = self._outcomes
        wanted = {key: leaves for key, leaves in self._wanted.items() if key in outcomes}
        turned = {
            key: leaves
            for key, leaves in wanted.items()
            if outcomes[key].rotation is None and is_like_a_turned_one(outcomes[key], *leaves)
        }
        doubted = doubt() if turned else ()
        undoubted = [leaves for key, leaves in turned.items() if key not in doubted]
        self.rotations = find_rotations(undoubted, self._untouched, declared)
        before = dict(outcomes)
        self._turn(wanted)
        self._drop_rare_rotations(before)
        self.has_unexplained = any(outcomes[key].rotation is None for key in turned)

    def turn_back_within_layers(
        self, standing: Iterable[Standing], declared: Mapping[str, Floats]
    ) -> None:
        """Explain what looks turned still by what takes it and undoes that."""
        rotations = {
            contents_of(*leaves): (leaves, rotation)
            for leaves, rotation in find_inner_rotations(standing, self._untouched, declared)
        }
        self._turn_by(rotations)
        told = {leaves[0].shape[-1] for leaves, _ in rotations.values()}
        too_few = tuple(few for few in self.rotations.too_few if few.channels not in told)
        self.rotations = replace(self.rotations, too_few=too_few)

    def found(self, reference: TensorLeaf, candidate: TensorLeaf) -> Outcome | None:
        """What was found between two leaves; None where nothing was to be."""
        return self._outcomes.get(contents_of(reference, candidate))

    def known(self, reference: TensorLeaf, candidate: TensorLeaf) -> Outcome | None:
        """The same, or that they are identical."""
        if same_contents(reference, candidate):
            return self._identical(reference)
        return self.found(reference, candidate)

    def state(self, reference: TensorLeaf, candidate: TensorLeaf) -> State | None:
        """How the vectors of two tensors look before any rotation; None where they have none that
        one would turn, or nothing is known of them."""
        if same_contents(reference, candidate):
            is_known = self.reference.has_elements(reference) and self._is_nonzero(reference)
            outcome = self._identical(reference)
            return state_of(outcome, reference, candidate) if is_known else None
        found = self.found(reference, candidate)
        return None if found is None else state_of(found, reference, candidate)

    def alike(self, leaf: TensorLeaf) -> Difference | None:
        """The difference of a tensor and its equal, from a look at its elements; None where none
        are stored."""
        if not self.reference.has_elements(leaf):
            return None
        array = self.reference.array(leaf)
        return compare_all([(array, array)], tokens=True)[0]

    def details(self, reference: TensorLeaf, candidate: TensorLeaf) -> Details | None:
        """The details of two leaves that are shown."""
        return self.detailed.found(reference, candidate)

    def outcome(self, reference: TensorLeaf, candidate: TensorLeaf) -> Outcome:
        """What is to be said of two tensors."""
        if same_contents(reference, candidate):
            outcome = self._identical(reference)
        else:
            outcome = self.found(reference, candidate) or self._not_read(reference, candidate)
            outcome = self.portions.with_hidden(outcome, reference, candidate)
        reasons = [outcome.reason, *unlike(reference, candidate)]
        return replace(outcome, reason="; ".join(filter(None, reasons)) or None)

    def compared(self, reference: TensorLeaf, candidate: TensorLeaf) -> Outcome:
        """The same for two that may not have been looked at yet."""
        contents = contents_of(reference, candidate)
        if self._has_to_be_read(reference, candidate) and contents not in self._outcomes:
            self._compare([(contents, (reference, candidate))])
        return self.outcome(reference, candidate)

    def lend(self, factor: ScaleFactor, reference: TensorLeaf, candidate: TensorLeaf) -> None:
        """Try a factor that other calls have on two leaves that have a difference."""
        contents = contents_of(reference, candidate)
        outcome = self._outcomes[contents]
        scaling = self.scaled_by(factor, reference, candidate)
        self._outcomes[contents] = replace(outcome, scaling=scaling)

    def expect_factor(self, reference: TensorLeaf, candidate: TensorLeaf) -> None:
        """Look for a factor once more in two leaves that have a difference, as their likes have."""
        contents = contents_of(reference, candidate)
        outcome = self._outcomes[contents]
        difference = outcome.rest or outcome.difference
        if difference is not None and outcome.scaling is None:
            sides = self._readable(reference, candidate, outcome.layout, outcome.rotation)
            scaling = find_scaling(*sides, difference, is_expected=True)
            self._outcomes[contents] = replace(outcome, scaling=scaling)

    def elements(
        self, reference: TensorLeaf, candidate: TensorLeaf, limit: int | None
    ) -> ElementsJson:
        """The elements of candidate minus reference, at most `limit`; those of another layout in
        the reference's."""
        outcome = self.outcome(reference, candidate)
        if outcome.status == "identical":
            array = self.reference.array(reference)
            return no_difference_json(array.dtype, array.shape, limit)
        return self._once(
            ("elements", contents_of(reference, candidate), limit),
            lambda: difference_json(
                self._arrays(reference, candidate)[0],
                self._readable(reference, candidate, outcome.layout)[1],
                limit,
            ),
        )

    def kept(self, call: CallEntry, reference: TensorLeaf, candidate: TensorLeaf) -> Flags | None:
        """A flag for each token that is compared of two tensors of a call: whether it is none of
        padding; None where there is no padding among them."""
        kept = self.padding.kept(call, reference.shape)
        if kept is None:
            return None
        sample = self.portions.sample(reference, candidate)
        kept = kept if sample is None else kept[sample.places]
        return None if kept.all() else kept

    def spread(
        self,
        reference: TensorLeaf,
        candidate: TensorLeaf,
        axes: Axes,
        kept: Flags | None,
    ) -> Spread | None:
        """Where in two tensors their error is, of the tokens that are `kept`; tokens of a sample by
        their places in the whole."""
        sample = self.portions.sample(reference, candidate)
        outcome = self.outcome(reference, candidate)
        layout = None if sample is not None else outcome.layout
        sides = self._readable(reference, candidate, layout, outcome.rotation)
        found = spread(*sides, axes, kept)
        if found is None or sample is None:
            return found
        return found.placed(sample.index, sample.counts)

    def output(self, reference: TensorLeaf, candidate: TensorLeaf, outcome: Outcome) -> Output:
        """Two compared tensors as what lies around them is judged by."""
        dtype, shape = self.reference.form(reference)
        sample = self.portions.sample(reference, candidate)
        if sample is not None:
            shape = len(sample.places), *shape[-1:]
        dtypes = dtype, self.candidate.form(candidate)[0]
        return Output(
            (reference, candidate),
            outcome.status,
            outcome.metrics if outcome.rest is None else outcome.rest.metrics,
            max(format_of(dtype).epsilon for dtype in dtypes),
            shape,
            any(dtype.kind == "c" for dtype in dtypes),
            outcome.layout,
            outcome.rotation,
            outcome.scaling,
        )

    def is_summand(self, part: Output, whole: Output) -> bool:
        """Whether the error of the whole has that of the part in it."""
        key = summand_key(part, whole)
        return self._once(key, lambda: is_summand(self._sides(part), self._sides(whole)))

    def on_top(self, whole: Leaves, others: Sequence[Leaves]) -> tuple[float, Parts] | None:
        """What the candidate's whole has on top of what it is made of, a ratio of powers to the
        reference's, and which of the others that is; None where the reference's is made of none."""
        reference, candidate = self._arrays(*whole)
        sides = [self._arrays(*leaves) for leaves in others]
        arrays = [reference, candidate, *(array for pair in sides for array in pair)]
        formats = [format_of(array.dtype) for array in arrays]
        if any(of.kind != "float" for of in formats) or len({of.shape for of in arrays}) > 1:
            return None
        before, its_before = [one for one, _ in sides], [other for _, other in sides]
        parts = parts_of(reference, before)
        if parts is None:
            return None
        compared = compare_all(
            [
                (reference, parts.on_top(candidate, its_before, before)),
                (reference, parts.whole(before)),
            ]
        )
        on_top, rest = (noise_of(found.metrics, found.undefined) for found in compared)
        rounding = rounding_of(max(of.epsilon for of in formats))
        if on_top is None or rest is None or rest > rounding:
            return None
        return on_top, parts

    def sizes(self, leaf: TensorLeaf) -> Sizes | None:
        """How large a tensor of the reference is; None where no elements are stored, or they are
        not finite or zero."""
        if not self.reference.has_elements(leaf):
            return None
        return sizes_of(self.reference.array(leaf))

    def vectors(self, reference: TensorLeaf, candidate: TensorLeaf) -> tuple[Vectors, Vectors]:
        """Two tensors as vectors along their last dimension."""
        forms = self.reference.form(reference), self.candidate.form(candidate)
        return (
            Vectors(*forms[0], lambda: vector_digests(self.reference.array(reference))),
            Vectors(*forms[1], lambda: self._candidate_vectors(candidate)),
        )

    def logits(
        self, wanted: Sequence[tuple[TensorLeaf, TensorLeaf, Ids]]
    ) -> list[tuple[TokenLogits, Places | None]]:
        """How far the distributions of each two leaves are apart, and what they say of targets: of
        all tokens, or of those at these places, which both sides hold."""
        pairs, places = [], []
        for *leaves, ids in wanted:
            sample = self.portions.sample(*leaves)
            targets = ids.reshape(-1)
            places.append(None if sample is None else sample.places)
            pairs.append(
                LogitsPair(*self._arrays(*leaves), targets)
                if sample is None
                else LogitsPair(*sample.sides, targets[sample.places])
            )
        return list(zip(compare_logits(pairs), places, strict=True))

    def count_beyond(self, key: Hashable, count: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """What counting values beyond a range finds; `key` tells contents and range."""
        return self._once(("beyond", key), count)

    def _once(self, key: Hashable, look: Callable[[], Found]) -> Found:
        """What a look finds. Here all contents can be looked at again, so that nothing is kept."""
        return look()

    def scaled_by(
        self, factor: ScaleFactor, reference: TensorLeaf, candidate: TensorLeaf
    ) -> Scaling | None:
        """What is left of a difference after a factor, if that explains it."""
        contents = contents_of(reference, candidate)
        outcome = self._outcomes[contents]
        difference = outcome.rest or outcome.difference
        if difference is None:
            return None
        how = outcome.layout, outcome.rotation
        return self._once(
            ("scaled", factor, contents),
            lambda: scaling_like(factor, *self._readable(reference, candidate, *how), difference),
        )

    def _is_nonzero(self, leaf: TensorLeaf) -> bool:
        """By the first elements of a tensor of the reference."""
        array = self.reference.array(leaf)
        return bool(reader(array)(0, min(array.size, _GLANCE)).any())

    def _candidate_vectors(self, leaf: TensorLeaf) -> list[str]:
        key = "vectors", leaf.digest, leaf.dtype, leaf.shape
        return self._once(key, lambda: vector_digests(self.candidate.array(leaf)))

    def _sides(self, output: Output) -> Sides:
        return self._readable(*output.leaves, output.layout, output.rotation)

    def _readable(
        self,
        reference: TensorLeaf,
        candidate: TensorLeaf,
        layout: Layout | None,
        rotation: AnyRotation | None = None,
    ) -> tuple[Readable, Readable]:
        sides = _in_layout(self._arrays(reference, candidate), layout)
        return sides if rotation is None else rotation.sides(*sides)

    def _untouched(self, reference: TensorLeaf, candidate: TensorLeaf) -> Sides:
        outcome = self._outcomes[contents_of(reference, candidate)]
        return self._readable(reference, candidate, outcome.layout)

    @cached_property
    def _keeps_tokens(self) -> bool:
        """Whether token figures will be taken again: over some tokens, or those of all samples."""
        return self.padding.is_any or has_several_samples(self.reference.manifest)

    def _not_read(self, reference: TensorLeaf, candidate: TensorLeaf) -> Outcome:
        if reference.shape == candidate.shape:
            return self.portions.without_elements(reference, candidate)
        return shapes_differ(reference, candidate)

    def _has_to_be_read(self, reference: TensorLeaf, candidate: TensorLeaf) -> bool:
        """Whether two tensors can be compared, and digests do not tell how."""
        can_be_read = self.portions.can_be_read(reference, candidate)
        return can_be_read and has_to_be_read(reference, candidate)

    def _arrays(self, reference: TensorLeaf, candidate: TensorLeaf) -> tuple[Array, Array]:
        """All of both tensors, or the vectors that both sides hold of them."""
        sample = self.portions.sample(reference, candidate)
        if sample is not None:
            return sample.sides
        return self.reference.array(reference), self.candidate.array(candidate)

    def _compare(self, wanted: Sequence[tuple[Contents, Leaves]]) -> None:
        """Set the outcomes of contents that have to be read."""
        sides: dict[Contents, tuple[Array, Array]] = {}
        layouts: dict[Contents, Layout] = {}
        for contents, (reference, candidate) in wanted:
            arrays = self._arrays(reference, candidate)
            if arrays[0].shape != arrays[1].shape:
                layout = _layout(contents, *arrays)
                if layout is None:
                    self._outcomes[contents] = shapes_differ(reference, candidate, arrays)
                    continue
                layouts[contents] = layout
            sides[contents] = arrays
        self._measure(sides, layouts)
        same_shape = {
            contents: sides[contents]
            for contents, leaves in wanted
            if contents in sides.keys() - layouts.keys() and not self.portions.are_partial(*leaves)
        }
        transposed = dict(self._transposed(same_shape))
        self._measure({contents: sides[contents] for contents in transposed}, transposed)
        if self.rotations.known:
            self._turn({contents: leaves for contents, leaves in wanted if contents in sides})

    def _turn(self, wanted: dict[Contents, Leaves]) -> None:
        """Set the outcomes of pairs that a known rotation explains."""
        rotations: dict[Contents, tuple[Leaves, AnyRotation]] = {}
        of_norms: dict[Contents, tuple[Leaves, AnyRotation]] = {}
        for contents, leaves in wanted.items() if self.rotations.known else ():
            rotation = self.rotations.of(leaves[1].shape)
            is_permuted = isinstance(self._outcomes[contents].rotation, Permutation)
            if rotation and not is_permuted and may_be_turned(self._outcomes[contents], *leaves):
                rotations[contents] = leaves, rotation
                of_norm = rotation.of_norm(*self._untouched(*leaves))
                if of_norm is not None:
                    of_norms[contents] = leaves, of_norm
        self._turn_by(rotations)
        self._turn_by(of_norms)

    def _drop_rare_rotations(self, before: Mapping[Contents, Outcome]) -> None:
        """Undo those found that explain no more than one or two arrays: that is no stream."""
        explained = Counter(outcome.rotation for outcome in self._outcomes.values())
        rare = [
            known
            for known in self.rotations.known
            if known.tokens and explained[known] < FEWEST_ALIKE
        ]
        if rare:
            known = tuple(one for one in self.rotations.known if one not in rare)
            self.rotations = replace(self.rotations, known=known)
            for contents, outcome in self._outcomes.items():
                if outcome.rotation in rare:
                    self._outcomes[contents] = before[contents]

    def _turn_by(self, rotations: Mapping[Contents, tuple[Leaves, AnyRotation]]) -> None:
        back = {
            contents: (
                rotation,
                self._readable(*leaves, self._outcomes[contents].layout, rotation),
            )
            for contents, (leaves, rotation) in rotations.items()
        }
        rests = compare_all(sides for _, sides in back.values())
        for (contents, (rotation, sides)), rest in zip(back.items(), rests, strict=True):
            explained = turned_back(self._outcomes[contents], rotation, sides, rest)
            if explained is not None:
                self._outcomes[contents] = explained

    def _measure(
        self, sides: dict[Contents, tuple[Array, Array]], layouts: dict[Contents, Layout]
    ) -> None:
        readable = [_in_layout(arrays, layouts.get(key)) for key, arrays in sides.items()]
        differences = self._differences(sides, readable)
        for contents, both, difference in zip(sides, readable, differences, strict=True):
            scaling = find_scaling(*both, difference)
            self._outcomes[contents] = measured(difference, layouts.get(contents), scaling)

    def _differences(
        self, sides: Iterable[Contents], readable: Sequence[tuple[Readable, Readable]]
    ) -> list[Difference]:
        pairs = dict(zip(sides, readable, strict=True))
        differences = self.detailed.compare(pairs, tokens=self._keeps_tokens)
        others = [contents for contents in pairs if contents not in differences]
        compared = compare_all((pairs[contents] for contents in others), tokens=self._keeps_tokens)
        differences.update(zip(others, compared, strict=True))
        return [differences[contents] for contents in pairs]

    def _transposed(
        self, sides: dict[Contents, tuple[Array, Array]]
    ) -> Iterator[tuple[Contents, Layout]]:
        """Pairs of one shape that differ as if their elements were in other places, and are."""
        for contents, arrays in sides.items():
            sqnr = self._outcomes[contents].metrics.sqnr
            if sqnr is not None and sqnr < _UNLIKE and may_be_transposed(arrays[0].shape):
                layout = find_layout(*arrays)
                if layout is not None:
                    yield contents, layout

    def _identical(self, leaf: TensorLeaf) -> Outcome:
        """The same for every tensor of one dtype."""
        outcome = self._identical_outcomes.get(leaf.dtype)
        if outcome is None:
            outcome = measured(identical(self.reference.form(leaf)[0], leaf.shape))
            self._identical_outcomes[leaf.dtype] = outcome
        return outcome


def _layout(contents: Contents, reference: Array, candidate: Array) -> Layout | None:
    """Of two arrays whose shapes differ."""
    if contents[0] == contents[1] and reference.dtype == candidate.dtype:
        return reshaped(reference.shape, candidate.shape)
    return find_layout(reference, candidate)


def _in_layout(arrays: tuple[Array, Array], layout: Layout | None) -> tuple[Readable, Readable]:
    return arrays if layout is None else (arrays[0], layout.of(arrays[1]))


def summand_key(part: Output, whole: Output) -> Hashable:
    """What tells two pairs of contents of which the one may be in the other."""
    return "summand", contents_of(*part.leaves), contents_of(*whole.leaves)
