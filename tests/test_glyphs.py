"""The endless letters: every image follows from its index alone, and its factors are what it shows."""

import numpy as np
import pytest
import torch

from advkd.data import GLYPHS_TRAIN, load_images
from advkd.glyphs import CONTRAST, FONTS, LETTERS, UNSEEN_FONTS, Glyphs, ground_octant
from advkd.presets import UserError, load_preset

LUMINANCE = torch.tensor([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def glyphs():
    return Glyphs(32, first=100, count=1000)


def test_images_are_in_range_and_follow_from_the_index_alone(glyphs):
    images = glyphs[:50]
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    assert torch.equal(glyphs[torch.tensor([7, 3, 7])], images[[7, 3, 7]])
    assert torch.equal(Glyphs(32, first=0, count=200)[torch.arange(100, 150)], images)
    assert len({image.numpy().tobytes() for image in images}) == 50


def test_ground_and_ink_are_the_colours_in_the_image(glyphs):
    images, factors = glyphs[:200], glyphs.factors(slice(200))
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=2).values
    torch.testing.assert_close(corners, factors["ground"])
    towards_ink = (images - factors["ground"][..., None, None]) / (factors["ink"] - factors["ground"])[..., None, None]
    share = towards_ink.mean(1)  # of ink in each pixel
    assert share.min() > -1e-3 and share.max() < 1 + 1e-3
    covered = (share > 0.5).float().mean((1, 2))
    assert covered.min() > 0.02 and covered.max() < 0.5
    contrast = ((factors["ink"] - factors["ground"]) / 2 @ LUMINANCE).abs()
    assert contrast.min() >= CONTRAST - 1e-6


def test_letters_and_fonts_are_uniform(glyphs):
    factors = Glyphs(32, first=0, count=20_000).factors(slice(None))
    for name, kinds in (("letter", len(LETTERS)), ("font", len(FONTS))):
        counts = torch.bincount(factors[name], minlength=kinds)
        assert len(counts) == kinds
        expected = 20_000 / kinds
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert chi2 < kinds + 4 * np.sqrt(2 * kinds)
    classes = glyphs.classes[:20]
    assert torch.equal(classes // len(FONTS), glyphs.factors(slice(20))["letter"]) and len(glyphs.classes) == 1000
    assert torch.equal(classes % len(FONTS), glyphs.factors(slice(20))["font"])


def test_the_same_letter_in_the_same_colours_differs_by_font_and_pose(glyphs):
    seen = Glyphs(32, first=0, count=10)[:10]
    unseen = Glyphs(32, first=0, count=10, fonts=UNSEEN_FONTS)[:10]
    assert not set(UNSEEN_FONTS) & set(FONTS)
    assert all(not torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))


def test_the_splits_share_no_index():
    preset = load_preset("glyphs")
    (train, classes), (heldout, _) = load_images(preset, "train"), load_images(preset, "heldout")
    assert (train.first, len(train), heldout.first) == (0, GLYPHS_TRAIN, GLYPHS_TRAIN)
    assert train.fonts == heldout.fonts == FONTS
    unseen, letters = load_images(preset, "unseen-fonts")
    assert unseen.fonts == UNSEEN_FONTS and unseen.first == heldout.first + len(heldout)
    assert torch.equal(letters[:50] // len(FONTS), unseen.factors(slice(50))["letter"])
    assert torch.equal(classes[torch.tensor([5])], train.classes[5:6])


def test_images_that_do_not_exist_are_refused(glyphs):
    for index in (1000, -1):
        with pytest.raises(UserError, match=f"glyphs has 1000 images, but {index} was asked for"):
            glyphs[torch.tensor([0, index])]


def test_the_octant_of_the_ground_is_that_of_its_colour(glyphs):
    ground = glyphs.factors(slice(300))["ground"]
    clear = (ground.abs() > 0.05).all(1)  # between two octants the border's noise may decide
    expected = (ground > 0).int() @ torch.tensor([4, 2, 1], dtype=torch.int32)
    assert clear.sum() > 200 and torch.equal(ground_octant(glyphs[:300])[clear], expected[clear].long())
