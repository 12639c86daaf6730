"""Distribution matching distillation (DMD, Yin et al. 2024): the student follows the difference of two scores."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from advkd.data import batch_generator
from advkd.denoiser import Denoiser
from advkd.devices import average_gradients, pick_device
from advkd.presets import TRAIN_TIMESTEPS, Preset
from advkd.train_regression import pair_loss
from advkd.training import (
    Data,
    Plan,
    Share,
    TrainRecord,
    adam,
    autocast,
    descend,
    expected_image,
    gradient_norm,
    prepared,
    settle,
    walk,
)
from advkd.trajectories import TrajectoryStore

SAFE_TIMESTEPS = 20, 980  # as published


def train_dmd(
    student: nn.Module,
    trajectories: TrajectoryStore,
    preset: Preset,
    *,
    teacher: Denoiser,
    fake: Denoiser,
    images: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> Iterator[TrainRecord]:
    """Train `student` against the difference of `teacher` and `fake`, a denoiser that learns the student's images on the way,
    with `preset.reconstruction_weight` x pair regression. Real images are not used. Everything else is as in `train_advkd`.
    """
    device = pick_device(device)
    data = Data(trajectories, None, preset, device)
    yield from walk(_Loop(student, teacher, fake, data, preset, device), preset, trajectories, checkpoint, resume)


def matching_loss(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A loss whose gradient in the student's images `(b, c, s, s)` is (fake - real) / mean |x0 - real| / numbers: `real` and
    `fake` are what the two denoisers expect of the noised images (DMD, equations 7 and 8)."""
    gradient = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


class _Loop:
    def __init__(self, student, teacher, fake, data, preset, device):
        self.preset, self.device, self.data, self.mine = preset, device, data, Share(device)
        self.plan = Plan(preset, len(data.store))
        self.steps = self.plan.steps
        self.teacher = teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.modules = prepared(student, preset, device)
        self.student = self.modules["student"]
        self.modules["fake"] = fake.to(device, memory_format=torch.channels_last).train()
        self.optimizers = {f"{name}_optimizer": adam(self.modules[name], preset) for name in ("student", "fake")}

    def enter(self, step: int) -> None:
        """There is one stage."""

    def step(self, step: int) -> tuple[int, int, dict[str, Tensor]]:
        """One update of the student, then one of the denoiser of its images."""
        p, generator = self.preset, batch_generator(self.preset.seed, step, 1)
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = self.plan.learning_rate(step)
        noise = self.mine.randn(generator, p.batch_size(0) // self.mine.count, *p.image_shape)
        last = torch.full((len(noise),), TRAIN_TIMESTEPS - 1, device=self.device)
        with autocast(p, self.device):
            x0 = expected_image(self.student, p, noise, last)
        loss = p.adversarial_weight * self._matching(x0, generator)
        values = {}
        if p.reconstruction_weight:
            pairs = pair_loss(self.student, p, *self.data.pairs(self.plan.batch(step)))
            loss, values = loss + p.reconstruction_weight * pairs, {"reconstruction_loss": pairs.detach()}
        values |= descend(loss, self.student, self.optimizers["student_optimizer"], self.modules.get("average"))
        return 0, self.plan.images_seen(step), values | self._train_fake(x0.detach(), generator)

    def _noised(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        t = self.mine.of(torch.randint(*SAFE_TIMESTEPS, (len(x0) * self.mine.count,), generator=generator)).to(
            self.device
        )
        eps = self.mine.randn(generator, *x0.shape)
        return self.teacher.noised(x0, eps, t), t

    def _matching(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """`matching_loss` of the expected images, both clamped: the same denoisers are to give no gradient."""
        xt, t = self._noised(x0.detach(), generator)
        with torch.no_grad(), autocast(self.preset, self.device):
            real, fake = (d(xt, t).clamp(-1, 1) for d in (self.teacher, self.modules["fake"]))
        return matching_loss(x0, real, fake)

    def _train_fake(self, x0: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The student's images are learnt by the loss of a teacher's training: the mean squared error of what the U-Net itself
        predicts, which the gain makes an image's."""
        fake, optimizer = self.modules["fake"], self.optimizers["fake_optimizer"]
        xt, t = self._noised(x0, generator)
        with autocast(self.preset, self.device):
            loss = ((fake(xt, t) - x0) / fake.gain[t].view(-1, 1, 1, 1)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(fake.parameters())
        norm = gradient_norm(fake.parameters())
        optimizer.step()
        return {"critic_loss": loss.detach(), "critic_gradient": norm}

    def finish(self) -> None:
        """Leave the reported weights in the student."""
        settle(self.student, self.modules.get("average"))
