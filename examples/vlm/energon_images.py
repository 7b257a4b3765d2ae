"""Documents of an energon WebDataset, of images of any format and text, packed into microbatches.

A sample is a document, of a WebDataset of class CrudeWebdataset:

    KEY.txt                               text, UTF-8, with <image> where an image stands (all before the text, where it has no mark)
    KEY.jpg, KEY.png, or KEY.0.jpg, ...   its images, in the order of their names; none in a document of text alone

A sample that cannot be trained on (no text, an image that cannot be read or has more pixels than any model takes, more marks than images,
a document longer than a sequence) is left out, with one message that names its key; all are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from images import Document, document_of_sample, pack
from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, stateless
from megatron.energon.flavors.base_dataset import Sample

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import VisionLanguageModel
from megatron_dip.trainer.samples import LeftOut


@dataclass
class DocumentSample(Sample):
    document: Document


class DocumentEncoder(TaskEncoder):
    """Makes microbatches of samples."""

    def __init__(self, model: VisionLanguageModel, tokenize: Callable[[str], Sequence[int]], mark: str, left_out: LeftOut) -> None:
        super().__init__()
        self.model, self.tokenize, self.mark, self.left_out = model, tokenize, mark, left_out
        self.cookers = [Cooker(self._cook)]

    def _cook(self, raw: dict[str, Any]) -> DocumentSample:
        try:
            return DocumentSample(**basic_sample_keys(raw), document=document_of_sample(raw, self.model, self.tokenize, self.mark))
        except InputError as error:
            self.left_out.add(error)
            raise SkipSample from error

    def select_samples_to_pack(self, samples: list[DocumentSample]) -> list[list[DocumentSample]]:
        """Consecutive documents, as many as fit into a sequence."""
        packs: list[list[DocumentSample]] = []
        left = 0
        for sample in samples:
            length = len(sample.document.tokens)
            if not packs or length > left:
                packs.append([])
                left = self.model.sequence_length
            packs[-1].append(sample)
            left -= length
        return packs

    @stateless
    def pack_selected_samples(self, samples: list[DocumentSample]) -> dict[str, Any]:
        item: dict[str, torch.Tensor] = pack(self.model, [sample.document for sample in samples])
        return {"__key__": ",".join(sample.__key__ for sample in samples), "__restore_key__": (), **item}
