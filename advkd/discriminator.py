"""Critics: the published conditional one, and the unconditional one of the improved recipe."""

import torch
from torch import Tensor, nn

from advkd.devices import batch_variance
from advkd.presets import Preset


def _down(c_in: int, c: int, norm: bool) -> list[nn.Module]:
    normalise = [nn.BatchNorm2d(c)] if norm else []
    return [nn.Conv2d(c_in, c, 4, stride=2, padding=1, bias=False), *normalise, nn.LeakyReLU(0.2)]


class Discriminator(nn.Module):
    """Adv-KD's critic for images of one stage, conditioned on the latent: `(image, latent)` to logits `(b,)`.

    Takes images `(b, channels, resolution_px, resolution_px)` in [-1, 1] and latents `(b, channels, 4, 4)`.
    """

    def __init__(self, resolution_px: int, channels: int = 3):
        super().__init__()
        image, c, side = _down(channels, 32, norm=False), 32, resolution_px // 2
        while side > 4:
            image += _down(c, min(2 * c, 128), norm=True)
            c, side = min(2 * c, 128), side // 2
        self.image = nn.Sequential(*image, nn.Flatten())
        self.latent = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.joint = nn.Sequential(
            nn.Linear(16 * c + 64 * 4, 128), nn.BatchNorm1d(128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )

    def forward(self, image: Tensor, latent: Tensor) -> Tensor:
        """Logits `(b,)`: large for images that belong to the teacher."""
        return self.joint(torch.cat([self.image(image), self.latent(latent)], dim=1)).squeeze(1)


class UnconditionalDiscriminator(nn.Module):
    """The improved recipe's critic: an image `(b, channels, s, s)` to logits `(b,)`; the latent is not looked at.

    No BatchNorm, which would mix the samples in the gradient penalty; only one number, the mean standard deviation over
    the batch (Karras et al. 2018, section 3), lets it see a collapse.
    """

    def __init__(self, resolution_px: int, channels: int = 3, width: int = 32):
        super().__init__()
        layers, c, side = (
            [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)],
            width,
            resolution_px // 2,
        )
        while side > 4:
            layers += [nn.Conv2d(c, c, 3, padding=1), nn.LeakyReLU(0.2)]
            layers += [nn.Conv2d(c, min(2 * c, 4 * width), 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            c, side = min(2 * c, 4 * width), side // 2
        self.image = nn.Sequential(*layers, nn.Conv2d(c, c, 3, padding=1), nn.LeakyReLU(0.2))
        self.joint = nn.Sequential(nn.Linear(16 * c + 1, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def forward(self, image: Tensor, latent: Tensor | None = None) -> Tensor:
        """Logits `(b,)`: large for images that belong to the teacher or the data."""
        features = self.image(image).flatten(1)
        spread = (batch_variance(features) + 1e-8).sqrt().mean().expand(len(features), 1)
        return self.joint(torch.cat([features, spread], dim=1)).squeeze(1)


def make_discriminator(preset: Preset, k: int) -> nn.Module:
    """A new critic for submodule k's images, its initial weights a function of `preset.seed` and k."""
    with torch.random.fork_rng():
        torch.manual_seed(preset.seed + 1000 * (k + 1))
        if preset.critic == "conditional":
            return Discriminator(preset.resolution(k), preset.channels)
        return UnconditionalDiscriminator(preset.resolution(k), preset.channels, preset.critic_width)
