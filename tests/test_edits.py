"""What a call edits in place of what it is given is in the archive, at the call that did it."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from recordings import Mlp, Returning, calls_of, recorded, seeded
from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.recording.recorder import record


class Pair(NamedTuple):
    """Two tensors with names."""

    left: Tensor
    right: Tensor


class Editing(nn.Module):
    """Edits something of what it is given in place."""

    def __init__(self, edit: Callable[..., object]) -> None:
        super().__init__()
        self.edit = edit

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        self.edit(*inputs, **kwargs)
        return torch.ones(2)


class Around(nn.Module):
    """Hands a view of its input to a module that edits it."""

    def __init__(self, edit: Callable[..., object], *, also: bool = False) -> None:
        super().__init__()
        self.inner = Editing(edit)
        self.also = also

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.inner(hidden.view(-1))
        return hidden.add_(1) if self.also else result


def edits(archive: Archive) -> dict[str, tuple[str, ...] | None]:
    """By module, what its first call has edited."""
    return {call.module: call.edited for call in archive.manifest.calls if call.index == 0}


@pytest.mark.parametrize(
    ("edit", "paths"),
    [
        (lambda x, *_, **__: x.mul_(2), ("inputs.0",)),
        (lambda x, *_, **__: x[0].zero_(), ("inputs.0",)),
        (lambda x, *_, **__: x.detach().add_(1), ("inputs.0",)),
        (lambda x, *_, **__: x + 1, ()),
        (lambda x, pair, named, **_: pair[1].add_(1), ("inputs.1.1",)),
        (lambda x, pair, named, **_: named.right.add_(1), ("inputs.2.right",)),
        (lambda *_, mask, held: mask.fill_(1), ("kwargs.mask",)),
        (lambda *_, mask, held: held["a.b"][0].fill_(1), (r"kwargs.held.a\.b.0",)),
        (lambda x, *_, mask, held: (x.neg_(), mask.neg_()), ("inputs.0", "kwargs.mask")),
    ],
    ids=["all", "a part", "detached", "none", "tuple", "named", "kwarg", "nested", "two"],
)
def test_the_places_that_a_call_edits_in_place_are_named_as_in_its_trees(
    file: Path, edit: Callable[..., object], paths: tuple[str, ...]
) -> None:
    def ones() -> Tensor:
        return torch.ones(2)

    given = ones(), (ones(), ones()), Pair(ones(), ones())

    archive = recorded(Editing(edit), file, *given, mask=ones(), held={"a.b": [ones()], "c": 1})

    assert edits(archive)[""] == paths


def test_the_innermost_call_that_edits_is_the_one(file: Path) -> None:
    archive = recorded(Around(lambda x: x.mul_(2)), file, torch.ones(2, 2))

    assert edits(archive) == {"inner": ("inputs.0",), "": ()}


def test_a_call_that_edits_what_a_call_in_it_has_edited_too_is_one_as_well(file: Path) -> None:
    archive = recorded(Around(lambda x: x.mul_(2), also=True), file, torch.ones(2, 2))

    assert edits(archive) == {"inner": ("inputs.0",), "": ("inputs.0",)}


def test_what_a_module_that_is_not_recorded_edits_is_the_edit_of_the_nearest_that_is(
    file: Path,
) -> None:
    model = Around(lambda x: x.mul_(2))
    with record(model, file, exclude=["inner"]):
        model(torch.ones(2, 2))

    assert edits(Archive.open(file)) == {"": ("inputs.0",)}


def test_an_activation_that_works_in_place_edits_its_input(file: Path) -> None:
    archive = recorded(seeded(Mlp), file, torch.ones(3, 4))

    assert edits(archive) == {"up": (), "act": ("inputs.0",), "down": (), "": ()}


def test_of_tensors_made_in_inference_mode_it_is_not_known(file: Path) -> None:
    model = seeded(Mlp)
    with record(model, file), torch.inference_mode():
        model(torch.ones(3, 4))

    assert set(edits(Archive.open(file)).values()) == {None}


def test_of_tensors_of_a_class_of_their_own_it_is_not_known_however_often_they_come(
    file: Path,
) -> None:
    class Own(Tensor):
        pass

    model = Editing(lambda x: x.add_(1))
    with record(model, file):
        for _ in range(3):
            model(torch.ones(2).as_subclass(Own))

    assert {call.edited for call in Archive.open(file).manifest.calls} == {None}


def test_of_a_call_that_a_hook_gives_another_tensor_it_is_not_known(file: Path) -> None:
    model = nn.Sequential(Returning(), Editing(lambda x: x.add_(1)))
    model[1].register_forward_pre_hook(lambda _, args: (args[0] + 1,))

    archive = recorded(model, file, torch.ones(2))

    assert edits(archive) == {"0": (), "1": None, "": ()}


def test_what_a_call_may_have_edited_is_no_known_edit_of_the_call_around_it(file: Path) -> None:
    model = Around(lambda x: x.mul_(2))
    model.inner.register_forward_pre_hook(lambda _, given: (given[0].view(2, 1),))

    assert edits(recorded(model, file, torch.ones(2))) == {"inner": None, "": None}


def test_a_list_that_holds_itself_is_looked_through_once(file: Path) -> None:
    circle: list[object] = [torch.ones(2)]
    circle.append(circle)

    archive = recorded(Editing(lambda *_: None), file, circle)

    assert edits(archive)[""] is None


def test_an_edit_before_an_exception_is_known(file: Path) -> None:
    def edit(hidden: Tensor) -> None:
        hidden.add_(1)
        raise ValueError("no more")

    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Editing(edit)

        def forward(self, hidden: Tensor) -> Tensor:
            try:
                self.inner(hidden)
            except ValueError:
                return hidden
            raise AssertionError

    archive = recorded(Catching(), file, torch.ones(2))

    assert calls_of(archive, "inner")[0].error == "ValueError: no more"
    assert edits(archive)["inner"] == ("inputs.0",)


def test_nothing_that_a_call_was_given_is_held_for_it(file: Path) -> None:
    class Freeing(nn.Module):
        def forward(self, held: list[Tensor]) -> bool:
            alive = weakref.ref(held.pop())
            return alive() is None

    model = Freeing()
    with record(model, file):
        assert model([torch.ones(2)])


def test_the_keys_of_a_private_recording_stay_private(file: Path) -> None:
    model = Editing(lambda given: given["secret"].add_(1))
    key = file.with_name("key")
    key.write_text("0123456789abcdef" * 4)
    with record(model, file, private=True, private_key=key):
        model({"secret": torch.ones(2)})

    (call,) = Archive.open(file).manifest.calls
    assert call.edited is not None
    assert call.edited[0].startswith("inputs.0.private_")
    assert b"secret" not in file.read_bytes()
