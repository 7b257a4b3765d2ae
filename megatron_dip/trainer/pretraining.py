"""What training scripts on Megatron-LM's ``pretrain()`` share that train a model which is built here: providers, data streams, the call.

In: a :class:`~megatron_dip.models.built_in.BuiltInConfig` and energon WebDatasets of crude samples. Needs a Megatron-LM checkout, patched or
under the launcher. Works with every release from 0.16 on: what differs between them is the form of ``pretrain()``.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from megatron_dip.models.built_in import BuiltInConfig, WholeModel
from megatron_dip.spec.codec import read_file
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModuleSpec
from megatron_dip.spec.training import TextToVideoModel, VisionLanguageModel
from megatron_dip.spec.workload import Parallel
from megatron_dip.trainer.samples import LeftOut
from megatron_dip.trainer.stock_layouts import stock_cuts

Model = TypeVar("Model", VisionLanguageModel, TextToVideoModel)

SCALE_DOWN = 64
"""What --scale-down divides by where no number is given: the paper's five setups then train on two cores within a minute."""


def add_scale_down(group: Any) -> None:
    """The flag that makes a named setup small."""
    group.add_argument(
        "--scale-down", type=int, nargs="?", const=SCALE_DOWN, default=1, metavar="N",
        help=f"divides widths, layers, vocabulary, images or clips, and sequences (default 1; without a number {SCALE_DOWN})",
    )


def check_scale_down(args: Any) -> None:
    """Raises InputError for a number below 1, and where the sizes are a file's."""
    if args.scale_down < 1:
        raise InputError("--scale-down", args.scale_down, "must be at least 1", f"give a whole number such as {SCALE_DOWN}")
    if args.model is not None and args.scale_down > 1:
        raise InputError("--scale-down", args.scale_down, "divides the sizes of a named setup", "write the sizes you want into the file")


def scaled(module: ModuleSpec, factor: int) -> ModuleSpec:
    """The module with widths and layers divided; unchanged for 1.

    Heads keep a size of at least 8 in multiples of 4, for rotary positions in two dimensions; four layers are left, so that two pipeline
    ranks can hold two chunks each.
    """
    if factor == 1:
        return module
    heads = max(4, module.num_attention_heads // factor)
    size = max(8, module.hidden_size // factor // heads // 4 * 4)
    groups = None if module.query_groups == module.num_attention_heads else max(2, min(heads, module.query_groups // factor))
    return msgspec.structs.replace(
        module, num_layers=max(4, module.num_layers // factor), hidden_size=heads * size,
        ffn_hidden_size=max(16, module.ffn_hidden_size // factor // 8 * 8), num_attention_heads=heads, num_query_groups=groups,
        vocab_size=None if module.vocab_size is None else max(128, module.vocab_size // factor // 128 * 128),
    )


def read_model_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file. Raises InputError for a file that holds none."""
    text = read_file(path)
    try:
        raw = msgspec.yaml.decode(text) if path.suffix in (".yaml", ".yml") else msgspec.json.decode(text)
    except (msgspec.DecodeError, ImportError) as error:
        raise InputError("--model", str(path), f"cannot be read ({error})", "give JSON or YAML") from error
    if not isinstance(raw, dict):
        raise InputError("--model", str(path), "holds no model", "give the config.json of an example")
    return raw


def model_of_example(path: Path, raw: Mapping[str, Any], kind: type[Model]) -> Model:
    """The field ``model`` of an example's config.json. Raises InputError for another kind of model."""
    if "model" not in raw:
        raise InputError("--model", str(path), "has no field model", "give the config.json of an example")
    try:
        model = msgspec.convert(raw["model"], kind)
    except msgspec.ValidationError as error:
        raise InputError(f"--model: {path}", "model", f"is not a model's ({error})", "mend the field named") from error
    model.validate("model")
    return model


def parallel_of(args: Any) -> Parallel:
    """Sizes of Megatron's namespace."""
    return Parallel(
        tensor=args.tensor_model_parallel_size, pipeline=args.pipeline_model_parallel_size, data=args.data_parallel_size,
        context=args.context_parallel_size, sequence=bool(args.sequence_parallel),
    )


def whole_model(config: BuiltInConfig, args: Any, pg_collection: Any) -> torch.nn.Module:
    """What a model provider returns: the description of the model for DIP, or under the stock schedule the model of one pipeline rank."""
    if getattr(args, "pipeline_schedule", "default") == "dip":
        return WholeModel(config)
    if args.pipeline_model_parallel_size > 1:
        raise InputError(
            "--pipeline-model-parallel-size", args.pipeline_model_parallel_size, "this model is cut for --pipeline-schedule dip alone",
            "use that schedule, or one pipeline rank",
        )
    from megatron.core.process_groups_config import ProcessGroupCollection

    whole = config.build_stage(stock_cuts(config, "scripts", ranks=1), 0, 0, is_chained=False)
    whole.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    return whole


class NumberedStream:
    """An endless stream of microbatches of which number i is ``make(i)``; this replica reads first, first + stride, ..."""

    def __init__(self, make: Callable[[int], dict[str, torch.Tensor]], first: int, stride: int) -> None:
        self.make, self.number, self.stride = make, first, stride

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        item = self.make(self.number)
        self.number += self.stride
        return item


class EnergonStream:
    """An endless stream of a loader's microbatches, whose place Megatron saves with ``--dataloader-save``."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._microbatches = self._cycle()

    def _cycle(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            count = 0
            for item in self.loader:
                count += 1
                yield {name: value for name, value in item.items() if isinstance(value, torch.Tensor)}
            if not count:
                raise InputError("--data-path", "every sample", "was left out", "see the messages above")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return next(self._microbatches)

    def save_state(self) -> Any:
        return self.loader.save_state_rank()


def read_webdataset(
    args: Any, make_encoder: Callable[[LeftOut], Any], *, packing_buffer_size: int
) -> tuple[EnergonStream, EnergonStream | None, EnergonStream | None]:
    """Streams of the data set that ``--data-path`` names, for training, validation and test: the part of this replica.

    Args:
        args: Megatron's namespace.
        make_encoder: gives a task encoder that packs samples into microbatches, and tells its argument what it leaves out.
        packing_buffer_size: samples among which those of a pack are chosen.
    """
    from megatron.core import parallel_state

    paths = args.data_path or []
    if len(paths) != 1:
        raise InputError("--data-path", paths, "is not one folder", "name an energon WebDataset, or give --mock-data")
    try:
        from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
    except ImportError as error:
        raise InputError("--data-path", paths[0], f"is read with a package that is missing: {error}", "pip install megatron-energon") from error
    folder, replica = Path(paths[0]), parallel_state.get_data_parallel_rank()
    inside = (parallel_state.get_tensor_model_parallel_rank, parallel_state.get_pipeline_model_parallel_rank, parallel_state.get_context_parallel_rank)
    left_out = LeftOut(speaks=all(rank() == 0 for rank in inside))
    workers = WorkerConfig(
        rank=replica, world_size=parallel_state.get_data_parallel_world_size(), num_workers=args.num_workers,
        data_parallel_group=parallel_state.get_data_parallel_group(), seed_offset=args.seed,
    )

    def read(is_training: bool) -> Any:
        common: dict[str, Any] = {
            "batch_size": None, "task_encoder": make_encoder(left_out), "worker_config": workers, "packing_buffer_size": packing_buffer_size,
            "auto_decode": False, "handler": left_out.unreadable,
        }
        try:
            # For evaluation the part repeats too: energon's packing fails at the end of data with packs left over (7.4).
            dataset = get_train_dataset(
                folder, split_part="train" if is_training else "val", shuffle_buffer_size=100 if is_training else None,
                max_samples_per_sequence=100, virtual_epoch_length=1000, **common,
            )
        except (OSError, AssertionError, ValueError, KeyError) as error:
            raise InputError(
                "--data-path", str(folder), f"is no prepared energon data set of crude samples ({type(error).__name__}: {error})",
                "run energon prepare on it, with the class CrudeWebdataset",
            ) from error
        return get_savable_loader(dataset)

    training = read(is_training=True)
    state = _loader_state(args, replica)
    if state is not None:
        training.restore_state_rank(state)
    evaluated = EnergonStream(read(is_training=False)) if args.eval_iters else None
    return EnergonStream(training), evaluated, evaluated


def _loader_state(args: Any, replica: int) -> Any:
    """Where the loader stood behind the checkpoint that is loaded; None where nothing was saved of it."""
    from megatron.training.checkpointing import get_checkpoint_name

    folder = getattr(args, "dataloader_save", None)
    if not args.load or not folder or not args.iteration:
        return None
    path = Path(get_checkpoint_name(folder, args.iteration, pipeline_rank=0, basename=f"train_dataloader_dprank{replica:03d}.pt"))
    if not path.is_file():
        raise InputError("--dataloader-save", str(path), "does not exist", "name the folder of the run that is gone on with, or leave it out")
    return torch.load(path, weights_only=False)["dataloader_state_dict"]


def start_pretrain(
    datasets_provider: Callable[..., Any], model_provider: Callable[..., Any], forward_step: Callable[..., Any],
    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser], defaults: dict[str, Any],
) -> None:
    """Calls Megatron-LM's ``pretrain()`` in the form that the checkout's release has."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    given = {
        "train_valid_test_dataset_provider": datasets_provider, "model_provider": model_provider, "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    parameters = inspect.signature(pretrain).parameters
    if "extra_args_provider" in parameters:
        pretrain(**given, extra_args_provider=add_arguments, args_defaults=defaults)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults=defaults)
    pretrain(pretrain_cfg_container_from_args(args), **given)
