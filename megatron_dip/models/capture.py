"""Runs the user's forward_step once a microbatch without running the model: what it gives the model, and how it makes the loss.

Megatron's contract: ``output, loss_func = forward_step(data_iterator, model)``. DIP cannot run the model at that moment, since its chunks
run later, in the plan's order and on other ranks. So forward_step gets a :class:`RecordingModel`, which records the one call and returns
a :class:`Placeholder` for the output. Whatever forward_step makes of the placeholder by unpacking it and by binding it into its loss
function (``functools.partial``, closures, tuples) is put right when the real output is there. Computing with it inside forward_step is
an error that says so.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dip.spec.errors import InputError


class Placeholder:
    """Stands for the model's output, or for one of its ``num_outputs`` parts, until the pipeline has made it."""

    __slots__ = ("_num_outputs", "_part")

    def __init__(self, num_outputs: int | None = None, part: int | None = None) -> None:
        self._num_outputs = num_outputs
        self._part = part

    def __iter__(self) -> Iterator[Placeholder]:
        if self._num_outputs is None:
            raise _used_too_early("unpacked into several values, but the model returns one tensor")
        return iter([Placeholder(part=part) for part in range(self._num_outputs)])

    def __getitem__(self, part: int) -> Placeholder:
        if self._num_outputs is None or not isinstance(part, int) or not -self._num_outputs <= part < self._num_outputs:
            raise _used_too_early(f"indexed with {part!r}")
        return Placeholder(part=part % self._num_outputs)

    def resolve(self, output: Any) -> Any:
        """The real value, given what the model returned."""
        return output if self._part is None else output[self._part]

    def __getattr__(self, name: str) -> Any:
        raise _used_too_early(f"its attribute {name!r} is used")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _used_too_early(f"passed to {getattr(func, '__name__', func)}")


def _refuse(name: str) -> Callable[..., Any]:
    def method(self: Placeholder, *args: Any) -> Any:
        raise _used_too_early(f"used in {name}")

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg", "lt", "gt", "le", "ge",
              "bool", "len", "float", "int"):
    setattr(Placeholder, f"__{_name}__", _refuse(f"__{_name}__"))


def _used_too_early(how: str) -> InputError:
    return InputError(
        "forward_step", "the model's output", f"{how} before the pipeline has made it",
        "return the output as the model gives it, and compute with it in the loss function",
    )


class RecordingModel:
    """What forward_step gets as ``model``: calling it records the arguments; everything else is the real model's.

    Args:
        model: a chunk of this rank, for attributes such as ``model.module.module.image_token_index``.
        num_outputs: how many values the whole model returns; None = one tensor.
    """

    def __init__(self, model: Any, num_outputs: int | None = None) -> None:
        self._model = model
        self._num_outputs = num_outputs
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        self.calls.append((args, kwargs))
        return Placeholder(self._num_outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True, slots=True)
class CapturedCall:
    """One microbatch: the arguments for the model, and what forward_step returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    """First value that forward_step returned, placeholders inside."""
    loss_function: Callable[..., Any] | None
    """Second value, placeholders inside; None = the output itself is wanted."""

    def resolved_output(self, output: Any) -> Any:
        """What forward_step would have returned first, had the model returned ``output``."""
        return resolve(self.output, output)

    def resolved_loss_function(self, output: Any) -> Callable[..., Any] | None:
        """Its second value, likewise."""
        return resolve(self.loss_function, output)


def capture(
    forward_step: Callable[..., Any], data_iterator: Iterator[Any] | None, model: Any, num_outputs: int | None = None
) -> CapturedCall:
    """Runs forward_step for one microbatch. Raises InputError when it does not call the model exactly once."""
    recorder = RecordingModel(model, num_outputs)
    returned = forward_step(data_iterator, recorder)
    if len(recorder.calls) != 1:
        raise InputError(
            "forward_step", getattr(forward_step, "__name__", forward_step), f"called the model {len(recorder.calls)} times",
            "call the model that it is given exactly once for each microbatch",
        )
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise InputError(
            "forward_step", getattr(forward_step, "__name__", forward_step), f"returned {type(returned).__name__} instead of two values",
            "return (output, loss function), as Megatron's schedules want it",
        )
    args, kwargs = recorder.calls[0]
    return CapturedCall(args, kwargs, returned[0], returned[1])


def resolve(value: Any, output: Any) -> Any:
    """``value`` with every placeholder in it replaced by the real output; what holds none is returned as it is."""
    if isinstance(value, Placeholder):
        return value.resolve(output)
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, functools.partial):
        args = resolve(value.args, output)
        keywords = resolve(value.keywords, output)
        function = resolve(value.func, output)
        unchanged = args is value.args and keywords is value.keywords and function is value.func
        return value if unchanged else functools.partial(function, *args, **keywords)
    if type(value) in (tuple, list):
        items = [resolve(item, output) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        mapped = {key: resolve(item, output) for key, item in value.items()}
        return value if all(mapped[key] is value[key] for key in value) else mapped
    if isinstance(value, types.FunctionType) and value.__closure__:
        return _resolve_closure(value, output)
    return value


def _resolve_closure(function: types.FunctionType, output: Any) -> types.FunctionType:
    """A copy of the function whose closure holds the real output, if its closure holds a placeholder."""
    cells = []
    changed = False
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            cells.append(cell)
            continue
        # Functions within functions are left alone: they might refer to each other without end.
        new = content if isinstance(content, types.FunctionType) else resolve(content, output)
        changed |= new is not content
        cells.append(cell if new is content else types.CellType(new))
    if not changed:
        return function
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
