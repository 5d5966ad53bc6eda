"""Recording in one line, and tiny modules that do one thing each."""

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.manifest import CallEntry
from qvtrace.recording.options import RecordingReport
from qvtrace.recording.recorder import record
from qvtrace.trees import Container, Node, TensorLeaf, tensor_leaves

Module = TypeVar("Module", bound=nn.Module)


class Returning(nn.Module):
    """Returns what it is given."""

    def forward(self, value: object) -> object:
        return value


class Adding(nn.Module):
    """Adds a number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.number


class Wrapper(nn.Module):
    """Hands on to another module, as wrappers of quantizers do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.wrapped(hidden)
        return result


class Mlp(nn.Module):
    """Two linear layers with an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(8, 4)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.down(self.act(self.up(hidden)))
        return hidden * scale


class Raising(nn.Module):
    """Raises what it was made with."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, value: object) -> object:
        raise self.error


def seeded(build: type[Module]) -> Module:
    """A module with the same weights every time."""
    torch.manual_seed(0)
    return build().eval()


def recorded(model: nn.Module, file: Path, *inputs: Any, **kwargs: Any) -> Archive:
    """The archive of one forward."""
    with record(model, file, overwrite=True), torch.no_grad():
        model(*inputs, **kwargs)
    return Archive.open(file)


def report_of(model: nn.Module, file: Path, *inputs: Any, **options: Any) -> RecordingReport:
    """What a recording of one forward says of itself; `options` are those of `record`."""
    with record(model, file, overwrite=True, **options) as recording, torch.no_grad():
        model(*inputs)
    assert recording.report is not None
    return recording.report


def calls_of(archive: Archive, module: str) -> list[CallEntry]:
    """The calls of one module, in order of their index."""
    calls = [call for call in archive.manifest.calls if call.module == module]
    return sorted(calls, key=lambda call: call.index)


def tree_of(archive: Archive, module: str, part: str = "output", index: int = 0) -> Node:
    """One tree of one call."""
    tree = calls_of(archive, module)[index].tree(part)
    assert tree is not None
    return tree


def container(node: Node) -> Container:
    """The node, which must be a container."""
    assert isinstance(node, Container)
    return node


def tensors_of(
    archive: Archive, module: str, part: str = "output", index: int = 0
) -> dict[str, Tensor]:
    """The elements of one tree of one call, by path."""
    tree = tree_of(archive, module, part, index)
    return {path: elements_of(archive, leaf) for path, leaf in tensor_leaves(tree, part)}


def only(values: dict[str, Tensor]) -> Tensor:
    """The one tensor of a tree that has one."""
    (value,) = values.values()
    return value


def modules_of(archive: Archive) -> list[str]:
    """The module of each call, in the order in which they returned."""
    return [call.module for call in archive.manifest.calls]


def elements_of(archive: Archive, leaf: TensorLeaf) -> Tensor:
    """The elements of one leaf, for dtypes that numpy and torch share."""
    return torch.from_numpy(archive.array(leaf).copy())


def quantized(tensor: Tensor, scale: float, zero_point: int) -> Tensor:
    """A tensor of the dtype `quint8`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give these dtypes up
        return torch.quantize_per_tensor(tensor, scale, zero_point, torch.quint8)


def bytes_of(tensor: Tensor) -> bytes:
    """The elements of a tensor, as they would lie in a file."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copied.reshape(-1).view(torch.uint8).numpy().tobytes()


def hooks_on(model: nn.Module) -> int:
    """How many hooks there are on all modules of a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
