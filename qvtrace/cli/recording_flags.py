"""What of a recording is stored, and what is seen of it while it runs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from qvtrace.cli.options import PATTERN, STORED, WATCHED, flag, option
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.privacy import Privacy
    from qvtrace.recording.keeping import Share


@dataclass(frozen=True)
class ShareFlags:
    """How much is stored of the tensors of a call."""

    sample_tokens: Annotated[
        int | None,
        option(
            STORED,
            "Of each tensor at most N vectors along its last dimension, at the same places in "
            "every archive; the first and the last always.",
            metavar="N",
            min=2,
        ),
    ] = None
    stats_only: Annotated[
        bool, flag(STORED, "Statistics and digests instead of elements.", "--stats-only")
    ] = False
    max_bytes: Annotated[
        str | None,
        option(
            STORED,
            "Budget for the archive, such as 200MB: a first forward counts, then tokens are "
            "sampled until every module fits.",
            metavar="SIZE",
        ),
    ] = None

    def budget(self) -> int | None:
        """Bytes; raises `UsageError` for what is no size."""
        from qvtrace.recording.budget import parse_size

        return None if self.max_bytes is None else parse_size(self.max_bytes)

    def share(self, like: "Share | None" = None) -> "Share":
        """What is asked for, else what the archive has that is followed."""
        from qvtrace.recording.keeping import Share

        asked = Share(self.sample_tokens, self.stats_only)
        return like if like is not None and asked.is_whole else asked


@dataclass(frozen=True)
class StorageFlags:
    """What of a call is stored."""

    no_inputs: Annotated[
        bool,
        flag(
            STORED,
            "Leave out positional inputs; the model's own stay, --like needs them.",
            "--no-inputs",
        ),
    ] = False
    no_kwargs: Annotated[
        bool,
        flag(
            STORED,
            "Leave out keyword inputs; the model's own stay, --like needs them.",
            "--no-kwargs",
        ),
    ] = False
    caches: Annotated[bool, flag(STORED, "Also the tensors of Cache objects.", "--caches")] = False
    weights: Annotated[
        bool, flag(STORED, "Also the dequantized weights, once each.", "--weights")
    ] = False
    private: Annotated[
        bool,
        flag(
            STORED,
            "Keep what the model is given, texts and absolute paths out of archive and reports: "
            "keyed digests stand for them.",
            "--private",
        ),
    ] = False
    private_key: Annotated[
        str | None,
        option(
            STORED,
            "File with the key of --private. (default: QVTRACE_PRIVATE_KEY, else the user's own)",
            metavar="FILE",
        ),
    ] = None

    def privacy(self, *, is_like_private: bool = False) -> "Privacy | None":
        """The key where something is to be kept private, as in an archive that is followed."""
        from qvtrace.privacy import load_privacy

        if self.private or is_like_private:
            return load_privacy(self.private_key)
        if self.private_key is not None:
            raise UsageError("--private-key: is the key of --private; add that, or leave it out")
        return None


@dataclass(frozen=True)
class WatchFlags:
    """What is seen of a recording while it runs."""

    print_calls: Annotated[
        bool,
        flag(WATCHED, "Print each call as one JSON object on a line, as it happens.", "--print"),
    ] = False
    print_inputs: Annotated[
        bool, flag(WATCHED, "Print the model's inputs before it runs.", "--print-inputs")
    ] = False
    break_at: Annotated[
        list[str],
        option(
            WATCHED,
            "Stop in the debugger (PYTHONBREAKPOINT) after each call of these modules; repeatable.",
            "--break",
            metavar=PATTERN,
        ),
    ] = field(default_factory=list)
    break_before: Annotated[
        bool, flag(WATCHED, "Also stop before each such call.", "--break-before")
    ] = False
