"""Which model runs, on which sample: the flags of whatever runs one."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from qvtrace.cli.options import MODEL, PATTERN, SAMPLE, STORED, flag, option

if TYPE_CHECKING:
    from qvtrace.models import ModelRequest


class Variant(StrEnum):
    """Which variant of a model runs."""

    FP = "fp"
    QUANT = "quant"


@dataclass(frozen=True)
class ModelFlags:
    """Which model runs on which sample."""

    model: Annotated[
        str | None,
        option(
            MODEL,
            "Embedded name, local directory, GGUF file, hub id, or file.py:function "
            "(package.module:function) "
            "that returns a model, or a model and its inputs. (default: qwen3-vl-tiny)",
            "--model",
            "-m",
            metavar="MODEL",
        ),
    ] = None
    quantizer: Annotated[
        str | None,
        option(
            MODEL,
            "For quant: NAME, NAME:SCHEME, or file.py:function taking and returning a model.  "
            "[default: torchao:int8-dynamic]",
            metavar="QUANTIZER",
        ),
    ] = None
    no_quantize: Annotated[
        bool,
        flag(
            MODEL,
            "For quant: the quantizer's wrappers in, quantization off (tico).",
            "--no-quantize",
        ),
    ] = False
    calibration: Annotated[
        str | None,
        option(
            MODEL,
            "For quant: calibration inputs, .safetensors or .json. (default: the sample)",
            metavar="FILE",
        ),
    ] = None
    keep_float: Annotated[
        list[str],
        option(
            MODEL,
            "For quant: leave modules float that are or fit this, and what is in them; repeatable.",
            metavar=PATTERN,
        ),
    ] = field(default_factory=list)
    keep_float_file: Annotated[
        str | None,
        option(
            MODEL,
            "File of such patterns, one a line, or what `suggest` wrote as JSON.",
            metavar="FILE",
        ),
    ] = None
    like: Annotated[
        str | None,
        option(
            MODEL,
            "Take model, inputs, seed, dtype, attention and filters from this archive.",
            metavar="ARCHIVE",
        ),
    ] = None
    from_config: Annotated[
        bool,
        flag(MODEL, "Random weights from the model's configuration.", "--from-config"),
    ] = False
    num_layers: Annotated[
        int | None,
        option(MODEL, "Only the first N layers (text and vision).", metavar="N", min=1),
    ] = None
    dtype: Annotated[
        str | None,
        option(MODEL, "Float dtype. (default: the checkpoint's)", metavar="DTYPE"),
    ] = None
    device: Annotated[
        str | None, option(MODEL, "Device to run on. (default: cpu)", metavar="DEVICE")
    ] = None
    device_map: Annotated[
        str | None,
        option(MODEL, "Spread the model as accelerate does: auto, or JSON.", metavar="MAP"),
    ] = None
    attn: Annotated[
        str | None,
        option(
            MODEL,
            "Attention implementation. (default: the checkpoint's; eager for the embedded model)",
            metavar="NAME",
        ),
    ] = None
    seed: Annotated[
        int | None, option(MODEL, "Seed of weights and samples. (default: 42)", metavar="N", min=0)
    ] = None
    revision: Annotated[
        str | None, option(MODEL, "Branch, tag or commit on the hub.", metavar="REVISION")
    ] = None
    cache_dir: Annotated[str | None, option(MODEL, "Where downloads are kept.", metavar="DIR")] = (
        None
    )
    hf_token: Annotated[
        str | None,
        option(
            MODEL,
            "Token for the hub; it never reaches a file or a message.",
            metavar="TOKEN",
            envvar="HF_TOKEN",
            show_default=False,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        flag(MODEL, "Run code that comes with the checkpoint.", "--trust-remote-code"),
    ] = False
    prompt: Annotated[str | None, option(SAMPLE, "The text.", metavar="TEXT")] = None
    image: Annotated[list[str], option(SAMPLE, "A picture file; repeatable.", metavar="FILE")] = (
        field(default_factory=list)
    )
    inputs: Annotated[
        str | None,
        option(
            SAMPLE,
            "Ready tensors: .safetensors or .json; several samples: .jsonl.",
            "--inputs",
            metavar="FILE",
        ),
    ] = None
    samples: Annotated[
        int | None,
        option(
            SAMPLE,
            "The first N samples of a file of several. (default: all)",
            metavar="N",
            min=1,
        ),
    ] = None
    generate: Annotated[
        int | None,
        option(
            SAMPLE,
            "Record a greedy generation of N tokens, every step; --like feeds its tokens.",
            metavar="N",
            min=1,
        ),
    ] = None
    use_cache: Annotated[
        bool, flag(SAMPLE, "Run the forward with use_cache=True.", "--use-cache")
    ] = False
    attention_maps: Annotated[
        bool,
        flag(
            STORED,
            "Also attention weights that the model returns only on request.",
            "--attention-maps",
        ),
    ] = False

    def request(self, variant: Variant) -> "ModelRequest":
        """What is asked of the models package."""
        from qvtrace.models import ModelRequest
        from qvtrace.models.keep_float import read_keep_float

        file = self.keep_float_file
        flags = {name: value for name, value in vars(self).items() if name not in _RENAMED}
        return ModelRequest(
            variant=variant.value,
            images=tuple(self.image),
            inputs_file=self.inputs,
            keep_float=(*(() if file is None else read_keep_float(file)), *self.keep_float),
            **flags,
        )

    def for_float(self) -> "ModelFlags":
        """The same for the float variant."""
        return replace(
            self,
            quantizer=None,
            no_quantize=False,
            calibration=None,
            keep_float=[],
            keep_float_file=None,
        )


_RENAMED = frozenset({"image", "inputs", "like", "keep_float", "keep_float_file"})
