"""Values of a running model -> trees, with as much of their tensors in the archive as is asked for.

Whose value it is decides how much: what the model itself is given is stored whole, what modules are
given and return may be sampled, and of a private recording only what tells nothing is stored.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qvtrace import trees
from qvtrace.archive import Tensor
from qvtrace.digests import digest_json
from qvtrace.manifest import GivenInputs
from qvtrace.observers import Watch
from qvtrace.recording.keeping import Keeper
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.position import Position
from qvtrace.recording.skips import HookedModule
from qvtrace.recording.snapshots import Snapshots
from qvtrace.recording.writers import Writer
from qvtrace.trees import Node, path_component

_PARTS_OF_CALLS = frozenset({"inputs", "kwargs", "output"})


@dataclass
class Counts:
    """Places that were stored so far; equal contents count each time they are met."""

    places: int = 0
    bytes_by_kind: dict[str, int] = field(
        default_factory=lambda: {"inputs": 0, "kwargs": 0, "output": 0}
    )

    def add(self, kind: str, nbytes: int) -> None:
        """A place of some kind with a tensor of so many bytes."""
        self.places += 1
        self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + nbytes


class _Thread(threading.local):
    """What one thread is storing."""

    def __init__(self) -> None:
        self.kind = "output"  # of the places that are being stored
        self.is_of_model = False  # they are what the model itself is given
        self.contents: dict[str, torch.Tensor] = {}  # just stored, by digest, for observers


class StoredValues:
    """Takes the values of one recording, and counts them."""

    def __init__(
        self, writer: Writer, options: RecordOptions, watch: Watch, position: Position
    ) -> None:
        """Where anybody watches, `contents` collects what is stored of calls."""
        privacy = options.privacy
        self.counts = Counts()
        self.snapshots = Snapshots(
            self._store,
            caches=options.caches,
            moment=position.moment,
            component=self.component,
        )
        self.keeper = Keeper(
            writer,
            options.share,
            privacy=privacy,
            counts_only=options.counts_only,
            forgets=options.open_writer is not None,
        )
        self._options = options
        self._privacy = privacy
        self._watch = watch
        self._thread = _Thread()
        self._given_keys: set[str] = set()  # of dicts, where they are private

    @property
    def contents(self) -> dict[str, torch.Tensor]:
        """What this thread has stored of calls for observers, by digest."""
        return self._thread.contents

    def begin_kind(self, kind: str) -> None:
        """What `snapshots` takes from now on in this thread is no part of a call, but of `kind`."""
        self._thread.kind = kind

    def take(self, value: object, place: str, part: str) -> Node:
        """The tree of a part of a call, stored under keys that start with `place`."""
        self._thread.kind = part
        node = self.snapshots.take(value, place, part)
        return node if self._privacy is None else self._privacy.redacted(node)

    def take_inputs(
        self,
        hooked: HookedModule,
        place: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_root: bool,
    ) -> tuple[Node | None, Node | None]:
        """The trees of inputs and kwargs, where they are asked for or compare two runs."""
        inputs = is_root or (hooked.recorded and self._options.inputs)
        named = is_root or (hooked.recorded and self._options.kwargs)
        self._thread.is_of_model = is_root
        taken = (
            self.take(args, place, "inputs") if inputs else None,
            self.take(kwargs, place, "kwargs") if named else None,
        )
        self._thread.is_of_model = False
        return taken

    def take_given(self, args: Sequence[object], kwargs: Mapping[str, object]) -> GivenInputs:
        """What a generation is given."""
        self._thread.is_of_model = True
        inputs = trees.to_json(self.take(tuple(args), "(given)/", "inputs"))
        named = trees.to_json(self.take(dict(kwargs), "(given)/", "kwargs"))
        self._thread.is_of_model = False
        self._thread.contents.clear()
        return GivenInputs(inputs, named, digest_json([inputs, named]))

    def component(self, key: object, *, is_given: bool) -> str:
        """The component of a path; keys that the model was given are private wherever they go."""
        plain = path_component(key)
        if self._privacy is None:
            return plain
        if is_given and self._thread.is_of_model:
            self._given_keys.add(plain)
        return self._privacy.component(plain, is_given=is_given or plain in self._given_keys)

    def _store(self, tensor: torch.Tensor, described: Tensor) -> str:
        kind = self._thread.kind
        self.counts.add(kind, tensor.numel() * tensor.element_size())
        is_of_call = kind in _PARTS_OF_CALLS
        privacy = self._privacy
        if is_of_call and privacy is not None:
            is_given = kind != "output"
            digest = self.keeper.keep_private(tensor, described, privacy, is_given=is_given)
        elif is_of_call and not self._thread.is_of_model:
            digest = self.keeper.keep(tensor, described)
        else:
            digest = self.keeper.keep_whole(tensor, described)
        if self._watch and is_of_call:
            self._thread.contents[digest] = tensor
        return digest
