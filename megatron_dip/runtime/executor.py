"""Runs one rank's actions of a plan: one loop over actions and a table of handlers.

What a compute action does is behind :class:`~megatron_dip.runtime.interface.Compute`; what a message action does is behind
:class:`~megatron_dip.runtime.p2p.PointToPoint`. The executor keeps what is under way between them: payloads and gradients that wait for
their stage (``inbox``), messages that wait for their send (``outbox``), buffers that wait for their receive, and posts that wait for
their wait. All five are empty when the iteration ends. Everything that can be looked up is looked up before the loop starts.

Three things stand elsewhere than the plan's actions say. The buffer of a receive is taken ahead of the stage before it, so that on CUDA
the receive waits for no more than that stage's start (:meth:`~megatron_dip.runtime.p2p.PointToPoint.buffer`). What is to follow a stage
is called behind the posts that follow it: a neighbour waits for the message, nobody for a reduction of gradients. What a backward needs
from the host begins to come one compute action before it (:mod:`megatron_dip.runtime.offload`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_dip.runtime.interface import Compute, PayloadSpec, StageLinks
from megatron_dip.runtime.p2p import Buffer, PointToPoint, Post
from megatron_dip.runtime.timing import StageTimer
from megatron_dip.spec.action_text import format_action
from megatron_dip.spec.plan import COMPUTE_OPS, Plan, PlanStage

AfterStage = Mapping[int, Sequence[Callable[[], None]]]
"""Stage id -> what to call once that stage has run and what it made is on its way."""


class PlanLinks:
    """What hangs together in a plan, looked up once: stages with their backward, data edges with both ends."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.forward_of: dict[int, int] = {}
        """Backward or weight stage -> its forward stage; a forward stage -> itself."""
        self.backward_of: dict[int, int] = {}
        self.weight_of: dict[int, int] = {}
        """Forward stage -> its backward, its weight part."""
        self.consumer_of_tag: dict[int, int] = {}
        self.consumers: dict[int, list[int]] = {}
        """Stage -> stages that take its output."""
        for stage in plan.stages:
            if stage.kind == "fw":
                self.forward_of[stage.id] = stage.id
        for stage in plan.stages:
            if stage.kind == "bw":
                forward = next(dep.stage for dep in stage.deps if plan.stages[dep.stage].kind == "fw")
                self.forward_of[stage.id] = forward
                self.backward_of[forward] = stage.id
        for stage in plan.stages:
            if stage.kind == "w":
                backward = next(dep.stage for dep in stage.deps if plan.stages[dep.stage].kind == "bw")
                self.forward_of[stage.id] = self.forward_of[backward]
                self.weight_of[self.forward_of[backward]] = stage.id
        for consumer, tags in plan.inputs.items():
            for tag in tags:
                self.consumer_of_tag[tag] = consumer
                self.consumers.setdefault(plan.outputs[tag], []).append(consumer)
        for consumer, producers in plan.local_inputs.items():
            for producer in producers:
                self.consumers.setdefault(producer, []).append(consumer)

    def of(self, forward: PlanStage) -> StageLinks:
        stages = self.plan.stages
        backward, weight = self.backward_of.get(forward.id), self.weight_of.get(forward.id)
        return StageLinks(
            forward=forward,
            backward=None if backward is None else stages[backward],
            weight=None if weight is None else stages[weight],
            consumers=tuple(stages[consumer] for consumer in sorted(self.consumers.get(forward.id, ()))),
            grad_inputs=() if backward is None else tuple(self.forward_of[c] for c in sorted(self.consumers.get(backward, ()))),
        )


class Executor:
    """Runs the actions of one pipeline rank, iteration after iteration.

    Args:
        rank: this process's pipeline rank.
        p2p: messages to the other ranks; None only with one rank.
        device: where stages compute; on CUDA every action is an NVTX range of its text form.
    """

    def __init__(self, rank: int, p2p: PointToPoint | None, device: torch.device) -> None:
        self._rank = rank
        self._p2p = p2p
        self._device = device

    def run(self, links: PlanLinks, compute: Compute, timer: StageTimer, after_stage: AfterStage | None = None) -> None:
        """Runs this rank's actions. The timer then holds a record of each compute action.

        Raises:
            PeerError: another rank died, or sent or took nothing within the time limit.
            Whatever a stage raises, with a note saying which one.
        """
        iteration = _Iteration(links, self._rank, self._p2p, compute, timer, after_stage or {})
        steps = iteration.steps()
        if self._device.type == "cuda":
            steps = [(_in_nvtx_range(name, handler), argument, name) for handler, argument, name in steps]
        step = None
        try:
            for step in steps:
                step[0](step[1])
        except Exception as error:
            assert step is not None
            error.add_note(f"in action {step[2]} of pipeline rank {self._rank}{iteration.describe(step[1])}")
            raise
        iteration.assert_empty()


Handler = Callable[[Any], None]

POST_OPS = ("isend", "irecv")


def _in_nvtx_range(name: str, handler: Handler) -> Handler:
    def run(argument: Any) -> None:
        torch.cuda.nvtx.range_push(name)
        try:
            handler(argument)
        finally:
            torch.cuda.nvtx.range_pop()

    return run


class _Iteration:
    """The state of one iteration on one rank."""

    def __init__(
        self, links: PlanLinks, rank: int, p2p: PointToPoint | None, compute: Compute, timer: StageTimer, after_stage: AfterStage
    ) -> None:
        self._links = links
        self._rank = rank
        self._p2p = p2p
        self._compute = compute
        self._timer = timer
        self._after_stage = after_stage
        plan = links.plan
        self._stage_links = {
            forward: links.of(plan.stages[forward])
            for forward in {links.forward_of[stage] for stage in plan.order[rank]}
        }
        self._inbox: dict[int, dict[int, torch.Tensor]] = {}
        """Stage -> producer -> what came from it (for a backward: by its forward stage's consumers)."""
        self._outbox: dict[int, torch.Tensor] = {}
        """Tag -> what is to be sent."""
        self._buffers: dict[int, Buffer] = {}
        self._sends: dict[int, Post] = {}
        self._receives: dict[int, Post] = {}
        self._tags: dict[int, dict[int, int]] = {}
        """Producer -> consumer -> tag of the message between them; absent = handed over on this rank."""
        for tag, producer in plan.outputs.items():
            self._tags.setdefault(producer, {})[links.consumer_of_tag[tag]] = tag

    def steps(self) -> list[tuple[Handler, Any, str]]:
        """The rank's actions as (handler, argument, text form)."""
        table: dict[str, Handler] = {
            "fw": self._forward, "bw": self._backward, "w": self._weight, "isend": self._isend, "irecv": self._irecv,
            "wait_send": self._wait_send, "wait_recv": self._wait_recv,
        }
        plan = self._links.plan
        steps: list[tuple[Handler, Any, str]] = []
        following: list[tuple[Handler, Any, str]] = []
        """What is to be called behind the posts of the last stage."""
        last: StageLinks | None = None
        """Of the compute action before."""
        last_op = ""
        before_stage = 0
        """Where the last stage's step is: buffers of the receives behind it are taken there."""
        for action in plan.actions[self._rank]:
            handler, name = table[action.op], format_action(action)
            if action.op not in POST_OPS:
                steps.extend(following)
                following = []
            if action.op in COMPUTE_OPS:
                assert isinstance(action.stage, int)
                of_stage = self._stage_links[self._links.forward_of[action.stage]]
                if action.op == "bw" and "offload" in of_stage.forward.strategy and last is not None and last is not of_stage:
                    steps.insert(before_stage, (self._fetch_ahead, (of_stage, last if last_op == "bw" else None), f"fetch for {name}"))
                before_stage = len(steps)
                last, last_op = of_stage, action.op
                steps.append((handler, of_stage, name))
                following = [(_call, function, f"after {name}") for function in self._after_stage.get(action.stage, ())]
            elif action.op == "irecv":
                assert isinstance(action.tag, int)
                steps.insert(before_stage, (self._take_buffer, (action.tag, self._spec(action.tag)), f"buffer of {name}"))
                before_stage += 1
                steps.append((handler, (action.tag, action.peer), name))
            elif action.op == "isend":
                steps.append((handler, (action.tag, action.peer), name))
            else:
                steps.append((handler, action.tag, name))
        return [*steps, *following]

    def _spec(self, tag: int) -> PayloadSpec:
        """A message between two forward stages is a payload; one between their backwards is that payload's gradient."""
        stages, links = self._links.plan.stages, self._links
        producer, consumer = stages[links.plan.outputs[tag]], stages[links.consumer_of_tag[tag]]
        if producer.kind == "bw":
            producer, consumer = stages[links.forward_of[consumer.id]], stages[links.forward_of[producer.id]]
        return self._compute.payload(producer, consumer)

    def _deliver(self, producer: int, consumer: int, tensor: torch.Tensor) -> None:
        tag = self._tags.get(producer, {}).get(consumer)
        if tag is None:
            self._inbox.setdefault(consumer, {})[producer] = tensor
        else:
            self._outbox[tag] = tensor

    def _forward(self, links: StageLinks) -> None:
        stage = links.forward.id
        inputs = self._inbox.pop(stage, {})
        self._timer.begin()
        payloads = self._compute.forward(links, inputs)
        self._timer.end(stage)
        for consumer in links.consumers:
            self._deliver(stage, consumer.id, payloads[consumer.id])

    def _backward(self, links: StageLinks) -> None:
        assert links.backward is not None
        stage = links.backward.id
        grads = {self._links.forward_of[producer]: grad for producer, grad in self._inbox.pop(stage, {}).items()}
        self._timer.begin()
        input_grads = self._compute.backward(links, grads)
        self._timer.end(stage)
        for producer in links.grad_inputs:
            self._deliver(stage, self._links.backward_of[producer], input_grads[producer])

    def _fetch_ahead(self, argument: tuple[StageLinks, StageLinks | None]) -> None:
        self._compute.fetch_ahead(*argument)

    def _weight(self, links: StageLinks) -> None:
        assert links.weight is not None
        self._timer.begin()
        self._compute.weight(links)
        self._timer.end(links.weight.id)

    def _isend(self, argument: tuple[int, int]) -> None:
        tag, peer = argument
        assert self._p2p is not None
        self._sends[tag] = self._p2p.isend(self._outbox.pop(tag), peer)

    def _take_buffer(self, argument: tuple[int, PayloadSpec]) -> None:
        tag, spec = argument
        assert self._p2p is not None
        self._buffers[tag] = self._p2p.buffer(spec)

    def _irecv(self, argument: tuple[int, int]) -> None:
        tag, peer = argument
        assert self._p2p is not None
        self._receives[tag] = self._p2p.irecv(self._buffers.pop(tag), peer)

    def _wait_send(self, tag: int) -> None:
        assert self._p2p is not None
        self._p2p.wait_send(self._sends.pop(tag))

    def _wait_recv(self, tag: int) -> None:
        assert self._p2p is not None
        message = self._p2p.wait_recv(self._receives.pop(tag))
        self._inbox.setdefault(self._links.consumer_of_tag[tag], {})[self._links.plan.outputs[tag]] = message

    def describe(self, argument: Any) -> str:
        """Which module's stage or message an action is about, for errors."""
        tag = argument[0] if isinstance(argument, tuple) else argument
        if isinstance(tag, StageLinks):
            return f" ({_describe(tag.forward)})"
        if not isinstance(tag, int):
            return ""
        stages = self._links.plan.stages
        producer, consumer = stages[self._links.plan.outputs[tag]], stages[self._links.consumer_of_tag[tag]]
        return f" (message from {_describe(producer)} to {_describe(consumer)})"

    def assert_empty(self) -> None:
        """The iteration's end: nothing may be left under way."""
        assert not self._inbox, f"never taken: {self._inbox.keys()}"
        assert not self._outbox, f"never sent: {self._outbox.keys()}"
        assert not self._buffers, f"never received into: {self._buffers.keys()}"
        assert not self._sends, f"sends never waited for: {self._sends.keys()}"
        assert not self._receives, f"receives never waited for: {self._receives.keys()}"
        self._compute.assert_empty()


def _call(function: Callable[[], None]) -> None:
    function()


def _describe(stage: PlanStage) -> str:
    return f"{stage.kind} {stage.module} chunk {stage.vp_stage} rank {stage.rank} microbatch {stage.microbatch}.{stage.sub_microbatch}"
