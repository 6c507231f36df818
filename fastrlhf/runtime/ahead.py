"""Prepares the data of the next step in a thread while the current step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

B = TypeVar("B")
T = TypeVar("T")


class Ahead(Generic[B, T]):
    """Calls a function for the batches of consecutive steps. The call for a step runs during the previous step:
    `with Ahead(batches, make) as ahead`, then `ahead.take(step)` in every step.

    The function runs in one other thread, so it must not communicate with other ranks, draw from a generator that the
    main thread uses, or change what the main thread reads. Nothing is made for steps that a resumed run skips.
    """

    def __init__(self, batches: Iterable[B], make: Callable[[B], T]) -> None:
        self._batches, self._make = enumerate(batches), make
        self._next: tuple[int, Future[T]] | None = None

    def __enter__(self) -> Ahead[B, T]:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> T:
        """Returns the result for the batch of `step`, counted from 0, and begins with the next batch. Steps must
        ascend. An exception of the function is raised here, in the step that needs its result."""
        if self._next is None or self._next[0] != step:
            self._next = self._begin(step)
        assert self._next is not None, f"step {step} has no batch"
        made = self._next[1].result()
        self._next = self._begin(step + 1)
        return made

    def _begin(self, step: int) -> tuple[int, Future[T]] | None:
        for number, batch in self._batches:
            if number == step:
                return number, self._thread.submit(self._make, batch)
        return None
