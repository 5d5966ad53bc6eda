"""A configuration cut to its first layers."""

from collections.abc import Iterator
from typing import Any

from qvtrace.errors import UsageError

_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
    "n_layer",
    "n_layers",
    "depth",
)
# Lists of the indexes of layers; what reads them takes an empty one, but for these.
_INDEXES = ("_indexes", "_indices", "_layers", "_layer_ids")
_NEVER_EMPTY = "deepstack_visual_indexes"


def keep_first_layers(config: Any, number: int, label: str) -> None:
    """Cut each part of a configuration (text, vision, audio) to its first `number` layers.

    Raises `UsageError` when no part has that many, or none says how many it has.
    """
    parts = list(_parts(config))
    most = max((count for part in parts for count in _counts(part).values()), default=0)
    if not most:
        raise UsageError(
            f"--num-layers: {label} does not say how many layers it has ({config.model_type}); "
            "leave the option out"
        )
    if not 1 <= number <= most:
        raise UsageError(f"--num-layers {number}: {label} has {most} layers; give 1 to {most}")
    for part in parts:
        _cut(part, number)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", ()):
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _counts(config: Any) -> dict[str, int]:
    values = config.to_dict()
    return {name: values[name] for name in _COUNTS if isinstance(values.get(name), int)}


def _cut(config: Any, number: int) -> None:
    counts = _counts(config)
    for name, value in config.to_dict().items():
        if name in counts:
            setattr(config, name, min(number, value))
        elif (
            isinstance(value, list) and value and "layer" in name and len(value) in counts.values()
        ):
            setattr(config, name, value[:number])
        elif isinstance(value, list) and value and name.endswith(_INDEXES):
            setattr(config, name, _cut_indexes(name, value, min([number, *counts.values()])))


def _cut_indexes(name: str, indexes: list[Any], number: int) -> list[Any]:
    kept = [index for index in indexes if not isinstance(index, int) or index < number]
    return kept or ([number - 1] if name == _NEVER_EMPTY else kept)
