"""What of a tensor that a call was given, or gave, goes into the archive: all of it, a sample of
its vectors, or its statistics. Whatever it is, places name the whole content by its digest."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from qvtrace.archive import Tensor
from qvtrace.archive.arrays import array_of
from qvtrace.digests import digest_bytes
from qvtrace.errors import UsageError
from qvtrace.manifest import PRIVATE, PortionEntry
from qvtrace.privacy import Privacy
from qvtrace.recording.device_copies import DeviceCopies, PieceStore
from qvtrace.recording.snapshots import flat_bytes, host_bytes
from qvtrace.sampling import FEWEST, SEED, count_vectors, sampled_places
from qvtrace.trees import Json, TensorLeaf


@dataclass(frozen=True)
class Share:
    """How much is stored of the tensors of calls; the model's own inputs are stored whole."""

    tokens: int | None = None  # vectors of each tensor at most; None: all
    statistics_only: bool = False

    def __post_init__(self) -> None:
        """Raise `UsageError` for a sample that cannot hold the first and the last vector, and for
        one of nothing."""
        if self.statistics_only and self.tokens is not None:
            raise UsageError("--sample-tokens: --stats-only stores no token; leave one of them out")
        if self.tokens is not None and self.tokens < FEWEST:
            raise UsageError(
                f"--sample-tokens {self.tokens}: the first and the last are always stored; "
                f"give {FEWEST} or more"
            )

    @property
    def is_whole(self) -> bool:
        """Whether every element is stored."""
        return self.tokens is None and not self.statistics_only

    def at_most(self, tokens: int | None) -> "Share":
        """The same, and no more vectors than this; None: as many as there are."""
        known = [number for number in (tokens, self.tokens) if number is not None]
        return replace(self, tokens=min(known, default=None))

    def to_json(self) -> Json:
        """What the manifest says of it among the settings: nothing where everything is stored."""
        if self.statistics_only:
            return {"statistics_only": True}
        return {} if self.tokens is None else {"sampling": {"tokens": self.tokens, "seed": SEED}}

    @classmethod
    def from_settings(cls, settings: Json) -> "Share":
        """That of an archive; a file may say anything."""
        sampling = settings.get("sampling")
        tokens = sampling.get("tokens") if isinstance(sampling, dict) else None
        if settings.get("statistics_only") is True:
            return cls(statistics_only=True)
        return cls(tokens if type(tokens) is int and tokens >= FEWEST else None)


@dataclass(frozen=True)
class Content:
    """A content that may be stored in part."""

    digest: str
    tensor: Tensor  # where it is first met in this shape


class Contents(PieceStore, Protocol):
    """What is needed of an archive's writer."""

    def add_tensor(self, data: memoryview, tensor: Tensor) -> str:
        """Store the bytes; returns their digest."""

    def add_portion(self, portion: PortionEntry) -> None:
        """Note what is stored of a content."""


class Keeper:
    """Stores tensors, as much of each as is asked for; equal contents once."""

    def __init__(
        self,
        writer: Contents,
        share: Share,
        *,
        privacy: Privacy | None = None,
        counts_only: bool = False,
        forgets: bool = False,
    ) -> None:
        """With `counts_only`, what may be stored in part is not stored but listed; a writer that
        `forgets` is given equal contents each time."""
        self._forgets = forgets
        self._privacy = privacy
        self._returned: set[str] = set()
        self._withheld: set[str] = set()
        self.listed: list[Content] = []
        self._counts_only = counts_only
        self._writer = writer
        self._share = share
        self._device_copies = DeviceCopies(writer)
        self._whole: set[str] = set()
        self._portions: set[tuple[str, tuple[int, ...]]] = set()

    def keep_whole(self, tensor: torch.Tensor, described: Tensor) -> str:
        """Store every element; returns the digest of their bytes."""
        if tensor.device.type == "cuda" and not self._forgets:
            digest = self._device_copies.store(tensor, described)
        else:
            digest = self._writer.add_tensor(host_bytes(tensor.cpu()), described)
        if self._counts_only or not self._share.is_whole:
            self._whole.add(digest)
        return digest

    def keep(self, tensor: torch.Tensor, described: Tensor) -> str:
        """Store what is asked for of a tensor; returns the digest of all of its bytes."""
        if self._is_kept_whole(described):
            return self.keep_whole(tensor, described)
        digest = self._digest(tensor)
        if digest in self._whole:
            return self.keep_whole(tensor, described) if self._forgets else digest
        if self._privacy is not None:
            digest = self._privacy.digest(digest)  # whoever guesses what is not there must not know
        if (digest, described.place_shape) not in self._portions:
            self._portions.add((digest, described.place_shape))
            if self._counts_only and not self._share.statistics_only:
                self.listed.append(Content(digest, described))
            else:
                self._keep_part(tensor, described, digest)
        elif self._forgets and self._share.tokens is not None:
            self._keep_sample(tensor, described, self._share.tokens)
        return digest

    def keep_private(
        self, tensor: torch.Tensor, described: Tensor, privacy: Privacy, *, is_given: bool
    ) -> str:
        """Store what a module returned, unless it may tell what the model was given; returns the
        digest that names it, a keyed one where nothing is stored.

        Of what a module is given only what another one has returned before can be stored, and of
        what is returned neither integers, such as token ids, nor what was withheld before.
        """
        digest = self._digest(tensor)
        may_tell = is_given or not _holds_floats(described)
        if digest in self._returned or not (may_tell or digest in self._withheld):
            self._returned.add(digest)
            return self.keep(tensor, described)
        self._withheld.add(digest)
        name, shape = privacy.digest(digest), described.place_shape
        if (name, shape) not in self._portions:
            self._portions.add((name, shape))
            self._writer.add_portion(PortionEntry(name, shape, PRIVATE))
        return name

    def _is_kept_whole(self, described: Tensor) -> bool:
        tokens = FEWEST if self._counts_only else self._share.tokens
        if self._share.statistics_only or tokens is None:
            return self._share.is_whole
        shape = described.place_shape
        return count_vectors(shape) <= tokens or not shape[-1]

    def _digest(self, tensor: torch.Tensor) -> str:
        if tensor.device.type == "cuda":
            return self._device_copies.digest(tensor)
        return digest_bytes(host_bytes(tensor.cpu()))

    def _keep_part(self, tensor: torch.Tensor, described: Tensor, digest: str) -> None:
        shape, found = described.place_shape, _statistics(tensor, described)
        tokens = self._share.tokens
        if self._share.statistics_only or tokens is None:
            entry = PortionEntry(digest, shape, "statistics only", statistics=found)
        else:
            stored = self._keep_sample(tensor, described, tokens)
            entry = PortionEntry(digest, shape, "sampled", tokens, stored, found)
        self._writer.add_portion(entry)

    def _keep_sample(self, tensor: torch.Tensor, described: Tensor, tokens: int) -> str:
        count = count_vectors(described.place_shape)
        places = torch.tensor(sampled_places(count, tokens), device=tensor.device)
        sample = flat_bytes(tensor).view(count, -1).index_select(0, places)
        return self._writer.add_tensor(host_bytes(sample.cpu()), sampled_form(described, tokens))


def _holds_floats(described: Tensor) -> bool:
    return described.dtype.startswith(("float", "bfloat", "complex"))


def sampled_form(described: Tensor, tokens: int) -> Tensor:
    """A sample of a tensor, as it is stored: one vector after the other."""
    inner = described.shape[len(described.place_shape) - 1 :]
    return Tensor(described.key, described.dtype, (tokens, *inner))


def _statistics(tensor: torch.Tensor, described: Tensor) -> Json | None:
    from qvtrace.metrics.statistics import statistics

    leaf = TensorLeaf(described.dtype, described.shape, "")
    try:
        return statistics(array_of(leaf, host_bytes(tensor.cpu()))).to_json()
    except TypeError:  # a dtype without numbers
        return None
