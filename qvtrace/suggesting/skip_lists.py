"""A suggestion as each quantizer takes it: its own list of modules that it is not to touch.

A list names all that was float in the run that reached the target: a list of one's own takes the
place of what a quantizer leaves out by default, such as the output head.
"""

import json
from collections.abc import Sequence

from qvtrace.trees import Json

_TORCHAO = """\
from torch import nn
from torchao.quantization import quantize_

keep_float = {names}
quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and name not in keep_float)
# or: transformers.TorchAoConfig(config, modules_to_not_convert=keep_float)
"""
_BITSANDBYTES = """\
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules={names})
# or load_in_4bit=True; then from_pretrained(..., quantization_config=config)
"""
_COMPRESSED_TENSORS = """\
# a recipe of llm-compressor; in Python: QuantizationConfig(config_groups=..., ignore=[...])
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      targets: [Linear]
      scheme: W8A8
      ignore: {names}
"""
_QUANTO = """\
from optimum import quanto

quanto.quantize(model, weights=quanto.qint8, exclude={names})
quanto.freeze(model)
# or: transformers.QuantoConfig(weights="int8", modules_to_not_convert=[...])
"""
_TICO = """\
from tico.quantization.wrapq.control import set_fake_quant_enabled

keep_float = {names}


def is_kept(site):  # site.module_path has "wrapped" between the float model's names
    path = "." + ".".join(part for part in site.module_path.split(".") if part != "wrapped") + "."
    return any(path.startswith(f".{{name}}.") for name in keep_float)


set_fake_quant_enabled(quantized, is_kept, False)  # what tico.quantization.convert returned
"""
_TEMPLATES = {
    "torchao": ("modules_to_not_convert", "python", _TORCHAO),
    "bitsandbytes": ("llm_int8_skip_modules", "python", _BITSANDBYTES),
    "compressed-tensors": ("ignore", "yaml", _COMPRESSED_TENSORS),
    "quanto": ("exclude", "python", _QUANTO),
    "tico": ("keep_float", "python", _TICO),
}


def skip_lists(left_float: Sequence[str]) -> dict[str, Json]:
    """By quantizer: the list under the name that it has for it, and a few lines that use it.

    `left_float` are the modules that are to be float, those of them included that the quantizer
    used here leaves out anyway.
    """
    names = list(left_float)
    return {
        quantizer: {parameter: names, "language": language, "code": _filled(template, names)}
        for quantizer, (parameter, language, template) in _TEMPLATES.items()
    }


def skip_list_code(quantizer: str, left_float: Sequence[str]) -> str | None:
    """The lines for one quantizer, `NAME` or `NAME:SCHEME`; None for a user's own, which is called
    with the names."""
    name = quantizer.partition(":")[0]
    return str(skip_lists(left_float)[name]["code"]) if name in _TEMPLATES else None


def _filled(template: str, names: Sequence[str]) -> str:
    return template.format(names=json.dumps(names, ensure_ascii=False))
