"""The digits example: what its sequences hold, and what is never shown in training."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.spec.codec import load_example
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import ExampleConfig

FOLDER = Path(__file__).parents[2] / "examples" / "vlm" / "digits"


@functools.cache
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", FOLDER / "example.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def config() -> ExampleConfig:
    return load_example(FOLDER / "config.json")


def dataset(seed: int = 1, **data: Any) -> Any:
    return example().Dataset(config().model, {**config().data, **data}, seed)


def words(item: dict[str, torch.Tensor]) -> list[str]:
    return [example().VOCABULARY[token] for token in item["tokens"][0].tolist()]


def test_items_have_the_shapes_the_model_takes() -> None:
    length, image = config().model.sequence_length, config().model.image
    for item in dataset().microbatches(0, 8) + dataset().held_out(1):
        assert item["images"].shape[1:] == (1, image.size, image.size)
        assert item["images"].dtype == torch.float32
        for name in ("tokens", "labels", "position_ids"):
            assert item[name].shape == (1, length)
            assert item[name].dtype == torch.int64
        assert item["loss_mask"].shape == (1, length)
        assert int((item["tokens"] == image.token_id).sum()) == len(item["images"]) * image.tokens
        bounds = item["cu_lengths"].tolist()
        assert bounds[0] == 0
        assert bounds[-1] == length
        assert all(low < high for low, high in itertools.pairwise(bounds))
        for low, high in itertools.pairwise(bounds):
            assert item["position_ids"][0, low:high].tolist() == list(range(high - low))


def test_every_image_is_answered_with_its_own_digit() -> None:
    data = dataset(max_shift=0)
    for item in data.microbatches(0, 8):
        tokens, labels, mask = (item[name][0] for name in ("tokens", "labels", "loss_mask"))
        ends = [i for i in range(len(tokens) - 1) if tokens[i] == 2 and tokens[i + 1] != 2]
        assert len(ends) == len(item["images"])
        assert all(mask[end] == 1 for end in ends)
        for image, end in zip(item["images"], ends, strict=True):
            scan = np.flatnonzero((data.images == image[0].numpy()).all(axis=(1, 2)))
            assert example().VOCABULARY[labels[end]] in {data.answers[i] for i in scan}


def test_labels_are_the_next_tokens_and_stay_inside_their_document() -> None:
    for item in dataset().microbatches(3, 4):
        tokens, labels, mask = (item[name][0] for name in ("tokens", "labels", "loss_mask"))
        last = item["cu_lengths"][1:].long() - 1
        inner = torch.ones(len(tokens), dtype=torch.bool)
        inner[last] = False
        assert torch.equal(labels[inner], tokens.roll(-1)[inner])
        assert not mask[last].any()
        assert not mask[labels == 2].any()


def test_held_out_scans_are_never_trained_on() -> None:
    data = dataset(max_shift=0)
    held = {data.images[scan].tobytes() for scan in data.held_out_scans}
    held -= {data.images[scan].tobytes() for scan in data.training_scans}  # equal scans of two people
    assert len(held) > 350
    for iteration in range(30):
        for item in data.microbatches(iteration, 8):
            assert not held & {image[0].numpy().tobytes() for image in item["images"]}


def test_held_out_scans_do_not_depend_on_the_seed_and_are_asked_once_each() -> None:
    assert set(dataset(1).held_out_scans) == set(dataset(2).held_out_scans)
    items = dataset().held_out(4)
    assert len(items) % 4 == 0
    assert sum(int(item["loss_mask"].sum()) for item in items) == config().data["held_out"]


def test_batches_are_a_function_of_seed_and_iteration() -> None:
    first, again, other = dataset(1).microbatches(5, 3), dataset(1).microbatches(5, 3), dataset(2).microbatches(5, 3)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    assert not all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, other, strict=True))


def test_image_counts_follow_the_iterations_bounds() -> None:
    data = dataset(image_counts=[[0, 0], [3, 5]])
    assert {len(item["images"]) for item in data.microbatches(0, 20)} == {0}
    assert {len(item["images"]) for item in data.microbatches(1, 40)} == {3, 4, 5}
    assert {len(item["images"]) for item in data.microbatches(3, 40)} == {3, 4, 5}


def test_a_text_answer_is_right() -> None:
    digits = example().DIGITS
    seen = 0
    for item in dataset(image_counts=[[0, 0]]).microbatches(0, 4):
        text = words(item)
        for at, word in enumerate(text):
            if word == "plus":
                seen += 1
                assert digits.index(text[at - 1]) + digits.index(text[at + 1]) == digits.index(text[at + 3])
            if word in ("before", "after"):
                seen += 1
                assert digits.index(text[at + 1]) - digits.index(text[at - 2]) == (1 if word == "before" else -1)
    assert seen > 20


@pytest.mark.parametrize(
    ("data", "field", "problem"),
    [
        ({"image_counts": [[0, 13]]}, "image_counts[0]", "tokens"),
        ({"image_counts": [[3, 2]]}, "image_counts[0]", "low <= high"),
        ({"image_counts": []}, "image_counts", "no bounds"),
        ({"held_out": 5000}, "held_out", "not between"),
        ({"held": 1}, "data", "unknown field"),
    ],
)
def test_bad_data_options_are_named(data: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InputError) as error:
        dataset(**data)
    assert field in error.value.field
    assert problem in error.value.problem


def own_data(path: Path, images: Any, answers: list[str]) -> str:
    np.savez(path, images=np.asarray(images, np.float32), answers=np.array(answers))
    return str(path)


def test_own_scans_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    file = own_data(tmp_path / "own.npz", random.integers(0, 17, (20, 8, 8)), ["three"] * 20)
    item = dataset(file=file, held_out=5, image_counts=[[4, 4]]).microbatches(0, 1)[0]
    assert len(item["images"]) == 4


@pytest.mark.parametrize(
    ("shape", "answers", "field", "problem"),
    [
        ((4, 9, 8), ["one"] * 4, "--data-file: images", "shape"),
        ((4, 8, 8), ["one"] * 3, "--data-file: answers", "not one for each"),
        ((4, 8, 8), ["one", "", "two", "two"], "--data-file: answers[1]", "without text"),
        ((4, 8, 8), ["one", "cat", "two", "two"], "--data-file: answers[1]", "vocabulary"),
    ],
)
def test_bad_own_scans_are_named(tmp_path: Path, shape: tuple[int, ...], answers: list[str], field: str, problem: str) -> None:
    with pytest.raises(InputError) as error:
        dataset(file=own_data(tmp_path / "own.npz", np.zeros(shape), answers), held_out=1)
    assert error.value.field == field
    assert problem in error.value.problem


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.npz").write_bytes(b"no archive")
    for name in ("own.npz", "absent.npz"):
        with pytest.raises(InputError, match=r"--data-file = .*cannot be read"):
            dataset(file=str(tmp_path / name))
