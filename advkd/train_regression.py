"""Pair regression (Luhman and Luhman 2021): the student repeats the image that the teacher made of the same noise."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkd.devices import pick_device
from advkd.presets import TRAIN_TIMESTEPS, Preset
from advkd.training import Data, Plan, TrainRecord, adam, autocast, descend, expected_image, prepared, settle, walk
from advkd.trajectories import TrajectoryStore


def train_regression(
    student: nn.Module,
    trajectories: TrajectoryStore,
    preset: Preset,
    *,
    images: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> Iterator[TrainRecord]:
    """Train `student` on the pairs of `trajectories` by the mean squared error; real images are not used. Everything else
    is as in `train_advkd`."""
    device = pick_device(device)
    yield from walk(_Loop(student, trajectories, preset, device), preset, trajectories, checkpoint, resume)


class _Loop:
    def __init__(self, student, trajectories, preset, device):
        self.preset, self.device, self.data = preset, device, Data(trajectories, None, preset, device)
        self.plan = Plan(preset, len(trajectories))
        self.steps = self.plan.steps
        self.modules = prepared(student, preset, device)
        self.student = self.modules["student"]
        self.optimizers = {"student_optimizer": adam(self.student, preset)}

    def enter(self, step: int) -> None:
        """There is one stage."""

    def step(self, step: int) -> tuple[int, int, dict[str, Tensor]]:
        """One update on a batch of pairs."""
        optimizer = self.optimizers["student_optimizer"]
        optimizer.param_groups[0]["lr"] = self.plan.learning_rate(step)
        loss = pair_loss(self.student, self.preset, *self.data.pairs(self.plan.batch(step)))
        values = descend(loss, self.student, optimizer, self.modules.get("average"))
        return 0, self.plan.images_seen(step), values

    def finish(self) -> None:
        """Leave the reported weights in the student."""
        settle(self.student, self.modules.get("average"))


def pair_loss(student: nn.Module, preset: Preset, noise: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the student's images from `noise` `(b, c, s, s)` to the teacher's from the same."""
    last = torch.full((len(noise),), TRAIN_TIMESTEPS - 1, device=noise.device)
    with autocast(preset, noise.device):
        image = expected_image(student, preset, noise, last)
    return F.mse_loss(image, target)
