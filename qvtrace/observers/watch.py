"""Tells observers of calls, and keeps what they raise from the model."""

from bdb import BdbQuit
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from qvtrace.observers.observer import ObservedCall, Observer


class Watch:
    """The observers of one recording; false when there are none, or none any more."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.failures: list[tuple[Observer, Exception]] = []
        self._observers = tuple(observers)

    def __bool__(self) -> bool:
        return bool(self._observers)

    def begin(self, names: Collection[str]) -> None:
        """Tell of the beginning; what an observer raises goes on its way."""
        for observer in self._observers:
            observer.begin(names)

    def before(self, call: ObservedCall) -> None:
        """Tell of a call that begins."""
        for observer in self._observers:
            with self._dismissed_if_it_raises(observer):
                observer.before(call)

    def after(self, call: ObservedCall) -> None:
        """Tell of a call that has ended."""
        for observer in self._observers:
            with self._dismissed_if_it_raises(observer):
                observer.after(call)

    @contextmanager
    def _dismissed_if_it_raises(self, observer: Observer) -> Iterator[None]:
        try:
            yield
        except BdbQuit:
            raise
        except Exception as error:
            self._observers = tuple(other for other in self._observers if other is not observer)
            self.failures.append((observer, error))
