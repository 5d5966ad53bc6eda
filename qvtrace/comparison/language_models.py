"""Which outputs of two archives are logits of a language model, and of which tokens they are."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np

from qvtrace.archive import Archive
from qvtrace.archive.layout import DTYPES
from qvtrace.comparison.alignment import Pair, unwrapped
from qvtrace.comparison.leaves import Arguments, LeafPair, pair_stored
from qvtrace.manifest import CallEntry, Manifest, RootCall
from qvtrace.metrics.elements import Array, Flags
from qvtrace.trees import Node, TensorLeaf

_FIELD = "output.logits"
# Classes whose first tensor, or whose `logits`, are of a vocabulary even where no ids say so.
_SPEAKS = re.compile(r"CausalLM|MaskedLM|LMHead|ConditionalGeneration|Seq2SeqLM")
_FILLS_IN = "MaskedLM"  # a token is predicted from both sides, not from those before it
_CLASSIFIES = re.compile(r"Classif|MultipleChoice|QuestionAnswering")
_HEADS = frozenset({"lm_head", "embed_out", "unembed", "output_projection", "proj_out"})
_IDS = ("decoder_input_ids", "input_ids")
_NO_IDS = ("mask", "position", "type", "label")  # in names of integers that are no ids
_ENCODED = "output.encoder_last_hidden_state"  # beside logits: `input_ids` are not theirs


@dataclass(frozen=True)
class Given:
    """What a language model was given, as far as it was recorded: of logits [..., tokens,
    vocabulary] the last tokens are meant where there are more ids."""

    ids: Array | None = None  # [..., tokens]
    kept: Flags | None = None  # as ids: False for padding
    is_text: Flags | None = None  # as ids: False where an id only keeps a place for a picture


@dataclass(frozen=True)
class LogitsCall:
    """The logits of one call on both sides, and what went in."""

    call: CallEntry  # of the reference
    reference: TensorLeaf
    candidate: TensorLeaf
    given: Given
    same_ids: bool
    predicts_next: bool  # a token is scored by the id after it

    @property
    def tokens(self) -> int:
        """How many distributions there are."""
        return prod(self.reference.shape[:-1])

    @property
    def is_identical(self) -> bool:
        """Whether nothing has to be read."""
        one, other = self.reference, self.candidate
        return (one.digest, one.dtype) == (other.digest, other.dtype)


def logits_calls(reference: Archive, candidate: Archive, pairs: Sequence[Pair]) -> list[LogitsCall]:
    """Each call of a language model that has logits of one shape on both sides, in order.

    Its root call's `logits`, or the first tensor that it returns; without a recorded root, the
    output of a head by its name. `pairs` are all that there are, whatever rows are asked for.
    Raises `DamagedArchiveError` for trees and tensors that no writer writes.
    """
    sides = _Side(reference), _Side(candidate)
    roots = [pair for pair in pairs if _key(pair.reference) in sides[0].root_calls]
    found = [call for pair in roots if (call := _of_root(pair, sides, pairs)) is not None]
    is_recorded = any(pair.reference.output is not None for pair in roots)
    return found if is_recorded else list(_of_heads(pairs, sides))


def logits_call_of_head(
    reference: Archive, candidate: Archive, pair: Pair, root_calls: Sequence[RootCall | None]
) -> LogitsCall | None:
    """The same for one call of a head, which lies within these root calls."""
    sides = _Side(reference), _Side(candidate)
    logits = next(filter(_may_be_logits, _places(pair, sides)), None)
    if logits is None:
        return None
    return _logits_call(pair, sides, logits, root_calls, decodes_only=True)


class _Side:
    """One archive, and what its model was given."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        calls = archive.manifest.inputs.root_calls
        self.root_calls = {(call.module, call.index): call for call in calls}
        self.classes = _classes(archive.manifest)

    def given(
        self,
        root_call: RootCall | None,
        parameters: tuple[str | None, ...],
        logits: TensorLeaf,
        *,
        decodes_only: bool,
    ) -> Given:
        """What the logits of a root call are of; `parameters` name its positional inputs."""
        if root_call is None:
            return Given()
        arguments = {
            argument.name or argument.path: argument.node
            for argument in Arguments(*self.archive.input_trees(root_call), parameters).items()
        }
        name = _ids_name(arguments, logits, decodes_only=decodes_only)
        mask = arguments.get("decoder_attention_mask" if name == _IDS[0] else "attention_mask")
        if name is None:
            return Given(kept=self._nonzero(mask, logits.shape[:-1]) if decodes_only else None)
        leaf = arguments[name]
        assert isinstance(leaf, TensorLeaf)
        pictures = self._nonzero(arguments.get("mm_token_type_ids"), leaf.shape)
        is_text = None if pictures is None else ~pictures
        ids = self.archive.array(leaf) if self.archive.portion(leaf) is None else None
        return Given(ids, self._nonzero(mask, leaf.shape), is_text)

    def _nonzero(self, leaf: Node | None, shape: tuple[int, ...]) -> Flags | None:
        """Which of the last tokens are not 0: a mask is also of what a cache holds."""
        if not isinstance(leaf, TensorLeaf) or not shape or len(leaf.shape) != len(shape):
            return None
        if self.archive.portion(leaf) is not None:
            return None
        if leaf.shape[:-1] != shape[:-1] or leaf.shape[-1] < shape[-1]:
            return None
        last: Array = self.archive.array(leaf)[..., leaf.shape[-1] - shape[-1] :]
        nonzero: Flags = last != 0
        return nonzero


_Sides: TypeAlias = tuple[_Side, _Side]


def _ids_name(arguments: dict[str, Node], logits: TensorLeaf, *, decodes_only: bool) -> str | None:
    """The argument that has an id for each token of the logits; those of an encoder are not."""
    if _IDS[0] in arguments or not decodes_only:
        names = [_IDS[0]]
    elif _IDS[1] in arguments:
        names = [_IDS[1]]
    else:
        names = [name for name in arguments if not any(part in name for part in _NO_IDS)]
    return next((name for name in names if _fits(arguments.get(name), logits)), None)


def _fits(leaf: Node | None, logits: TensorLeaf) -> bool:
    return (
        isinstance(leaf, TensorLeaf)
        and leaf.dtype in ("int64", "int32")
        and len(leaf.shape) == len(logits.shape) - 1
        and leaf.shape[:-1] == logits.shape[:-2]
        and leaf.shape[-1] >= logits.shape[-2]
    )


def _of_root(pair: Pair, sides: _Sides, pairs: Sequence[Pair]) -> LogitsCall | None:
    classes = sides[0].classes
    if any(map(_CLASSIFIES.search, classes)):
        return None
    places = _places(pair, sides)
    logits = min(filter(_may_be_logits, places), key=_is_no_field, default=None)
    if logits is None:
        return None
    decodes_only = all(place.path != _ENCODED for place in places)
    root_calls = [
        side.root_calls.get(_key(call)) for side, call in zip(sides, _calls(pair), strict=True)
    ]
    call = _logits_call(pair, sides, logits, root_calls, decodes_only=decodes_only)
    if not _is_of_vocabulary(call, classes):
        return None
    is_named = logits.path == _FIELD or any(map(_SPEAKS.search, classes))
    return call if is_named or _comes_from_head(call, sides[0].archive, pairs) else None


def _is_of_vocabulary(call: LogitsCall, classes: Sequence[str]) -> bool:
    """Whether the last dimension has a place for every id that went in; without ids, by the name of
    the model's class."""
    ids = call.given.ids
    if ids is None:
        return any(map(_SPEAKS.search, classes))
    return not ids.size or int(ids.max()) < call.reference.shape[-1]


def _of_heads(pairs: Sequence[Pair], sides: _Sides) -> Iterator[LogitsCall]:
    """The outputs of heads, each of one root call where there are as many of these."""
    heads = [pair for pair in pairs if is_head(pair.reference)]
    known = [list(side.root_calls.values()) for side in sides]
    for number, pair in enumerate(heads):
        logits = next(filter(_may_be_logits, _places(pair, sides)), None)
        if logits is not None:
            root_calls = [calls[number] if len(calls) == len(heads) else None for calls in known]
            call = _logits_call(pair, sides, logits, root_calls, decodes_only=True)
            if _is_of_vocabulary(call, sides[0].classes):
                yield call


def _places(pair: Pair, sides: _Sides) -> list[LeafPair]:
    reference, candidate = (
        side.archive.tree(call, "output") for side, call in zip(sides, _calls(pair), strict=True)
    )
    return [place for place in pair_stored(reference, candidate, "output") if place.stored]


def _is_no_field(place: LeafPair) -> bool:
    return place.path != _FIELD


def _may_be_logits(place: LeafPair) -> bool:
    one, other = place.reference, place.candidate
    return (
        isinstance(one, TensorLeaf)
        and isinstance(other, TensorLeaf)
        and one.shape == other.shape
        and len(one.shape) >= 3
        and min(one.shape) > 0
        and all(map(_holds_floats, (one, other)))
    )


def _holds_floats(leaf: TensorLeaf) -> bool:
    """Whether it is a whole tensor of floats, and no part that one process holds."""
    is_part = leaf.original is not None and leaf.original.placement is not None
    return not is_part and leaf.dtype in DTYPES and "float" in leaf.dtype


def _comes_from_head(call: LogitsCall, archive: Archive, pairs: Sequence[Pair]) -> bool:
    """Whether a module in the root gave what that returns: one that is named as heads are, whose
    output may be masked then, or the last one of a model of token ids, whatever its name."""
    hidden = _hidden_sizes(archive)
    for pair in pairs:
        if pair.reference.parent != _key(call.call):
            continue
        output = archive.tree(pair.reference, "output")
        if not isinstance(output, TensorLeaf) or output.shape != call.reference.shape:
            continue
        is_last = output.digest == call.reference.digest and call.given.ids is not None
        if is_head(pair.reference) or (is_last and hidden and output.shape[-1] not in hidden):
            return True
    return False


def _hidden_sizes(archive: Archive) -> set[int]:
    """How many channels the embeddings of a model give."""
    classes = {entry.name: entry.class_name for entry in archive.manifest.modules}
    embeddings = (
        call for call in archive.manifest.calls if "Embedding" in classes.get(call.module, "")
    )
    outputs = (archive.tree(call, "output") for call in embeddings)
    return {output.shape[-1] for output in outputs if isinstance(output, TensorLeaf)}


def is_head(call: CallEntry) -> bool:
    """Whether a module has a name that heads have."""
    return unwrapped(call.module).rpartition(".")[2] in _HEADS


def _logits_call(
    pair: Pair,
    sides: _Sides,
    logits: LeafPair,
    root_calls: Sequence[RootCall | None],
    *,
    decodes_only: bool,
) -> LogitsCall:
    leaves = logits.reference, logits.candidate
    assert isinstance(leaves[0], TensorLeaf)
    assert isinstance(leaves[1], TensorLeaf)
    given = []
    for side, call, root_call in zip(sides, _calls(pair), root_calls, strict=True):
        parameters = call.parameters if _key(call) in side.root_calls else ()
        given.append(side.given(root_call, parameters, leaves[0], decodes_only=decodes_only))
    return LogitsCall(
        pair.reference,
        leaves[0],
        leaves[1],
        given[0],
        _same_ids(given[0].ids, given[1].ids),
        not any(_FILLS_IN in name for name in sides[0].classes),
    )


def _same_ids(reference: Array | None, candidate: Array | None) -> bool:
    """Whether both sides were given the same, as far as that is known."""
    if reference is None or candidate is None:
        return True
    return np.array_equal(reference, candidate)


def _classes(manifest: Manifest) -> list[str]:
    """The class of the model, and of what its wrappers hold."""
    names = [manifest.model.class_name] if manifest.model.class_name else []
    return names + [entry.class_name for entry in manifest.modules if not unwrapped(entry.name)]


def _calls(pair: Pair) -> tuple[CallEntry, CallEntry]:
    return pair.reference, pair.candidate


def _key(call: CallEntry) -> tuple[str, int]:
    return call.module, call.index
