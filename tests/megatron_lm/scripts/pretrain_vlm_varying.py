"""pretrain_vlm.py of the checkout on mock data with zero to four random images a sample, instead of always one black one.

The script runs as it is, up to its main block and then that block; in between its data set is replaced. Model provider and forward_step
stay the script's own, but that the provider is told of the old checkpoint format, on which it insists without depending on it.

By the environment: SIGTERM_AT_SAMPLE and SIGKILL_AT_SAMPLE send this process a signal when that sample is read, UNREADABLE_SAMPLE raises then; STARTED_EARLIER_MINUTES lets the training
loop think so; NODE_NAME gives this machine another name; UNSUPERVISED_EVERY leaves every n-th sample without a token to learn;
TEXT_LENGTHS=vary gives texts of 4 to 24 tokens; TELLS_LENGTHS lets the data set tell lengths without reading a sample (lies: wrong ones); IMAGES_AT=even or one gives images to samples of even numbers alone, or 40 to the first, and
pairs gives the two samples of a microbatch different numbers; SAMPLES, with --dataloader-type external, is how many samples each replica's loader
gives before it ends (one number, or one a replica with commas); HIDES_LAYERS puts a vision model of transformers in the place of Megatron's; NOISE draws noise on images and weights of tokens in forward_step; RERUN_EVERY_ITERATION sets the mode that 0.16.1's --rerun-mode cannot name.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine
from megatron.training import get_args, initialize, training

IMAGE_COUNTS = (3, 0, 1, 4, 2)
TEXT_LENGTH = 24
MAIN = 'if __name__ == "__main__":'

checkout = next(folder for folder in map(Path, sys.path) if (folder / "pretrain_vlm.py").is_file())
definitions, main_block = (checkout / "pretrain_vlm.py").read_text().split(MAIN)
script: dict[str, Any] = {"__name__": "__main__", "__file__": str(checkout / "pretrain_vlm.py")}
exec(compile(definitions, script["__file__"], "exec", dont_inherit=True), script)
stock_get_batch, stock_model_provider = script["get_batch"], script["model_provider"]
stock_datasets_provider = script["train_valid_test_datasets_provider"]


def count_images(index: int) -> int:
    where = os.environ.get("IMAGES_AT")
    if where == "even":
        return 0 if index % 2 else 1 + index % 3
    if where == "one":
        return 40 if index == 0 else 0
    if where == "pairs":
        return (3, 1, 0, 2, 4, 0)[index % 6]
    return IMAGE_COUNTS[index % len(IMAGE_COUNTS)]


def count_text(index: int) -> int:
    return 4 + index * 7 % (TEXT_LENGTH - 3) if os.environ.get("TEXT_LENGTHS") == "vary" else TEXT_LENGTH


class VaryingImages(MockGPTDataset):
    """Samples of equal text and IMAGE_COUNTS[index % 5] images; everything follows from the index."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if str(index) == os.environ.get("SIGTERM_AT_SAMPLE"):
            os.kill(os.getpid(), signal.SIGTERM)
        if str(index) == os.environ.get("SIGKILL_AT_SAMPLE"):
            os.kill(os.getpid(), signal.SIGKILL)
        if str(index) == os.environ.get("UNREADABLE_SAMPLE"):
            raise OSError(f"sample {index} cannot be read")
        text = super().__getitem__(index)
        generator = torch.Generator().manual_seed(index)
        size = (self.config.image_h, self.config.image_w)
        count = count_images(index)
        length = count_text(index)
        every = int(os.environ.get("UNSUPERVISED_EVERY", "0"))
        learned = torch.zeros(length) if every and index % every == 0 else torch.ones(length)
        image_tokens = torch.full((count,), script["DEFAULT_IMAGE_TOKEN_INDEX"], dtype=text["tokens"].dtype)
        tokens = torch.cat([image_tokens, text["tokens"][:length]])
        # The stock preprocessing moves labels along with their text: an image token's label is the token behind it.
        labels = torch.cat([tokens[1:], text["labels"][length - 1 : length]])
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": torch.cat([torch.zeros(count), learned]),
            "position_ids": torch.arange(len(tokens)),
            # Megatron broadcasts tensors of one to four dimensions that are not empty: images are stacked, and one pixel means none.
            "image": torch.rand(count * 3, *size, generator=generator) if count else torch.zeros(1, 1, 1),
        }


class ToldLengths(VaryingImages):
    def instance_lengths(self, index: int) -> dict[str, list[int]]:
        patches = (self.config.image_h // get_args().patch_dim) * (self.config.image_w // get_args().patch_dim)
        count = 4 - count_images(index) if os.environ["TELLS_LENGTHS"] == "lies" else count_images(index)
        return {"vit": [patches] * count, "lm": [count_text(index) + count * patches]}


def get_batch(data_iterator: Any) -> tuple[Any, ...]:
    """The script's, with the images of the one sample in a microbatch as the model takes them: [images, 3, height, width]."""
    batch = list(stock_get_batch(data_iterator))
    height, width = get_args().img_h, get_args().img_w
    batch[3] = batch[3].view(-1, 3, height, width) if batch[3].numel() > 1 else batch[3].new_zeros(0, 3, height, width)
    if "NOISE" in os.environ:
        batch[3] = batch[3] + 0.1 * torch.randn_like(batch[3])
        batch[4] = batch[4] * (0.5 + torch.rand(batch[4].shape, device=batch[4].device))
    return tuple(batch)


def datasets_provider(sizes: Any, *arguments: Any, **others: Any) -> tuple[Any, Any, Any]:
    """The script's data sets; or an iterator over microbatches that ends, as external loaders give them."""
    train, validation, test = stock_datasets_provider(sizes, *arguments, **others)
    if "SAMPLES" not in os.environ:
        return train, validation, test
    numbers = [int(number) for number in os.environ["SAMPLES"].split(",")]
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return microbatches(train, replica, replicas, numbers[replica % len(numbers)]), None, None


def microbatches(dataset: Any, replica: int, replicas: int, samples: int) -> Iterator[dict[str, torch.Tensor]]:
    """Of --micro-batch-size samples, texts padded to the longest and images one behind the other."""
    size = get_args().micro_batch_size
    for first in range(0, samples, size):
        rows = [dataset[(first + place) * replicas + replica] for place in range(size)]
        longest = max(len(row["tokens"]) for row in rows)
        texts = {
            name: torch.stack([torch.nn.functional.pad(row[name], (0, longest - len(row[name]))) for row in rows])
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
        images = [row["image"] for row in rows if row["image"].numel() > 1]
        yield {**texts, "image": torch.cat(images)[None] if images else torch.zeros(1, 1, 1, 1)}


def model_provider(**arguments: Any) -> torch.nn.Module:
    args = get_args()
    given, args.ckpt_format = args.ckpt_format, "torch"
    try:
        model = stock_model_provider(**arguments)
    finally:
        args.ckpt_format = given
    if "HIDES_LAYERS" in os.environ and model.vision_model is not None:
        model.vision_model = HiddenLayers().requires_grad_(not args.freeze_ViT)
    return model


class HiddenLayers(torch.nn.Module):
    """A tiny CLIPVisionModel of transformers: images [n, 3, height, width] -> [n, 1 + patches, hidden]."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        args = get_args()
        self.model = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=args.hidden_size, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=args.img_h, patch_size=args.patch_dim,
        ))

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """The stock model's, which hands nothing on in one process."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).last_hidden_state  # type: ignore[no-any-return]


def pretend() -> None:
    """What cannot be had at once in a test."""
    if "NODE_NAME" in os.environ:
        node = os.uname_result((os.uname().sysname, os.environ["NODE_NAME"], *os.uname()[2:]))
        os.uname = lambda: node
    earlier_s = 60 * float(os.environ.get("STARTED_EARLIER_MINUTES", "0"))
    training._TRAIN_START_TIME -= earlier_s
    if "_PROGRAM_START_TIME" in script:  # what newer scripts tell the training loop
        script["_PROGRAM_START_TIME"] -= earlier_s
    if "RERUN_EVERY_ITERATION" in os.environ:
        initialize.RerunMode = lambda name: RerunMode.REPORT_DETERMINISM_STATS
        RerunStateMachine.REPORTING_INTERVAL_ITERATIONS = 1000  # its report asks for what its entries do not have any more


pretend()
datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # as the script's main block says of its own
script.update(
    get_batch=get_batch, model_provider=model_provider, train_valid_test_datasets_provider=datasets_provider,
    MockMultimodalDataset=ToldLengths if "TELLS_LENGTHS" in os.environ else VaryingImages,
)

if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"], "start it with one process a rank"
    exec(compile("if True:" + main_block, script["__file__"], "exec", dont_inherit=True), script)
