"""What calls edit in place of what they are given, told by the versions that torch counts.

Each operation in place adds one to the version of a tensor and of all its views. Tensors that are
made in inference mode have none, and those of classes of their own are not asked: what a call that
is given such a tensor edits is not known. Caches are there to be edited, and not looked into.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from qvtrace.recording.call_stacks import OpenCall
from qvtrace.recording.snapshots import (
    MAX_VALUES,
    PLAIN_TENSORS,
    Component,
    container_items,
    container_kind,
    is_key_given,
)
from qvtrace.trees import join_path

# Told at a glance; whether others hold anything has to be looked at.
_HOLD_NOTHING = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})


def versions(args: Iterable[object], kwargs: dict[str, Any]) -> list[int] | None:
    """The identity and the version of each tensor that a call is given, one after the other.

    None where one has no version: an edit of that could not be told.
    """
    found: list[int] = []
    values: list[Any] = [*args, *kwargs.values()]
    try:
        for value in values:  # which grow by what containers hold
            kind = type(value)
            if kind in PLAIN_TENSORS:
                found.append(id(value))
                found.append(value._version)
            elif kind not in _HOLD_NOTHING:
                if isinstance(value, torch.Tensor):  # of a class of its own
                    return None
                held = value if kind is tuple or kind is list else _held_by(value)
                if len(values) + len(held) > MAX_VALUES:
                    return None
                values += held
    except (Exception, SystemExit):  # there is no version, or a class of the user's raises
        return None
    return found


def edited_by(
    call: OpenCall, args: tuple[Any, ...], kwargs: dict[str, Any], component: Component
) -> list[str] | None:
    """The paths of what a call that ends has edited in place; None: not known.

    What a recorded call in it has edited is that one's; where it is not known what that was, it may
    be what this one seems to have edited. `component` names the keys in paths.
    """
    edited: list[str] | None = None
    if call.number is not None and call.versions is not None:
        now = versions(args, kwargs)
        if now == call.versions:
            edited = []
        elif now is not None:
            places = _places(args, kwargs, component)
            edited = _told(call.edits, call.versions, now, places)
            if edited and call.holds_unknown_edits:
                edited = None
    is_unknown = call.number is not None and edited is None
    if call.parent is not None and (is_unknown or call.holds_unknown_edits):
        call.parent.holds_unknown_edits = True
    if call.edits and call.parent is not None:
        for storage, count in call.edits.items():
            call.parent.edits[storage] = call.parent.edits.get(storage, 0) + count
    return edited


def _told(
    edits: dict[int, int],
    before: Sequence[int],
    now: Sequence[int],
    places: Iterator[tuple[str, torch.Tensor]],
) -> list[str] | None:
    """The paths of what was edited more often than calls within have; now that is told of it."""
    if now[::2] != before[::2]:  # a hook has given it something else instead
        return None
    try:
        all_of_them = list(zip(places, before[1::2], now[1::2], strict=True))
    except (Exception, SystemExit):  # a class of the user's raises
        return None
    edited = [(path, _storage(tensor), new - old) for (path, tensor), old, new in all_of_them]
    own = [path for path, storage, count in edited if count > edits.get(storage, 0)]
    edits.update((storage, count) for _, storage, count in edited if count)
    return own


def _places(
    args: Iterable[object], kwargs: dict[str, Any], component: Component
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `versions` met, in its order, with their paths."""
    values = [*_named(args, "inputs", component), *_named(kwargs, "kwargs", component)]
    for path, value in values:
        if isinstance(value, torch.Tensor):
            yield path, value
        elif type(value) not in _HOLD_NOTHING:
            values += _named(value, path, component)


def _held_by(value: object) -> Sequence[object]:
    kind = container_kind(value)
    if kind is None:
        return ()
    return [held for _, held in islice(container_items(value, kind), MAX_VALUES)]


def _named(value: object, path: str, component: Component) -> Iterator[tuple[str, object]]:
    kind = container_kind(value)
    if kind is not None:
        is_given = is_key_given(kind, path)
        for key, held in container_items(value, kind):
            yield join_path(path, component(key, is_given=is_given)), held


def _storage(tensor: torch.Tensor) -> int:
    """What a tensor shares with its views."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a sparse one has no storage of its own
        return id(tensor)
