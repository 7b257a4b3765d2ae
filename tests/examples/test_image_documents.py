"""Documents of examples/vlm/train.py: what is made of a sample's files, what is said of a bad one, mock data that fit the model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import VisionLanguageModel
from megatron_dip.spec.workload import Parallel

EXAMPLE = Path(__file__).parents[2] / "examples" / "vlm"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("images", "energon_images"):
        sys.modules.pop(name, None)
    return msgspec.convert(json.loads((EXAMPLE / "tiny/any_size.json").read_text())["model"], VisionLanguageModel)


def picture(width: int, height: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    data = io.BytesIO()
    image.fromarray(np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3).astype(np.uint8)).save(data, format="PNG")
    return data.getvalue()


def document(model: VisionLanguageModel, raw: dict[str, Any]) -> Any:
    from images import document_of_sample  # type: ignore[import-not-found]

    return document_of_sample(raw, model, lambda text: [7] * len(text.split()), "<image>")


def test_images_stand_where_the_text_has_their_marks(model: VisionLanguageModel) -> None:
    raw = {"__key__": "a/0", "txt": b"two words <image> then <image>", "0.png": picture(16, 8), "1.png": picture(200, 100)}
    made = document(model, raw)
    token = model.image.token_id
    # 2 x 1 tokens of 8 x 8 pixels; the second image is scaled down to 64 x 32 pixels
    assert made.tokens == [7, 7, *[token] * 2, 7, *[token] * 32]
    assert made.grids == [(1, 2, 4), (1, 8, 16)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": picture(16, 8)}, "has no txt"),
        ({"txt": b"  <image>", "0.png": picture(16, 8)}, "has no words"),
        ({"txt": b"a <image> b <image>", "0.png": picture(16, 8)}, "marks stand in the text of 1 images"),
        ({"txt": b"a", "0.png": picture(16, 8)[:60]}, r"0\.png.*is no image that can be read"),
        ({"txt": b"a", "0.png": picture(130, 100)}, r"0\.png.*has more than 10000 pixels"),
        ({"txt": b"\xff\xfe"}, "is no UTF-8 text"),
        ({"txt": b"a " * 600}, "has more tokens than a sequence, 512"),
    ],
)
def test_a_bad_sample_is_named_by_its_key(
    model: VisionLanguageModel, files: dict[str, bytes], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dip.trainer.samples.MAX_PIXELS", 10_000)
    with pytest.raises(InputError, match=f"(?s)sample shard/000007.*{message}"):
        document(model, {"__key__": "shard/000007", **files})


def test_a_left_out_sample_is_counted_and_named_once(model: VisionLanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    skip = pytest.importorskip("megatron.energon").SkipSample
    from energon_images import DocumentEncoder  # type: ignore[import-not-found]

    from megatron_dip.trainer.samples import LeftOut

    made = DocumentEncoder(model, lambda text: [7] * len(text.split()), "<image>", LeftOut())
    for _ in range(3):
        with pytest.raises(skip):
            made._cook({"__key__": "s/1", "__restore_key__": ()})
    assert made.left_out.count == 3
    assert capsys.readouterr().err.count("left out: sample s/1") == 1


@pytest.mark.parametrize("has_tower", [True, False])
def test_mock_microbatches_fit_the_model_and_follow_from_their_number(model: VisionLanguageModel, has_tower: bool) -> None:
    from images import draw_microbatch  # type: ignore[import-not-found]

    from megatron_dip.models.vlm import VlmConfig, check_item

    if not has_tower:
        layers = msgspec.structs.replace(model.language_layers, mrope_section=None)
        model = msgspec.structs.replace(model, tower=None, language_layers=layers, image=msgspec.structs.replace(model.image, size=16))
    config = VlmConfig(model=model, parallel=Parallel())
    items = [draw_microbatch(model, 3, number) for number in range(8)]
    for number, item in enumerate(items):
        check_item(config, item)
        again = draw_microbatch(model, 3, number)
        assert all(item[name].equal(again[name]) for name in item)
        # No loss is taken on images, nor on what follows a document's last token.
        labels, asked = item["labels"][0], item["loss_mask"][0] > 0
        assert not (labels[asked] == model.image.token_id).any()
        assert not asked[item["cu_lengths"][1:].long() - 1].any()
    counts = {len(config.describe().metadata(item).get("vit", ())) for item in items}
    assert len(counts) > 2
