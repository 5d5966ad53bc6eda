"""Whether the difference of two archives means what it seems to mean."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import unwrapped
from qvtrace.comparison.leaf_pairs import same_contents
from qvtrace.comparison.leaves import Arguments, LeafPair, pair_arguments
from qvtrace.comparison.swapping import look_swapped
from qvtrace.comparison.tokens import compare_tokens
from qvtrace.digests import digest_json
from qvtrace.manifest import Manifest, RootCall
from qvtrace.metrics.elements import format_of
from qvtrace.patterns import shown
from qvtrace.trees import Json, TensorLeaf

WEIGHTS = "float weights"

_DIGEST_SHOWN = 8
_PLACES_NAMED = 3
_INPUTS_DIFFER = "inputs differ"
_TEXTS_PART = "texts part"


@dataclass(frozen=True)
class Comparable:
    """Whether inputs, model class, configuration and float weights are the same on both sides."""

    ok: bool
    differences: tuple[str, ...] = ()  # each in words; those that decide `ok` first
    swapped: bool = False  # the reference looks quantized, the candidate does not

    @property
    def same_inputs(self) -> bool:
        """Whether both models were fed the same."""
        return not any(text.startswith((_INPUTS_DIFFER, _TEXTS_PART)) for text in self.differences)


def comparable(reference: Archive, candidate: Archive) -> Comparable:
    """Hold two archives against each other.

    What one side does not know is named and does not decide; nor does another seed, dtype, device,
    attention implementation or version. Raises `DamagedArchiveError` for trees of inputs that no
    writer writes.
    """
    manifests = reference.manifest, candidate.manifest
    deciding = [
        *_different_inputs(reference, candidate),
        *_different_classes(*manifests),
        *_different_digests(*manifests),
    ]
    listed = [
        *_unknown(*manifests),
        *_private_inputs(reference, candidate),
        *_different_settings(*manifests),
        *_training(*manifests),
    ]
    return Comparable(not deciding, (*deciding, *listed), look_swapped(*manifests))


def _different_inputs(reference: Archive, candidate: Archive) -> Iterator[str]:
    """Of two generations what they were given and the text that they went on with; their further
    calls also hold what the model has computed itself."""
    if _why_not_told(reference, candidate) is not None:
        return
    given = [archive.manifest.inputs.given for archive in (reference, candidate)]
    if given[0] is None or given[1] is None:
        yield from _different_calls(reference, candidate)
        return
    if given[0].digest != given[1].digest:
        sides = (
            Arguments(*archive.input_trees(inputs), ())
            for archive, inputs in zip((reference, candidate), given, strict=True)
            if inputs is not None
        )
        pairs = pair_arguments(*sides)
        where = "what the generation was given"
        yield from _different_places(where, pairs, reference, candidate)
    yield from _different_texts(reference.manifest, candidate.manifest)


def _why_not_told(reference: Archive, candidate: Archive) -> str | None:
    """Why digests of inputs cannot be held against each other; None where they can."""
    keys = reference.key_digest, candidate.key_digest
    if keys[0] == keys[1]:
        return None
    if None not in keys:
        return "private under two keys"
    return f"private in the {'reference' if keys[1] is None else 'candidate'}"


def _private_inputs(reference: Archive, candidate: Archive) -> Iterator[str]:
    why = _why_not_told(reference, candidate)
    if why is not None:
        yield f"inputs not compared: {why}"
    given = [archive.manifest.inputs.given for archive in (reference, candidate)]
    if None not in given and (reference.is_private or candidate.is_private):
        yield "texts not compared: their tokens are private"


def _different_texts(reference: Manifest, candidate: Manifest) -> Iterator[str]:
    tokens = compare_tokens(reference, candidate)
    if tokens is not None and tokens.parted is not None:
        parted = tokens.parted
        yield (
            f"{_TEXTS_PART} after step {parted.step}: token {parted.reference} in the reference, "
            f"{parted.candidate} in the candidate; record the candidate with --like"
        )


def _different_calls(reference: Archive, candidate: Archive) -> Iterator[str]:
    calls = [archive.manifest.inputs.root_calls for archive in (reference, candidate)]
    digests = [[(call.module, call.digest) for call in side] for side in calls]
    if digests[0] != digests[1] and Counter(digests[0]) == Counter(digests[1]):
        yield f"{_INPUTS_DIFFER}: the same {len(calls[0])} calls of the model in another order"
        return
    if len(calls[0]) != len(calls[1]):
        yield (
            f"{_INPUTS_DIFFER}: {len(calls[0])} calls of the model in the reference, "
            f"{len(calls[1])} in the candidate"
        )
    different = [pair for pair in zip(*calls, strict=False) if pair[0].digest != pair[1].digest]
    parameters = [_parameters(archive) if different else {} for archive in (reference, candidate)]
    for call, other in different:
        pairs = pair_arguments(
            _arguments(reference, call, parameters[0]),
            _arguments(candidate, other, parameters[1]),
        )
        where = f"call {call.index} of {shown(call.module)}"
        yield from _different_places(where, pairs, reference, candidate)


def _different_places(
    where: str, pairs: Iterator[LeafPair], reference: Archive, candidate: Archive
) -> Iterator[str]:
    """Says nothing where only the digests differ: one side passes by name what the other passes
    by position."""
    different = (
        leaves for leaves in pairs if not same_contents(leaves.reference, leaves.candidate)
    )
    places = list(islice(different, _PLACES_NAMED + 1))
    if places:
        more = ", ..." if places[_PLACES_NAMED:] else ""
        named = [
            leaves.path + _number_formats(reference, candidate, leaves)
            for leaves in places[:_PLACES_NAMED]
        ]
        yield f"{_INPUTS_DIFFER} in {where}: {', '.join(named)}{more}"


def _number_formats(reference: Archive, candidate: Archive, leaves: LeafPair) -> str:
    """Says where the numbers are those of the other side, rounded to another dtype."""
    one, other = leaves.reference, leaves.candidate
    if not isinstance(one, TensorLeaf) or not isinstance(other, TensorLeaf):
        return ""
    if one.dtype == other.dtype or one.shape != other.shape:
        return ""
    if not (reference.has_elements(one) and candidate.has_elements(other)):
        return f" ({one.dtype} against {other.dtype})"
    arrays = reference.array(one), candidate.array(other)
    if arrays[0].dtype.kind != "c" and arrays[1].dtype.kind != "c":
        for array, rounded in (arrays, arrays[::-1]):
            with np.errstate(all="ignore"):
                same = array.astype(rounded.dtype).tobytes() == rounded.tobytes()
            if same:
                return f" (the same numbers but for rounding, {one.dtype} against {other.dtype})"
    return f" ({one.dtype} against {other.dtype})"


_Parameters: TypeAlias = dict[tuple[str, int], tuple[str | None, ...]]


def _parameters(archive: Archive) -> _Parameters:
    return {(entry.module, entry.index): entry.parameters for entry in archive.manifest.calls}


def _arguments(archive: Archive, call: RootCall, parameters: _Parameters) -> Arguments:
    return Arguments(*archive.input_trees(call), parameters.get((call.module, call.index), ()))


def _different_classes(reference: Manifest, candidate: Manifest) -> Iterator[str]:
    one, other = _root_classes(reference), _root_classes(candidate)
    if one and other and one[-1] not in other and other[-1] not in one:
        yield _sides("model classes differ:", one[-1], other[-1])


def _root_classes(manifest: Manifest) -> list[str]:
    """The class of the model, and of what its wrappers hold, the innermost last."""
    names = [manifest.model.class_name] if manifest.model.class_name else []
    roots = [entry for entry in manifest.modules if not unwrapped(entry.name)]
    roots.sort(key=lambda entry: len(entry.name))
    return [*names, *(entry.class_name for entry in roots)]


def _digests(manifest: Manifest) -> dict[str, str | None]:
    return {
        "configurations": manifest.model.config_digest,
        WEIGHTS: manifest.model.weights_digest,
    }


def _different_digests(reference: Manifest, candidate: Manifest) -> Iterator[str]:
    others = _digests(candidate)
    for what, digest in _digests(reference).items():
        other = others[what]
        if digest and other and digest != other:
            digests = digest[:_DIGEST_SHOWN], other[:_DIGEST_SHOWN]
            yield _sides(f"{what} differ: digest", *digests) + _why(what, reference, candidate)


def _why(what: str, reference: Manifest, candidate: Manifest) -> str:
    dtypes = reference.model.dtype, candidate.model.dtype
    if what != WEIGHTS or None in dtypes or dtypes[0] == dtypes[1]:
        return ""
    return (
        f" (as they must, {dtypes[0]} against {dtypes[1]}; whether they are the same but for "
        "rounding is not known)"
    )


def _unknown(reference: Manifest, candidate: Manifest) -> Iterator[str]:
    others = _digests(candidate)
    for what, digest in _digests(reference).items():
        if (digest is None) != (others[what] is None):
            side = "reference" if digest is None else "candidate"
            yield f"{what} not compared: unknown in the {side}"


def _different_settings(reference: Manifest, candidate: Manifest) -> Iterator[str]:
    others = dict(_settings(candidate))
    for name, value in _settings(reference):
        other = others.get(name)
        if value is not None and other is not None and value != other:
            yield _sides(name, value, other)


def _settings(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    model = manifest.model
    yield "model", model.name
    yield "revision", model.revision
    yield "seed", model.seed
    yield "dtype", model.dtype
    yield from (item for item in _flat(model.modifications) if item[0] != "dtype")
    yield from _flat(manifest.environment)
    yield "qvtrace", manifest.qvtrace


def _flat(json: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in json.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _training(reference: Manifest, candidate: Manifest) -> Iterator[str]:
    sides = zip(("reference", "candidate"), (reference, candidate), strict=True)
    training = [f"the {side}" for side, manifest in sides if manifest.model.training]
    if training:
        yield (
            f"training mode in {' and '.join(training)}: dropout makes two runs of one model "
            "differ, record after model.eval()"
        )


def _sides(what: str, reference: object, candidate: object) -> str:
    return f"{what} {reference} in the reference, {candidate} in the candidate"


def inputs_told(reference: Archive, candidate: Archive) -> Json | None:
    """What tells the inputs of a comparison from those of others: a digest of all that the
    reference was given, of how many samples and, where they are private, which key that is under.

    None beside a candidate that keeps private what the reference would give away.
    """
    if _why_not_told(reference, candidate) is not None:
        return None
    inputs = reference.manifest.inputs
    calls = [(call.module, call.sample, call.digest) for call in inputs.root_calls]
    return {
        "digest": digest_json(calls) if inputs.given is None else inputs.given.digest,
        "samples": len({call.sample for call in inputs.root_calls}),
        **({} if reference.key_digest is None else {"key": reference.key_digest}),
    }


def inputs_agree(reference: Archive, candidate: Archive) -> bool:
    """Whether both models were fed the same, but for rounding to another floating-point dtype.

    Raises `DamagedArchiveError` for trees of inputs that no writer writes.
    """
    fed = _fed(reference), _fed(candidate)
    return (
        len(fed[0]) == len(fed[1])
        and not any(_different_texts(reference.manifest, candidate.manifest))
        and all(
            same_contents(leaves.reference, leaves.candidate)
            or _differ_by_rounding(reference, candidate, leaves)
            for arguments in zip(*fed, strict=True)
            for leaves in pair_arguments(*arguments)
        )
    )


def _fed(archive: Archive) -> list[Arguments]:
    """What a generation was given, or each call of the model."""
    given = archive.manifest.inputs.given
    if given is not None:
        return [Arguments(*archive.input_trees(given), ())]
    parameters = _parameters(archive)
    calls = archive.manifest.inputs.root_calls
    return [_arguments(archive, call, parameters) for call in calls]


def _differ_by_rounding(reference: Archive, candidate: Archive, leaves: LeafPair) -> bool:
    one, other = leaves.reference, leaves.candidate
    if not isinstance(one, TensorLeaf) or not isinstance(other, TensorLeaf):
        return False
    if not (reference.has_elements(one) and candidate.has_elements(other)):
        return False
    arrays = reference.array(one), candidate.array(other)
    if any(format_of(array.dtype).kind != "float" for array in arrays):
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return any(
            np.array_equal(array.astype(rounded.dtype), rounded, equal_nan=True)
            for array, rounded in (arrays, arrays[::-1])
        )
