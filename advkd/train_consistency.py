"""Consistency distillation (Song et al. 2023): all points of one teacher trajectory are to give the same image."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from advkd.data import batch_generator
from advkd.denoiser import Denoiser
from advkd.devices import pick_device
from advkd.presets import Preset
from advkd.training import Data, Plan, Share, TrainRecord, adam, autocast, descend, prepared, settle, timestep, walk
from advkd.trajectories import TrajectoryStore


def train_consistency(
    student: Denoiser,
    trajectories: TrajectoryStore,
    preset: Preset,
    *,
    teacher: Denoiser,
    images: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> Iterator[TrainRecord]:
    """Train `student` to expect at x_t what its moving average (without one, itself) expects one DDIM step of `teacher`
    later, on a grid of `preset.student_grid` timesteps; after the last step that is the teacher's image itself. `images`
    are real ones `(n, c, h, w)` in [-1, 1]; without them the last states of the trajectories stand in. Everything else
    is as in `train_advkd`.
    """
    device = pick_device(device)
    data = Data(trajectories, images, preset, device)
    yield from walk(_Loop(student, teacher, data, preset, device), preset, trajectories, checkpoint, resume)


def consistency_target(followed: nn.Module, teacher: Denoiser, xt: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """What `followed`, a student or its moving average, expects after a DDIM step of the teacher from x_t to timestep
    `end`; where that is -1, the clean image, what the step ends with."""
    after = teacher.ddim(xt, teacher(xt, t), t, end)
    return torch.where((end < 0).view(-1, 1, 1, 1), after, followed(after, end.clamp(min=0)))


class _Loop:
    def __init__(self, student, teacher, data, preset, device):
        self.preset, self.device, self.data, self.mine = preset, device, data, Share(device)
        self.plan = Plan(preset, len(data.store))
        self.steps = self.plan.steps
        self.teacher = teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.modules = prepared(student, preset, device)
        self.student = self.modules["student"]
        self.optimizers = {"student_optimizer": adam(self.student, preset)}

    def enter(self, step: int) -> None:
        """There is one stage."""

    def step(self, step: int) -> tuple[int, int, dict[str, Tensor]]:
        """One update towards the target of the moving average (Song et al. 2023, algorithm 2), or, without one, of the
        student itself (Song and Dhariwal 2023, section 3.2), in both cases without gradient."""
        p, generator, optimizer = (
            self.preset,
            batch_generator(self.preset.seed, step, 1),
            self.optimizers["student_optimizer"],
        )
        optimizer.param_groups[0]["lr"] = self.plan.learning_rate(step)
        average = self.modules.get("average")
        followed = self.student if average is None else average
        x0, grid = self.data.real(generator), p.student_grid
        which = self.mine.of(torch.randint(grid, (p.batch_size(0),), generator=generator)).to(self.device)
        t, end = timestep(which + 1, grid), timestep(which, grid)
        xt = self.teacher.noised(x0, self.mine.randn(generator, *x0.shape), t)
        with torch.no_grad(), autocast(p, self.device):
            target = consistency_target(followed, self.teacher, xt, t, end)
        # Another autocast: older torch would keep the weights that the first has cast, without their gradients.
        with autocast(p, self.device):
            image = self.student(xt, t)
        loss = pseudo_huber(image, target)
        return 0, self.plan.images_seen(step), descend(loss, self.student, optimizer, average)

    def finish(self) -> None:
        """Leave the reported weights in the student."""
        settle(self.student, self.modules.get("average"))


def pseudo_huber(x: Tensor, y: Tensor) -> Tensor:
    """E sqrt(||x - y||_2^2 + c^2) - c over images, c = 0.00054 sqrt(n) of n numbers (Song and Dhariwal 2023, section 3.3)."""
    c = 0.00054 * x[0].numel() ** 0.5
    return ((x - y).square().flatten(1).sum(1) + c**2).sqrt().mean() - c
