"""One call at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class _Lockable(Protocol):
    _lock: threading.RLock


_P = ParamSpec("_P")
_T = TypeVar("_T")
_Owner = TypeVar("_Owner", bound=_Lockable)


def alone(method: Callable[Concatenate[_Owner, _P], _T]) -> Callable[Concatenate[_Owner, _P], _T]:
    """One call at a time on a model and what belongs to it; a second thread gets an error, not a race."""

    @functools.wraps(method)
    def locked(self: _Owner, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        lock = self._lock
        if not lock.acquire(blocking=False):
            raise RuntimeError(
                "this model is in use by another thread: take turns, or give each thread a model of its own"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            lock.release()

    return locked
