"""Paired calls -> rows: one for each place, compared by what stands there on both sides."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, TypeGuard

from qvtrace.archive import Archive
from qvtrace.archive.layout import DTYPES
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.leaves import (
    Arguments,
    LeafPair,
    described,
    filled,
    pair_arguments,
    pair_nodes,
    pair_stored,
)
from qvtrace.comparison.routing import Routed, Routing, is_expert_by_name
from qvtrace.comparison.surroundings import Judgement, Output, Surroundings
from qvtrace.failures import failure, fate
from qvtrace.manifest import CallEntry
from qvtrace.metrics import differences as metrics
from qvtrace.metrics.details import Details, compare_in_detail, details_all
from qvtrace.metrics.differences import METRICS, Difference, Metrics, Nonfinite, Peak
from qvtrace.metrics.elements import Array, ElementsJson, Readable, format_of
from qvtrace.metrics.factors import ListedFactors, ScaleFactor
from qvtrace.metrics.layouts import Layout, find_layout, may_be_transposed, reshaped
from qvtrace.metrics.scaling import Scaling, find_scaling, scaling_like
from qvtrace.metrics.subtraction import difference_json, no_difference_json
from qvtrace.trees import (
    Container,
    Node,
    OpaqueLeaf,
    Original,
    PlainValue,
    TensorLeaf,
    ValueLeaf,
    tensor_leaves,
)

Status = Literal[
    "ok",
    "identical",
    "nonfinite",
    "shape",
    "structure",
    "opaque",
    "routing",
    "exact",
    "mismatch",
]
COMPARED: frozenset[Status] = frozenset({"ok", "identical", "nonfinite", "exact", "mismatch"})

PARTS = {
    "output": ("output",),
    "inputs": ("inputs",),
    "kwargs": ("kwargs",),
    "weights": (),  # of modules, not of calls
    "all": ("inputs", "kwargs", "output"),
}
# Why every metric of a row is undefined. The first two do not apply, the others are findings.
PLAIN_VALUE = "plain value"
NOT_STORED = "not stored"
TYPES_DIFFER = "types differ"
SHAPES_DIFFER = "shapes differ"
STRUCTURE_DIFFERS = "structure differs"
ROUTING_DIFFERS = "routing differs"

# Below, in dB, elements of equal shapes may be in other places.
_UNLIKE = 3.0
_ON_BOTH_SIDES = " on both sides"

_TOGETHER = 4096  # pairs compared at once: each is some objects until it is done

# Values of these types are no contents of a prompt or a file, so that they can be shown.
_HARMLESS = frozenset({"bool", "int", "float", "dtype", "device", "layout", "range", "slice"})


@dataclass(frozen=True)
class Place:
    """One place of one call: where a row stands, or what only one side has."""

    module: str
    call: int
    path: str


@dataclass(frozen=True)
class Groups:
    """The error of a weight in each group of its quantization, as SQNR in dB."""

    size: int  # elements
    sqnr_p50: float | None
    sqnr_p5: float | None
    sqnr_min: float | None
    worst: tuple[int, ...] | None  # channel and group of the smallest


@dataclass(frozen=True)
class FailedCall:
    """A call that both sides make and that has no output on one or both: what became of it there,
    None where it returned."""

    place: Place
    reference: str | None
    candidate: str | None


@dataclass(frozen=True)
class Row:
    """One pair of leaves, compared. Every metric is relative to the reference."""

    module: str
    call: int
    sample: int
    step: int
    path: str  # `output`, `output.0`, `kwargs.attention_mask`
    order: int  # of the call, among all of the reference in order of execution
    type: tuple[str, str]  # module classes
    dtype: tuple[str | None, str | None]  # None where a side is no tensor
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    matched_by: str  # `exact`, or the rule
    status: Status
    reason: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    undefined: dict[str, str] = field(default_factory=dict)
    layout: str | None = None  # what gives the candidate the reference's, as methods of torch
    scale_factor: ScaleFactor | ListedFactors | None = (
        None  # the candidate is the reference times this,
    )
    residual_peir: float | None = None  # up to what is left when it is divided by that
    residual_sqnr: float | None = None
    worst_token: tuple[int, ...] | None = None
    zero_tokens: int = 0
    peak: Peak | None = None
    nonfinite: Nonfinite | None = None
    groups: Groups | None = None  # of a weight that is quantized in groups
    same_as: Place | None = None  # the earlier row, by order, that has both digests of this one
    judgement: Judgement | None = None  # of the scale factor
    floor: Metrics | None = None  # of the same place in an archive that differs by noise alone
    details: Details | None = field(default=None, repr=False, compare=False)  # where asked for

    @property
    def failed_alike(self) -> bool:
        """Whether it stands for a call that raised, or did not return, on both sides alike."""
        return self.status == "opaque" and (self.reason or "").endswith(_ON_BOTH_SIDES)

    @property
    def peaks_at_mask(self) -> bool:
        """Whether the largest error is a mask that only the candidate has: no size of an error."""
        dtype = DTYPES.get(self.dtype[1] or "")
        if dtype is None or self.peak is None or not self.nonfinite:
            return False
        if not self.nonfinite.sentinel_mismatches:
            return False
        return abs(self.peak.candidate) >= format_of(dtype.numpy).sentinel

    @property
    def place(self) -> Place:
        """Where the row stands."""
        return Place(self.module, self.call, self.path)

    @property
    def is_made_up_for(self) -> bool:
        """Whether the row is equal up to a factor that nothing around it shows."""
        return self.judgement is not None and self.judgement.agrees


@dataclass(frozen=True)
class _Outcome:
    """What a row says of its two leaves."""

    status: Status
    reason: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    undefined: dict[str, str] = field(default_factory=dict)
    peak: Peak | None = None
    difference: Difference | None = None
    layout: Layout | None = None
    scaling: Scaling | None = None


_Contents: TypeAlias = tuple[str, str, str, str, tuple[int, ...], tuple[int, ...]]


class RowBuilder:
    """Takes calls pair by pair, then compares all of them at once, so that no thread waits for
    another; equal pairs of contents are computed once, whatever their places."""

    def __init__(
        self,
        reference: Archive,
        candidate: Archive,
        path: str,
        pairs: Sequence[Pair],
        *,
        details: bool = False,
    ) -> None:
        """`path` is a key of `PARTS`; `pairs` are all that there are, those without rows too; with
        `details`, rows of two tensors have them."""
        self.only_in_reference: list[Place] = []
        self.only_in_candidate: list[Place] = []
        self.candidate_modules: set[str] = set()  # names in the candidate that have rows
        self.failed: list[FailedCall] = []
        self._reference = reference
        self._candidate = candidate
        self._parts = PARTS[path]
        self._classes = _classes(reference), _classes(candidate)
        self.rows: list[Row] = []
        self.aside: list[Row] = []  # of the places that `path` leaves out
        self._planned: list[tuple[Pair, LeafPair]] = []
        self._planned_aside: list[tuple[Pair, LeafPair]] = []
        self._wanted: dict[_Contents, tuple[TensorLeaf, TensorLeaf]] = {}
        self._outcomes: dict[_Contents, _Outcome] = {}
        self._with_details = details
        self._shown: dict[_Contents, tuple[TensorLeaf, TensorLeaf]] = {}  # in detail
        self._details: dict[_Contents, Details] = {}
        self._identical_outcomes: dict[str, _Outcome] = {}
        self._first: dict[_Contents, Place] = {}
        self._surroundings = Surroundings(
            reference.manifest.calls, pairs, self._compared_outputs, self._given
        )
        self._routing = Routing(pairs, self._given_arrays)

    def add(self, pair: Pair) -> None:
        """Take in two calls: what their rows will be, and the places that one side did not store.

        Raises `DamagedArchiveError` for a tree that no writer writes.
        """
        fates = fate(failure(pair.reference)), fate(failure(pair.candidate))
        if "output" in self._parts and fates != (None, None):
            self.failed.append(FailedCall(_place(pair.reference, "output"), *fates))
        for leaves in self._leaf_pairs(pair):
            is_wanted = leaves.path.partition(".")[0] in self._parts
            if leaves.stored:
                self._plan(pair, leaves, is_wanted=is_wanted)
            elif not is_wanted:
                continue
            elif leaves.candidate is None:
                self.only_in_reference.append(_place(pair.reference, leaves.path))
            else:
                self.only_in_candidate.append(_place(pair.candidate, leaves.path))

    def add_only_in_reference(self, call: CallEntry) -> None:
        """Append the places of a call that the candidate does not have."""
        self.only_in_reference += self._places(self._reference, call)

    def add_only_in_candidate(self, call: CallEntry) -> None:
        """Append the places of a call that the reference does not have."""
        self.only_in_candidate += self._places(self._candidate, call)

    def add_leaves(self, pair: Pair, leaves: LeafPair) -> None:
        """Take in two leaves that are part of no recorded call."""
        self._plan(pair, leaves, is_wanted=True)

    def want(self, reference: Node | None, candidate: Node | None) -> None:
        """Compare two leaves with all others, if they are tensors that differ."""
        if (
            isinstance(reference, TensorLeaf)
            and isinstance(candidate, TensorLeaf)
            and _has_to_be_read(reference, candidate)
        ):
            self._wanted.setdefault(_contents(reference, candidate), (reference, candidate))

    def difference(self, reference: TensorLeaf, candidate: TensorLeaf) -> Difference | None:
        """What was found between two leaves that were wanted; None where nothing was to be."""
        outcome = self._outcomes.get(_contents(reference, candidate))
        return None if outcome is None else outcome.difference

    def compare(self) -> None:
        """Set `rows` and `aside`, in the order in which their pairs were added.

        Raises `DamagedArchiveError` for contents that are missing.
        """
        for _, leaves in self._planned if self._with_details else ():
            reference, candidate = _tensor(leaves.reference), _tensor(leaves.candidate)
            if reference is not None and candidate is not None:
                self._shown[_contents(reference, candidate)] = reference, candidate
        wanted = list(self._wanted.items())
        for start in range(0, len(wanted), _TOGETHER):
            self._compare_contents(wanted[start : start + _TOGETHER])
        self._lend_factors()
        self._find_experts()
        self._look_apart()
        self.rows = [
            self._row(pair, leaves, self._same_as(pair, leaves)) for pair, leaves in self._planned
        ]
        self.aside = [self._row(pair, leaves, None) for pair, leaves in self._planned_aside]

    def elements(
        self, modules: Collection[str], limit: int | None
    ) -> Iterator[tuple[Place, ElementsJson]]:
        """The elements of candidate minus reference in the compared rows of these modules, of each
        at most `limit`; those of another layout in the reference's."""
        for row, (_, leaves) in zip(self.rows, self._planned, strict=True):
            reference, candidate = leaves.reference, leaves.candidate
            if (
                row.module in modules
                and row.status in COMPARED
                and isinstance(reference, TensorLeaf)
                and isinstance(candidate, TensorLeaf)
            ):
                yield row.place, self._difference(reference, candidate, limit)

    def _difference(
        self, reference: TensorLeaf, candidate: TensorLeaf, limit: int | None
    ) -> ElementsJson:
        outcome = self._tensors(reference, candidate)
        arrays = self._arrays(reference, candidate)
        if outcome.status == "identical":
            return no_difference_json(arrays[0].dtype, arrays[0].shape, limit)
        return difference_json(arrays[0], _in_layout(arrays, outcome.layout)[1], limit)

    def _plan(self, pair: Pair, leaves: LeafPair, *, is_wanted: bool) -> None:
        if is_wanted:
            self._planned.append((pair, leaves))
            self.candidate_modules.add(pair.candidate.module)
        else:
            self._planned_aside.append((pair, leaves))
        self.want(leaves.reference, leaves.candidate)

    def _compare_contents(
        self, wanted: Sequence[tuple[_Contents, tuple[TensorLeaf, TensorLeaf]]]
    ) -> None:
        """Set the outcomes of contents that have to be read."""
        sides: dict[_Contents, tuple[Array, Array]] = {}
        layouts: dict[_Contents, Layout] = {}
        for contents, (reference, candidate) in wanted:
            arrays = self._arrays(reference, candidate)
            if arrays[0].shape != arrays[1].shape:
                layout = _layout(contents, *arrays)
                if layout is None:
                    self._outcomes[contents] = _shapes_differ(reference, candidate, arrays)
                    continue
                layouts[contents] = layout
            sides[contents] = arrays
        self._measure(sides, layouts)
        same_shape = {key: arrays for key, arrays in sides.items() if key not in layouts}
        transposed = dict(self._transposed(same_shape))
        self._measure({contents: sides[contents] for contents in transposed}, transposed)

    def _measure(
        self, sides: dict[_Contents, tuple[Array, Array]], layouts: dict[_Contents, Layout]
    ) -> None:
        readable = [_in_layout(arrays, layouts.get(key)) for key, arrays in sides.items()]
        differences = self._differences(sides, readable)
        for contents, both, difference in zip(sides, readable, differences, strict=True):
            scaling = find_scaling(*both, difference)
            self._outcomes[contents] = _measured(difference, layouts.get(contents), scaling)

    def _differences(
        self, sides: Iterable[_Contents], readable: Sequence[tuple[Readable, Readable]]
    ) -> list[Difference]:
        pairs = dict(zip(sides, readable, strict=True))
        shown = [contents for contents in pairs if contents in self._shown]
        others = [contents for contents in pairs if contents not in self._shown]
        found = compare_in_detail([pairs[contents] for contents in shown])
        self._details.update(zip(shown, (details for _, details in found), strict=True))
        differences = dict(zip(shown, (difference for difference, _ in found), strict=True))
        compared = metrics.compare_all(pairs[contents] for contents in others)
        differences.update(zip(others, compared, strict=True))
        return [differences[contents] for contents in pairs]

    def _look_apart(self) -> None:
        """Set the details of contents that are not compared: they are equal, or of other shapes."""
        apart = {}
        for contents, (reference, candidate) in self._shown.items():
            if contents not in self._details:
                both = self._arrays(reference, candidate)
                is_one = same_contents(reference, candidate)
                apart[contents] = (both[0], both[0]) if is_one else both
        self._details.update(zip(apart, details_all(list(apart.values())), strict=True))

    def _transposed(
        self, sides: dict[_Contents, tuple[Array, Array]]
    ) -> Iterator[tuple[_Contents, Layout]]:
        """Pairs of one shape that differ as if their elements were in other places, and are."""
        for contents, arrays in sides.items():
            sqnr = self._outcomes[contents].metrics.sqnr
            if sqnr is not None and sqnr < _UNLIKE and may_be_transposed(arrays[0].shape):
                layout = find_layout(*arrays)
                if layout is not None:
                    yield contents, layout

    def _lend_factors(self) -> None:
        """A call of few tokens cannot tell a factor by itself; other calls of its module can."""
        known: dict[tuple[str, str], ScaleFactor] = {}
        without = []
        for pair, leaves in self._planned:
            contents = _tensor_contents(leaves)
            outcome = self._outcomes.get(contents) if contents is not None else None
            if contents is None or outcome is None or outcome.difference is None:
                continue
            place = pair.reference.module, leaves.path
            if outcome.scaling is not None:
                known.setdefault(place, outcome.scaling.factor)
            else:
                without.append((place, contents))
        for place, contents in without if known else ():
            outcome = self._outcomes[contents]
            if place in known and outcome.scaling is None and outcome.difference is not None:
                arrays = self._arrays(*self._wanted[contents])
                both = _in_layout(arrays, outcome.layout)
                scaling = scaling_like(known[place], *both, outcome.difference)
                self._outcomes[contents] = replace(outcome, scaling=scaling)

    def _find_experts(self) -> None:
        """Before any row: an expert may be known by those beside it."""
        for pair, leaves in (*self._planned, *self._planned_aside):
            if _have_other_tokens(leaves):
                self._routing.of(pair)

    def _routed(self, pair: Pair, leaves: LeafPair) -> Routed | None:
        """How an expert's tokens were routed whose tensors therefore cannot be compared."""
        reference, candidate = leaves.reference, leaves.candidate
        if not (isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf)):
            return None
        have_other_tokens = _have_other_tokens(leaves)
        may_be = have_other_tokens or self._routing.may_be_expert(pair)
        if not may_be or same_contents(reference, candidate):
            return None
        is_told = have_other_tokens and is_expert_by_name(pair)
        return self._routing.of(pair) or (Routed() if is_told else None)

    def _given_arrays(self, pair: Pair) -> Iterator[tuple[Array, Array]]:
        """Tensors that two calls were given at one place."""
        reference = _arguments(self._reference, pair.reference)
        candidate = _arguments(self._candidate, pair.candidate)
        for leaves in pair_arguments(reference, candidate):
            if isinstance(leaves.reference, TensorLeaf) and isinstance(
                leaves.candidate, TensorLeaf
            ):
                yield self._arrays(leaves.reference, leaves.candidate)

    def _compared_outputs(self, pair: Pair) -> list[Output]:
        """The outputs of two calls that can be compared, whether they have rows or not."""
        outputs = []
        for leaves in self._outputs(pair):
            reference, candidate = leaves.reference, leaves.candidate
            if not (isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf)):
                continue
            outcome = self._compared(reference, candidate)
            if outcome.status in COMPARED:
                outputs.append(self._output(reference, candidate, outcome))
        return outputs

    def _compared(self, reference: TensorLeaf, candidate: TensorLeaf) -> _Outcome:
        contents = _contents(reference, candidate)
        if _has_to_be_read(reference, candidate) and contents not in self._outcomes:
            self._compare_contents([(contents, (reference, candidate))])
        return self._tensors(reference, candidate)

    def _output(self, reference: TensorLeaf, candidate: TensorLeaf, outcome: _Outcome) -> Output:
        arrays = self._arrays(reference, candidate)
        epsilons = [format_of(array.dtype).epsilon for array in arrays]
        return Output(
            (reference.digest, candidate.digest),
            _in_layout(arrays, outcome.layout),
            outcome.status,
            outcome.metrics,
            max(epsilons),
            outcome.scaling,
        )

    def _given(self, pair: Pair) -> tuple[set[str], set[str]]:
        return (
            self._argument_digests(self._reference, pair.reference),
            self._argument_digests(self._candidate, pair.candidate),
        )

    def _argument_digests(self, archive: Archive, call: CallEntry) -> set[str]:
        trees = [(part, archive.tree(call, part)) for part in ("inputs", "kwargs")]
        stored = [tensor_leaves(tree, part) for part, tree in trees if tree is not None]
        return {leaf.digest for found in stored for _, leaf in found}

    def _arrays(self, reference: TensorLeaf, candidate: TensorLeaf) -> tuple[Array, Array]:
        return self._reference.array(reference), self._candidate.array(candidate)

    def _places(self, archive: Archive, call: CallEntry) -> list[Place]:
        """At least one, so that the call is told of."""
        trees = [(part, archive.tree(call, part)) for part in self._parts]
        paths = [path for part, node in trees if node is not None for path, _ in filled(node, part)]
        return [_place(call, path) for path in paths or self._parts[-1:]]

    def _leaf_pairs(self, pair: Pair) -> Iterator[LeafPair]:
        yield from pair_arguments(
            _arguments(self._reference, pair.reference), _arguments(self._candidate, pair.candidate)
        )
        yield from self._outputs(pair)

    def _outputs(self, pair: Pair) -> Iterator[LeafPair]:
        failures = failure(pair.reference), failure(pair.candidate)
        if None not in failures:
            return iter([LeafPair("output", *failures)])
        reference = self._reference.tree(pair.reference, "output")
        if reference is not None and pair.reference.output == pair.candidate.output:
            return pair_nodes(reference, reference, "output")  # parsing twice would tell no more
        return pair_stored(reference, self._candidate.tree(pair.candidate, "output"), "output")

    def _row(self, pair: Pair, leaves: LeafPair, same_as: Place | None) -> Row:
        reference, candidate = leaves.reference, leaves.candidate
        tensors = _tensor(reference), _tensor(candidate)
        routed = self._routed(pair, leaves)
        outcome = _routing(routed) if routed else self._outcome(leaves)
        difference, scaling = outcome.difference, outcome.scaling
        call = pair.reference
        judgement = self._judgement(pair, leaves, outcome)
        return Row(
            module=call.module,
            call=call.index,
            sample=call.sample,
            step=call.step,
            path=leaves.path,
            order=pair.order,
            type=(
                self._classes[0].get(call.module, "?"),
                self._classes[1].get(pair.candidate.module, "?"),
            ),
            dtype=(_dtype(tensors[0]), _dtype(tensors[1])),
            shape=(_shape(tensors[0]), _shape(tensors[1])),
            matched_by=pair.rule,
            status=outcome.status,
            reason=_joined(outcome.reason, leaves.note, judgement.text if judgement else None),
            metrics=outcome.metrics,
            undefined=outcome.undefined,
            peak=outcome.peak,
            layout=None if outcome.layout is None else str(outcome.layout),
            scale_factor=None if scaling is None else scaling.factor,
            residual_peir=None if scaling is None else scaling.residual.metrics.peir,
            residual_sqnr=None if scaling is None else scaling.residual.metrics.sqnr,
            worst_token=difference.worst_token if difference else None,
            zero_tokens=difference.zero_tokens if difference else 0,
            nonfinite=difference.nonfinite if difference else None,
            same_as=same_as,
            judgement=judgement,
            details=self._details_of(leaves),
        )

    def _details_of(self, leaves: LeafPair) -> Details | None:
        contents = _tensor_contents(leaves)
        return None if contents is None else self._details.get(contents)

    def _judgement(self, pair: Pair, leaves: LeafPair, outcome: _Outcome) -> Judgement | None:
        reference, candidate = _tensor(leaves.reference), _tensor(leaves.candidate)
        if outcome.scaling is None or reference is None or candidate is None:
            return None
        scaled = self._output(reference, candidate, outcome)
        return self._surroundings.judge(pair, leaves.path, scaled)

    def _same_as(self, pair: Pair, leaves: LeafPair) -> Place | None:
        reference, candidate = _tensor(leaves.reference), _tensor(leaves.candidate)
        if reference is None or candidate is None:
            return None
        # The shape itself says nothing that another row of these elements does not.
        shapes = ((), ()) if reference.shape == candidate.shape else _shapes(reference, candidate)
        key = reference.digest, candidate.digest, reference.dtype, candidate.dtype, *shapes
        place = _place(pair.reference, leaves.path)
        first = self._first.setdefault(key, place)
        return None if first is place else first

    def _outcome(self, leaves: LeafPair) -> _Outcome:
        reference, candidate = leaves.reference, leaves.candidate
        fates = fate(reference), fate(candidate)
        if fates[0] and fates[1]:
            return _failed(fates[0], fates[1])
        match reference, candidate:
            case TensorLeaf(), TensorLeaf():
                return self._tensors(reference, candidate)
            case ValueLeaf(), ValueLeaf():
                return _values(reference, candidate, listed=leaves.listed)
            case OpaqueLeaf(), OpaqueLeaf():
                return _opaque(reference, candidate)
            case Container(kind="cache"), Container(kind="cache"):
                return _caches(reference, candidate)
        return _structure(reference, candidate)

    def _tensors(self, reference: TensorLeaf, candidate: TensorLeaf) -> _Outcome:
        if same_contents(reference, candidate):
            outcome = self._identical(reference)
        else:
            known = self._outcomes.get(_contents(reference, candidate))
            outcome = known or _shapes_differ(reference, candidate)
        reasons = [outcome.reason, *_unlike(reference, candidate)]
        return replace(outcome, reason="; ".join(filter(None, reasons)) or None)

    def _identical(self, leaf: TensorLeaf) -> _Outcome:
        """The same for every tensor of one dtype."""
        outcome = self._identical_outcomes.get(leaf.dtype)
        if outcome is None:
            dtype = self._reference.array(leaf).dtype
            outcome = _measured(metrics.identical(dtype, leaf.shape))
            self._identical_outcomes[leaf.dtype] = outcome
        return outcome


def same_contents(reference: Node | None, candidate: Node | None) -> bool:
    """Whether two leaves are told equal without a look at any element."""
    if isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf):
        keys = [(leaf.digest, leaf.dtype, leaf.shape) for leaf in (reference, candidate)]
        return keys[0] == keys[1]
    if isinstance(reference, ValueLeaf) and isinstance(candidate, ValueLeaf):
        return _equal(reference, candidate)
    return reference == candidate


def _contents(reference: TensorLeaf, candidate: TensorLeaf) -> _Contents:
    """What two leaves have in common with all that are compared alike."""
    dtypes = reference.dtype, candidate.dtype
    return reference.digest, candidate.digest, *dtypes, *_shapes(reference, candidate)


def _shapes(
    reference: TensorLeaf, candidate: TensorLeaf
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return reference.shape, candidate.shape


def _tensor_contents(leaves: LeafPair) -> _Contents | None:
    reference, candidate = leaves.reference, leaves.candidate
    if isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf):
        return _contents(reference, candidate)
    return None


def _have_other_tokens(leaves: LeafPair) -> bool:
    """Whether two tensors have the same shape but for the number of vectors."""
    reference, candidate = leaves.reference, leaves.candidate
    if not (isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf)):
        return False
    shapes = _shapes(reference, candidate)
    return (
        shapes[0] != shapes[1]
        and len(shapes[0]) == len(shapes[1]) >= 2
        and shapes[0][-1] == shapes[1][-1]
    )


def _has_to_be_read(reference: TensorLeaf, candidate: TensorLeaf) -> bool:
    """Whether two tensors can be compared, and digests do not tell how."""
    may_correspond = _may_correspond(*_shapes(reference, candidate))
    return may_correspond and not same_contents(reference, candidate)


def _may_correspond(reference: tuple[int, ...], candidate: tuple[int, ...]) -> bool:
    size = math.prod(reference)
    return reference == candidate or (size > 0 and size == math.prod(candidate))


def _layout(contents: _Contents, reference: Array, candidate: Array) -> Layout | None:
    """Of two arrays whose shapes differ."""
    if contents[0] == contents[1] and reference.dtype == candidate.dtype:
        return reshaped(reference.shape, candidate.shape)
    return find_layout(reference, candidate)


def _in_layout(arrays: tuple[Array, Array], layout: Layout | None) -> tuple[Readable, Readable]:
    return arrays if layout is None else (arrays[0], layout.of(arrays[1]))


def _joined(*reasons: str | None) -> str | None:
    return "; ".join(filter(None, reasons)) or None


def _classes(archive: Archive) -> dict[str, str]:
    return {entry.name: entry.class_name for entry in archive.manifest.modules}


def _place(call: CallEntry, path: str) -> Place:
    return Place(call.module, call.index, path)


def _arguments(archive: Archive, call: CallEntry) -> Arguments:
    return Arguments(archive.tree(call, "inputs"), archive.tree(call, "kwargs"), call.parameters)


def _tensor(node: Node | None) -> TensorLeaf | None:
    return node if isinstance(node, TensorLeaf) else None


def _measured(
    difference: Difference, layout: Layout | None = None, scaling: Scaling | None = None
) -> _Outcome:
    return _Outcome(
        difference.status,
        None,
        difference.metrics,
        difference.undefined,
        difference.peak,
        difference,
        layout,
        scaling,
    )


def _dtype(leaf: TensorLeaf | None) -> str | None:
    return None if leaf is None else leaf.dtype


def _shape(leaf: TensorLeaf | None) -> tuple[int, ...] | None:
    return None if leaf is None else leaf.shape


def _unlike(reference: TensorLeaf, candidate: TensorLeaf) -> Iterator[str]:
    """Says where a side held a tensor of another kind than the other's, or another part of one."""
    leaves = reference, candidate
    originals = reference.original, candidate.original
    names = [original and original.class_name for original in originals]
    if names[0] != names[1]:
        sides = zip(("reference", "candidate"), originals, strict=True)
        yield ", ".join(_once(original, side) for side, original in sides if original)
    if reference.added != candidate.added:
        whole, added = "whole", "what a step added after the first {}"
        parts = [added.format(leaf.added.after) if leaf.added else whole for leaf in leaves]
        yield f"{parts[0]} in the reference, {parts[1]} in the candidate"


def _once(original: Original, side: str) -> str:
    how = "dequantized" if original.placement is None else "the part that one process holds"
    return f"{original.class_name} in the {side}, {how}"


def _not_comparable(status: Status, why: str, reason: str | None) -> _Outcome:
    return _Outcome(status, reason, undefined=dict.fromkeys(METRICS, why))


def _shapes_differ(
    reference: TensorLeaf, candidate: TensorLeaf, stored: tuple[Array, Array] | None = None
) -> _Outcome:
    shapes, how = _shapes(reference, candidate), ""
    if stored is not None and shapes[0] == shapes[1]:
        shapes, how = (stored[0].shape, stored[1].shape), "stored as "
    reason = f"{how}{list(shapes[0])} against {list(shapes[1])}"
    return _not_comparable("shape", SHAPES_DIFFER, reason)


def _routing(routed: Routed) -> _Outcome:
    return _not_comparable("routing", ROUTING_DIFFERS, routed.text)


def _structure(reference: Node | None, candidate: Node | None) -> _Outcome:
    if candidate is None:
        reason = "only in the reference"
    elif reference is None:
        reason = "only in the candidate"
    else:
        reason = f"{described(reference)} against {described(candidate)}"
    return _not_comparable("structure", STRUCTURE_DIFFERS, reason)


def _failed(reference: str, candidate: str) -> _Outcome:
    """Of what became of a call that has no output on either side."""
    if reference == candidate:
        return _not_comparable("opaque", NOT_STORED, f"{reference}{_ON_BOTH_SIDES}")
    reason = f"{reference} in the reference, {candidate} in the candidate"
    return _not_comparable("structure", STRUCTURE_DIFFERS, reason)


def _opaque(reference: OpaqueLeaf, candidate: OpaqueLeaf) -> _Outcome:
    one, other = reference.class_name, candidate.class_name
    if one == other:
        return _not_comparable("opaque", NOT_STORED, f"an object of type {one}")
    return _not_comparable("opaque", TYPES_DIFFER, f"types differ: {one} against {other}")


def _caches(reference: Container, candidate: Container) -> _Outcome:
    """By class and length; their tensors have rows of their own where both sides stored them."""
    if reference.class_name != candidate.class_name:
        return _structure(reference, candidate)
    lengths = [cache.length for cache in (reference, candidate)]
    reason = None if lengths[0] == lengths[1] else f"length {lengths[0]} against {lengths[1]}"
    if bool(reference.items) != bool(candidate.items):
        side = "reference" if reference.items else "candidate"
        reason = "; ".join(filter(None, (reason, f"tensors stored only in the {side}")))
    return _plain(lengths[0] == lengths[1], *lengths, reason=reason)


def _values(reference: ValueLeaf, candidate: ValueLeaf, *, listed: bool) -> _Outcome:
    """`listed`: they are elements of a list of numbers, which are shown no more than a tensor's."""
    equal = _equal(reference, candidate)
    if listed and not equal:
        outcome = _plain(equal, reference.value, candidate.value, reason="an element differs")
        return replace(outcome, peak=None)
    reason = None if equal else f"{_shown(reference)} against {_shown(candidate)}"
    return _plain(equal, reference.value, candidate.value, reason=reason)


def _plain(
    equal: bool, reference: PlainValue, candidate: PlainValue, *, reason: str | None
) -> _Outcome:
    undefined = dict.fromkeys(METRICS, PLAIN_VALUE)
    del undefined["mismatches"]
    error = peak = None
    if _is_number(reference) and _is_number(candidate):
        error = _absolute_difference(reference, candidate)
        if error is not None:
            del undefined["max_abs_error"]
            peak = None if equal else Peak((), reference, candidate)
    metrics = Metrics(max_abs_error=error, mismatches=int(not equal))
    return _Outcome("exact" if equal else "mismatch", reason, metrics, undefined, peak)


def _equal(reference: ValueLeaf, candidate: ValueLeaf) -> bool:
    one, other = reference.value, candidate.value
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    same_type = reference.class_name == candidate.class_name
    return one == other and (same_type or not isinstance(one, str))


def _absolute_difference(reference: float, candidate: float) -> float | int | None:
    """None where JSON cannot say it."""
    try:
        error = abs(reference - candidate)
    except OverflowError:  # an integer beyond every float
        return None
    return error if math.isfinite(error) else None


def _is_number(value: PlainValue) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(leaf: ValueLeaf) -> str:
    if leaf.value is None:
        return "None"
    return str(leaf.value) if leaf.class_name in _HARMLESS else f"a {leaf.class_name}"
