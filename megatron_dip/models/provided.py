"""What a training script's own model provider would build, found out without building it.

A provider is run once with the constructors of the large modules replaced by :class:`Sketch`: the script's own code, and Megatron's,
decides every argument, and the chunks are built from these arguments later, each with its own part of the layers. Nothing of the
model's logic is repeated here, so that scripts and releases may differ in how they arrive at their arguments.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.huggingface import module as hugging_face
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.built_in import WholeModel
from megatron_dip.models.description import bind_arguments
from megatron_dip.models.layout import ModuleCut
from megatron_dip.spec.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says of itself, to whoever imports it, that it is experimental
    from megatron.core.models.mimo import MimoModel
    from megatron.core.models.mimo.model import base as mimo_model
    from megatron.core.models.mimo.submodules import base as mimo_submodules

_LLAVA_PARTS = ("GPTModel", "CLIPViTModel", "RADIOViTModel", "MultimodalProjector")
_LLAVA_OTHERS = ("MambaModel", "HybridModel")


class Sketch(torch.nn.Module):
    """Stands where a provider builds a module: its class and arguments, and one weight by which to see whether the script froze it."""

    def __init__(self, builder: Callable[..., torch.nn.Module], arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.builder = builder
        self.arguments = dict(arguments)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    @property
    def trainable(self) -> bool:
        return self.weight.requires_grad

    def build(self, **changes: Any) -> torch.nn.Module:
        """The module, with some arguments changed; frozen where the script froze it, or where its own classes freeze weights."""
        module = self.builder(**{**self.arguments, **changes})
        if not self.trainable:
            module.requires_grad_(False)
        return module

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise _loads_too_early()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise _loads_too_early()


def _loads_too_early() -> InputError:
    return InputError(
        "model_provider", "a checkpoint of one part", "is loaded while the model is described, before its chunks exist",
        "give a checkpoint of the whole model with --load",
    )


def sketch_model(provider: Callable[..., MegatronModule], **arguments: Any) -> MegatronModule:
    """Runs a script's model provider and gives what it returns: a LLaVAModel or MimoModel whose parts are sketches, or a GPT model's sketch.

    Args:
        arguments: what Megatron hands to providers; those that this provider does not take are left out.

    Raises:
        InputError: for models that DIP cannot cut.
    """
    with _sketching_llava(), _sketching_gpt(), _sketching_mimo():
        model = call_provider(provider, **arguments)
    if not isinstance(model, LLaVAModel | GPTModel | MimoModel | WholeModel) and packed_tower(model) is None:
        raise InputError(
            "model_provider", type(model).__name__, "DIP can cut LLaVAModel, MimoModel, GPTModel, the models built here (WholeModel), and "
            f"models of a GPTModel called language_model and a tower called {' or '.join(_TOWERS)}{_instead(model)}",
            "use --pipeline-schedule default for this model",
        )
    return model


_TOWERS = ("vision_model", "visual")
PACKED_INPUTS = ("input_ids", "pixel_values", "image_grid_thw")


def packed_tower(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """Name and module of the tower of a model of the form that :mod:`megatron_dip.models.packed_vision` describes; None: it has another form."""
    language = getattr(model, "language_model", None)
    if type(language) is not GPTModel or not isinstance(getattr(language, "sketch", None), Sketch):
        return None
    if not set(PACKED_INPUTS) <= inspect.signature(type(model).forward).parameters.keys():
        return None
    return next(((name, tower) for name in _TOWERS if isinstance(tower := getattr(model, name, None), torch.nn.Module)), None)


def _instead(model: torch.nn.Module) -> str:
    language = getattr(model, "language_model", None)
    return "" if language is None or type(language) is GPTModel else f", here a {type(language).__name__}"


def call_provider(provider: Callable[..., MegatronModule], **arguments: Any) -> MegatronModule:
    parameters = inspect.signature(provider).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return provider(pre_process=True, post_process=True, **arguments)


@contextlib.contextmanager
def _sketching_llava() -> Iterator[None]:
    """LLaVAModel's constructor runs as it is, for the whole model, and finds sketches where it would build its parts."""

    def whole(self: LLaVAModel, *args: Any, **kwargs: Any) -> None:
        # Scripts build the parts of a stock pipeline rank; DIP cuts the whole model.
        everything = {"pre_process": True, "post_process": True, "add_encoder": True, "add_decoder": True}
        given = bind_arguments(original, args, kwargs)
        original(self, **{**given, **everything})
        self.given = given  # type: ignore[assignment]

    def refuse(name: str) -> Callable[..., Any]:
        def constructor(*args: Any, **kwargs: Any) -> Any:
            raise InputError("model_provider", name, "DIP cannot cut state-space and hybrid language models", "use --pipeline-schedule default")

        return constructor

    original = LLaVAModel.__init__
    with contextlib.ExitStack() as stack:
        for name in _LLAVA_PARTS:
            stack.enter_context(replaced(llava_model, name, _sketcher(getattr(llava_model, name))))
        for name in _LLAVA_OTHERS:
            if hasattr(llava_model, name):
                stack.enter_context(replaced(llava_model, name, refuse(name)))
        stack.enter_context(replaced(hugging_face, "build_hf_model", _sketcher(hugging_face.build_hf_model)))
        stack.enter_context(replaced(LLaVAModel, "__init__", whole))
        yield


def _sketcher(builder: Callable[..., torch.nn.Module]) -> Callable[..., Sketch]:
    constructor = builder.__init__ if isinstance(builder, type) else _without_self(builder)  # type: ignore[misc]  # of GPTModel another one stands there when a provider runs

    def sketch(*args: Any, **kwargs: Any) -> Sketch:
        return Sketch(builder, bind_arguments(constructor, args, kwargs))

    return sketch


def _without_self(function: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """With a constructor's signature."""

    @functools.wraps(function)
    def constructor(*args: Any, **kwargs: Any) -> torch.nn.Module:
        return function(*args, **kwargs)

    own = inspect.signature(function)
    constructor.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *own.parameters.values()]
    )
    return constructor


@contextlib.contextmanager
def _sketching_gpt() -> Iterator[None]:
    """A GPTModel that a provider builds holds its own sketch and no layers."""

    def sketch(self: GPTModel, *args: Any, **kwargs: Any) -> None:
        arguments = bind_arguments(original, args, kwargs)
        MegatronModule.__init__(self, config=arguments["config"])
        self.sketch = Sketch(GPTModel, arguments)

    original = GPTModel.__init__
    with replaced(GPTModel, "__init__", sketch):
        yield


@contextlib.contextmanager
def _sketching_mimo() -> Iterator[None]:
    """MimoModel's constructor runs as it is and finds sketches where it would build encoders, projections and the language model."""

    def build(spec: ModuleSpec | type, *args: Any, **kwargs: Any) -> Sketch:
        if not isinstance(spec, ModuleSpec):
            return Sketch(spec, kwargs)
        builder = spec.module if isinstance(spec.module, type) else import_module(spec.module)
        submodules = {} if spec.submodules is None else {"submodules": spec.submodules}
        return Sketch(builder, {**(spec.params or {}), **submodules, **kwargs})

    with replaced(mimo_model, "build_module", build), replaced(mimo_submodules, "build_module", build):
        yield


@contextlib.contextmanager
def gpt_cut(
    config: TransformerConfig, *, pre_process: bool, post_process: bool, vp_stage: int | None, layer_spec: Callable[[Any], Any]
) -> Iterator[None]:
    """While active, every GPTModel is built as this part of the model.

    Args:
        layer_spec: the part's ``transformer_layer_spec``, from the script's.
    """

    def part(self: GPTModel, *args: Any, **kwargs: Any) -> None:
        given = bind_arguments(original, args, kwargs)
        cut = {
            "config": config, "pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage,
            "transformer_layer_spec": layer_spec(given["transformer_layer_spec"]),
        }
        original(self, **{**given, **cut})

    original = GPTModel.__init__
    with replaced(GPTModel, "__init__", part):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block the owner's attribute is another one."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cut_config(config: TransformerConfig, cut: ModuleCut) -> TransformerConfig:
    """A module's config narrowed to a cut, with the attributes that scripts set beyond the config's own fields."""
    own = cut.config(config)
    names = {field.name for field in fields(config)}
    for name, value in vars(config).items():
        if name not in names and not hasattr(own, name):
            setattr(own, name, value)
    return own
