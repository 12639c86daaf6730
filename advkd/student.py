"""The one-step student: K submodules that play the teacher's denoising phases, each with a head of its own."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import cache

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from advkd.data import block_mean
from advkd.presets import LATENT_SIDE, Preset, UserError, resolution, stage_times


class Conv(nn.Sequential):
    """Convolution 3x3, BatchNorm, LeakyReLU(0.01): `(b, c_in, s, s)` to `(b, c, s, s)`."""

    def __init__(self, c_in: int, c: int):
        super().__init__(nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.LeakyReLU(0.01))


class Up(nn.Sequential):
    """Transposed convolution 3x3, BatchNorm, LeakyReLU(0.01): `(b, c_in, s, s)` to `(b, c, 2s, 2s)`."""

    def __init__(self, c_in: int, c: int):
        convolution = nn.ConvTranspose2d(c_in, c, 3, stride=2, padding=1, output_padding=1)
        super().__init__(convolution, nn.BatchNorm2d(c), nn.LeakyReLU(0.01))


class Residual(nn.Module):
    """LeakyReLU(x + f(x)) with f = Conv, convolution 3x3, BatchNorm; keeps the shape `(b, c, s, s)`."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(Conv(c, c), nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c))
        self.activation = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.body(x))


def plain_layers(c_in: int, c: int, factor: int, first: bool) -> list[nn.Module]:
    """A submodule as published: two layers (the first resolution's submodules 0 and 1: one), Up for each doubling."""
    before = [] if first else [Conv(c_in, c)]
    c_in = c_in if first else c
    if factor == 1:
        return [*before, Conv(c_in, c)]
    return [*before, Up(c_in, c), *(Up(c, c) for _ in range(factor.bit_length() - 2))]


def residual_layers(c_in: int, c: int, factor: int, first: bool) -> list[nn.Module]:
    """A submodule of the improved recipe: nearest upsampling where its image grows, then a residual block."""
    grow = [nn.Upsample(scale_factor=factor), Conv(c_in, c)] if factor > 1 else []
    return [*grow, Residual(c)]


def terminal(c: int, channels: int) -> nn.Sequential:
    """The published head: features `(b, c, s, s)` to an image `(b, channels, s, s)` in [-1, 1]."""
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1),
        nn.BatchNorm2d(c),
        nn.LeakyReLU(0.01),
        nn.Conv2d(c, channels, 3, padding=1),
        nn.Tanh(),
    )


def light_head(c: int, channels: int) -> nn.Sequential:
    """A head of one convolution, so that the denoising happens in the submodules."""
    return nn.Sequential(nn.Conv2d(c, channels, 3, padding=1), nn.Tanh())


BLOCKS = {"plain": plain_layers, "residual": residual_layers}
LATENTS = ("shrink8bit", "block-mean", "full")
HEADS = {"terminal": terminal, "light": light_head}


class Submodule(nn.Module):
    """One denoising phase: `layers` carry the features on, `terminal` shows them as an image (None: no head)."""

    def __init__(self, layers: list[nn.Module], head: nn.Module | None):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.terminal = head


class Student(ModelMixin, ConfigMixin):
    """Adv-KD's student (section 3): a 4 x 4 latent to an image in one forward pass through K submodules.

    `widths` are the feature channels at each resolution, coarse to fine; `block` is a key of BLOCKS, `head` of HEADS.
    With `latent="full"` the input is the teacher's whole noise: a submodule whose image grows to r px is given its block
    means at r px beside the features. With `training_heads=False` only the last submodule has a head: the deployable
    generator.
    """

    @register_to_config
    def __init__(
        self,
        image_size_px: int = 256,
        channels: int = 3,
        submodules: int = 11,
        widths: tuple[int, ...] = (16, 32, 64, 128, 128, 128),
        block: str = "plain",
        head: str = "terminal",
        latent: str = "block-mean",
        training_heads: bool = True,
    ):
        super().__init__()
        for name, value, known in (("block", block, BLOCKS), ("head", head, HEADS), ("latent", latent, LATENTS)):
            if value not in known:
                raise UserError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, known))}")
        self.stages = nn.ModuleList()
        side, c_in = LATENT_SIDE, channels
        sizes = [resolution(k, submodules, image_size_px) for k in range(submodules)]
        for k, size in enumerate(sizes):
            c = widths[sorted(set(sizes)).index(size)]
            if latent == "full" and size > side:
                c_in = channels * (size // side) ** 2 + (c_in if k else 0)
            layers = BLOCKS[block](c_in, c, size // side, k < 2)
            has_head = training_heads or k == submodules - 1
            self.stages.append(Submodule(layers, HEADS[head](c, channels) if has_head else None))
            side, c_in = size, c

    @classmethod
    def from_preset(cls, preset: Preset) -> "Student":
        """A new student whose initial weights follow from `preset.seed` alone."""
        fields = "image_size_px channels submodules widths block head latent"
        with torch.random.fork_rng():
            torch.manual_seed(preset.seed)
            return cls(**{name: getattr(preset, name) for name in fields.split()})

    def forward(self, latent: Tensor, stage: int | None = None) -> Tensor:
        """The image `(b, channels, r, r)` in [-1, 1] of submodule `stage` (default: the last) for latents `latent_shape`.

        Raises UserError for a stage that does not exist, or has no head in a deployable generator.
        """
        stage = self._check(stage)
        *_, features = self._walk(latent, stage)
        return self.stages[stage].terminal(features)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the last image."""
        return self.config.channels, self.config.image_size_px, self.config.image_size_px

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        side = self.config.image_size_px if self.config.latent == "full" else LATENT_SIDE
        return self.config.channels, side, side

    @property
    def sampled_from(self) -> str:
        """What of the seeded noise it is sampled from, see `data.make_latent`: whatever it was trained on, N(0, 1)."""
        return "full" if self.config.latent == "full" else "block-mean"

    def _walk(self, latent: Tensor, stage: int) -> Iterator[Tensor]:
        """The features after submodules 0..`stage`."""
        features = latent
        for k, submodule in enumerate(self.stages[: stage + 1]):
            features = submodule.layers(self.given(features, latent, k))
            yield features

    def given(self, features: Tensor, latent: Tensor, k: int) -> Tensor:
        """What the layers of submodule `k` take: the features after submodule k - 1 (of the first, the latent), and beside
        them, where its image grows and the latent is the whole noise, the noise's block means."""
        side, size = features.shape[-1] if k else LATENT_SIDE, self.resolution(k)
        if self.config.latent != "full" or size == side:
            return features
        noise = F.pixel_unshuffle(block_mean(latent, size), size // side)
        return torch.cat([features, noise], dim=1) if k else noise

    def resolution(self, k: int) -> int:
        """Side in pixels of submodule k's image."""
        return resolution(k, len(self.stages), self.config.image_size_px)

    def images(self, latent: Tensor, stage: int | None = None, first: int | None = None) -> list[Tensor]:
        """The images of submodules 0..`stage` (default: all) in one pass, coarse to fine.

        With `first` the heads before the last one show only that many samples: training compares no others.
        """
        if not self.config.training_heads:
            raise UserError("this is the deployable generator, which has the last head only; load the training student")
        stage = self._check(stage)
        walk = zip(self.stages, self._walk(latent, stage), strict=False)
        return [m.terminal(features if k == stage else features[:first]) for k, (m, features) in enumerate(walk)]

    def generator(self) -> "Student":
        """A copy without the training-time heads, for deployment: the same last image from fewer parameters."""
        copy = Student.from_config(self.config, training_heads=False)
        kept = copy.state_dict().keys()
        copy.load_state_dict({name: value for name, value in self.state_dict().items() if name in kept})
        return copy.to(self.device).train(self.training)

    def _check(self, stage: int | None) -> int:
        count = len(self.stages)
        if stage is None:
            return count - 1
        if not 0 <= stage < count:
            raise UserError(f"stage is {stage}, but the student has submodules 0 to {count - 1}")
        if self.stages[stage].terminal is None:
            raise UserError(
                f"submodule {stage} has no head: this is the deployable generator; load the training student"
            )
        return stage


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; BatchNorm's running statistics are buffers and not counted."""
    return sum(p.numel() for p in module.parameters())


@torch.inference_mode()
def gflop_per_submodule(student: Student) -> list[tuple[float, float]]:
    """Billions of floating-point operations (two for a multiplication and sum) for one image: of each submodule's layers,
    and of its head, which only training needs but for the last."""
    latent, counts, before = torch.zeros(1, *student.latent_shape, device=student.device), [], 0
    with FlopCounterMode(display=False) as counter:
        for stage, features in zip(student.stages, student._walk(latent, len(student.stages) - 1), strict=True):
            layers = counter.get_total_flops() - before
            if stage.terminal is not None:
                stage.terminal(features)
            after = counter.get_total_flops()
            counts.append((layers / 1e9, (after - before - layers) / 1e9))
            before = after
    return counts


def gflop_per_image(student: Student) -> float:
    """As `gflop_per_submodule`, of the deployable generator."""
    return sum(map(sum, gflop_per_submodule(student.generator().eval())))


@cache
def parameters(preset: Preset) -> int:
    """Number of parameters of the preset's student."""
    with torch.device("meta"):  # shapes without weights
        return count_parameters(Student.from_preset(preset))


def describe(preset: Preset) -> str:
    """What a preset's student is, a line for each submodule: its image's side, what it imitates, its parameters."""
    images = (
        f"{preset.name}: {preset.channels} x {preset.image_size_px} x {preset.image_size_px}, recipe {preset.recipe}"
    )
    if preset.architecture == "unet":
        return (
            f"{images}: the teacher's U-Net, sampled at the timesteps {sorted(preset.student_timesteps, reverse=True)}"
        )
    with torch.device("meta"):
        stages = Student.from_preset(preset).stages
    times = [f"t = {t}" for t in stage_times(preset.submodules)] + ["the final image"]
    lines = [f"{images}, {parameters(preset):,} parameters"]
    for k, (stage, time) in enumerate(zip(stages, times, strict=True)):
        own, head = count_parameters(stage.layers), count_parameters(stage.terminal)
        lines.append(f"  submodule {k}: {preset.resolution(k)} px, {time}, {own:,} parameters + {head:,} of its head")
    return "\n".join(lines)


def match_parameters(preset: Preset, wanted: int) -> Preset:
    """The preset with its widths scaled, in multiples of 2, to the number of parameters nearest to `wanted`."""
    scaled = {
        tuple(max(2, round(width * tenths / 20) * 2) for width in preset.widths): None for tenths in range(2, 120)
    }
    fitting = [preset.replace(widths=widths) for widths in scaled]
    at = bisect_left(fitting, wanted, key=parameters)  # they grow with the widths, and counting takes a student each
    return min(fitting[max(at - 1, 0) : at + 1], key=lambda p: abs(parameters(p) - wanted))
