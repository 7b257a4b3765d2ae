"""Instance lengths of items that were read ahead, before their iteration comes.

In: an item of the data iterator and the user's forward_step. Out: its :data:`~megatron_dip.spec.workload.Microbatch`. Three ways, in this
order: a function ``dip_metadata(item)`` beside the script's forward_step; forward_step itself, recorded as it is for the batch
(so that both say the same); the model description's reading of the item. Recording runs on a copy of the item, and random numbers are put back
as they were: the iteration itself then sees what it would have seen.

Under tensor or context parallelism forward_step exchanges data between the ranks of a pipeline rank, so that these run it ahead together
(:class:`JointRecording`): what fails in it there ends the run, since ranks that went on would take each other's data for another item's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.iteration.randomness import drawing
from megatron_dip.models.capture import CapturedCall, capture
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch

HOOK = "dip_metadata"
"""Name of the function of a script that says what an item means: item -> {module: [length of each instance]}."""


class JointFailure(RuntimeError):
    """forward_step failed on an item ahead, on one of several ranks that ran it together."""


class JointRecording:
    """Of the tensor- and context-parallel ranks of the first pipeline rank: they run forward_step ahead as often and in one order.

    The planner rank leads: it says which item comes, and at the end that none does.

    Args:
        group: these ranks, on gloo.
        leader: global rank of the planner rank.
    """

    def __init__(self, group: dist.ProcessGroup, leader: int) -> None:
        self._group = group
        self._leader = leader

    def lead(self, item: int) -> None:
        """Says that the leader is about to run forward_step on this one of the items ahead."""
        self._tell(item)

    def end(self) -> None:
        """Says that the leader has looked at all items."""
        self._tell(_NONE_LEFT)

    def follow(self, record: Callable[[int], object]) -> None:
        """On the other ranks: records the items that the leader records, until it has looked at all."""
        while (item := self._tell(_NONE_LEFT)) != _NONE_LEFT:
            record(item)

    def _tell(self, item: int) -> int:
        said = torch.tensor(item, dtype=torch.int64)
        dist.broadcast(said, self._leader, group=self._group)
        return int(said)


_NONE_LEFT = -1


class ForeseenMetadata:
    """
    Args:
        chunk: one of this rank, for what forward_step asks of its model.
        item_metadata: instance lengths of an item by its form.
        call_metadata: instance lengths of a captured microbatch; None: ``item_metadata`` says them for the batch too.
        joint: the ranks with which this one must run forward_step; None: none.
    """

    def __init__(
        self, chunk: torch.nn.Module, item_metadata: Callable[[Any], Microbatch], call_metadata: Callable[[CapturedCall], Microbatch] | None,
        num_outputs: int | None, joint: JointRecording | None = None,
    ) -> None:
        self._chunk = chunk
        self._item_metadata = item_metadata
        self._call_metadata = call_metadata
        self._num_outputs = num_outputs
        self._joint = joint

    def __call__(self, forward_step: Callable[..., Any], item: Any, place: int) -> Microbatch | Exception:
        """The item's instance lengths, or why they are not known.

        Args:
            place: of the item among those ahead.

        Raises:
            JointFailure: forward_step failed where other ranks run it too.
        """
        try:
            if self._call_metadata is None:
                return self._item_metadata(item)
            hook = script_function(forward_step, HOOK)
            if hook is not None:
                return _checked(hook(item))
            return self._recorded(forward_step, item, place)
        except JointFailure:
            raise
        except Exception as error:
            return error

    def record(self, forward_step: Callable[..., Any], item: Any) -> CapturedCall:
        """Runs forward_step on a copy of an item; None: on this rank, which is given none."""
        with drawing(0), torch.no_grad():
            return capture(forward_step, None if item is None else iter([copy.deepcopy(item)]), self._chunk, self._num_outputs)

    def _recorded(self, forward_step: Callable[..., Any], item: Any, place: int) -> Microbatch:
        assert self._call_metadata is not None
        try:
            if self._joint is None:
                call = self.record(forward_step, item)
            else:
                copy.deepcopy(item)  # what cannot be copied fails here, on this rank alone
                self._joint.lead(place)
                try:
                    call = self.record(forward_step, item)
                except Exception as error:
                    raise JointFailure(f"forward_step failed on an item read ahead: {type(error).__name__}: {error}") from error
            found = self._call_metadata(call)
        except JointFailure:
            raise
        except Exception as error:
            try:
                return self._item_metadata(item)
            except Exception:
                raise error from None
        return found or self._item_metadata(item)


def script_function(forward_step: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """The function of this name in the module of the user's forward_step; None where there is none."""
    function: Any = forward_step
    while not hasattr(function, "__globals__"):
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return None
    found = function.__globals__.get(name)
    return found if callable(found) else None


def _checked(said: Any) -> Microbatch:
    """Raises InputError for what is no microbatch."""
    if not isinstance(said, dict) or not all(
        isinstance(module, str) and isinstance(lengths, list | tuple) and all(isinstance(n, int) and n > 0 for n in lengths)
        for module, lengths in said.items()
    ):
        raise InputError(HOOK, said, "is not what an item can be", 'return the length of each instance of every module, such as {"vit": [256], "lm": [4096]}')
    return {module: list(lengths) for module, lengths in said.items() if lengths}
