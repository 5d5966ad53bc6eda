"""Calls that raised or did not return: what stands where their outputs would."""

from collections.abc import Iterator, Sequence

from qvtrace.manifest import DID_NOT_RETURN, CallEntry
from qvtrace.patterns import shown
from qvtrace.trees import Node, OpaqueLeaf

_RAISED = "raised"


def failure(call: CallEntry) -> OpaqueLeaf | None:
    """A leaf in place of the output that a call does not have; None where it returned.

    It names the exception's type and nothing of its message, which may quote a prompt.
    """
    if call.error is None:
        return None
    return OpaqueLeaf(call.error.partition(":")[0], _RAISED)


def fate(node: Node | None) -> str | None:
    """What became of a call in whose place `failure` put this leaf."""
    if not isinstance(node, OpaqueLeaf) or node.reason != _RAISED:
        return None
    return DID_NOT_RETURN if node.class_name == DID_NOT_RETURN else f"raised {node.class_name}"


def failure_warnings(calls: Sequence[CallEntry]) -> Iterator[str]:
    """How many calls of a trace have no output, and the first of them."""
    failed = [call for call in calls if call.error is not None]
    if failed:
        first = failed[0]
        yield (
            f"{len(failed)} call{'s' * (len(failed) > 1)} raised or did not return, first "
            f"{shown(first.module)}#{first.index} ({fate(failure(first))})"
        )
