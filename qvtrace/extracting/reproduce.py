"""Prints again how the two outputs in this folder differ, and computes the module's output from its
inputs and weights where its class is a known one.

Needs torch and safetensors: python reproduce.py
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
HERE = Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "module.json").read_text(encoding="utf-8"))
# What is not recorded of a module is tried, and what fits best is told.
EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 1e-2, 1e-4, 1e-7, 2e-5, 5e-6, 1e-1)
DILATIONS = (1, 2, 3, 4)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
EQUAL = 80.0  # dB
# What a class may have that is not recorded, for when nothing that is tried fits.
SETTINGS = {
    "Conv1d": "stride, padding, dilation, groups or padding mode",
    "Conv2d": "stride, padding, dilation, groups or padding mode",
    "Conv3d": "stride, padding, dilation, groups or padding mode",
    "LayerNorm": "its eps",
    "GroupNorm": "its number of groups or eps",
    "RMSNorm": "its eps, or an offset of the weight",
    "Embedding": "a factor, or a largest norm",
}
OTHERWISE = "another dtype inside, an adapter, a forward of its own"


def load(name: str) -> Tensors:
    file = HERE / f"{name}.safetensors"
    return load_file(file) if file.exists() else {}


def difference(reference: Tensor, candidate: Tensor) -> str:
    if reference.shape != candidate.shape:
        return f"shapes differ: {list(reference.shape)} against {list(candidate.shape)}"
    one, other = reals(reference), reals(candidate)
    finite = one.isfinite() & other.isfinite()
    left_out = int((~finite).sum())
    one, other = one[finite], other[finite]
    rest = f", {left_out} not finite" if left_out else ""
    if not len(one):
        return f"nothing to compare{rest}"
    peak = (one - other).abs().max().item()
    interval = (one.max() - one.min()).item()
    peir = "0" if peak == 0 else f"{peak / interval:.6g}" if interval else "undefined"
    decibels = sqnr(one, other)
    shown = "identical" if math.isinf(decibels) else f"{decibels:.4f} dB"
    return f"max |d| {peak:.6g}, PEIR {peir}, SQNR {shown}{rest}"


def reals(tensor: Tensor) -> Tensor:
    """Every element as float64, of complex ones both parts."""
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return parts.double().flatten()


def sqnr(reference: Tensor, candidate: Tensor) -> float:
    one, other = reals(reference), reals(candidate)
    signal = one.square().sum().item()
    noise = (one - other).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def closeness(like: Tensor, found: Tensor) -> float:
    """SQNR of what is finite; the same places have to be."""
    one, other = reals(like), reals(found)
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return -math.inf
    return sqnr(one[finite], other[finite])


def equality(like: Tensor, found: Tensor) -> str | None:
    """Whether one is the other, and if only up to rounding; None where it is not."""
    decibels = closeness(like, found)
    if decibels >= EQUAL:
        return "equals the reference"
    dtype = like.dtype
    is_narrow = dtype.is_floating_point and decibels >= -20 * math.log10(torch.finfo(dtype).eps)
    name = str(dtype).removeprefix("torch.")
    return f"equals the reference up to rounding in {name}" if is_narrow else None


def forwards(
    x: Tensor, weights: Tensors, shape: torch.Size
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """How the module may compute its output of this shape, with the settings of each way."""
    kind, weight, bias = ABOUT["class"], weights.get("weight"), weights.get("bias")
    if weight is None:
        return
    if kind == "Conv1D":  # of GPT-2, a transposed Linear
        yield "", lambda: x @ weight + (0 if bias is None else bias)
    elif kind.endswith("Linear"):
        yield "", lambda: functional.linear(x, weight, bias)
    elif kind.endswith("Embedding"):
        yield "", lambda: functional.embedding(x, weight)
    elif kind in ("Conv1d", "Conv2d", "Conv3d"):
        yield from convolutions(x, weight, bias, shape)
    elif kind.endswith("LayerNorm"):
        layer_norm = partial(functional.layer_norm, x, list(weight.shape), weight, bias)
        for eps in EPSILONS:
            yield f"eps {eps}", partial(layer_norm, eps)
    elif kind == "GroupNorm":
        channels = len(weight)
        for groups in (count for count in range(1, channels + 1) if channels % count == 0):
            group_norm = partial(functional.group_norm, x, groups, weight, bias)
            for eps in EPSILONS:
                yield f"groups {groups}, eps {eps}", partial(group_norm, eps)
    elif kind.endswith("RMSNorm"):
        for eps in EPSILONS:
            for offset in (0.0, 1.0):  # Gemma stores its scale as an offset from 1
                settings = f"eps {eps}" + (", weight + 1" if offset else "")
                yield settings, partial(rms_norm, x, weight + offset, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def convolutions(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: torch.Size
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    size = weight.dim() - 2
    kernel, places = list(weight.shape[2:]), list(x.shape[-size:])
    groups, rest = divmod(x.shape[-1 - size], weight.shape[1])
    if rest:
        return
    strides = sorted({*((step,) * size for step in (1, 2, 3, 4)), tuple(kernel)})
    for stride, dilation in product(strides, DILATIONS):
        reach = [dilation * (length - 1) for length in kernel]
        paddings = [[width] * size for width in range(max(reach) + 1)]
        same = [length // 2 for length in reach]
        for padding in paddings if same in paddings else [*paddings, same]:
            sizes = [
                (place + 2 * width - length - 1) // step + 1
                for place, width, length, step in zip(places, padding, reach, stride, strict=True)
            ]
            if sizes != list(shape[-size:]):
                continue
            for mode in PADDING_MODES if any(padding) else PADDING_MODES[:1]:
                settings = f"stride {list(stride)}, padding {shortly(padding)}, groups {groups}"
                settings += f", dilation {dilation}" if dilation > 1 else ""
                settings += f", padding mode {mode}" if mode != "zeros" else ""
                how = {"stride": stride, "dilation": dilation, "groups": groups}
                yield settings, partial(convolve, x, weight, bias, padding, mode, **how)


def shortly(padding: list[int]) -> str:
    return str(padding if len(set(padding)) > 1 else padding[0])


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], mode: str, **how: Any
) -> Tensor:
    size = weight.dim() - 2
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[size - 1]
    if mode == "zeros":
        return function(x, weight, bias, padding=padding, **how)
    sides = [width for widest in reversed(padding) for width in (widest, widest)]
    batched = x if x.dim() == size + 2 else x[None]
    return function(functional.pad(batched, sides, mode=mode), weight, bias, **how)


def computed(
    x: Tensor, weights: Tensors, like: Tensor, only: str | None = None
) -> tuple[str, Tensor] | None:
    """The output that comes closest to another one, and with which settings: any, or `only`
    these."""
    best = None
    for settings, forward in forwards(x, weights, like.shape):
        if only is not None and settings != only:
            continue
        try:
            found = forward()
        except (RuntimeError, IndexError):
            continue
        if found.numel() != like.numel():
            continue
        found = found.reshape(like.shape)
        near = closeness(like, found)
        if best is None or near > best[0]:
            best = near, settings, found
        if near == math.inf:
            break
    return None if best is None else best[1:]


def recompute(inputs: Tensors, outputs: tuple[Tensors, Tensors]) -> None:
    sides = [load("reference_weights"), load("candidate_weights")]
    first = next((x for name, x in inputs.items() if not name.startswith("kwargs.")), None)
    first = next(iter(inputs.values()), None) if first is None else first
    like = outputs[0].get("output")
    if first is None or like is None or "weight" not in sides[0]:
        print("not recomputed: that takes an input, a weight and an output of the reference")
        return
    with torch.no_grad():
        found = computed(first, sides[0], like)
        if found is None and ABOUT["class"].startswith("BatchNorm"):
            print("not recomputed: its running mean and variance are not recorded")
            return
        if found is None and ABOUT["class"] not in SETTINGS:
            print(f"not recomputed: how {ABOUT['class']} computes is not known here")
            return
        verdict = None if found is None else equality(like, found[1])
        if found is None or verdict is None:
            print(unlike())
            return
        settings, output = found
        told = f" ({settings})" if settings else ""
        print(f"from inputs and reference weights{told}: {verdict}: {difference(like, output)}")
        if "weight" in sides[1] and sides[1]["weight"].shape == sides[0]["weight"].shape:
            weights = {name: value.to(like.dtype) for name, value in sides[1].items()}
            quantized = computed(first, weights, like, settings)
            if quantized is not None:
                apart = difference(output, quantized[1])
                print(f"the same inputs with the candidate's weights: {apart}")
                for reason in beside_weights():
                    print(f"  the stored difference may be another: {reason}")


def unlike() -> str:
    """That what was computed is another output, so that no figure is worth printing."""
    known = [missing for ending, missing in SETTINGS.items() if ABOUT["class"].endswith(ending)]
    may_be = f"{known[-1]}, or {OTHERWISE}" if known else OTHERWISE
    return (
        "not recomputed: what comes from inputs and reference weights with the settings tried here "
        f"IS NOT the reference's output; what is not recorded and may be missing: {may_be}"
    )


def beside_weights() -> Iterator[str]:
    """What the candidate has that its weights alone do not."""
    file = HERE / "quantization.json"
    parameters = json.loads(file.read_text(encoding="utf-8"))["candidate"] if file.exists() else []
    for one in parameters:
        if one["of"].rpartition(".")[2] in ("input", "output"):
            granularity = one.get("granularity")
            words = [one.get("dtype"), granularity and f"per {granularity}"]
            words.append("dynamic" if one.get("dynamic") else None)
            how = " ".join(filter(None, words))
            yield f"the candidate's {one['of']} is quantized too ({how}), which is not done here"
    if (HERE / "candidate_inputs.safetensors").exists():
        yield "the candidate was given other inputs, candidate_inputs.safetensors"


def main() -> None:
    print(f"{ABOUT['module'] or '(root)'} ({ABOUT['class']}), call {ABOUT['call']}")
    outputs = load("reference_output"), load("candidate_output")
    both = [path for path in outputs[0] if path in outputs[1]]
    for path in both:
        print(f"{path}: {difference(outputs[0][path], outputs[1][path])}")
    if not both:
        print("no output is stored on both sides")
    recompute(load("inputs"), outputs)


if __name__ == "__main__":
    main()
