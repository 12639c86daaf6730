"""Real images in [-1, 1] and noise with one seed per sample index."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from advkd.folder import CachedImages, load_folder
from advkd.glyphs import FONTS, LETTERS, UNSEEN_FONTS, Classes, Glyphs
from advkd.presets import LATENT_SIDE, Preset, UserError

DIGITS_TRAIN = 1197  # of 1797; the other 600 are held out from teacher, student and feature extractor alike
GLYPHS_TRAIN, GLYPHS_HELDOUT = 10_000_000, 10_000
# What a class label says, most significant first.
FACTORS = {"digits": {"digit": 10}, "glyphs": {"letter": len(LETTERS), "font": len(FONTS)}}
_SEED_STRIDE = 1_000_003  # more samples than any run draws, so that two seeds share no sample's random stream


def load_images(preset: Preset, split: str) -> tuple[Tensor | Glyphs | CachedImages, Tensor | Classes | None]:
    """Real images `(n, c, h, w)` in [-1, 1] and their class labels `(n,)`, to be indexed by a 1-D integer tensor.

    `split` is "train" or "heldout"; the glyphs have "unseen-fonts" too. The digits are scikit-learn's 1797 real handwritten digits (8 x 8, 17 grey levels),
    resized to 16 x 16 by bicubic interpolation. The split is a fixed permutation: 1197 train, 600 held out.
    The glyphs are rendered when they are asked for: ten million in the train split, the next ten thousand held out, the ten
    thousand after them in two fonts of their own (whose labels count these two fonts).
    A folder's images have no labels (None); see `folder.load_folder`.
    Raises UserError for an unknown split and for a preset whose images are not embedded while none are given.
    """
    splits = ("train", "heldout", *(["unseen-fonts"] if preset.data == "glyphs" else []))
    if split not in splits:
        raise UserError(f"there is no split {split!r}; splits: {', '.join(splits)}")
    if preset.data == "glyphs":
        first = (0, GLYPHS_TRAIN, GLYPHS_TRAIN + GLYPHS_HELDOUT)[splits.index(split)]
        count = GLYPHS_TRAIN if split == "train" else GLYPHS_HELDOUT
        glyphs = Glyphs(preset.image_size_px, first, count, UNSEEN_FONTS if split == "unseen-fonts" else FONTS)
        return glyphs, glyphs.classes
    if preset.data == "folder":
        if not preset.images:
            raise UserError(
                f"the images of preset {preset.name!r} are not embedded; give a folder of them (images=..., --images), "
                "or train without real images (real_share=0)"
            )
        return load_folder(preset.images, preset.image_size_px, preset.channels, split), None
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=preset.image_size_px, mode="bicubic", align_corners=False).clamp(-1, 1)
    order = np.random.RandomState(0).permutation(len(images))  # RandomState's stream is frozen across numpy versions
    chosen = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    return images[chosen], torch.from_numpy(digits.target)[chosen]


def reference_images(preset: Preset, split: str, count: int = 10_000) -> tuple[Tensor, Tensor | None]:
    """The first `count` real images of a split (all, where it has fewer) and their labels: what samples are compared with."""
    images, labels = load_images(preset, split)
    return images[:count], None if labels is None else labels[:count]


def sample_generators(indices: Sequence[int], seed: int) -> list[torch.Generator]:
    """One random generator per sample index, so that a sample depends neither on its batch nor on the process."""
    return [torch.Generator().manual_seed((seed * _SEED_STRIDE + int(i)) % 2**32) for i in indices]


def sample_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """The next noise of each generator: `(len(generators), *shape)`, standard normal."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def seeded_noise(indices: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """The noise x_T `(n, *shape)` of the samples `indices`, standard normal; `shape` is (c, h, w)."""
    return sample_noise(sample_generators(indices, seed), shape)


def batch_generator(*counters: int) -> torch.Generator:
    """A generator that is a function of a seed and the counters of a loop.

    Whoever resumes at step n draws what an uninterrupted run drew there: the counters are the whole random state.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence((len(counters), *counters)).generate_state(1)[0]))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as integers 0..255, rounded and clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_uint8`: float32 images in [-1, 1]."""
    return torch.div(images, 127.5).sub_(1)


def block_mean(noise: Tensor, size_px: int) -> Tensor:
    """Noise `(b, c, s, s)` as `(b, c, size_px, size_px)`, the block means times the block's side: N(0, 1) stays N(0, 1)."""
    side = noise.shape[-1] // size_px
    return F.avg_pool2d(noise, side) * side


def make_latent(noise: Tensor, how: str = "block-mean") -> Tensor:
    """State 0 `(b, c, s, s)` as the student's input `(b, c, 4, 4)`, or as it is.

    "block-mean": the mean of each block times the block's side, an orthonormal projection, hence exactly N(0, 1).
    "shrink8bit": what the published code trains on, the noise saved as a clamped 8-bit image and shrunk by an
    antialiased resize; its standard deviation is about 0.5 / (s / 4), although sampling feeds N(0, 1).
    "full": all of the noise that the teacher starts from.
    """
    if how == "full":
        return noise
    if how == "block-mean":
        return block_mean(noise, LATENT_SIDE)
    if how == "shrink8bit":
        return F.interpolate(from_uint8(to_uint8(noise)), LATENT_SIDE, mode="bilinear", antialias=True)
    raise UserError(f"there is no latent {how!r}; latents: block-mean, shrink8bit, full")
