"""What a trace says of itself: the manifest.

The manifest is the index of an archive: what was run, how, and which tensor stands at which place.
Trees of calls stay JSON until somebody asks for them, so that a hundred thousand calls load
quickly.
"""

from dataclasses import dataclass, field
from typing import Final, Literal

from qvtrace import trees
from qvtrace.trees import Json, Node

# 1 - the first
FORMAT_VERSION = 1

DID_NOT_RETURN = "did not return"  # the error of a call that was left, or still runs
# In what a file `contains`.
PROMPTS = "prompts"
KEYED_DIGESTS = "keyed digests of inputs"

PRIVATE: Final = "private"  # in place of what is known by its keyed digest alone

Portion = Literal["sampled", "statistics only", "private"]


@dataclass(frozen=True)
class ModelInfo:
    """Which model ran. What is not known is None."""

    name: str | None = None  # id, folder or function as the user gave it
    class_name: str | None = None
    revision: str | None = None
    dtype: str | None = None
    seed: int | None = None
    config_digest: str | None = None  # of the configuration but for quantization
    weights_digest: str | None = None  # of the float weights, before quantizing
    training: bool = False
    modifications: Json = field(default_factory=dict)  # `from_config`, `num_layers`, `attention`


@dataclass(frozen=True)
class VariantInfo:
    """Which variant of the model ran."""

    name: str | None = None  # `fp`, `quant`, or what the user called it
    quantizer: str | None = None  # `torchao:int8-dynamic`; None for a float model
    settings: Json = field(default_factory=dict)
    quantized: tuple[str, ...] = ()  # modules that the quantizer changed
    left_float: tuple[str, ...] = ()  # modules of a kind it quantizes, left as they were


@dataclass(frozen=True)
class RootCall:
    """The inputs of one outermost call: stored whatever the filters, since two runs are told
    comparable by them."""

    module: str
    index: int
    inputs: Json
    kwargs: Json
    digest: str
    sample: int = 0

    def input_trees(self) -> tuple[Node, Node]:
        """The trees of the positional and of the keyword inputs."""
        return trees.from_json(self.inputs), trees.from_json(self.kwargs)


@dataclass(frozen=True)
class GivenInputs:
    """What a generation was given: its root calls are steps, which hold more than that."""

    inputs: Json
    kwargs: Json
    digest: str

    def input_trees(self) -> tuple[Node, Node]:
        """The trees of the positional and of the keyword inputs."""
        return trees.from_json(self.inputs), trees.from_json(self.kwargs)


@dataclass(frozen=True)
class InputsInfo:
    """How the inputs were made, and what they were."""

    source: Json = field(default_factory=dict)  # `{"kind": "crafted", ...}`, prompt, files
    root_calls: tuple[RootCall, ...] = ()
    given: GivenInputs | None = None  # where a generation was recorded that knows it


@dataclass(frozen=True)
class StepEntry:
    """The end of one step of a generation: a token for each sequence of the batch."""

    sample: int
    step: int
    chosen: tuple[int, ...]  # the model's own: the highest logit
    taken: tuple[int, ...]  # what the text went on with; another one where tokens were fed


@dataclass(frozen=True)
class ModuleEntry:
    """One module of the model."""

    name: str  # "" is the root
    class_name: str
    parent: str | None  # None for the root
    aliases: tuple[str, ...] = ()  # further names of the same module
    calls: int = 0
    quantization: Json | None = None  # scheme, dtype, granularity, summaries
    float_name: str | None = None  # of the float module that it stands for, where it says so
    placement: Json | None = None  # what of it this process holds, where others hold the rest
    # Of `inputs` or `output` whose last axis is heads of attention, one after the other: the
    # channels of one. None: not known.
    head_widths: dict[str, int] | None = None


@dataclass(frozen=True)
class WeightEntry:
    """One weight as the model computes with it. `value` is a tree as JSON: a tensor, or an opaque
    leaf where its values are not stored."""

    module: str  # that holds it
    name: str  # `weight`, `bias`
    class_name: str  # of the tensor before it was dequantized
    aliases: tuple[str, ...]  # further full names, of a tied weight or a shared module
    value: Json

    def node(self) -> Node:
        """The tree of its value; raises `ValueError` where the file holds something else."""
        return trees.from_json(self.value)


@dataclass(frozen=True, slots=True)
class CallEntry:
    """One call of one module. `inputs`, `kwargs` and `output` are trees as JSON; None: not
    stored."""

    module: str
    index: int
    sample: int
    step: int
    parent: tuple[str, int] | None  # module and index of the call that made this one
    inputs: Json | None
    kwargs: Json | None
    output: Json | None
    parameters: tuple[str | None, ...]  # names of the positional inputs in forward's signature
    seconds: float | None
    error: str | None = None  # the call raised, or had not returned when the recording ended
    # Places of tensors that it has edited in place itself; None: not known.
    edited: tuple[str, ...] | None = None

    def tree(self, part: str) -> Node | None:
        """The tree of `inputs`, `kwargs` or `output`; None where it was not stored.

        Raises `ValueError` where the file holds something else.
        """
        json = getattr(self, part)
        return None if json is None else trees.from_json(json)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored content: the key, dtype and shape of its first place, and its digest."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class PortionEntry:
    """What the file holds of a content that it does not hold whole, as a tensor of one shape.

    Its places name it by the digest of all of it, whatever is stored.
    """

    digest: str  # of the whole content
    shape: tuple[int, ...]  # of the whole tensor
    portion: Portion
    vectors: int = 0  # stored, along the last dimension; 0: no element is
    stored: str | None = None  # the digest of those
    statistics: Json | None = None  # of the whole tensor


@dataclass(frozen=True)
class Skipped:
    """What was registered and not recorded, and why."""

    registered: int = 0
    called: int = 0
    recorded: int = 0
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)  # reason -> module names
    opaque: dict[str, int] = field(default_factory=dict)  # why a leaf was not stored -> how often
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The whole index of an archive."""

    qvtrace: str
    created: str  # ISO 8601, UTC
    complete: bool
    error: str | None
    recorded_by: str  # `record`, `run` or `library`
    model: ModelInfo
    variant: VariantInfo
    inputs: InputsInfo
    contains: tuple[str, ...]  # `inputs`, `prompts`, `elements`, `paths`
    environment: Json
    settings: Json  # filters and what else was asked of the recorder
    modules: tuple[ModuleEntry, ...]
    calls: tuple[CallEntry, ...]
    tensors: tuple[TensorEntry, ...]
    skipped: Skipped
    steps: tuple[StepEntry, ...] = ()  # of a generation, in order
    weights: tuple[WeightEntry, ...] | None = None  # None: they were not recorded
    portions: tuple[PortionEntry, ...] = ()  # of what is not stored whole
    format: int = FORMAT_VERSION


def has_several_samples(manifest: Manifest) -> bool:
    """Whether calls are of more than one sample."""
    samples = (call.sample for call in manifest.calls)
    first = next(samples, None)
    return any(sample != first for sample in samples)
