"""The strict reader and the atomic writer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_dip.spec import codec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.named import NAMED_SETUPS
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Profile

POINT = {
    "instances": 1, "tokens": 4, "forward_ns": 1, "backward_input_ns": 1.5, "backward_weight_ns": 1, "activation_bytes": 2, "boundary_bytes": 3
}
PROFILE: dict[str, Any] = {
    "format": "megatron-dip/profile/1",
    "modules": {"vit": {"num_layers": 63, "layer": {"points": [POINT]}}, "lm": {"num_layers": 32, "layer": {"points": [POINT]}}},
    "p2p": {"latency_ns": 10, "bytes_per_second": 1e9},
}
WORKLOAD: dict[str, Any] = {"format": "megatron-dip/workload/1", "model": "vlm-s", "device": "h800", "microbatches": [{"vit": [4], "lm": [8]}]}


def put(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def changed(base: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {**base, **fields}


def profile_with(point: dict[str, object] | None = None, **fields: object) -> dict[str, Any]:
    value = json.loads(json.dumps(PROFILE))
    value["modules"]["vit"]["layer"]["points"][0].update(point or {})
    value.update(fields)
    return value


def test_a_workload_comes_back_with_its_model_and_the_profile_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub" / "p.json", PROFILE)
    path = put(tmp_path / "sub" / "w.json", changed(WORKLOAD, profile="p.json", device=None))
    workload = codec.load_workload(path)
    assert workload.model == NAMED_SETUPS["vlm-s"].model
    assert isinstance(workload.profile, Profile)
    assert workload.profile.modules["vit"].layer.points[0].backward_input_ns == 1.5
    assert workload.parallel.num_gpus == 1
    assert not workload.parallel.sequence_parallel


def test_replicas_take_every_nth_microbatch(tmp_path: Path) -> None:
    microbatches = [{"lm": [index + 1]} for index in range(5)]
    workload = codec.load_workload(put(tmp_path / "w.json", changed(WORKLOAD, microbatches=microbatches, parallel={"data": 2})))
    assert workload.replica_microbatches(1) == [{"lm": [2]}, {"lm": [4]}]


BAD_WORKLOADS: list[tuple[object, str, str]] = [
    ('{"format": "megatron-dip/workload/1", "model"', "w.json", "broken JSON at line 1"),
    ('{"format": "megatron-dip/workload/1", "model": "vlm-s", "model": "vlm-m"}', "w.json: model", "twice"),
    ("[" * 100_000, "w.json", "nested too deeply"),
    ("[]", "w.json", "not a JSON object"),
    ("", "w.json", "broken JSON"),
    (changed(WORKLOAD, format="megatron-dip/workload/2"), "w.json: format", "version"),
    ({"model": "vlm-s"}, "w.json: format", "version"),
    (changed(WORKLOAD, extra=1), "w.json: extra", "unknown field"),
    (changed(WORKLOAD, training={"dtype": "bf17"}), "w.json: training.dtype", "bf17"),
    (changed(WORKLOAD, training={"schedule": "zz"}), "w.json: training.schedule", "use one of '1f1b', 'bigmac', 'dip', "),
    (changed(WORKLOAD, model={"modules": [{"name": "vit", "kind": "zz"}]}), "w.json: model.modules[0].kind", "use one of 'audio', 'dit', 'lm', 'vit'"),
    (changed(WORKLOAD, training={"speed": 1}), "w.json: training.speed", "unknown field"),
    (changed(WORKLOAD, parallel={"tensor": 0}), "w.json: parallel.tensor", "outside"),
    (changed(WORKLOAD, parallel={"pipeline": 10**9}), "w.json: parallel.pipeline", "outside"),
    (changed(WORKLOAD, parallel={"data": 2}), "w.json: microbatches", "too few"),
    (changed(WORKLOAD, model="vlm-xxs"), "w.json: model", "no such setup"),
    (changed(WORKLOAD, model={"modules": []}), "w.json: model.modules", "no modules"),
    (changed(WORKLOAD, microbatches=[]), "w.json: microbatches", "no microbatches"),
    (changed(WORKLOAD, microbatches=[{}]), "w.json: microbatches[0]", "no module has an instance"),
    (changed(WORKLOAD, microbatches=[{"vit": [], "lm": []}]), "w.json: microbatches[0]", "no module has an instance"),
    (changed(WORKLOAD, microbatches=[{"audio": [3]}]), "w.json: microbatches[0].audio", "no such module"),
    (changed(WORKLOAD, microbatches=[{"lm": [3]}, {"lm": [1], "vit": [2, -5]}]), "w.json: microbatches[1].vit[1]", "outside"),
    (changed(WORKLOAD, microbatches=[{"lm": [3], "vit": ["a"]}]), "w.json: microbatches[0].vit[0]", "type str"),
    (changed(WORKLOAD, microbatches=[{"lm": [float("nan")]}]), "w.json: microbatches[0].lm[0]", "type float"),
    (changed(WORKLOAD, microbatches=[{"lm": [10**30]}]), "w.json: microbatches[0].lm[0]", "outside"),
    (changed(WORKLOAD, microbatches=[{"lm": [3]}, {"vit": [2]}]), "w.json: microbatches[1].vit", "vit feeds lm, which has no instance"),
    (changed(WORKLOAD, device=None), "w.json: device", "missing"),
    (changed(WORKLOAD, device={"peak_tflops": 1}), "w.json: device.memory_gib", "missing"),
    (changed(WORKLOAD, memory_capacity_bytes=-1), "w.json: memory_capacity_bytes", "outside"),
    (changed(WORKLOAD, profile="nowhere.json"), "w.json: profile", "there is no file"),
    (changed(WORKLOAD, profile=profile_with({"forward_ns": float("nan")})), "w.json: profile.modules.vit.layer.points[0].forward_ns", "finite"),
    (changed(WORKLOAD, profile=profile_with({"forward_ns": -1})), "w.json: profile.modules.vit.layer.points[0].forward_ns", "outside"),
    (changed(WORKLOAD, profile=profile_with({"forward_ns": 1e30})), "w.json: profile.modules.vit.layer.points[0].forward_ns", "outside"),
    (changed(WORKLOAD, profile=profile_with({"instances": 0})), "w.json: profile.modules.vit.layer.points[0].instances", "outside 1 to"),
    (changed(WORKLOAD, profile=profile_with(p2p={"latency_ns": 1, "bytes_per_second": 0})), "w.json: profile.p2p.bytes_per_second", "outside"),
    (changed(WORKLOAD, profile=profile_with(modules={"lm": PROFILE["modules"]["lm"]})), "w.json: profile.modules", "'vit' is missing"),
]


@pytest.mark.parametrize(("text", "field", "problem"), BAD_WORKLOADS, ids=lambda value: value[:40] if isinstance(value, str) else "json")
def test_a_mistake_in_a_workload_names_its_field(tmp_path: Path, text: object, field: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        codec.load_workload(put(tmp_path / "w.json", text))
    assert caught.value.field == field
    assert problem in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("change", [
    {"inputs": ["lm"]}, {"num_layers": 0}, {"hidden_size": -8}, {"num_query_groups": 3}, {"num_layers": 10**12}, {"name": ""},
], ids=str)
def test_impossible_modules_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    vit = {"name": "vit", "kind": "vit", "role": "encoder", "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 4}
    model = {"modules": [{**vit, **change}, {**vit, "name": "lm", "role": "backbone"}]}
    with pytest.raises(InputError, match=r"w\.json: model\.modules"):
        codec.load_workload(put(tmp_path / "w.json", changed(WORKLOAD, model=model)))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        codec.load_plan(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        codec.load_profile(tmp_path)
    with pytest.raises(InputError, match=r"^/dev/null = '': broken JSON"):
        codec.load_plan(os.devnull)
    (tmp_path / "bytes.json").write_bytes(b'{"format": "\xff\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        codec.load_partition(tmp_path / "bytes.json")


@pytest.mark.parametrize(("fields", "field"), [({"chunks": {}}, "p.json: chunks"), ({"chunks": {"lm": []}}, "p.json: chunks.lm")])
def test_partitions_without_chunks_are_refused(tmp_path: Path, fields: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        codec.load_partition(put(tmp_path / "p.json", {"format": "megatron-dip/partition/1", "sub_microbatch_size": {"lm": 1}, **fields}))
    assert caught.value.field == field


def test_a_key_that_is_no_number_is_named(tmp_path: Path) -> None:
    value = json.loads((Path(__file__).parents[1] / "golden" / "plan.json").read_text())
    with pytest.raises(InputError) as caught:
        codec.load_plan(put(tmp_path / "p.json", {**value, "inputs": {"0": [1], "first": [2]}}))
    assert (caught.value.field, caught.value.value) == ("p.json: inputs", "first")
    assert "no whole number" in caught.value.problem


def test_files_round_trip_byte_for_byte(tmp_path: Path) -> None:
    partition = Partition(chunks={"vit": [[1, 2]], "lm": [[3, 0], [1, 1]]}, sub_microbatch_size={"vit": 3, "lm": 1})
    codec.save(tmp_path / "p.json", partition)
    assert codec.load_partition(tmp_path / "p.json") == partition
    before = (tmp_path / "p.json").read_bytes()
    codec.save(tmp_path / "p.json", codec.load_partition(tmp_path / "p.json"))
    assert (tmp_path / "p.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["p.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = put(tmp_path / "plan.json", "old")

    def fail(source: object, destination: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        codec.write_atomically(target, b"new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_unwritable_targets_are_told_beforehand(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        codec.check_writable(tmp_path, "--output")
    with pytest.raises(InputError, match="does not exist"):
        codec.check_writable(tmp_path / "no" / "plan.json", "--output")


def test_every_named_setup_is_sound() -> None:
    layers = {name: [module.num_layers for module in setup.model.modules] for name, setup in NAMED_SETUPS.items()}
    assert layers == {
        "vlm-s": [63, 32], "vlm-m": [63, 64], "vlm-l": [48, 80], "t2v-s": [32, 28], "t2v-l": [64, 48],
        "vlm-xl-8k": [48, 96], "vlm-xl-16k": [48, 96], "t2v-xl-3k": [80, 48], "t2v-xl-6k": [80, 48],
    }
    gpus = {name: setup.tensor * setup.pipeline * setup.data for name, setup in NAMED_SETUPS.items()}
    assert gpus == {
        "vlm-s": 16, "vlm-m": 32, "vlm-l": 64, "t2v-s": 16, "t2v-l": 64,
        "vlm-xl-8k": 8192, "vlm-xl-16k": 16384, "t2v-xl-3k": 3072, "t2v-xl-6k": 6144,
    }
    for setup in NAMED_SETUPS.values():
        setup.model.validate()
        assert isinstance(setup.model, ModelSpec)
