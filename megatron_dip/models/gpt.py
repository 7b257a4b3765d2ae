"""Megatron's GPTModel as DIP cuts it: one module, ``lm``, whose instances are the sequences of a microbatch.

The chunks are built by the script's own provider, once for each, with the layers and the ends that the cut says.

Letters: S tokens of a sequence, b sequences in a microbatch.

Under context parallelism scripts give the model a rank's own S / CP tokens of each sequence; lengths here are those of whole sequences.

Not modelled: multi-token prediction, inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.description import LANGUAGE, bind_arguments, unwrap
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.parts import LanguageModel, cut_layer_spec, language_conditions
from megatron_dip.models.provided import Sketch, call_provider, cut_config, gpt_cut
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.workload import Microbatch


class GptDescription:
    """A script's GPTModel as :class:`megatron_dip.models.description.ModelDescription`."""

    def __init__(self, sketch: GPTModel, provider: Callable[..., MegatronModule], arguments: Mapping[str, Any]) -> None:
        """Args:
        sketch: from :func:`megatron_dip.models.provided.sketch_model`.
        provider: the script's model provider.
        arguments: what Megatron hands to it.
        """
        own = sketch.sketch
        assert isinstance(own, Sketch)
        self._language = LanguageModel(own)
        self._provider = provider
        self._arguments = dict(arguments)
        self.config: TransformerConfig = self._language.config
        if own.arguments.get("mtp_block_spec") is not None:
            raise InputError("--mtp-num-layers", self.config.mtp_num_layers, "multi-token prediction layers cannot be cut yet", "leave it out")

    @property
    def model_spec(self) -> ModelSpec:
        return ModelSpec(modules=[self._language.spec])

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return bind_arguments(GPTModel.forward, args, kwargs)

    def metadata(self, batch: Mapping[str, Any]) -> Microbatch:
        """Lengths of the sequences, empty where the rank does not see them (scripts read data on the first and last rank alone)."""
        found = next((batch[name] for name in ("input_ids", "labels") if batch.get(name) is not None), None)
        return {} if found is None else {LANGUAGE: [found.shape[1] * self.config.context_parallel_size] * found.shape[0]}

    num_outputs = None

    undivided = (LANGUAGE,)

    def typical_microbatch(self, sequences: int, length: int) -> Microbatch:
        return {LANGUAGE: [length] * sequences}

    def item_metadata(self, item: Any) -> Microbatch:
        """What :meth:`metadata` will say of a batch of the data loader. Raises InputError for items of another form."""
        if not isinstance(item, dict) or "tokens" not in item:
            raise InputError("data_iterator", type(item).__name__, "items of this form are not known before forward_step reads them",
                             "give dictionaries as pretrain_gpt.py and pretrain_vlm.py do, or --dip-look-ahead 0")
        sequences, length = item["tokens"].shape
        return {LANGUAGE: [length] * sequences}

    def num_instances(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return {module: len(lengths) for module, lengths in self.metadata(batch).items()}

    def without_stem_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return batch

    def conditions(self, batch: Mapping[str, Any]) -> list[str]:
        return language_conditions(batch, "attention_mask", "packed_seq_params")

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> torch.nn.Module:
        cut = ModuleCut.of_partition(partition, module)
        first, last, stage = (vp_stage, rank) == cut.first, (vp_stage, rank) == cut.last, cut.vp_stage(vp_stage)
        config = cut_config(self.config, cut)

        def layer_spec(whole_or_own: Any) -> Any:
            return cut_layer_spec(whole_or_own, cut, vp_stage, rank, perhaps_cut=True)

        with gpt_cut(config, pre_process=first, post_process=last, vp_stage=stage, layer_spec=layer_spec):
            return call_provider(self._provider, **{**self._arguments, "config": config, "vp_stage": stage})

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Any, first_instance: int) -> PayloadSpec:
        return self._language.boundary(producer)

    outermost = LANGUAGE

    def output_slice(self, stage: PlanStage, batch: Any, first_instance: int) -> None:
        return None

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: Mapping[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        model = unwrap(chunk, GPTModel)
        own = inputs.get(LANGUAGE, ())
        model.set_input_tensor(own[0] if own else None)  # type: ignore[arg-type]
        return model(**batch)
