"""Where in a recording the calls are that are made now."""

from dataclasses import dataclass

from qvtrace.recording.cache_growth import Moment


@dataclass
class Position:
    """Which sample runs, and which step of its generation."""

    sample: int = 0
    step: int = 0

    def moment(self) -> Moment:
        """As it is now."""
        return self.sample, self.step
