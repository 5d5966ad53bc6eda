"""Paired calls -> rows: one for each place, compared by what stands there on both sides."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.axes import TensorAxes
from qvtrace.comparison.call_leaves import (
    argument_leaves,
    call_leaves,
    has_arguments,
    have_other_tokens,
    output_leaves,
    tensors_of,
)
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.inner_rotating import Standing
from qvtrace.comparison.leaf_pairs import contents_of, same_contents
from qvtrace.comparison.leaves import (
    LeafPair,
    filled,
)
from qvtrace.comparison.outcomes import (
    Outcome,
    caches,
    failed,
    opaque,
    private,
    routing_differs,
    structure_differs,
    values,
)
from qvtrace.comparison.portions import Sample
from qvtrace.comparison.rotating import Declared
from qvtrace.comparison.routing import Routed, Routing, Vectors, is_expert_by_name
from qvtrace.comparison.rows import (
    COMPARED,
    INNER_ROTATION,
    PARTS,
    PERMUTATION,
    ROTATION,
    WEIGHTS,
    FailedCall,
    Place,
    Row,
    is_weight,
)
from qvtrace.comparison.sample_pooling import SamplePool
from qvtrace.comparison.streams import Seen, of_no_stream
from qvtrace.comparison.surroundings import Judgement, Output, Surroundings
from qvtrace.failures import failure, fate
from qvtrace.manifest import CallEntry, has_several_samples
from qvtrace.metrics.chosen_tokens import over_tokens
from qvtrace.metrics.details import Details
from qvtrace.metrics.differences import Difference, Sums
from qvtrace.metrics.elements import ElementsJson
from qvtrace.metrics.factors import ScaleFactor
from qvtrace.metrics.inner_rotations import InnerRotation
from qvtrace.metrics.layouts import reshaped
from qvtrace.metrics.permutations import Permutation
from qvtrace.patterns import kind_of
from qvtrace.trees import (
    Container,
    Node,
    OpaqueLeaf,
    TensorLeaf,
    ValueLeaf,
    tensor_leaves,
)

_LAYERS_ALIKE = 2  # whose channels have factors at one place, so that others' may too


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
        per_sample: bool = False,
        contents: ContentPairs | None = None,
        rotations: Declared | None = None,
    ) -> None:
        """`path` is a key of `PARTS`; `pairs` are all that there are, those without rows too; with
        `details`, rows of two tensors have them; `per_sample`: those of several samples stay apart.
        `contents` may have been looked at before, `rotations` are declared to be in the
        candidate."""
        self.only_in_reference: list[Place] = []
        self.only_in_candidate: list[Place] = []
        self.candidate_modules: set[str] = set()  # names in the candidate that have rows
        self.without_inputs: set[tuple[str, int]] = set()  # calls, as the candidate stored them
        self.failed: list[FailedCall] = []
        self._reference = reference
        self._candidate = candidate
        self._parts = PARTS[path]
        self._classes = _classes(reference), _classes(candidate)
        self._axes = TensorAxes(reference.manifest)
        self.rows: list[Row] = []
        self.aside: list[Row] = []  # of the places that `path` leaves out
        self.calls: Sequence[CallEntry] = reference.manifest.calls  # that rows stand for
        self._each: list[Row] = []  # before samples are pooled
        self._each_aside: list[Row] = []
        self._differences: dict[Place, Difference] = {}
        self._pools_samples = has_several_samples(reference.manifest) and not per_sample
        self._planned: list[tuple[Pair, LeafPair]] = []
        self._planned_aside: list[tuple[Pair, LeafPair]] = []
        self._with_details = details
        self.contents = contents or ContentPairs(reference, candidate)
        self._rotations = rotations or Declared()
        self._first: dict[tuple[object, ...], Place] = {}
        self._surroundings = Surroundings(
            reference.manifest.calls,
            pairs,
            self._compared_outputs,
            self._given,
            self.contents.is_summand,
        )
        self._rejudged: set[Place] = set()
        self._routing = Routing(pairs, self._given_vectors)

    def add(self, pair: Pair) -> None:
        """Take in two calls: what their rows will be, and the places that one side did not store.

        Raises `DamagedArchiveError` for a tree that no writer writes.
        """
        fates = fate(failure(pair.reference)), fate(failure(pair.candidate))
        if "output" in self._parts and fates != (None, None):
            self.failed.append(FailedCall(Place.of(pair.reference, "output"), *fates))
        if not has_arguments(pair.candidate):
            self.without_inputs.add((pair.reference.module, pair.reference.index))
        for leaves in call_leaves(self._reference, self._candidate, pair):
            is_wanted = leaves.path.partition(".")[0] in self._parts
            if leaves.stored:
                self._plan(pair, leaves, is_wanted=is_wanted)
            elif not is_wanted:
                continue
            elif leaves.candidate is None:
                self.only_in_reference.append(Place.of(pair.reference, leaves.path))
            else:
                self.only_in_candidate.append(Place.of(pair.candidate, leaves.path))

    def add_only_in_reference(self, call: CallEntry) -> None:
        """Append the places of a call that the candidate does not have."""
        self.only_in_reference += self._places(self._reference, call)

    def add_only_in_candidate(self, call: CallEntry) -> None:
        """Append the places of a call that the reference does not have."""
        self.only_in_candidate += self._places(self._candidate, call)

    def add_leaves(self, pair: Pair, leaves: LeafPair) -> None:
        """Take in two leaves that are part of no recorded call."""
        self._plan(pair, leaves, is_wanted=True)

    def compare(self) -> None:
        """Set `rows` and `aside`, in the order in which their pairs were added.

        Raises `DamagedArchiveError` for contents that are missing.
        """
        self.contents.compare()
        if self.contents.has_turned():
            self.contents.permute_within_layers(list(self._standing()))
        self.contents.turn_back(self._rotations.stream, lambda: of_no_stream(list(self._seen())))
        if self.contents.has_unexplained:
            declared = self._rotations.heads
            self.contents.turn_back_within_layers(list(self._standing()), declared)
        self._lend_factors()
        self._find_experts()
        self.rows = [
            self._row(pair, leaves, self._same_as(pair, leaves)) for pair, leaves in self._planned
        ]
        self.aside = [
            self._row(pair, leaves, self._same_as(pair, leaves))
            for pair, leaves in self._planned_aside
        ]
        self._each, self._each_aside = self.rows, self.aside
        if self._pools_samples:
            self._pool_samples()

    def of_calls(self) -> list[Row]:
        """The rows of what calls received and gave, those of places that `path` leaves out too."""
        return [row for row in (*self.rows, *self.aside) if not is_weight(row)]

    def rejudge(self, factors: Mapping[Place, Judgement]) -> bool:
        """Judge factors otherwise, by the first places of what is scaled; False where nothing is
        left to judge: each once."""
        new = {place: factors[place] for place in factors.keys() - self._rejudged}
        self._rejudged |= new.keys()
        for rows in (self.rows, self.aside) if new else ():
            rows[:] = [_rejudged(row, new.get(row.first_place)) for row in rows]
        return bool(new)

    def tensors(self) -> dict[Place, tuple[TensorLeaf, TensorLeaf]]:
        """Those that rows are of, of the first sample where they are pooled."""
        found: dict[Place, tuple[TensorLeaf, TensorLeaf]] = {}
        for pair, leaves in (*self._planned, *self._planned_aside):
            tensors = tensors_of(leaves)
            if tensors is not None:
                found.setdefault(Place.of(pair.reference, leaves.path), tensors)
        return found

    def sums(self) -> dict[Place, Sums]:
        """What rows are pooled from, of those whose elements were read."""
        found = {row.place: self._differences.get(row.place) for row in self.rows}
        return {
            place: difference.sums
            for place, difference in found.items()
            if difference is not None and difference.sums is not None
        }

    def places(
        self, modules: Collection[str], *, with_inputs: bool
    ) -> Iterator[tuple[Row, CallEntry, LeafPair]]:
        """The rows of these modules, of each sample, with the reference's call and their leaves;
        `with_inputs`, what they are given first."""
        aside = zip(self._each_aside, self._planned_aside, strict=True) if with_inputs else ()
        planned = [*aside, *zip(self._each, self._planned, strict=True)]
        for row, (pair, leaves) in sorted(planned, key=lambda one: one[0].order):
            if row.module in modules:
                yield row, pair.reference, leaves

    def elements(
        self, modules: Collection[str], limit: int | None
    ) -> Iterator[tuple[Place, ElementsJson]]:
        """The elements of candidate minus reference in the compared rows of these modules, of each
        at most `limit`; those of another layout in the reference's."""
        for row, (_, leaves) in zip(self._each, self._planned, strict=True):
            reference, candidate = leaves.reference, leaves.candidate
            if (
                row.module in modules
                and row.status in COMPARED
                and isinstance(reference, TensorLeaf)
                and isinstance(candidate, TensorLeaf)
                and self.contents.portions.have_elements(reference, candidate)
            ):
                yield row.place, self.contents.elements(reference, candidate, limit)

    def _plan(self, pair: Pair, leaves: LeafPair, *, is_wanted: bool) -> None:
        if is_wanted:
            self._planned.append((pair, leaves))
            self.candidate_modules.add(pair.candidate.module)
            if self._with_details:
                axes = partial(self._axes.of, pair.reference.module, leaves.path)
                self.contents.show(pair.reference, leaves.reference, leaves.candidate, axes)
        else:
            self._planned_aside.append((pair, leaves))
        self.contents.want(leaves.reference, leaves.candidate)

    def _pool_samples(self) -> None:
        pool = SamplePool(self.calls)
        leaves = {
            Place.of(pair.reference, stored.path): _tensor(stored.reference)
            for pair, stored in (*self._planned, *self._planned_aside)
        }

        def alike(row: Row) -> Difference | None:
            leaf = leaves[row.place]
            return None if leaf is None else self.contents.alike(leaf)

        self.rows, pooled = pool.pool(self.rows, self._differences, alike)
        self.aside, _ = pool.pool(self.aside, self._differences, alike)
        self._differences.update(pooled)
        self.calls = pool.firsts(self.calls)

    def _seen(self) -> Iterator[Seen]:
        """The places of what is compared of calls and may be turned."""
        parents = {call.parent for call in self._reference.manifest.calls}
        for pair, leaves in (*self._planned, *self._planned_aside):
            tensors = tensors_of(leaves)
            state = None if tensors is None else self.contents.state(*tensors)
            if tensors is not None and state is not None:
                module, call = pair.reference.module, pair.reference.index
                is_leaf = (module, call) not in parents
                contents, channels = contents_of(*tensors), tensors[0].shape[-1]
                yield Seen(module, call, leaves.path, is_leaf, contents, channels, state)

    def _standing(self) -> Iterator[Standing]:
        """What calls were given and gave, in order of execution."""
        parents = {call.parent for call in self._reference.manifest.calls}
        planned = [*self._planned_aside, *self._planned]
        for pair, leaves in sorted(planned, key=lambda one: one[0].order):
            module, call = pair.reference.module, pair.reference.index
            tensors = tensors_of(leaves)
            if tensors is None or leaves.path.startswith(f"{WEIGHTS}."):
                continue
            outcome = self.contents.known(*tensors)
            if outcome is not None:
                makes_calls = (module, call) in parents
                yield Standing(module, call, leaves.path, tensors, outcome, makes_calls)

    def _lend_factors(self) -> None:
        """A call of few tokens cannot tell a factor by itself; other calls of its module can.

        Nor can one of many tokens behind the noise of others, but then the same module of other
        layers is likely to have a factor, or factors of its channels, too.
        """
        known: dict[tuple[str, str], ScaleFactor] = {}
        scaled: dict[tuple[str, str], set[str]] = defaultdict(set)
        without = []
        for pair, leaves in (*self._planned, *self._planned_aside):
            tensors = tensors_of(leaves)
            outcome = None if tensors is None else self.contents.found(*tensors)
            if tensors is None or outcome is None or outcome.difference is None:
                continue
            place = pair.reference.module, leaves.path
            if outcome.scaling is not None:
                known.setdefault(place, outcome.scaling.factor)
                scaled[kind_of(place[0]), leaves.path].add(place[0])
            else:
                without.append((place, tensors))
        for place, tensors in without if known else ():
            outcome = self.contents.found(*tensors)
            if place in known and outcome is not None and outcome.scaling is None:
                self.contents.lend(known[place], *tensors)
            if len(scaled[kind_of(place[0]), place[1]]) >= _LAYERS_ALIKE:
                self.contents.expect_factor(*tensors)

    def _find_experts(self) -> None:
        """Before any row: an expert may be known by those beside it."""
        for pair, leaves in (*self._planned, *self._planned_aside):
            if have_other_tokens(leaves):
                self._routing.of(pair)

    def _routed(self, pair: Pair, leaves: LeafPair) -> Routed | None:
        """How an expert's tokens were routed whose tensors therefore cannot be compared."""
        reference, candidate = leaves.reference, leaves.candidate
        if not (isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf)):
            return None
        are_others = have_other_tokens(leaves)
        may_be = are_others or self._routing.may_be_expert(pair)
        if not may_be or same_contents(reference, candidate):
            return None
        is_told = are_others and is_expert_by_name(pair)
        return self._routing.of(pair) or (Routed() if is_told else None)

    def _given_vectors(self, pair: Pair) -> Iterator[tuple[Vectors, Vectors]]:
        """Tensors that two calls were given at one place."""
        for leaves in argument_leaves(self._reference, self._candidate, pair):
            tensors = tensors_of(leaves)
            # Every token is needed to tell where it stands.
            if tensors is not None and not self.contents.portions.are_partial(*tensors):
                yield self.contents.vectors(*tensors)

    def _compared_outputs(self, pair: Pair) -> list[Output]:
        """The outputs of two calls that can be compared, whether they have rows or not."""
        outputs = []
        for leaves in output_leaves(self._reference, self._candidate, pair):
            reference, candidate = leaves.reference, leaves.candidate
            if not (isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf)):
                continue
            outcome = self.contents.compared(reference, candidate)
            can_be_read = self.contents.portions.can_be_read(reference, candidate)
            if outcome.status in COMPARED and can_be_read:
                outputs.append(self.contents.output(reference, candidate, outcome))
        return outputs

    def _given(self, pair: Pair) -> tuple[set[str], set[str]]:
        return (
            self._argument_digests(self._reference, pair.reference),
            self._argument_digests(self._candidate, pair.candidate),
        )

    def _argument_digests(self, archive: Archive, call: CallEntry) -> set[str]:
        trees = [(part, archive.tree(call, part)) for part in ("inputs", "kwargs")]
        stored = [tensor_leaves(tree, part) for part, tree in trees if tree is not None]
        return {leaf.digest for found in stored for _, leaf in found}

    def _places(self, archive: Archive, call: CallEntry) -> list[Place]:
        """At least one, so that the call is told of."""
        trees = [(part, archive.tree(call, part)) for part in self._parts]
        paths = [path for part, node in trees if node is not None for path, _ in filled(node, part)]
        return [Place.of(call, path) for path in paths or self._parts[-1:]]

    def _row(self, pair: Pair, leaves: LeafPair, same_as: Place | None) -> Row:
        reference, candidate = leaves.reference, leaves.candidate
        tensors = _tensor(reference), _tensor(candidate)
        routed = self._routed(pair, leaves)
        outcome = routing_differs(routed) if routed else self._outcome(leaves)
        call = pair.reference
        judgement = self._judgement(pair, leaves, outcome)
        sample = self._sample(leaves, outcome)
        outcome, padding = self._without_padding(pair, leaves, outcome, sample)
        difference, scaling = outcome.difference, outcome.scaling
        if difference is not None:
            self._differences[Place.of(call, leaves.path)] = difference
        peak, worst_token = outcome.peak, difference.worst_token if difference else None
        if sample is not None:
            peak = None if peak is None else sample.peak(peak)
            worst_token = None if worst_token is None else sample.index(worst_token)
        residual = _residual(outcome, judgement)
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
            peak=peak,
            layout=_layout_text(leaves, outcome, sample),
            scale_factor=None if scaling is None else scaling.factor,
            worst_token=worst_token,
            transform=_transform(outcome),
            residual_peir=None if residual is None else residual.metrics.peir,
            residual_sqnr=None if residual is None else residual.metrics.sqnr,
            zero_tokens=difference.zero_tokens if difference else 0,
            padding_tokens=padding,
            nonfinite=outcome.nonfinite or (difference.nonfinite if difference else None),
            same_as=same_as,
            judgement=judgement,
            sampled=None if sample is None else sample.counts,
            residual=residual,
            details=self._details_of(leaves),
            unseen=outcome.unseen,
        )

    def _sample(self, leaves: LeafPair, outcome: Outcome) -> Sample | None:
        """What of two tensors was compared; None where that is all of them, or nothing."""
        tensors = tensors_of(leaves)
        if tensors is None or outcome.difference is None or same_contents(*tensors):
            return None
        return self.contents.portions.sample(*tensors)

    def _without_padding(
        self, pair: Pair, leaves: LeafPair, outcome: Outcome, sample: Sample | None
    ) -> tuple[Outcome, int]:
        """The outcome with token figures without those of padding, and how many tokens that are."""
        tensors, difference = tensors_of(leaves), outcome.difference
        if tensors is None or difference is None or difference.tokens is None:
            return outcome, 0
        kept = self.contents.kept(pair.reference, *tensors)
        if kept is None:
            return outcome, 0
        shape = tensors[0].shape
        if sample is not None:
            shape = (len(kept), shape[-1])
        found = over_tokens(difference, kept, shape)
        told = replace(outcome, difference=found, metrics=found.metrics, undefined=found.undefined)
        return told, int(kept.size - kept.sum())

    def _details_of(self, leaves: LeafPair) -> Details | None:
        tensors = tensors_of(leaves)
        return None if tensors is None else self.contents.details(*tensors)

    def _judgement(self, pair: Pair, leaves: LeafPair, outcome: Outcome) -> Judgement | None:
        reference, candidate = _tensor(leaves.reference), _tensor(leaves.candidate)
        if outcome.scaling is None or reference is None or candidate is None:
            return None
        scaled = self.contents.output(reference, candidate, outcome)
        return self._surroundings.judge(pair, leaves.path, scaled)

    def _same_as(self, pair: Pair, leaves: LeafPair) -> Place | None:
        reference, candidate = _tensor(leaves.reference), _tensor(leaves.candidate)
        if reference is None or candidate is None:
            return None
        # The shape itself says nothing that another row of these elements does not.
        shapes = ((), ()) if reference.shape == candidate.shape else _shapes(reference, candidate)
        key = reference.digest, candidate.digest, reference.dtype, candidate.dtype, *shapes
        place = Place.of(pair.reference, leaves.path)
        first = self._first.setdefault(key, place)
        return None if first is place else first

    def _outcome(self, leaves: LeafPair) -> Outcome:
        reference, candidate = leaves.reference, leaves.candidate
        fates = fate(reference), fate(candidate)
        if fates[0] and fates[1]:
            return failed(fates[0], fates[1])
        match reference, candidate:
            case TensorLeaf(), TensorLeaf():
                return self.contents.outcome(reference, candidate)
            case OpaqueLeaf(reason="private") | ValueLeaf(), OpaqueLeaf(reason="private"):
                return private(reference, candidate)
            case OpaqueLeaf(reason="private"), ValueLeaf():
                return private(reference, candidate)
            case ValueLeaf(), ValueLeaf():
                return values(reference, candidate, listed=leaves.listed)
            case OpaqueLeaf(), OpaqueLeaf():
                return opaque(reference, candidate)
            case Container(kind="cache"), Container(kind="cache"):
                return caches(reference, candidate)
        return structure_differs(reference, candidate)


def _layout_text(leaves: LeafPair, outcome: Outcome, sample: Sample | None) -> str | None:
    """Vectors of a sample are one after the other on both sides, whatever the shapes."""
    tensors = tensors_of(leaves)
    if sample is not None and tensors is not None:
        shapes = _shapes(*tensors)
        return None if shapes[0] == shapes[1] else str(reshaped(*shapes))
    return None if outcome.layout is None else str(outcome.layout)


def _transform(outcome: Outcome) -> str | None:
    if outcome.rotation is None:
        return None
    if isinstance(outcome.rotation, Permutation):
        return PERMUTATION
    return INNER_ROTATION if isinstance(outcome.rotation, InnerRotation) else ROTATION


def _residual(outcome: Outcome, judgement: Judgement | None) -> Difference | None:
    """What is left after all that explains a difference; a factor that is a fault is no excuse
    where vectors are turned as well."""
    if outcome.scaling is None:
        return outcome.rest
    is_fault = judgement is None or not judgement.agrees
    return outcome.rest if outcome.rest and is_fault else outcome.scaling.residual


def _rejudged(row: Row, judgement: Judgement | None) -> Row:
    if judgement is None or row.judgement is None or row.judgement.agrees == judgement.agrees:
        return row
    note = (row.reason or "").removesuffix(row.judgement.text).removesuffix("; ")
    return replace(row, judgement=judgement, reason=_joined(note, judgement.text))


def _shapes(
    reference: TensorLeaf, candidate: TensorLeaf
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return reference.shape, candidate.shape


def _joined(*reasons: str | None) -> str | None:
    return "; ".join(filter(None, reasons)) or None


def _classes(archive: Archive) -> dict[str, str]:
    return {entry.name: entry.class_name for entry in archive.manifest.modules}


def _tensor(node: Node | None) -> TensorLeaf | None:
    return node if isinstance(node, TensorLeaf) else None


def _dtype(leaf: TensorLeaf | None) -> str | None:
    return None if leaf is None else leaf.dtype


def _shape(leaf: TensorLeaf | None) -> tuple[int, ...] | None:
    return None if leaf is None else leaf.shape
