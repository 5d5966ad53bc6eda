"""Prints again how the two outputs in this folder differ, and computes the module's output from its
inputs and weights where its class is a known one.

Needs torch and safetensors: python reproduce.py
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
HERE = Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "module.json").read_text(encoding="utf-8"))
# What is not recorded of a module is tried, and what fits best is told.
EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3)
EQUAL = 80.0  # dB


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


def forwards(x: Tensor, weights: Tensors) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """How the module may compute its output, with the settings that each way takes."""
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
        yield from convolutions(x, weight, bias)
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
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    size = weight.dim() - 2
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[size - 1]
    groups, rest = divmod(x.shape[-1 - size], weight.shape[1])
    kernel = max(weight.shape[2:])
    if rest:
        return
    strides = sorted({(1,) * size, (2,) * size, tuple(weight.shape[2:])})
    for stride in strides:
        for padding in range(kernel):
            settings = f"stride {list(stride)}, padding {padding}, groups {groups}"
            forward = partial(convolve, x, weight, bias, stride, padding, groups=groups)
            yield settings, forward


def computed(x: Tensor, weights: Tensors, like: Tensor) -> tuple[str, Tensor] | None:
    """The output that comes closest to another one, and with which settings."""
    best = None
    for settings, forward in forwards(x, weights):
        try:
            found = forward()
        except (RuntimeError, IndexError):
            continue
        if found.numel() != like.numel():
            continue
        found = found.reshape(like.shape)
        closeness = sqnr(like, found)
        if best is None or closeness > best[0]:
            best = closeness, settings, found
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
        if found is None:
            print(f"not recomputed: how {ABOUT['class']} computes is not known here")
            return
        settings, output = found
        is_equal = sqnr(like, output) >= EQUAL
        verdict = "equals the reference" if is_equal else "IS NOT the reference's output"
        told = f" ({settings})" if settings else ""
        print(f"from inputs and reference weights{told}: {verdict}: {difference(like, output)}")
        if "weight" in sides[1] and sides[1]["weight"].shape == sides[0]["weight"].shape:
            weights = {name: value.to(like.dtype) for name, value in sides[1].items()}
            quantized = computed(first, weights, like)
            if quantized is not None:
                apart = difference(output, quantized[1])
                print(f"the same inputs with the candidate's weights: {apart}")


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
