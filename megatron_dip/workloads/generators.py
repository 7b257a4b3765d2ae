"""Workloads by name and seed: batches with the statistics of the data sets that multimodal models are trained on.

Sourced (data set papers and cards): means, shares and limits in :data:`IMAGE_TEXT_SETS` and :data:`VIDEO_SETS`; 8192 packed tokens, at
most 48 images, 2704 ViT patches and 169 tokens an image; at most 8 clips within 16 s of video in a microbatch; the dynamic run's
bounds on images; the heaviest packed T2V microbatch has 4.15 times the work of the lightest (DIP, arXiv 2504.14145).

Assumed, since nobody publishes them: the shapes of all distributions (geometric image counts, log-normal texts and clip lengths), the
mix of data sets and of text alone (each microbatch draws its own from a Dirichlet distribution, so that some are nearly all captions
and others nearly all text), detailed captions for every clip at 1.35 tokens a word, 1792 DiT tokens a second of video (16 fps, 4 frames a latent
frame, 16 x 28 patches), and that work is uniform between the lightest and the heaviest T2V microbatch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModuleSpec
from megatron_dip.spec.named import IMAGE_PATCHES, IMAGE_TOKENS, MAX_IMAGES, PACKED_TOKENS, Setup, named_setup
from megatron_dip.spec.workload import WORKLOAD_FORMAT, Microbatch, Parallel, Workload

DataKind = Literal["packed", "uniform", "dynamic"]
DATA_KINDS: tuple[str, ...] = get_args(DataKind)

DYNAMIC_ITERATIONS = 40
"""Of the paper's dynamic run: two cycles of 20."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTextSet:
    """Documents of images and text. Sourced unless said otherwise."""

    mean_images: float
    mean_text_tokens: float
    max_images: int
    image_share: float = 1.0
    """Documents that have an image at all."""
    max_text_tokens: int = PACKED_TOKENS
    sigma: float = 1.0
    """Of the log-normal text length: assumed."""


IMAGE_TEXT_SETS: dict[str, ImageTextSet] = {
    "LAION-2B": ImageTextSet(mean_images=1.0, mean_text_tokens=16.4, max_images=1, sigma=0.5),
    "OBELICS": ImageTextSet(mean_images=2.50, mean_text_tokens=815.0, max_images=30, sigma=1.1),
    "MMC4": ImageTextSet(mean_images=5.64, mean_text_tokens=425.0, max_images=30),
    "ScienceQA": ImageTextSet(mean_images=1.0, mean_text_tokens=120.0, max_images=1, image_share=0.487, max_text_tokens=320, sigma=0.5),
    "text": ImageTextSet(mean_images=1.0, mean_text_tokens=800.0, max_images=0, image_share=0.0),
}
_MIX = {"LAION-2B": 0.1, "OBELICS": 0.45, "MMC4": 0.25, "ScienceQA": 0.1, "text": 0.35}
"""Parameters of the Dirichlet distribution over data sets. Assumed: small, so that most microbatches are mostly of one set, and in
ratios that give 16 images a microbatch in the mean, as many as the paper's dynamic run has at its height of 0 to 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSet:
    """Clips. Means are sourced, the log-normal's sigma is assumed (InternVid's meets "85 % under 10 s" with a mean of 11.7 s)."""

    mean_seconds: float
    sigma: float


VIDEO_SETS: dict[str, VideoSet] = {
    "InternVid": VideoSet(mean_seconds=11.7, sigma=1.6),
    "MMTrail": VideoSet(mean_seconds=4.9, sigma=0.6),
    "ShareGPT4Video": VideoSet(mean_seconds=26.0, sigma=0.8),
}
MAX_CLIPS = 8
MAX_SECONDS = 16.0
LATENT_FRAMES_PER_SECOND = 4
TOKENS_PER_LATENT_FRAME = 448
CAPTION_WORDS = 273.0
"""Mean of ShareGPT4Video's detailed captions."""
TOKENS_PER_WORD = 1.35
T2V_SPREAD = 4.15
"""Work of the heaviest packed microbatch over that of the lightest."""
_DRAWS = 8


def make_workload(
    name: str,
    *,
    seed: int = 0,
    num_microbatches: int = 32,
    data: str = "packed",
    iteration: int = 1,
    images: tuple[int, int] = (0, MAX_IMAGES),
    parallel: Parallel | None = None,
) -> Workload:
    """One iteration's workload of a named setup.

    Args:
        name: one of :data:`megatron_dip.spec.named.NAMED_SETUPS`.
        num_microbatches: of the global batch.
        data: ``packed`` documents or clips; ``uniform`` numbers of images between the ``images`` bounds; ``dynamic``, the paper's run of
            40 iterations in which those bounds move (VLM setups).
        iteration: from 1; every iteration has other data.
        parallel: sizes instead of the setup's own.
    """
    setup = named_setup(name)
    if data not in DATA_KINDS:
        raise InputError("--data", data, "no such data", f"use one of {', '.join(DATA_KINDS)}")
    if not 1 <= num_microbatches <= 1 << 20:
        raise InputError("--microbatches", num_microbatches, "outside 1 to 2^20", "give the microbatches of the global batch")
    if iteration < 1:
        raise InputError("--iteration", iteration, "below 1", "iterations count from 1")
    if seed < 0:
        raise InputError("--seed", seed, "negative", "give a whole number from 0")
    rng = np.random.default_rng([seed, iteration])
    if setup.family == "t2v":
        if data != "packed":
            raise InputError("--data", data, f"{name} has no images", "use packed, or a VLM setup")
        microbatches = pack_clips(rng, num_microbatches, setup.model.module("dit"))
    elif data == "packed":
        microbatches = [pack_documents(rng) for _ in range(num_microbatches)]
    else:
        low, high = dynamic_bounds(iteration) if data == "dynamic" else images
        if not 0 <= low <= high <= MAX_IMAGES:
            raise InputError("--images", [low, high], f"not two rising numbers in 0 to {MAX_IMAGES}", "give the least and the most images")
        microbatches = [_packed(int(count)) for count in rng.integers(low, high, num_microbatches, endpoint=True)]
    return Workload(
        format=WORKLOAD_FORMAT,
        model=name,
        parallel=parallel if parallel is not None else default_parallel(setup),
        device=setup.device,
        microbatches=microbatches,
    )


def default_parallel(setup: Setup) -> Parallel:
    return Parallel(tensor=setup.tensor, pipeline=setup.pipeline, data=setup.data)


def dynamic_bounds(iteration: int) -> tuple[int, int]:
    """Least and most images a microbatch in an iteration (from 1) of the paper's dynamic run.

    The lower bound rises from 0 to 16 with the upper one at 32 (iterations 1 to 5), then both fall to 0 (6 to 20); then again.
    """
    at = (iteration - 1) % 20 + 1
    if at <= 5:
        return 4 * (at - 1), 32
    left = (20 - at) / 15
    return round(16 * left), round(32 * left)


def _packed(num_images: int) -> Microbatch:
    """A packed VLM microbatch; text fills what images leave."""
    return {"vit": [IMAGE_PATCHES] * num_images, "lm": [PACKED_TOKENS]} if num_images else {"lm": [PACKED_TOKENS]}


@dataclass(frozen=True, slots=True)
class Document:
    num_images: int
    text_tokens: int
    """At least 1."""

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.num_images * IMAGE_TOKENS


def draw_document(rng: np.random.Generator, source: ImageTextSet) -> Document:
    """One document with the statistics of a data set."""
    count = _image_count(rng, source)
    # The mean of a log-normal is exp(mu + sigma^2 / 2).
    text = rng.lognormal(np.log(source.mean_text_tokens) - source.sigma**2 / 2, source.sigma)
    return Document(count, max(1, min(round(text), source.max_text_tokens)))


def pack_documents(rng: np.random.Generator) -> Microbatch:
    """A microbatch of :func:`draw_packed` documents; what is left over is filled with text alone."""
    return _packed(sum(document.num_images for document in draw_packed(rng)))


def draw_packed(rng: np.random.Generator) -> list[Document]:
    """Draws documents until the next does not fit into a microbatch."""
    sets = [IMAGE_TEXT_SETS[name] for name in _MIX]
    mix = rng.dirichlet(list(_MIX.values()))
    documents: list[Document] = []
    tokens = num_images = 0
    while True:
        source = sets[int(rng.choice(len(sets), p=mix))]
        document = draw_document(rng, source)
        tokens += document.tokens
        num_images += document.num_images
        if tokens > PACKED_TOKENS or num_images > MAX_IMAGES:
            return documents
        documents.append(document)


def repack_documents(microbatches: Sequence[Sequence[Document]]) -> list[Microbatch]:
    """The documents of a global batch over as many microbatches, so that these hold equal numbers of images: most images first, each
    into the microbatch with the fewest (the first of equals) that has room. A document for which none has is left out."""
    images, tokens = [0] * len(microbatches), [0] * len(microbatches)
    for document in sorted((one for microbatch in microbatches for one in microbatch), key=lambda one: (-one.num_images, -one.tokens)):
        room = [
            place for place in range(len(microbatches))
            if tokens[place] + document.tokens <= PACKED_TOKENS and images[place] + document.num_images <= MAX_IMAGES
        ]
        if room:
            place = min(room, key=lambda one: images[one])
            images[place] += document.num_images
            tokens[place] += document.tokens
    return [_packed(count) for count in images]


def _image_count(rng: np.random.Generator, source: ImageTextSet) -> int:
    if rng.random() >= source.image_share:
        return 0
    if source.mean_images == 1.0:
        return 1
    return int(min(rng.geometric(1.0 / source.mean_images), source.max_images))


def pack_clips(rng: np.random.Generator, num_microbatches: int, dit: ModuleSpec) -> list[Microbatch]:
    """Packed T2V microbatches whose DiT work spreads by :data:`T2V_SPREAD` (from two microbatches on).

    Every microbatch aims at some work between that of one clip of 16 s and 1 / 4.15 of it; its clips' lengths are in the ratios of
    drawn ones, scaled until the work is met.
    """
    full = _frames_work(dit, [round(MAX_SECONDS * LATENT_FRAMES_PER_SECOND)])
    targets = rng.uniform(full / T2V_SPREAD, full, num_microbatches)
    if num_microbatches > 1:
        heaviest, lightest = rng.choice(num_microbatches, 2, replace=False)
        targets[heaviest], targets[lightest] = full, full / T2V_SPREAD
    microbatches = []
    for target in targets:
        # Frames are whole, so one draw only comes near its target: the nearest of several that is within the spread.
        draws = [_clips_of_work(rng, dit, float(target)) for _ in range(_DRAWS)]
        within = [frames for frames in draws if full / T2V_SPREAD * 0.995 <= _frames_work(dit, frames) <= full]
        frames = min(within or draws, key=lambda frames: abs(_frames_work(dit, frames) - target))
        captions = rng.lognormal(np.log(CAPTION_WORDS * TOKENS_PER_WORD) - 0.3**2 / 2, 0.3, len(frames))
        microbatches.append({
            "lm": [max(1, round(length)) for length in captions],
            "dit": [count * TOKENS_PER_LATENT_FRAME for count in frames],
        })
    return microbatches


def typical_clips(length: int) -> list[tuple[int, int]]:
    """What to expect of a packed microbatch whose clips nobody has seen: four equal ones that fill it, each with a caption of a sixteenth
    of its patches (a drawn one of TOKENS_PER_WORD * CAPTION_WORDS tokens stands beside some 5 000 patches).

    Args:
        length: patches that a microbatch may have.

    Returns:
        Patches and tokens of each clip.
    """
    return [(max(1, length // 4), max(1, length // 64))] * 4


def _clips_of_work(rng: np.random.Generator, dit: ModuleSpec, target: float) -> list[int]:
    """Latent frames of each clip: drawn clip lengths, scaled to the target work within 16 s together."""
    sets = list(VIDEO_SETS.values())
    limit = round(MAX_SECONDS * LATENT_FRAMES_PER_SECOND)
    seconds: list[float] = []
    for _ in range(int(rng.integers(1, MAX_CLIPS, endpoint=True))):
        source = sets[int(rng.integers(len(sets)))]
        seconds.append(rng.lognormal(np.log(source.mean_seconds) - source.sigma**2 / 2, source.sigma))
    while True:
        shares = np.array(seconds) / sum(seconds)
        totals = range(len(seconds), limit + 1)
        # Work grows with the frames: the two totals around the target, or the end of the range.
        above = bisect.bisect_left(totals, target, key=lambda total: _frames_work(dit, _share_out(total, shares)))
        near = [_share_out(total, shares) for total in totals[max(0, above - 1) : above + 1]]
        best = min(near, key=lambda frames: abs(_frames_work(dit, frames) - target))
        # Many short clips have less work than one long one: where 16 s of them do not reach the target, drop the shortest.
        if len(seconds) == 1 or _frames_work(dit, best) >= 0.98 * target:
            return best
        seconds.remove(min(seconds))


def _share_out(total: int, shares: NDArray[np.float64]) -> list[int]:
    """Whole frames in the ratios of ``shares``, at least one each, that add up to ``total`` (at least the number of shares)."""
    exact = shares * (total - len(shares))
    frames = np.floor(exact).astype(int)
    frames[np.argsort(frames - exact, kind="stable")[: total - len(shares) - int(frames.sum())]] += 1
    return (frames + 1).tolist()


def _frames_work(dit: ModuleSpec, frames: list[int]) -> float:
    """Multiply-adds of a DiT layer's projections, MLP and self-attention over clips of these numbers of latent frames."""
    hidden = dit.hidden_size
    per_token = 4 * hidden * hidden + (3 if dit.has_gated_mlp else 2) * hidden * dit.ffn_hidden_size
    lengths = [count * TOKENS_PER_LATENT_FRAME for count in frames]
    return float(sum(length * per_token + 2 * length * length * hidden for length in lengths))


def dit_spread(microbatches: list[Microbatch], dit: ModuleSpec) -> float:
    """Work of the heaviest microbatch over that of the lightest."""
    work = [_frames_work(dit, [length // TOKENS_PER_LATENT_FRAME for length in microbatch["dit"]]) for microbatch in microbatches]
    return max(work) / min(work)
