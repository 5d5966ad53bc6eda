"""What is asked for, and what is got ready: plain data."""

from bdb import BdbQuit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvtrace.errors import ModelError, QvtraceError
from qvtrace.manifest import ModelInfo, VariantInfo
from qvtrace.models.chatter import one_line, quiet
from qvtrace.models.generation import Generation, Listener
from qvtrace.models.seeds import DEFAULT_SEED, seeded
from qvtrace.trees import Json

HINT = "--traceback shows where"


@dataclass(frozen=True)
class ModelRequest:
    """Which model to get ready, in which variant, and with which inputs. None: not asked for."""

    model: str | None = None  # embedded name, directory, hub id or function
    variant: str = "fp"  # or `quant`
    quantizer: str | None = None  # `NAME`, `NAME:SCHEME` or a function
    no_quantize: bool = False  # the quantizer's wrappers in, quantization off
    calibration: str | None = None  # file of inputs; None: the sample that is recorded
    keep_float: tuple[str, ...] = ()  # patterns on modules that the quantizer leaves as they are
    from_config: bool = False  # random weights
    num_layers: int | None = None
    prompt: str | None = None
    images: tuple[str, ...] = ()
    inputs_file: str | None = None
    samples: int | None = None  # the first so many of a file of several; None: all
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None  # a name, or a JSON object of module and device
    attn: str | None = None
    seed: int | None = None
    revision: str | None = None
    cache_dir: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    attention_maps: bool = False
    use_cache: bool = False
    generate: int | None = None  # tokens; None: a single forward


@dataclass(frozen=True)
class Sample:
    """What the model is called with, and how it was made."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: Json
    warnings: tuple[str, ...] = ()
    guessed: bool = False  # made from the configuration, so that the model may not like it


@dataclass
class PreparedModel:
    """A model that is ready to run on its inputs, and what a manifest says of both."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    info: ModelInfo
    variant: VariantInfo
    source: Json  # how the inputs were made
    environment: Json
    warnings: tuple[str, ...] = ()
    hint: str = HINT  # what may help when the forward raises
    generation: Generation | None = None
    more: tuple[Sample, ...] = ()  # samples that are run after the first

    def run(self, listener: Listener | None = None) -> None:
        """One forward for each sample, without gradients, from the seed; with a `listener`, which
        is told of the steps and samples, the generation that was asked for.

        Raises `ModelError` with the exception of the model as its cause, `KeyboardInterrupt` where
        a debugger was quit.
        """
        seed = DEFAULT_SEED if self.info.seed is None else self.info.seed
        try:
            with quiet(), seeded(seed), torch.no_grad():
                if self.generation is not None and listener is not None:
                    self.generation.run(self.model, self.kwargs, listener)
                    return
                self.model(*self.args, **self.kwargs)
            for sample in self.more:
                if listener is not None:
                    listener.next_sample()
                with quiet(), seeded(seed), torch.no_grad():
                    self.model(*sample.args, **sample.kwargs)
        except QvtraceError:
            raise
        except BdbQuit:  # somebody has had enough in a debugger
            raise KeyboardInterrupt from None
        except (Exception, SystemExit, GeneratorExit) as error:
            message = f"{self.info.name}: the model raised {one_line(error)}; {self.hint}"
            raise ModelError(message) from error


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A nested value with `function` applied to each tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if type(value) is dict:
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value
