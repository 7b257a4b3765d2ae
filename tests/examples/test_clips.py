"""Clips of examples/t2v/train.py: what is made of a sample's files, what is said of a bad one, microbatches that fit the model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.models.flow_matching import FlowMatching
from megatron_dip.models.t2v import TextToVideoConfig, check_batch
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.training import TextToVideoModel, VideoSpec
from megatron_dip.spec.workload import Parallel
from megatron_dip.trainer.pretraining import scaled

EXAMPLE = Path(__file__).parents[2] / "examples" / "t2v"
FLOW = FlowMatching()
CAPTION = b"a digit moves"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TextToVideoModel:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("clips", "energon_clips"):
        sys.modules.pop(name, None)
    modules = [scaled(module, 64) for module in named_setup("t2v-s").model.modules]
    return TextToVideoModel(modules=ModelSpec(modules=modules), video=VideoSpec(channels=16), sequence_length=1024)


def read(model: TextToVideoModel, files: dict[str, bytes]) -> Any:
    from clips import PackLimits, clip_of_sample  # type: ignore[import-not-found]

    return clip_of_sample(
        {"__key__": "shard/000007", **files}, model, lambda text: [7] * len(text.split()), PackLimits(patches=40, tokens=20)
    )


def npy(*shape: int, value: float = 0.0, dtype: str = "float32") -> bytes:
    data = io.BytesIO()
    np.save(data, np.full(shape, value, dtype))
    return data.getvalue()


def pth(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def picture(width: int, height: int, value: int = 255) -> bytes:
    image = pytest.importorskip("PIL.Image")
    data = io.BytesIO()
    image.fromarray(np.full((height, width, 3), value, np.uint8)).save(data, format="PNG")
    return data.getvalue()


@pytest.mark.parametrize("name", ["pth", "npy", "latents.pth", "latents.npy"])
def test_latents_become_patches_in_order_of_time_height_and_width(model: TextToVideoModel, name: str) -> None:
    latents = torch.arange(16 * 3 * 4 * 6, dtype=torch.float32).view(16, 3, 4, 6)
    data = io.BytesIO()
    np.save(data, latents.numpy())
    clip = read(model, {"txt": CAPTION, name: pth(latents.half().float()) if name.endswith("pth") else data.getvalue()})
    assert clip.grid == (3, 2, 3)
    assert clip.tokens == [7, 7, 7]
    # The patch in the second frame, at the right end of the upper row.
    assert clip.patches[1 * 6 + 2].equal(latents[:, 1, 0:2, 4:6].reshape(-1))


def test_frames_stand_in_for_latents(model: TextToVideoModel) -> None:
    files = {f"{number:04d}.png": picture(16, 8, value) for number, value in enumerate((0, 255))}
    clip = read(model, {"caption.txt": CAPTION, **files})
    assert clip.grid == (2, 1, 2)
    values = clip.patches.view(2, 2, 16, 4)
    # Of frames of one colour the lowest frequency alone is not zero: sqrt(3 * 4 * 4) / 4.
    torch.testing.assert_close(values[:, :, 0], torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 2, 4) * 3**0.5)
    assert float(values[:, :, 1:].abs().max()) < 1e-6


def test_the_stand_in_keeps_grey_frames_lengths(model: TextToVideoModel) -> None:
    """Its rows are orthonormal, but for the division by 4."""
    from clips import _lowest_frequencies

    rows = _lowest_frequencies(48)
    np.testing.assert_allclose(rows @ rows.T * 16, np.eye(48), atol=1e-12)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"npy": npy(16, 2, 4, 4)}, "has no txt or caption.txt"),
        ({"txt": b"  ", "npy": npy(16, 2, 4, 4)}, "has no words"),
        ({"txt": b"\xff\xfe", "npy": npy(16, 2, 4, 4)}, "is no UTF-8 text"),
        ({"txt": b"a " * 21, "npy": npy(16, 2, 4, 4)}, "tokens are not between 1 and 20"),
        ({"txt": CAPTION}, r"has no pth or latents\.pth or npy"),
        ({"txt": CAPTION, "npy": npy(16, 2, 4, 4)[:90]}, "npy.*no latents that can be read"),
        ({"txt": CAPTION, "npy": b""}, "npy.*no latents that can be read"),
        ({"txt": CAPTION, "pth": pth(torch.zeros(16, 2, 4, 4))[:300]}, "pth.*no latents that can be read"),
        ({"txt": CAPTION, "pth": b"nothing"}, "pth.*no latents that can be read"),
        ({"txt": CAPTION, "pth": pth({"latents": 1})}, "dict.*is no tensor"),
        ({"txt": CAPTION, "npy": npy(16, 2, 4, 4, dtype="int64")}, "torch.int64.*is no tensor of floating-point"),
        ({"txt": CAPTION, "npy": npy(8, 2, 4, 4)}, r"is no shape \[16, frames, height, width\]"),
        ({"txt": CAPTION, "npy": npy(16, 4, 4)}, r"is no shape \[16, frames, height, width\]"),
        ({"txt": CAPTION, "npy": npy(16, 0, 4, 4)}, "has no frames"),
        ({"txt": CAPTION, "npy": npy(16, 2, 5, 4)}, r"not multiples of a patch's, \[1, 2, 2\]"),
        ({"txt": CAPTION, "npy": npy(16, 2, 0, 4)}, r"not multiples of a patch's, \[1, 2, 2\]"),
        ({"txt": CAPTION, "npy": npy(16, 2, 4, 4, value=np.nan)}, "inf or nan"),
        ({"txt": CAPTION, "npy": npy(16, 41, 2, 2)}, "patches are more than a microbatch's, 40"),
        ({"txt": CAPTION, "0000.png": b"no picture"}, r"0000\.png.*is no image that can be read"),
        ({"txt": CAPTION, "0000.png": "130 x 100"}, r"0000\.png.*has more than 10000 pixels"),
        ({"txt": CAPTION, "0000.png": "16 x 8", "0001.png": "8 x 8"}, "are of different sizes"),
        ({"txt": CAPTION, "0000.png": "18 x 8"}, "do not divide into blocks of 4 pixels"),
    ],
)
def test_a_bad_sample_is_named_by_its_key(
    model: TextToVideoModel, files: dict[str, bytes | str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dip.trainer.samples.MAX_PIXELS", 10_000)
    made = {name: picture(*map(int, data.split(" x "))) if isinstance(data, str) else data for name, data in files.items()}
    with pytest.raises(InputError, match=f"(?s)sample shard/000007.*({message})"):
        read(model, made)


def test_mock_microbatches_fit_the_model_and_follow_from_their_number(model: TextToVideoModel) -> None:
    from clips import draw_microbatch

    config = TextToVideoConfig(model=model, parallel=Parallel())
    counts = set()
    for number in range(8):
        item = draw_microbatch(model, (2, 4), 8, FLOW, 3, number)
        check_batch(config, item)
        again = draw_microbatch(model, (2, 4), 8, FLOW, 3, number)
        assert all(item[name].equal(again[name]) for name in item)
        assert int(item["grid_sizes"][:, 0].sum()) <= 64  # 16 s of four latent frames a second
        counts.add(len(item["grid_sizes"]))
    assert len(counts) > 2


def test_a_pack_is_noised_by_its_levels_and_asks_for_the_velocity(model: TextToVideoModel) -> None:
    from clips import Clip, pack

    clips = [Clip(torch.randn(count, 64), (count, 1, 1), [7] * count) for count in (2, 3)]
    item = pack(model, clips, FLOW, torch.Generator().manual_seed(1))
    check_batch(TextToVideoConfig(model=model, parallel=Parallel()), item)
    level = (item["timesteps"] / 1000).float().repeat_interleave(torch.tensor([2, 3]))[:, None, None]
    clean = torch.cat([clip.patches for clip in clips])[:, None]
    torch.testing.assert_close(item["x"] - level * item["target"], clean)
    torch.testing.assert_close(item["weight"], 1 + FLOW.shift * level[:, :, 0])


def test_clips_are_packed_up_to_each_limit(model: TextToVideoModel) -> None:
    pytest.importorskip("megatron.energon")
    from clips import Clip, PackLimits
    from energon_clips import ClipEncoder  # type: ignore[import-not-found]

    from megatron_dip.trainer.samples import LeftOut

    made = ClipEncoder(model, lambda text: [7], PackLimits(patches=10, tokens=6, clips=3), FLOW, LeftOut())
    sizes = [(4, 1), (6, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 4), (1, 2), (9, 1)]  # patches, tokens
    samples = [
        SimpleNamespace(number=i, clip=Clip(torch.zeros(patches, 64), (patches, 1, 1), [7] * tokens))
        for i, (patches, tokens) in enumerate(sizes)
    ]
    packs = made.select_samples_to_pack(samples)
    assert [[one.number for one in chosen] for chosen in packs] == [[0, 1], [2, 3, 4], [5, 6], [7, 8]]


def test_a_left_out_clip_is_counted_and_named_once(model: TextToVideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    skip = pytest.importorskip("megatron.energon").SkipSample
    from clips import PackLimits
    from energon_clips import ClipEncoder

    from megatron_dip.trainer.samples import LeftOut

    made = ClipEncoder(model, lambda text: [7], PackLimits(patches=10, tokens=6), FLOW, LeftOut())
    for _ in range(3):
        with pytest.raises(skip):
            made._cook({"__key__": "s/1", "__restore_key__": (), "txt": CAPTION, "npy": npy(16, 0, 4, 4)})
    assert made.left_out.count == 3
    assert capsys.readouterr().err.count("left out: sample s/1") == 1
