"""Which modules have heads of attention one after the other along their last axis.

A projection has no axis of heads; the attention that holds it knows them. Told are the projections
of queries, keys and values by what they give, and that of the heads' outputs by what it is given:
each only where its width is what the attention itself says. Heads of queries, keys and values that
one module gives are in an order that it does not tell, so that nothing is said of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from qvtrace.recording.module_tree import NamedModule

_QUERIES = "q_proj", "query", "q", "q_lin", "query_proj", "to_q", "wq", "q_attn", "q_b_proj"
_KEYS = "k_proj", "key", "k", "k_lin", "key_proj", "to_k", "wk"
_VALUES = "v_proj", "value", "v", "v_lin", "value_proj", "to_v", "wv"
_TOGETHER = "qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj"
_OUTPUTS = "o_proj", "out_proj", "o", "out_lin", "wo", "c_proj", "dense", "proj"
# BERT has the projection of its heads' outputs, `output.dense`, beside its attention.
_BESIDE = "self", "attention"

_COUNTS = "num_heads", "num_attention_heads", "n_heads", "n_head"
_WIDTHS = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "d_kv",
    "qk_head_dim",
    "v_head_dim",
)


def head_widths(module: NamedModule) -> dict[str, int] | None:
    """How many channels one head has in the last axis of a module's `inputs` or `output`; None
    where that is not known."""
    name, above = module.name.rpartition(".")[2], module.parent
    if above is None:
        return None
    if name in _QUERIES or name in _KEYS or name in _VALUES:
        attention = _Attention.of(above.module)
        width = attention and attention.given_by(name)
        return {"output": width} if width else None
    if name in _OUTPUTS:
        attention = _Attention.of(above.module) or _attention_beside(above)
        width = attention and attention.head_of(_width(module.module, "in_features", "nx"))
        return {"inputs": width} if width else None
    return None


@dataclass(frozen=True)
class _Attention:
    """A module that has projections of queries, and says what heads these have."""

    children: Mapping[str, nn.Module]
    heads: int  # of the queries
    widths: frozenset[int]  # that it says one has; empty where it does not

    @classmethod
    def of(cls, module: nn.Module) -> "_Attention | None":
        """None for a module that says nothing of heads: a configuration alone is everywhere."""
        own = vars(module)
        children = _children(module)
        own_counts, own_widths = _numbers(own, _COUNTS), _numbers(own, _WIDTHS)
        if not (own_counts or own_widths) or not _first(children, (*_QUERIES, *_TOGETHER)):
            return None
        config = _attributes(own.get("config"), (*_COUNTS, *_WIDTHS))
        counts = own_counts or _numbers(config, _COUNTS)
        widths = own_widths or _numbers(config, _WIDTHS)
        return cls(children, counts[0], frozenset(widths)) if len(set(counts)) == 1 else None

    @property
    def has_output(self) -> bool:
        """Whether it projects the heads' outputs itself."""
        return _first(self.children, _OUTPUTS) is not None

    def head_of(self, width: int | None) -> int | None:
        """How wide one of all its heads is, if together they are so wide."""
        if width is None or width % self.heads:
            return None
        head = width // self.heads
        return head if head in self.widths or not self.widths else None

    def given_by(self, name: str) -> int | None:
        """The same of what a child projects. Several heads may share a key and a value."""
        width = _width(self.children.get(name), "out_features", "nf")
        if name in _QUERIES or width is None:
            return self.head_of(width)
        queries = _first(self.children, _QUERIES)
        of_queries = self.head_of(_width(queries, "out_features", "nf"))
        widths = self.widths or ({of_queries} if of_queries else frozenset())
        fitting = [
            head for head in widths if width % head == 0 and self.heads % (width // head) == 0
        ]
        return fitting[0] if len(fitting) == 1 else None


def _attention_beside(module: NamedModule) -> _Attention | None:
    if module.parent is None or module.name.rpartition(".")[2] != "output":
        return None
    beside = _first(_children(module.parent.module), _BESIDE)
    attention = None if beside is None else _Attention.of(beside)
    return None if attention is None or attention.has_output else attention


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """By name. Those of a scripted module, whose attributes are nowhere in Python, are left out."""
    registered = vars(module).get("_modules")
    named = registered.items() if isinstance(registered, dict) else ()
    return {name: child for name, child in named if isinstance(child, nn.Module)}


def _first(children: Mapping[str, nn.Module], names: Iterable[str]) -> nn.Module | None:
    return next((children[name] for name in names if name in children), None)


def _width(module: nn.Module | None, *names: str) -> int | None:
    """That of a linear layer, which transformers' Conv1D is too."""
    numbers = [] if module is None else _numbers(vars(module), names)
    return numbers[0] if numbers else None


def _attributes(config: object, names: Iterable[str]) -> dict[str, object]:
    try:
        return {name: getattr(config, name, None) for name in names}
    except Exception:  # a configuration of the user's, whose properties may raise
        return {}


def _numbers(of: Mapping[str, object], names: Iterable[str]) -> list[int]:
    values = (of.get(name) for name in names)
    return [value for value in values if type(value) is int and value > 0]
