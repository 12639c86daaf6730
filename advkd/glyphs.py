"""Endless real images in colour: letters from matplotlib's fonts, each rendered from its index alone."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from advkd.presets import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
)
UNSEEN_FONTS = ("DejaVuSerif-BoldItalic", "cmtt10")  # a harder held-out split
STAMP_PX = 64  # letters are drawn once at this size, then turned, shifted and shrunk in one transform
ROTATION_DEGREES = 12.0
SHIFT = 0.06  # of the image's side
HEIGHT = (0.5, 0.72)  # of a capital letter, as a share of the image's side
CONTRAST = 0.35  # smallest difference in luminance of ink and ground
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_COLOUR_PAIRS = 64  # drawn at once; a fifth of them have enough contrast, so that all fail once in a million images


class Glyphs:
    """The images with the indices `first` .. `first + count - 1`: indexed like a tensor, rendered when asked for.

    `glyphs[indices]` are images `(n, 3, size_px, size_px)` in [-1, 1] for a 1-D integer tensor (of positions below
    `len(glyphs)`) or a slice. Letter, font, size, shift, rotation and the two colours follow from the index alone.
    """

    def __init__(self, size_px: int, first: int, count: int, fonts: Sequence[str] = FONTS):
        self.size_px, self.first, self.count, self.fonts = size_px, first, count, tuple(fonts)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        drawn = [self._factors(i) for i in self._indices(which)]
        ink = torch.from_numpy(np.stack([self._mask(f) for f in drawn]))[:, None].float() / 255
        ground, colour = (torch.from_numpy(np.stack([f[n] for f in drawn]))[..., None, None] for n in ("ground", "ink"))
        return torch.lerp(ground, colour, ink)

    def factors(self, which: Tensor | slice) -> dict[str, Tensor]:
        """What the images show: `letter` and `font` as indices `(n,)`, `ground` and `ink` as RGB `(n, 3)` in [-1, 1]."""
        drawn = [self._factors(i) for i in self._indices(which)]
        names = "letter", "font", "ground", "ink"
        return {name: torch.from_numpy(np.stack([np.asarray(f[name]) for f in drawn])) for name in names}

    @property
    def classes(self) -> "Classes":
        """The class labels, indexed like the images."""
        return Classes(self)

    def _indices(self, which: Tensor | slice) -> list[int]:
        positions = range(*which.indices(self.count)) if isinstance(which, slice) else which.tolist()
        if outside := [i for i in positions if not 0 <= i < self.count]:
            raise UserError(f"glyphs has {self.count} images, but {outside[0]} was asked for")
        return [self.first + i for i in positions]

    def _factors(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        letter, font = rng.integers((len(LETTERS), len(self.fonts)))
        height, *shift, turn = rng.random(4)
        pairs = rng.random((_COLOUR_PAIRS, 2, 3))
        contrast = np.abs((pairs[:, 0] - pairs[:, 1]) @ _LUMINANCE)
        ground, ink = pairs[np.argmax(contrast >= CONTRAST)].astype(np.float32) * 2 - 1  # the first that has enough
        return {
            "letter": letter,
            "font": font,
            "ground": ground,
            "ink": ink,
            "height": HEIGHT[0] + (HEIGHT[1] - HEIGHT[0]) * height,
            "shift": (np.asarray(shift) * 2 - 1) * SHIFT,
            "radians": np.deg2rad((2 * turn - 1) * ROTATION_DEGREES),
        }

    def _mask(self, f: dict) -> np.ndarray:
        size = self.size_px
        stamp, capital_px = _stamp(self.fonts[f["font"]], LETTERS[f["letter"]])
        # Output pixel to stamp pixel: shift back, turn back, scale back, all about the centres.
        scale = capital_px / (f["height"] * size)
        cos, sin = scale * np.cos(f["radians"]), scale * np.sin(f["radians"])
        x, y = size / 2 + f["shift"] * size
        affine = (cos, sin, STAMP_PX / 2 - cos * x - sin * y, -sin, cos, STAMP_PX / 2 + sin * x - cos * y)
        return np.asarray(stamp.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))


class Classes:
    """Which letter in which font glyphs show: `classes[indices]` are `letter * len(FONTS) + font`, `(n,)`."""

    def __init__(self, glyphs: Glyphs):
        self.glyphs = glyphs

    def __len__(self) -> int:
        return len(self.glyphs)

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        factors = self.glyphs.factors(which)
        return factors["letter"] * len(FONTS) + factors["font"]


def ground_octant(images: Tensor) -> Tensor:
    """The colour of the ground of images `(n, 3, s, s)`, as one of 8 octants of the RGB cube, `(n,)`.

    The median of the border: no letter reaches half of it.
    """
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], dim=-1)
    return ((border.median(dim=-1).values > 0) * torch.tensor([4, 2, 1])).sum(1)


@cache
def _stamp(font: str, letter: str) -> tuple[Image.Image, float]:
    """A letter, white on black, centred on a square of STAMP_PX, and the height of the font's H in it."""
    import matplotlib  # slow to import, and only needed for its fonts

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    face = ImageFont.truetype(str(path), STAMP_PX * 0.62)
    _, top, _, bottom = face.getbbox("H")
    left, _, right, _ = face.getbbox(letter)
    stamp = Image.new("L", (STAMP_PX, STAMP_PX))
    corner = (STAMP_PX - left - right) / 2, (STAMP_PX - top - bottom) / 2
    ImageDraw.Draw(stamp).text(corner, letter, 255, font=face)
    return stamp, bottom - top
