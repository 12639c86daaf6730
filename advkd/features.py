"""The critic of ADD: light heads on a frozen feature network, the teacher's own or DINOv2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from advkd.denoiser import Denoiser

VIRTUAL_BATCH = 8


class BatchNormLocal(nn.Module):
    """Normalises `(b, c, *)` by mean and variance over groups of 8 samples (StyleGAN-T, section 3.2), with an affine map.

    A group takes every n-th sample of the batch, so that processes which deal a batch out one by one have whole groups.
    """

    def __init__(self, c: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x`. Fewer than 8 samples are one group, and so are those that 8 does not divide."""
        size = VIRTUAL_BATCH if len(x) % VIRTUAL_BATCH == 0 else len(x)
        groups = x.float().reshape(size, len(x) // size, x.shape[1], -1)
        mean = groups.mean((0, 3), keepdim=True)
        variance = (groups - mean).square().mean((0, 3), keepdim=True)
        groups = (groups - mean) * (variance + self.eps).rsqrt() * self.weight.view(-1, 1) + self.bias.view(-1, 1)
        return groups.view(x.shape).to(x.dtype)


class Head(nn.Module):
    """A critic of one layer's features `(b, c, *)`: a logit for every place, `(b, n)` (StyleGAN-T, section 3.2).

    Tokens `(b, c, n)` are mixed by circular convolutions over 9, maps `(b, c, h, w)` by 3 x 3. With `condition_size` a
    vector `(b, condition_size)`, such as the embedding of a timestep, moves the hidden channels.
    """

    def __init__(self, c: int, dims: int, condition_size: int = 0, width: int = 64):
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        mix = {1: {"kernel_size": 9, "padding": 4, "padding_mode": "circular"}, 2: {"kernel_size": 3, "padding": 1}}[
            dims
        ]
        self.enter = spectral_norm(convolution(c, width, 1))
        self.condition = nn.Linear(condition_size, width) if condition_size else None
        self.normalise = nn.Sequential(BatchNormLocal(width), nn.LeakyReLU(0.2))
        self.mix = nn.Sequential(
            spectral_norm(convolution(width, width, **mix)), BatchNormLocal(width), nn.LeakyReLU(0.2)
        )
        self.leave = spectral_norm(convolution(width, 1, 1))

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.enter(features)
        if self.condition is not None:
            x = x + self.condition(condition).view(len(x), -1, *[1] * (x.ndim - 2))
        x = self.normalise(x)
        return self.leave((x + self.mix(x)) / 2**0.5).flatten(1)


class Heads(nn.Module):
    """One head for each layer of a feature network."""

    def __init__(self, channels: Sequence[int], dims: int, condition_size: int = 0):
        super().__init__()
        self.heads = nn.ModuleList(Head(c, dims, condition_size) for c in channels)

    def forward(self, features: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        """Logits `(b, n)` of every head: large for real images."""
        return [head(x, condition) for head, x in zip(self.heads, features, strict=True)]


class TeacherFeatures:
    """What the frozen teacher's encoder sees of noised images: after every resolution and in the middle (LADD, section 3).

    No download, no foreign images, and no feature that a metric here looks at.
    """

    dims = 2

    def __init__(self, teacher: Denoiser, mean: float, sd: float):
        self.teacher, self.mean, self.sd = teacher, mean, sd
        widths = teacher.unet.config.block_out_channels
        self.channels = [*widths, widths[-1]]
        self.condition_size = teacher.unet.time_embedding.linear_2.out_features

    def __call__(self, images: Tensor, eps: Tensor, z: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features of images `(b, c, s, s)` with noise `eps`, and the embedding of their timesteps: those where
        log(sigma / alpha) is mean + sd z, of z `(b, n)` the first column. In the time of LADD's straight paths that is a
        logit-normal."""
        ratio = (self.teacher.sigma / self.teacher.alpha)[:-1]
        t = torch.searchsorted(ratio, (self.mean + self.sd * z[:, 0]).exp()).clamp(max=len(ratio) - 1)
        unet = self.teacher.unet
        embedding = unet.time_embedding(unet.time_proj(t))
        x, features = unet.conv_in(self.teacher.noised(images, eps, t)), []
        for block in unet.down_blocks:
            x, _ = block(hidden_states=x, temb=embedding)
            features.append(x)
        return [*features, unet.mid_block(x, embedding)], embedding


def make_heads(features: TeacherFeatures, seed: int) -> Heads:
    """New heads for a feature network, their initial weights a function of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1000)
        return Heads(features.channels, features.dims, features.condition_size)
