"""Caches of a generation, built again from what a recording with `--caches` stored of them.

Classes are chosen here, by names that are known; nothing of the archive is looked up.
"""

from typing import Any

import torch

from qvtrace.archive import Archive
from qvtrace.cached import CachedTensors
from qvtrace.errors import DamagedArchiveError
from qvtrace.manifest import CallEntry
from qvtrace.models.rebuilding import NotRebuiltError, rebuild_tensor
from qvtrace.trees import Container, Node, TensorLeaf, join_path

_GROWING = "DynamicCache"
_OF_BOTH = "EncoderDecoderCache"
_PARTS = ("self_attention_cache", "cross_attention_cache")
_TENSORS = frozenset({"keys", "values"})


class Caches:
    """Builds Caches as calls of an archive found them; each is new."""

    def __init__(self, archive: Archive, config: object) -> None:
        """`config` is the model's, as far as it has one."""
        self._archive = archive
        self._tensors = CachedTensors(archive)
        self._slides = _slides(config)

    def build(self, node: Container, call: CallEntry, path: str, device: torch.device) -> Any:
        """The Cache at a path of a call.

        Raises `NotRebuiltError` for one whose tensors were not stored or whose class holds more
        than tensors tell.
        """
        if not node.items:
            raise NotRebuiltError(
                f"{path} was a {node.class_name}, whose tensors were not stored: record with "
                "--caches"
            )
        if node.class_name == _OF_BOTH:
            return self._build_both(node, call, path, device)
        if node.class_name != _GROWING or self._slides:
            kind = "a sliding " if self._slides else "a "
            raise NotRebuiltError(
                f"{path} was {kind}{node.class_name}, which cannot be built again"
            )
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers(node, call, path, device)):
            if keys is not None and values is not None:
                cache.update(keys, values, number)
        return cache

    def _build_both(self, node: Container, call: CallEntry, path: str, device: torch.device) -> Any:
        from transformers import EncoderDecoderCache

        parts = dict(node.items)
        caches = []
        for name in _PARTS:
            part = parts.get(name)
            if not isinstance(part, Container) or part.kind != "cache":
                raise NotRebuiltError(f"{path} has no {name}")
            caches.append(self.build(part, call, join_path(path, name), device))
        return EncoderDecoderCache(*caches)

    def _layers(
        self, node: Container, call: CallEntry, path: str, device: torch.device
    ) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        layers = dict(node.items).get("layers")
        if not isinstance(layers, Container) or len(node.items) > 1:
            raise NotRebuiltError(f"{path} holds more than layers of keys and values")
        place = join_path(path, "layers")
        return [
            self._layer(layer, call, join_path(place, name), device) for name, layer in layers.items
        ]

    def _layer(
        self, layer: Node, call: CallEntry, path: str, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        tensors = dict(layer.items) if isinstance(layer, Container) else {}
        if not tensors:
            return None, None
        if tensors.keys() != _TENSORS:
            raise NotRebuiltError(f"{path} holds more than keys and values")
        keys, values = (
            self._whole(call, join_path(path, name)).to(device)
            if isinstance(tensors[name], TensorLeaf)
            else None
            for name in ("keys", "values")
        )
        return keys, values

    def _whole(self, call: CallEntry, path: str) -> torch.Tensor:
        try:
            leaves, axis = self._tensors.parts(call, path)
        except DamagedArchiveError as error:  # steps may just not be recorded
            raise NotRebuiltError(str(error)) from error
        parts = [rebuild_tensor(leaf, self._archive, path) for leaf in leaves]
        return torch.cat(parts, dim=axis) if parts[1:] else parts[0]


def _slides(config: object) -> bool:
    """Whether some layers forget what lies far back: how far, tensors do not tell."""
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config(decoder=True) if callable(get_text_config) else config
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(text, "sliding_window", None) is not None
