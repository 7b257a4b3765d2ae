"""Two encoders, a backbone and two decoders of which one also reads an encoder: any acyclic arrangement trains as in one process.

The modules are stacks of Megatron layers over packed instances; what feeds a module is averaged and added to its inputs. Microbatches
lack some of the encoders' instances, or all; the decoders end in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch
from tests.distributed.tiny_vlm import Result, losses_of, merge_ranks, result_of, worst_difference

pytestmark = pytest.mark.distributed

FEATURES, WIDTH = 6, 16
LENGTHS: list[dict[str, list[int]]] = [
    {"image": [5, 3, 4], "audio": [7, 2], "lm": [9], "speech": [4, 6, 3]},
    {"audio": [4], "lm": [6], "speech": [5]},
    {"lm": [8], "speech": [3, 3]},
    {"image": [2], "lm": [5], "speech": [7, 2]},
]


def spec_of(trainable_image: bool) -> ModelSpec:
    def module(name: str, kind: Any, role: Any, layers: int, **more: Any) -> ModuleSpec:
        return ModuleSpec(
            name=name, kind=kind, role=role, num_layers=layers, hidden_size=WIDTH, ffn_hidden_size=2 * WIDTH, num_attention_heads=2, **more
        )

    return ModelSpec(modules=[
        module("image", "vit", "encoder", 4, trainable=trainable_image), module("audio", "audio", "encoder", 4),
        module("lm", "lm", "backbone", 8, gated_mlp=False), module("speech", "dit", "decoder", 4, inputs=["lm", "audio"]),
    ])


@dataclass(frozen=True)
class OmniCase:
    parallel: Parallel
    chunks: tuple[int, int, int, int] = (1, 1, 1, 1)
    sizes: tuple[int, int, int, int] = (8, 8, 8, 8)
    trainable_image: bool = True


def cut_of(case: OmniCase) -> Partition:
    from megatron_dip.partition.offline import even_partition

    spec = spec_of(case.trainable_image)
    names = [module.name for module in spec.modules]
    return even_partition(spec, case.parallel.pipeline, dict(zip(names, case.chunks, strict=True)), dict(zip(names, case.sizes, strict=True)))


def plan_of(case: OmniCase) -> Plan:
    from megatron_dip.cost.profile import ProfileCost
    from megatron_dip.planner.iteration import PlanOptions, plan_iteration
    from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint

    point = ProfilePoint(
        instances=1, tokens=4, forward_ns=2000, backward_input_ns=2200, backward_weight_ns=1800, activation_bytes=1600, boundary_bytes=160
    )
    spec = spec_of(case.trainable_image)
    profile = Profile(
        format="megatron-dip/profile/1", p2p=PointToPoint(latency_ns=1000, bytes_per_second=1e9),
        modules={module.name: ModuleProfile(num_layers=module.num_layers, layer=ProfileGrid(points=[point])) for module in spec.modules},
    )
    return plan_iteration(spec, cut_of(case), LENGTHS, ProfileCost(profile), PlanOptions(evaluations=30))


def microbatches() -> list[dict[str, Any]]:
    import torch

    items = []
    for number, lengths in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(number)
        features = {
            name: [torch.randn(length, 1, FEATURES, generator=generator) for length in of_module] for name, of_module in lengths.items()
        }
        items.append({"features": features, "target": torch.randn(sum(lengths["speech"]), 1, WIDTH, generator=generator)})
    return items


def make_config(case: OmniCase) -> Any:
    """The model as training wants it (``models.built_in.BuiltInConfig``), made inside a rank."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.description import OutputSlice, unwrap
    from megatron_dip.models.initial_weights import draw_weights, global_name
    from megatron_dip.models.layers import transformer_block_spec
    from megatron_dip.models.layout import ModuleCut
    from megatron_dip.runtime.interface import PayloadSpec

    class Part(MegatronModule):
        def __init__(self, config: Any, layers: int, first: bool, last: bool, vp_stage: int | None) -> None:
            super().__init__(config=config)
            if first:
                self.stem = torch.nn.Linear(FEATURES, WIDTH)
            self.decoder = TransformerBlock(
                config=config, spec=transformer_block_spec(layers, causal=False, packed=True), pre_process=first, post_process=last,
                vp_stage=vp_stage,
            )
            if last:
                self.head = torch.nn.Linear(WIDTH, WIDTH)

    class Chunk(MegatronModule):
        share_embeddings_and_output_weights = pre_process = post_process = False

        def __init__(self, whole: Any, cut: ModuleCut, module: str, vp_stage: int, rank: int) -> None:
            config = cut.config(whole.transformer_config(whole.model_spec.module(module)))
            super().__init__(config=config)
            place = (vp_stage, rank)
            setattr(self, module, Part(config, cut.rows[vp_stage][rank], place == cut.first, place == cut.last, cut.vp_stage(vp_stage)))
            draw_weights(self, seed=1, tensor_parallel=1, std_of=lambda *_: 0.2, key_of=lambda name: global_name(self, name))
            self.requires_grad_(whole.model_spec.module(module).trainable)

        def shared_embedding_or_output_weight(self) -> None:
            return None

        def forward(self, module: str, features: Sequence[Any], hidden: Any, given: Sequence[Any], lengths: Sequence[int]) -> Any:
            part = getattr(self, module)
            if hidden is None:
                hidden = part.stem(torch.cat(list(features)))
                for of_module in given:
                    hidden = hidden + of_module.mean(dim=0)
            bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
            part.decoder.set_input_tensor(hidden)
            hidden = part.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
            return part.head(hidden) if hasattr(part, "head") else hidden

    class Description:
        outermost, num_outputs = "lm", None
        model_spec = spec_of(case.trainable_image)

        def metadata(self, batch: Any) -> Any:
            return {name: [len(one) for one in of_module] for name, of_module in batch["features"].items()}

        item_metadata = metadata

        def bind(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
            return dict(kwargs)

        def num_instances(self, batch: Any) -> Any:
            return {name: len(of_module) for name, of_module in batch["features"].items()}

        def without_stem_inputs(self, batch: Any) -> Any:
            return {"features": {name: [one.to("meta") for one in of_module] for name, of_module in batch["features"].items()}}

        def conditions(self, batch: Any) -> list[str]:
            return []

        def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> Any:
            return Chunk(whole, ModuleCut.of_partition(partition, module), module, vp_stage, rank)

        def boundary(self, producer: Any, consumer: Any, batch: Any, first_instance: int) -> PayloadSpec:
            return PayloadSpec((producer.tokens, 1, WIDTH), torch.float32)

        def output_slice(self, stage: Any, batch: Any, first_instance: int) -> OutputSlice:
            lengths = [len(one) for one in batch["features"][stage.module]]
            return OutputSlice(dim=0, start=sum(lengths[:first_instance]), whole=sum(lengths))

        def run_chunk(self, chunk: Any, stage: Any, batch: Any, first_instance: int, inputs: Mapping[str, Sequence[Any]]) -> Any:
            features = batch["features"][stage.module][first_instance : first_instance + stage.instances]
            own = inputs.get(stage.module, ())
            given = [torch.cat(list(inputs[name])) for name in self.model_spec.inputs_of(stage.module) if inputs.get(name)]
            assert unwrap(chunk, Chunk)
            return chunk(stage.module, features, own[0] if own else None, given, [len(one) for one in features])

    class Whole:
        parallel, dtype, outermost, has_fixed_lengths = case.parallel, torch.float32, "lm", False
        model_spec = Description.model_spec

        def transformer_config(self, module: ModuleSpec) -> TransformerConfig:
            return TransformerConfig(
                num_layers=module.num_layers, hidden_size=WIDTH, ffn_hidden_size=2 * WIDTH, num_attention_heads=2, hidden_dropout=0.0,
                attention_dropout=0.0, use_cpu_initialization=True, pipeline_dtype=torch.float32,
            )

        def describe(self) -> Description:
            return Description()

    whole = Whole()
    return whole


def loss_func(target: Any, output: Any) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    loss, count = (output - target).square().sum(), torch.tensor(len(target), dtype=torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}


def forward_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
    from functools import partial

    item = next(data_iterator)
    return model(features=item["features"]), partial(loss_func, item["target"])


def run_dip(rank: int, num_ranks: int, cases: Sequence[OmniCase], plans: Sequence[Plan]) -> list[Result]:
    import torch

    from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings
    from megatron_dip.trainer.build import build_dip_model, initialize_parallel

    results = []
    for case, plan in zip(cases, plans, strict=True):
        initialize_parallel(case.parallel, device="cpu", seed=1, timeout_s=60)
        model = build_dip_model(make_config(case), cut_of(case))
        model.zero_grad()
        assert model.staged is not None
        run = DipForwardBackward(
            staged_model=model.staged, chunks=model.chunks, partition=cut_of(case),
            settings=IterationSettings(
                device=torch.device("cpu"), timeout_s=30.0, metadata=model.staged.description.item_metadata,
                plan_function=lambda *_, plan=plan: plan, plan_deadline_s=30.0,
            ),
        )
        items = microbatches()
        reports = run(
            forward_step_func=forward_step, data_iterator=iter(items), model=model.chunks, num_microbatches=len(items), seq_length=1,
            micro_batch_size=1, forward_only=False,
        )
        results.append(result_of(model, [[float(report["lm loss"][0]) for report in reports]]))
    return results


def run_alone(rank: int, num_ranks: int, cases: Sequence[OmniCase]) -> list[Result]:
    """The same layers in one process, module by module, without executor or plan."""
    from megatron_dip.trainer.build import build_dip_model, initialize_parallel

    results = []
    for case in cases:
        initialize_parallel(Parallel(), device="cpu", seed=1, timeout_s=60)
        alone = OmniCase(Parallel(), trainable_image=case.trainable_image)
        model = build_dip_model(make_config(alone), cut_of(alone))
        model.zero_grad()
        assert model.staged is not None
        description: Any = model.staged.description
        losses = []
        for item in microbatches():
            outputs: dict[str, list[Any]] = {}
            for module in description.model_spec.topological():
                if count := len(item["features"].get(module, ())):
                    stage = SimpleNamespace(module=module, instances=count)
                    outputs[module] = [description.run_chunk(model.staged.chunks[module, 0], stage, item, 0, outputs)]
            loss, count, _ = loss_func(item["target"], outputs["speech"][0])
            (loss / count / len(LENGTHS)).backward()
            losses.append(float(loss.detach()))
        assert model.config.finalize_model_grads_func is not None
        model.config.finalize_model_grads_func(model.chunks, None)
        results.append(result_of(model, [losses]))
    return results


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_two_encoders_a_backbone_and_a_decoder_that_reads_both(ranks: int) -> None:
    parallel = Parallel(pipeline=ranks)
    cuts = [(2, 1, 2, 1), (1, 2, 2, 2)] if ranks < 4 else [(1, 1, 2, 1)] * 2  # as far as four layers of the others go
    cases = [OmniCase(parallel), OmniCase(parallel, cuts[0], (2, 1, 1, 2)), OmniCase(parallel, cuts[1], (1, 8, 1, 1), False)]
    expected = launch(run_alone, 1, cases)[0]
    by_rank = launch(run_dip, ranks, cases, [plan_of(case) for case in cases])
    for index, case in enumerate(cases):
        results = [results[index] for results in by_rank]
        ends = [result for result in results if any(result.losses)]
        np.testing.assert_allclose(losses_of(ends), losses_of([expected[index]]), rtol=1e-6, err_msg=str(case))
        found, alone = merge_ranks(results, "gradients"), merge_ranks([expected[index]], "gradients")
        assert any(name.startswith("audio.") for name in found)
        assert any(name.startswith("image.") for name in found) == case.trainable_image
        assert worst_difference(found, alone) <= 3e-6, case
