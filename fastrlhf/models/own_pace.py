"""Lets the ranks of a run make different numbers of passes through sharded models, without gathering whole models.

A pass through a sharded model gathers its layers one by one, which is possible only if all ranks make the pass
together. While a rank samples or evaluates its rows, other ranks may be done with theirs. Before each pass a rank
therefore announces the model that it wants to run. All ranks then run the first model that any of them wants: a rank
that does not want this model runs it on a single token and ignores the result. The context ends when no rank wants a
pass. Within the context the ranks exchange nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from transformers import PreTrainedModel

from fastrlhf.distributed import ranks

_PACE = "fastrlhf_pace"  # attribute of a sharded model within the context, with its _Pace and its number
_DONE = 1 << 30  # what a rank announces when it wants no pass any more


class _Pace:
    """The state of this rank in a context. `in_pass`: a pass is under way, or has ended in an error."""

    def __init__(self, models: Sequence[PreTrainedModel], run: Callable[[PreTrainedModel], None]) -> None:
        self._models, self._run = models, run
        self.in_pass = self._joining = False

    def begin(self, number: int) -> None:
        """Waits until it is the turn of the model `number`, and meanwhile takes part in the passes of other ranks."""
        if not self._joining:
            ranks.forbid_unwinding()
            self.in_pass = True
            self._join(number)

    def end(self) -> None:
        if not self._joining:
            self.in_pass = False
            ranks.allow_unwinding()

    def finish(self) -> None:
        """Takes part in the passes of other ranks until no rank wants a pass."""
        self._join(_DONE)

    def _join(self, wanted: int) -> None:
        while (turn := ranks.smallest(wanted)) != wanted:
            self._joining = True
            with torch.no_grad():
                self._run(self._models[turn])
            self._joining = False


@contextmanager
def own_pace_of(models: Sequence[PreTrainedModel], run: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Context in which ranks may make different numbers of passes through sharded models. `run` makes a short pass
    through a model. The weights outside the layers, such as embeddings and heads, stay gathered in the context.

    An error between two passes is raised on every rank at the end of the context; an error within a pass only on this
    rank, at once, because the other ranks wait for this rank within the pass.
    """
    pace, error = _Pace(models, run), None
    with ExitStack() as stack:
        for number, model in enumerate(models):
            stack.enter_context(_outside_layers(model))
            setattr(model, _PACE, (pace, number))
            stack.callback(delattr, model, _PACE)
            stack.enter_context(_hooked(model))
        try:
            with ranks.unwinding():
                yield
        except (Exception, KeyboardInterrupt) as raised:
            if pace.in_pass:
                raise
            error = raised
        pace.finish()
    ranks.raise_first(error)


@contextmanager
def announced(model: PreTrainedModel) -> Iterator[None]:
    """Context of a pass through the model; it waits until all ranks make the pass. Outside `own_pace_of` it does
    nothing."""
    pace, number = getattr(model, _PACE, (None, 0))
    if pace is None:
        yield
        return
    pace.begin(number)
    yield
    pace.end()


def gathered_outside_layers(model: PreTrainedModel) -> bool:
    """Returns whether the model is in the context `own_pace_of`."""
    return hasattr(model, _PACE)


@contextmanager
def _hooked(model: PreTrainedModel) -> Iterator[None]:
    """Context in which calls of the whole model are announced; calls of the backbone announce themselves."""
    pace, number = getattr(model, _PACE)

    def before(module: Module, arguments: Any) -> None:
        pace.begin(number)

    def after(module: Module, arguments: Any, output: Any) -> None:
        pace.end()

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _outside_layers(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the weights outside the layers are gathered."""
    score = getattr(model, "score", None)
    groups = [cast(FSDPModule, model), *[score] * isinstance(score, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()
        for group in groups[1:]:
            group.set_reshard_after_forward(True, recurse=False)
