"""How an example is trained: the ``megatron-dip/example/1`` format, the ``config.json`` of an example's folder.

The folder also holds ``example.py``, which brings the data and Megatron's ``forward_step``; see :mod:`megatron_dip.trainer.loop`
for what that module must define. The command line beats the file.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.orders import OrderName
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Parallel

EXAMPLE_FORMAT = "megatron-dip/example/1"


class ImageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an image becomes patches for the vision module and tokens for the backbone."""

    size: int
    """Height and width in pixels."""
    channels: int
    patch: int
    """Height and width of a patch in pixels."""
    merge: int
    """Patches along one side that become one token of the backbone."""
    token_id: int
    """Id of the token that an image's embeddings replace, ``tokens`` times in a row."""
    class_token: bool = False
    """A learned token stands before an image's patches, with a position of its own; it goes behind the last layer (CLIP, InternViT)."""
    end_token: bool = False
    """A learned embedding stands behind an image's own ones (LLaVA-OneVision's ``image_newline``)."""

    @property
    def patches(self) -> int:
        """Sequence length of one image in the vision module."""
        return (self.size // self.patch) ** 2 + self.class_token

    @property
    def tokens(self) -> int:
        """Tokens of one image in the backbone."""
        return (self.size // (self.patch * self.merge)) ** 2 + self.end_token

    def validate(self, where: str) -> None:
        for field in ("size", "channels", "patch", "merge"):
            if getattr(self, field) < 1:
                raise InputError(f"{where}.{field}", getattr(self, field), "must be at least 1", "give a positive whole number")
        if self.size % (self.patch * self.merge):
            raise InputError(
                f"{where}.size", self.size, f"is no multiple of patch * merge = {self.patch * self.merge}",
                "change the image size, the patch or the merge",
            )


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]


class LayerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How a module's layers are built, beyond their sizes: fields and defaults of Megatron's TransformerConfig and GPTModel."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    """Biases of queries, keys and values where the other products have none."""
    qk_layernorm: bool = False
    """Queries and keys are normed, head by head."""
    kv_channels: int | None = None
    """Width of an attention head; absent = hidden_size / num_attention_heads."""
    activation: Activation | None = None
    """Of the MLP; absent = SiLU where it is gated, else GELU."""
    rotary_base: int = 10000
    """Of rotary positions of a language model."""
    mrope_section: list[int] | None = None
    """Pairs of a head's channels that turn by a token's frame, row and column; absent = all turn by its place in the document."""
    mrope_interleaved: bool = False
    """Those pairs alternate (Qwen3-VL) instead of lying behind each other (Qwen2.5-VL)."""

    def validate(self, where: str) -> None:
        if self.layernorm_epsilon <= 0:
            raise InputError(f"{where}.layernorm_epsilon", self.layernorm_epsilon, "not above 0", "use 1e-5")
        if self.kv_channels is not None and (self.kv_channels < 2 or self.kv_channels % 2):
            raise InputError(f"{where}.kv_channels", self.kv_channels, "is no even number from 2", "give the width of an attention head")
        if self.rotary_base < 1:
            raise InputError(f"{where}.rotary_base", self.rotary_base, "must be at least 1", "use 10000")
        if self.mrope_section is not None and (len(self.mrope_section) != 3 or min(self.mrope_section) < 0):
            raise InputError(f"{where}.mrope_section", self.mrope_section, "is not three numbers", "give the pairs for frame, row and column")


class VitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What a vision module for images of one size has beside its layers: the differences between CLIP, SigLIP and InternViT."""

    patch_bias: bool = True
    """Whether the product that embeds patches has a bias."""
    first_norm: bool = False
    """A norm before the first layer (CLIP)."""
    final_norm: bool = True
    """A norm behind the last layer."""
    layer_scale: bool = False
    """What attention and MLP add is multiplied by learned factors, channel by channel (InternViT)."""
    projector_norm: bool = False
    """A norm of merged patches before the projector (InternVL)."""


class TowerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A vision module for images of any size and number, as Qwen2.5-VL and Qwen3-VL have it: packed patches with rotary 2-D positions."""

    frames_per_patch: int = 1
    """Frames of a video that one patch covers; a still image is repeated (``temporal_patch_size`` of Qwen's configs)."""
    patch_bias: bool = True
    """Whether the product that embeds patches has a bias."""
    window_size: int | None = None
    """Height and width in pixels of the windows that layers attend within; absent = all layers attend to the whole frame."""
    full_attention_layers: list[int] = []
    """Layers, from 0, that attend to the whole frame in spite of ``window_size``."""
    learned_positions: int | None = None
    """Height and width of a grid of learned positions, interpolated to each image's patches; absent = rotary ones alone."""
    deepstack_layers: list[int] = []
    """Layers, from 0, whose outputs are merged too and added behind the first layers of the language model, one behind each."""

    def validate(self, where: str, image: ImageSpec, num_layers: int) -> None:
        unit = image.patch * image.merge
        if self.frames_per_patch < 1:
            raise InputError(f"{where}.frames_per_patch", self.frames_per_patch, "must be at least 1", "use 1 for still images")
        if self.window_size is not None and self.window_size < unit:
            raise InputError(f"{where}.window_size", self.window_size, f"holds no token of {unit} x {unit} pixels", "make windows larger")
        if self.learned_positions is not None and self.learned_positions < 1:
            raise InputError(f"{where}.learned_positions", self.learned_positions, "must be at least 1", "give the grid's side")
        for field in ("full_attention_layers", "deepstack_layers"):
            layers: list[int] = getattr(self, field)
            if any(not 0 <= layer < num_layers for layer in layers) or sorted(set(layers)) != layers:
                raise InputError(f"{where}.{field}", layers, f"are not rising numbers of the {num_layers} layers", "count layers from 0")


class VisionLanguageModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model: its modules, and how images enter it."""

    modules: ModelSpec
    image: ImageSpec
    sequence_length: int
    """Tokens of a packed sequence of the backbone."""
    init_method_std: float = 0.02
    """Standard deviation of the matrices at the start; Megatron's word and default."""
    tower: TowerSpec | None = None
    """A vision module for images of any size, up to ``image.size`` a side; absent = all images have that size, positions are learned."""
    vit: VitSpec = VitSpec()
    """Of a vision module without a tower."""
    vision_layers: LayerOptions = LayerOptions()
    language_layers: LayerOptions = LayerOptions()

    def validate(self, where: str) -> None:
        self.modules.validate(where)
        self.image.validate(f"{where}.image")
        self.vision_layers.validate(f"{where}.vision_layers")
        self.language_layers.validate(f"{where}.language_layers")
        if self.tower is not None:
            self.tower.validate(f"{where}.tower", self.image, self.modules.module("vit").num_layers)
            for field, given in (("vit", self.vit != VitSpec()), ("image.class_token", self.image.class_token), ("image.end_token", self.image.end_token)):
                if given:
                    raise InputError(f"{where}.{field}", given, "belongs to a vision module for images of one size", "leave it or the tower out")


class VideoSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latents of a clip, [channels, frames, height, width], and how they become patches for the diffusion transformer."""

    channels: int
    patch_spatial: int = 2
    """Height and width of a patch."""
    patch_temporal: int = 1
    """Frames of a patch."""
    freq_dim: int = 256
    """Sines and cosines of the timestep."""
    text_width: int | None = None
    """Width of text embeddings that come with the data; absent where the model has a language model."""
    pooled_text: bool = False
    """The mean of a clip's text modulates all layers, beside its timestep."""
    absolute_positions: bool = False
    """Sines and cosines of a patch's place are added to its embedding, beside the rotary positions in attention."""

    @property
    def patch_size(self) -> int:
        """Values of a patch."""
        return self.channels * self.patch_temporal * self.patch_spatial**2

    def validate(self, where: str) -> None:
        for field in ("channels", "patch_spatial", "patch_temporal", "freq_dim"):
            if getattr(self, field) < 1:
                raise InputError(f"{where}.{field}", getattr(self, field), "must be at least 1", "give a positive whole number")
        if self.freq_dim % 2:
            raise InputError(f"{where}.freq_dim", self.freq_dim, "is odd", "give as many sines as cosines")
        if self.text_width is not None and self.text_width < 1:
            raise InputError(f"{where}.text_width", self.text_width, "must be at least 1", "give the embeddings' width or leave it out")


class TextToVideoModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model: a diffusion transformer, a language model before it (or text embeddings with the data), and the clips' form."""

    modules: ModelSpec
    video: VideoSpec
    sequence_length: int
    """Text tokens of a microbatch at most."""
    init_method_std: float = 0.02
    """Standard deviation of the matrices at the start; Megatron's word and default."""
    embedding_init_method_std: float | None = None
    """The same of the language model's embeddings, Megatron's word; absent = ``init_method_std``. Words that are small beside what layers add
    to them are slow to be told apart."""

    def validate(self, where: str) -> None:
        self.modules.validate(where)
        self.video.validate(f"{where}.video")


class OptimizerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    lr: float
    min_lr: float = 0.0
    """Reached at the last iteration along a cosine."""
    warmup_iterations: int = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    def validate(self, where: str) -> None:
        if not 0 < self.lr < 10:
            raise InputError(f"{where}.lr", self.lr, "outside (0, 10)", "give a learning rate such as 8e-4")
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"{where}.min_lr", self.min_lr, f"outside [0, lr = {self.lr}]", "give a value up to lr")
        for field in ("warmup_iterations", "weight_decay", "clip_grad"):
            if getattr(self, field) < 0:
                raise InputError(f"{where}.{field}", getattr(self, field), "negative", "give 0 or more")


class ExampleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/example/1"]
    model: VisionLanguageModel
    virtual_pipeline: dict[str, int]
    """Module -> chunks on each rank (K) of as many layers as can be equal."""
    sub_microbatch_size: dict[str, int]
    """Module -> instances in a full sub-microbatch (B)."""
    optimizer: OptimizerSpec
    num_microbatches: int
    """Of all replicas together, an iteration."""
    iterations: int
    data: dict[str, Any]
    """Handed to the example's ``Dataset``, which knows its fields."""
    chunks: dict[int, dict[str, list[list[int]]]] = {}
    """Number of pipeline ranks -> module -> layers of each chunk on each rank: where they shall not be those of ``virtual_pipeline``."""

    def given_partition(self, num_ranks: int) -> Partition | None:
        """The cut that the file gives for so many pipeline ranks."""
        rows = self.chunks.get(num_ranks)
        return None if rows is None else Partition(chunks=rows, sub_microbatch_size=self.sub_microbatch_size)

    def validate(self) -> None:
        """Raises InputError, naming the field, for values that cannot be trained."""
        self.model.validate("model")
        self.optimizer.validate("optimizer")
        names = [module.name for module in self.model.modules.modules]
        for field in ("virtual_pipeline", "sub_microbatch_size"):
            given: dict[str, int] = getattr(self, field)
            if sorted(given) != sorted(names):
                raise InputError(field, sorted(given), f"must name the modules {names}", "give one number for each module")
            for name, value in given.items():
                if value < 1:
                    raise InputError(f"{field}.{name}", value, "must be at least 1", "give a positive whole number")
        for num_ranks in self.chunks:
            partition = self.given_partition(num_ranks)
            assert partition is not None
            partition.validate({module.name: module.num_layers for module in self.model.modules.modules}, num_ranks, f"chunks.{num_ranks}")
        for field in ("num_microbatches", "iterations"):
            if getattr(self, field) < 1:
                raise InputError(field, getattr(self, field), "must be at least 1", "give a positive whole number")
        if self.model.sequence_length < 2:
            raise InputError("model.sequence_length", self.model.sequence_length, "must be at least 2", "give the packed length")


class VideoExampleConfig(ExampleConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An example whose model makes video: its ``model`` has ``video`` instead of ``image``."""

    model: TextToVideoModel  # type: ignore[assignment]


StockLayout = Literal["scripts", "parameters", "measured"]
"""Where the layers lie under Megatron's own schedules: whole encoder on the first rank, as its scripts do; both modules in one chain
cut by parameters; the same chain cut by measured time."""


class SchedulePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Which pipeline schedule runs, and how the model is cut for it."""

    name: Literal["dip", "1f1b", "interleaved"]
    order: OrderName = "dip"
    """Of ``dip``: whose order of stages runs, by its rule; ``dip``: the order is searched."""
    layout: StockLayout = "scripts"
    """Of ``1f1b`` and ``interleaved``."""
    virtual: int = 1
    """Chunks a rank under ``interleaved``."""
    partition: Partition | None = None
    """Of ``dip``; absent = the example's ``chunks`` for these ranks, or even layers by its ``virtual_pipeline``."""
    auto_partition: bool = False
    """Of ``dip`` without ``partition``: the cut that an earlier run has kept, or the best one for the example's data; learned on, and kept for the next run."""
    plan_s: float = 0.01
    """Seconds of search for each plan of ``dip``."""
    profile: str | None = None
    """File of measured costs that ``dip`` plans with; absent = measured while training."""
    evaluations: int | None = None
    """Orders that ``dip`` tries for each plan, instead of ``plan_s`` seconds."""
    deterministic: bool = False
    """Of ``dip``: plans depend on batches, costs and seed alone, neither on the clock nor on measured times, so that a run's numbers can be had
    again bit for bit; every iteration waits for its plan."""
    split_backward: bool = False
    """Of ``dip``: weight gradients are stages of their own, which fill bubbles."""

    @property
    def label(self) -> str:
        if self.name == "dip":
            label = "DIP" if self.order == "dip" else f"DIP's cut, {self.order} order"
            return f"{label}, backward split" if self.split_backward else label
        where = {"scripts": "ViT on rank 0", "parameters": "split by parameters", "measured": "split by measured time"}[self.layout]
        how = "1F1B" if self.name == "1f1b" else f"interleaved x{self.virtual}"
        return f"Megatron {how}, {where}"


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One training run of an example, the command line and config.json joined."""

    schedule: SchedulePlan
    parallel: Parallel
    device: str
    seed: int
    iterations: int
    num_microbatches: int
    data: dict[str, Any]
    timeout_s: float = 600.0
    """A rank that waits longer for another one gives up."""
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    balance: Literal["auto", "off", "indices", "exchange"] = "auto"
    """Of ``dip`` with several replicas: whether they deal the microbatches of a global batch among them by work. ``indices``, which is
    ``auto``: each takes what it is dealt from the data set; ``exchange``: microbatches travel, as with data of which each reads a part."""
    log_interval: int = 10
    evaluate_interval: int = 0
    """Iterations between scorings of the held-out data; 0 = at the end alone."""
    save: str | None = None
    """Folder of checkpoints to write."""
    save_interval: int = 0
    """Iterations between checkpoints; 0 = at the end alone."""
    load: str | None = None
    load_iteration: int | None = None
    """Whose checkpoint is loaded; None: the latest."""
    record: str | None = None
    """File for the run's figures."""
    timelines: str | None = None
    """Folder for the last iteration's plan and timelines."""

    def validate(self) -> None:
        for field in ("tensor", "pipeline", "data"):
            if getattr(self.parallel, field) < 1:
                raise InputError(f"--{field}", getattr(self.parallel, field), "must be at least 1", "give a positive whole number")
        if self.num_microbatches % self.parallel.data:
            raise InputError(
                "--num-microbatches", self.num_microbatches, f"cannot be dealt out to {self.parallel.data} replicas",
                f"use a multiple of {self.parallel.data}",
            )
        for field, least in (("iterations", 1), ("num_microbatches", 1), ("log_interval", 1), ("evaluate_interval", 0), ("save_interval", 0)):
            if getattr(self, field) < least:
                raise InputError("--" + field.replace("_", "-"), getattr(self, field), f"must be at least {least}", f"give {least} or more")
        if not self.timeout_s > 0:
            raise InputError("--timeout", self.timeout_s, "not a positive number of seconds", "give for example 600")
        if self.load_iteration is not None and self.load is None:
            raise InputError("--load-iteration", self.load_iteration, "given without --load", "name the folder with --load")
        if self.schedule.evaluations is not None and self.schedule.evaluations < 1:
            raise InputError("--evaluations", self.schedule.evaluations, "must be at least 1", "give for example 20")
        if not 0 <= self.schedule.plan_s <= 60:
            raise InputError("--plan-time", self.schedule.plan_s, "outside [0, 60] seconds", "give for example 0.1")
        if self.overlap_grad_reduce and self.schedule.name != "dip":
            raise InputError(
                "--overlap-grad-reduce", True,
                "Megatron's own schedules wait for a gradient of every weight, which a microbatch without images does not give",
                "leave it out, or use --pipeline-schedule dip",
            )
        replica = self.num_microbatches // self.parallel.data
        if self.schedule.name == "interleaved":
            if self.parallel.pipeline < 2:
                raise InputError("--pipeline", self.parallel.pipeline, "Megatron interleaves only over several ranks", "use --pipeline 2")
            if replica % self.parallel.pipeline:
                raise InputError(
                    "--num-microbatches", self.num_microbatches,
                    f"{replica} of a replica are no multiple of {self.parallel.pipeline} pipeline ranks, which Megatron's interleaving asks for",
                    f"use a multiple of {self.parallel.pipeline * self.parallel.data}",
                )


class IterationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One training iteration as it was."""

    iteration: int
    loss: float
    grad_norm: float
    seconds: float
    """Whole iteration: data, forward and backward, optimizer."""
    pipeline_seconds: float
    """Forward and backward alone."""
    planned_ns: int | None = None
    """Makespan of the plan that ran."""
    planning_ns: int | None = None


class EvaluationFigures(msgspec.Struct, frozen=True, kw_only=True):
    iteration: int
    training_seconds: float
    """Trained until then, without evaluations."""
    right: int
    asked: int
    """Of the first score."""
    scores: dict[str, tuple[int, int]] = {}
    """What was scored -> (right, asked)."""


class BalanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What dealing the microbatches of global batches to replicas came to, as rank 0 knows it. Imbalance: largest over mean."""

    dealt: int
    """Batches trained as dealt."""
    left: dict[str, int]
    """Why others were not -> batches."""
    moves: int
    """Microbatches that changed replicas, of all replicas."""
    bytes_sent: int
    seconds: float
    """That exchanges took, in the background."""
    waited_s: float
    """That iterations waited for them."""
    imbalance_before: float
    """Estimated work of the last batch, as read."""
    imbalance: float
    """The same, as trained."""
    planned_imbalance: float | None = None
    """Planned times of the last batch that was dealt by them as well."""
    measured_imbalance: float
    """Pipeline time of the last iteration but one."""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did, for tables and pictures."""

    format: Literal["megatron-dip/run/1"] = "megatron-dip/run/1"
    schedule: str
    settings: RunSettings
    iterations: list[IterationFigures]
    evaluations: list[EvaluationFigures]
    late_plans: int = 0
    """Iterations that ran under a quick plan because the searched one was not ready."""
    balance: BalanceRecord | None = None
    """Of replicas; absent where there is one, or microbatches are not dealt."""
    waited_for_plans_s: float = 0.0
    """In all."""
