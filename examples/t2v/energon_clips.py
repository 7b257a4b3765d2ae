"""Clips of an energon WebDataset, packed into microbatches.

A sample is a clip, of a WebDataset of class CrudeWebdataset:

    KEY.txt (KEY.caption.txt)            its caption, UTF-8
    KEY.pth or KEY.npy (KEY.latents.pth, KEY.latents.npy)
                                         its latents, floating-point numbers [C, frames, height, width]
    KEY.0000.png, KEY.0001.png, ...      in their place its frames, all of one size, in the order of their names; a stand-in for a VAE
                                         makes latents of them (clips.py)

A sample that cannot be trained on (no caption, latents that cannot be read or of another shape, no frames, more patches than a microbatch)
is left out, with one message that names its key; all are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from clips import Clip, PackLimits, clip_of_sample, pack
from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, stateless
from megatron.energon.flavors.base_dataset import Sample

from megatron_dip.models.flow_matching import FlowMatching
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import TextToVideoModel
from megatron_dip.trainer.samples import LeftOut


@dataclass
class ClipSample(Sample):
    clip: Clip


class ClipEncoder(TaskEncoder):
    """Makes microbatches of samples."""

    def __init__(
        self, model: TextToVideoModel, tokenize: Callable[[str], Sequence[int]], limits: PackLimits, flow: FlowMatching, left_out: LeftOut
    ) -> None:
        super().__init__()
        self.model, self.tokenize, self.limits, self.flow, self.left_out = model, tokenize, limits, flow, left_out
        self.cookers = [Cooker(self._cook)]

    def _cook(self, raw: dict[str, Any]) -> ClipSample:
        try:
            return ClipSample(**basic_sample_keys(raw), clip=clip_of_sample(raw, self.model, self.tokenize, self.limits))
        except InputError as error:
            self.left_out.add(error)
            raise SkipSample from error

    def select_samples_to_pack(self, samples: list[ClipSample]) -> list[list[ClipSample]]:
        """Consecutive clips, as many as fit into a microbatch."""
        packs: list[list[ClipSample]] = []
        patches = tokens = 0
        for sample in samples:
            clip = sample.clip
            fits = patches + len(clip.patches) <= self.limits.patches and tokens + len(clip.tokens) <= self.limits.tokens
            if not packs or not fits or len(packs[-1]) == self.limits.clips:
                packs.append([])
                patches = tokens = 0
            packs[-1].append(sample)
            patches += len(clip.patches)
            tokens += len(clip.tokens)
        return packs

    @stateless(restore_seeds=True)
    def pack_selected_samples(self, samples: list[ClipSample]) -> dict[str, Any]:
        # energon seeds the process' generators by the microbatch's number, alike on all ranks of a replica and in a resumed run.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        item: dict[str, torch.Tensor] = pack(self.model, [sample.clip for sample in samples], self.flow, generator)
        return {"__key__": ",".join(sample.__key__ for sample in samples), "__restore_key__": (), **item}
