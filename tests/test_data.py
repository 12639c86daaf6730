import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from advkd.data import (
    batch_generator,
    from_uint8,
    load_images,
    make_latent,
    sample_generators,
    sample_noise,
    seeded_noise,
    to_uint8,
)
from advkd.presets import UserError, load_preset

PRESET = load_preset("digits")


def test_the_split_covers_the_digits_once():
    (train, train_labels), (heldout, heldout_labels) = load_images(PRESET, "train"), load_images(PRESET, "heldout")
    assert train.shape == (1197, 1, 16, 16) and train_labels.shape == (1197,)
    assert heldout.shape == (600, 1, 16, 16) and heldout_labels.shape == (600,)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=16, mode="bicubic", align_corners=False).clamp(-1, 1)
    rows = [(image.numpy().tobytes(), label) for image, label in zip(images, digits.target.tolist(), strict=True)]
    split = zip(torch.cat([train, heldout]), torch.cat([train_labels, heldout_labels]).tolist(), strict=True)
    assert sorted(rows) == sorted((image.numpy().tobytes(), label) for image, label in split)


def test_no_image_is_in_both_splits():
    train, heldout = ({x.numpy().tobytes() for x in load_images(PRESET, split)[0]} for split in ("train", "heldout"))
    assert not train & heldout


def test_images_fill_the_range():
    images, labels = load_images(PRESET, "train")
    assert images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert labels.unique().tolist() == list(range(10))


def test_images_are_the_same_bytes_twice():
    first, second = load_images(PRESET, "heldout"), load_images(PRESET, "heldout")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_unknown_split_and_images_that_are_not_embedded_are_refused():
    with pytest.raises(UserError, match=r"no split 'unseen-fonts'; splits: train, heldout$"):
        load_images(load_preset("digits"), "unseen-fonts")
    with pytest.raises(UserError, match="no split 'test'; splits: train, heldout"):
        load_images(PRESET, "test")
    with pytest.raises(UserError, match="'celebahq' are not embedded; give a folder of them"):
        load_images(load_preset("celebahq"), "train")


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together = seeded_noise(range(6), (1, 8, 8), seed=3)
    alone = torch.cat([seeded_noise([i], (1, 8, 8), seed=3) for i in range(6)])
    assert torch.equal(together, alone)
    assert torch.equal(seeded_noise([4, 1], (1, 8, 8), seed=3), together[[4, 1]])
    assert torch.equal(together[2], torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)))


def test_noise_differs_between_samples_and_seeds_and_draws():
    noise = torch.cat([seeded_noise(range(4), (1, 8, 8), seed) for seed in (0, 1)])
    assert len({x.numpy().tobytes() for x in noise}) == 8
    generators = sample_generators(range(4), 0)
    assert torch.equal(sample_noise(generators, (1, 8, 8)), noise[:4])
    assert not torch.equal(sample_noise(generators, (1, 8, 8)), noise[:4])


def test_noise_is_standard_normal():
    noise = seeded_noise(range(100), (1, 16, 16), 0)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_batch_generator_is_a_function_of_its_counters():
    draws = [torch.rand(4, generator=batch_generator(*c)) for c in ((0, 1), (0, 1), (1, 0), (0, 2), (0, 1, 1))]
    assert torch.equal(draws[0], draws[1])
    assert len({draw.numpy().tobytes() for draw in draws}) == 4


@pytest.mark.parametrize("side", [16, 32])
def test_block_mean_latent_is_an_orthonormal_projection(side):
    basis = torch.eye(side * side).view(side * side, 1, side, side)
    matrix = make_latent(basis, "block-mean").flatten(1).T
    assert matrix.shape == (16, side * side)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16))


@pytest.mark.parametrize("side", [16, 64])
def test_shrink8bit_latent_is_an_antialiased_shrink_of_the_8_bit_image(side):
    noise = seeded_noise(range(400), (1, side, side), 0)
    pixels = np.clip(np.round((noise.numpy() + 1) * np.float32(127.5)), 0, 255).astype(float) / 127.5 - 1
    scale = side / 4
    distance = (np.arange(side) + 0.5)[None] - (np.arange(4) + 0.5)[:, None] * scale
    weights = np.maximum(0, 1 - np.abs(distance) / scale)
    weights /= weights.sum(1, keepdims=True)
    latent = make_latent(noise, "shrink8bit")
    np.testing.assert_allclose(latent.numpy(), weights @ pixels @ weights.T, atol=1e-5)
    assert abs(latent.std() / (0.5 / scale) - 1) < 0.1


def test_unknown_latent_is_refused():
    with pytest.raises(UserError, match="no latent 'mean'; latents: block-mean, shrink8bit"):
        make_latent(torch.zeros(1, 1, 16, 16), "mean")


def test_every_8_bit_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values).min() == -1 and from_uint8(values).max() == 1
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    x = torch.linspace(-1, 1, 1001)
    assert (from_uint8(to_uint8(x)) - x).abs().max() <= 0.5 / 127.5 + 1e-6
