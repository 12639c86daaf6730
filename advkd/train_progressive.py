"""Progressive distillation (Salimans and Ho 2022): each student does in one step what its teacher does in two."""

import copy
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from advkd.data import batch_generator
from advkd.denoiser import Denoiser
from advkd.devices import pick_device
from advkd.presets import Preset
from advkd.training import Data, Plan, Share, TrainRecord, adam, autocast, descend, prepared, settle, timestep, walk
from advkd.trajectories import TrajectoryStore


def train_progressive(
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
    """Halve the DDIM steps of `teacher` from `2 * preset.student_grid` to as many as the student has timesteps, in phases
    of equal length; a phase's student is the next one's teacher. `images` are real ones `(n, c, h, w)` in [-1, 1]; without
    them the last states of the trajectories stand in. Everything else is as in `train_advkd`.
    """
    device = pick_device(device)
    data = Data(trajectories, images, preset, device)
    yield from walk(_Loop(student, teacher, data, preset, device), preset, trajectories, checkpoint, resume)


def two_steps(teacher: Denoiser, xt: Tensor, t: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """The image that takes x_t in one DDIM step to timestep `end` to where two steps of the teacher, over `middle`, take it.

    Timesteps are `(b,)`; -1 is the clean image (Salimans and Ho 2022, appendix G).
    """
    halfway = teacher.ddim(xt, teacher(xt, t), t, middle)
    after = teacher.ddim(halfway, teacher(halfway, middle), middle, end)
    (alpha, sigma), (alpha_end, sigma_end) = teacher.levels(t), teacher.levels(end)
    return (after - sigma_end / sigma * xt) / (alpha_end - sigma_end / sigma * alpha)


class _Loop:
    def __init__(self, student, teacher, data, preset, device):
        self.preset, self.device, self.data, self.mine = preset, device, data, Share(device)
        self.plan = Plan(preset, len(data.store))
        self.steps = self.plan.steps
        self.student = student.to(device, memory_format=torch.channels_last)
        self.first = teacher.to(device, memory_format=torch.channels_last)
        grid, last = preset.student_grid, len(preset.student_timesteps)
        self.grids = [grid >> n for n in range(grid.bit_length()) if grid >> n >= last]  # steps of each phase's student
        count = len(self.grids)
        self.begins = [-(-n * self.steps // count) for n in range(count + 1)]  # of the phases, and the end of the last
        self.phase = None
        self.modules, self.optimizers = {}, {}

    def _phase_of(self, step: int) -> int:
        return bisect_right(self.begins, step) - 1

    def enter(self, step: int) -> None:
        """A phase's teacher, the student so far; a fresh optimizer and a fresh average."""
        p, before = self.preset, self.phase
        self.phase = self._phase_of(step)
        teacher = self.first
        if self.phase and before is not None:
            settle(self.student, self.modules.get("average"))
            teacher = self.student
        self.modules = prepared(self.student, p, self.device)
        self.modules["teacher"] = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.optimizers = {"student_optimizer": adam(self.student, p)}

    def step(self, step: int) -> tuple[int, int, dict[str, Tensor]]:
        """One update at the timesteps of the phase, the loss weighted by max(1, signal to noise)."""
        if self._phase_of(step) != self.phase:
            self.enter(step)
        p, generator, optimizer = (
            self.preset,
            batch_generator(self.preset.seed, step, 1),
            self.optimizers["student_optimizer"],
        )
        optimizer.param_groups[0]["lr"] = self._learning_rate(step)
        x0, grid = self.data.real(generator), self.grids[self.phase]
        which = self.mine.of(torch.randint(grid, (p.batch_size(0),), generator=generator)).to(self.device)
        t, middle, end = (timestep(2 * which + n, 2 * grid) for n in (2, 1, 0))
        teacher = self.modules["teacher"]
        xt = teacher.noised(x0, self.mine.randn(generator, *x0.shape), t)
        with autocast(p, self.device):
            with torch.no_grad():
                target = two_steps(teacher, xt, t, middle, end)
            image = self.student(xt, t)
        alpha, sigma = teacher.levels(t)
        weight = (alpha / sigma).square().clamp(min=1)
        loss = (weight * (image - target).square()).mean()
        values = descend(loss, self.student, optimizer, self.modules.get("average"))
        return self.phase, self.plan.images_seen(step), values

    def _learning_rate(self, step: int) -> float:
        """Falls linearly to zero over each phase, as published."""
        begin, end = self.begins[self.phase : self.phase + 2]
        return self.preset.learning_rate * (end - step) / (end - begin)

    def finish(self) -> None:
        """Leave the reported weights in the student."""
        settle(self.student, self.modules.get("average"))
