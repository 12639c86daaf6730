"""The critic of ADD: light heads on a frozen feature network, the teacher's own or DINOv2."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from advkd.denoiser import Denoiser
from advkd.files import check_weights, fingerprint, first_line
from advkd.presets import UserError

VIRTUAL_BATCH = 8
DINO_PX = 224  # 16 x 16 patches
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation that DINOv2 expects


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
    vector `(b, condition_size)`, such as the embedding of a timestep, moves the hidden channels. With several `kinds` of
    images each has a logit of its own; where no kind is named, all are given, `(b, kinds n)`.
    """

    def __init__(self, c: int, dims: int, condition_size: int = 0, width: int = 64, kinds: int = 1):
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
        self.leave = spectral_norm(convolution(width, kinds, 1))

    def forward(self, features: Tensor, condition: Tensor | None = None, kind: Tensor | None = None) -> Tensor:
        x = self.enter(features)
        if self.condition is not None:
            x = x + self.condition(condition).view(len(x), -1, *[1] * (x.ndim - 2))
        x = self.normalise(x)
        logits = self.leave((x + self.mix(x)) / 2**0.5).flatten(2).float()  # losses are not for bfloat16
        return logits.flatten(1) if kind is None else logits[torch.arange(len(x), device=x.device), kind]


class Heads(nn.Module):
    """One head for each layer of a feature network."""

    def __init__(self, channels: Sequence[int], dims: int, condition_size: int = 0, kinds: int = 1):
        super().__init__()
        self.heads = nn.ModuleList(Head(c, dims, condition_size, kinds=kinds) for c in channels)

    def forward(
        self, features: Sequence[Tensor], condition: Tensor | None = None, kind: Tensor | None = None
    ) -> list[Tensor]:
        """Logits `(b, n)` of every head, large for real images; `kind` `(b,)` says of which kind each image would be."""
        return [head(x, condition, kind) for head, x in zip(self.heads, features, strict=True)]


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


class DinoFeatures:
    """What a frozen DINOv2 sees of augmented images: the patch embedding and four layers, the class token added to every
    other (ADD, section 3.2; StyleGAN-T, section 3.2). Features that a metric uses must not be trained against: no metric
    here does.
    """

    dims, condition_size = 1, 0

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        depth = model.config.num_hidden_layers
        self.layers = [0, *(depth * n // 4 for n in (1, 2, 3, 4))]
        self.channels = [model.config.hidden_size] * len(self.layers)
        self.fingerprint = fingerprint(model.state_dict())

    @classmethod
    def from_pretrained(cls, source: str) -> "DinoFeatures":
        """From a folder or a hub id with weights as safetensors, such as facebook/dinov2-small (downloaded when it is not at
        hand). Raises UserError where transformers or the weights are missing, and for another network."""
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise UserError(
                f"features {source!r} need the package transformers: pip install -U transformers"
            ) from error
        check_weights(Path(source))
        try:
            model, found = Dinov2Model.from_pretrained(source, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"features {source!r} are no DINOv2 that can be read ({first_line(error)})") from error
        if found["missing_keys"] or model.config.model_type != "dinov2":
            raise UserError(f"features {source!r} hold another network than a DINOv2; give one, or features=''")
        return cls(model)

    def __call__(self, images: Tensor, eps: Tensor, z: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features `(b, c, n)` of images `(b, c, s, s)` in [-1, 1], augmented by `z` `(b, 8)`; the condition is empty."""
        self.model.to(images.device)
        rgb = F.interpolate(augmented(images, z) / 2 + 0.5, DINO_PX, mode="bicubic", antialias=True)
        mean, sd = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in IMAGENET)
        states = self.model((rgb.expand(-1, 3, -1, -1) - mean) / sd, output_hidden_states=True).hidden_states
        features = [(states[n][:, 1:] + states[n][:, :1]).transpose(1, 2) for n in self.layers]
        return features, images.new_zeros(len(images), 0)


def augmented(images: Tensor, z: Tensor) -> Tensor:
    """Images `(b, c, s, s)` in [-1, 1] in other brightness, saturation and contrast, moved by up to an eighth, and with a
    square of half the side cut out; by standard normal `z` `(b, 8)` (Zhao et al. 2020, appendix)."""
    side, u = images.shape[-1], torch.special.ndtr(z)[:, :, None, None, None]
    x = images + u[:, 0] - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * u[:, 1] * (x - grey)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = middle + (u[:, 2] + 0.5) * (x - middle)
    reach, places = side // 8, torch.arange(side, device=x.device)
    down, right, top, left = (u[:, n].view(-1, 1) for n in range(3, 7))
    rows, columns = (places + ((2 * reach + 1) * by).long().clamp(max=2 * reach) - reach for by in (down, right))
    inside = [(at >= 0) & (at < side) for at in (rows, columns)]
    cut = [(places >= (start := (side * by).floor() - side // 4)) & (places < start + side // 2) for by in (top, left)]
    batch = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    rows, columns = (at.clamp(0, side - 1) for at in (rows, columns))
    moved = x.movedim(1, -1)[batch, rows[:, :, None], columns[:, None]].movedim(-1, 1)
    seen = inside[0][:, :, None] & inside[1][:, None] & ~(cut[0][:, :, None] & cut[1][:, None])
    return moved * seen[:, None]


def make_heads(features: TeacherFeatures | DinoFeatures, seed: int, kinds: int = 1) -> Heads:
    """New heads for a feature network, their initial weights a function of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1000)
        return Heads(features.channels, features.dims, features.condition_size, kinds)
