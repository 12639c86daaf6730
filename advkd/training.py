"""What the training loops share: records, the walk over the steps with its checkpoints, averages, shares of a batch."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advkd.checkpoints import checkpoint_due, load_checkpoint, read_checkpoint_state, save_checkpoint
from advkd.data import batch_generator, make_latent, seeded_noise
from advkd.devices import all_mean, average_gradients, precision, processes, to_device, with_global_batches
from advkd.files import differences
from advkd.folder import CachedImages
from advkd.presets import TRAIN_TIMESTEPS, Preset, UserError, asdict, complete
from advkd.trajectories import TrajectoryStore, as_images

READ_EVERY = 50  # steps whose records are read from a GPU at once


@dataclass(frozen=True)
class TrainRecord:
    """One step: losses and the L2 norms of the gradients that the optimizers used; None where a method has no such thing.

    `critic_loss` and `student_loss` are what is minimised: with the weighted penalty of this step, and with all weighted
    terms; of DMD, which has no critic, `critic_loss` is its second denoiser's. Unweighted: `reconstruction_loss`, what the
    student is told to reproduce (of Adv-KD the sum over the heads, of ADD the score distillation, of DMD the pairs), and
    `penalty`, the gradient penalty of this step (None where lazy regularisation leaves it out; of ADD that on images, where
    there is one). `stage` is the submodule or the phase that is trained.
    """

    step: int
    stage: int
    images_seen: int
    critic_loss: float | None
    student_loss: float
    reconstruction_loss: float | None
    penalty: float | None
    critic_gradient: float | None
    student_gradient: float


VALUES = [field.name for field in fields(TrainRecord)][3:]  # what a step measures


class Loop(Protocol):
    """What a method gives to `walk`: what belongs into a checkpoint, and its step."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    device: torch.device
    steps: int

    def enter(self, step: int) -> None:
        """Make the modules and optimizers of the stage that `step` (from 0) belongs to."""

    def step(self, step: int) -> tuple[int, int, dict[str, Tensor]]:
        """Take one; returns its stage, the images seen after it, and the values of its record, on the device."""

    def finish(self) -> None:
        """Leave the reported weights in the student."""


class Plan:
    """Which stage trains at which step, and on which trajectories."""

    def __init__(self, preset: Preset, trajectories: int):
        self.preset, self.count = preset, trajectories
        last = preset.submodules - 1
        if preset.schedule == "joint":
            self.stages = {last: preset.steps}
        else:
            batches = [trajectories // preset.batch_size(k) for k in range(last + 1)]
            if 0 in batches:
                raise UserError(
                    f"trajectories is {trajectories}, fewer than a batch of {max(preset.batch_sizes)}: "
                    "make more of them, or have smaller batch_sizes"
                )
            self.stages = {k: max(1, round(preset.epochs * (k + 1) * n)) for k, n in enumerate(batches)}
        self.steps = sum(self.stages.values())

    def stage_of(self, step: int) -> int:
        """The stage that step (from 0) belongs to."""
        return self._locate(step)[0]

    def _locate(self, step: int) -> tuple[int, int]:
        for k, steps in self.stages.items():
            if step < steps:
                return k, step
            step -= steps
        raise ValueError("the plan has no such step")

    def is_first(self, step: int) -> bool:
        """Whether a stage begins with this step."""
        return self._locate(step)[1] == 0

    def batch(self, step: int) -> Tensor:
        """Indices of the trajectories of this step: staged, shuffled epochs without incomplete batches; joint, at random."""
        k, local = self._locate(step)
        size = self.preset.batch_size(k)
        if self.preset.schedule == "joint":
            paired = size - round(size * self.preset.fresh_share)
            return torch.randint(self.count, (paired,), generator=batch_generator(self.preset.seed, step, 0))
        epoch, position = divmod(local, self.count // size)
        order = torch.randperm(self.count, generator=batch_generator(self.preset.seed, k, epoch))
        return order[position * size : (position + 1) * size]

    def images_seen(self, step: int) -> int:
        """Images that the student has made for its losses once this step is done, over all stages."""
        k, local = self._locate(step)
        earlier = sum(n * self.preset.batch_size(i) for i, n in self.stages.items() if i < k)
        return earlier + (local + 1) * self.preset.batch_size(k)

    def learning_rate(self, step: int) -> float:
        """The constant rate, then a linear fall to zero over the last `decay_share` of the steps."""
        falling = self.preset.decay_share * self.steps
        return self.preset.learning_rate * (min(1.0, (self.steps - step) / falling) if falling else 1.0)


@dataclass
class _Made:
    step: int
    stage: int
    images_seen: int
    names: list[str]
    values: Tensor


def walk(
    loop: Loop, preset: Preset, trajectories: TrajectoryStore, checkpoint: Path | None, resume: bool
) -> Iterator[TrainRecord]:
    """All steps of a loop; yields a record each. Of a GPU the records of 50 steps are read at once.

    `checkpoint` is written by the first process as `checkpoint_due` says; with `resume` the walk goes on from it.
    Raises UserError if the checkpoint was made with another preset or of other trajectories, and if a loss or a gradient is not
    finite.
    """
    state = {"preset": asdict(preset), "trajectories": trajectories.config, "step": 0}
    if resume and checkpoint and checkpoint.exists():
        state = read_checkpoint_state(checkpoint)
        different = differences(complete(state["preset"]), complete(asdict(preset)))
        if different := different + differences(state["trajectories"], trajectories.config):
            raise UserError(f"{checkpoint} belongs to another preset ({'; '.join(different)})")
        loop.enter(max(state["step"] - 1, 0))
        load_checkpoint(checkpoint, loop.modules, loop.optimizers)
    made = []
    for step in range(state["step"], loop.steps):
        stage, seen, values = loop.step(step)
        made.append(_Made(step + 1, stage, seen, list(values), all_mean(torch.stack(list(values.values())))))
        due = checkpoint_due(step + 1, loop.steps)
        if due or len(made) == (1 if loop.device.type == "cpu" else READ_EVERY):
            yield from _read(made, preset)  # first, so that the caller's log is never behind the checkpoint
            made.clear()
        if checkpoint and due and processes()[0] == 0:
            save_checkpoint(checkpoint, loop.modules, loop.optimizers, state | {"step": step + 1})
    loop.finish()


def _read(made: list[_Made], preset: Preset) -> Iterator[TrainRecord]:
    """What was made, read from the device at once."""
    flat = iter(torch.cat([one.values for one in made]).tolist())
    for one in made:
        values = dict(zip(one.names, flat, strict=False))  # as many of all as this one has names
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"a loss or gradient is not finite at step {one.step} (stage {one.stage}); the last checkpoint is kept. "
                f"Train with a smaller learning_rate than {preset.learning_rate:g}, or in float32 (train_dtype), in another "
                "folder"
            )
        missing = dict.fromkeys(VALUES)
        yield TrainRecord(one.step, one.stage, one.images_seen, **(missing | values))


class MovingAverage(AveragedModel):
    """The moving average of a model's weights and buffers, to be updated after every step; see `update_average`.

    torch's own asks for its count on the device, which a GPU would be waited for twice a step.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the current weights; counters, such as BatchNorm's, are copied."""
        kept, current = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs, count = list(zip(kept, current, strict=True)), int(self.n_averaged)  # the count lies on the CPU
        averaged = [pair for pair in pairs if count and pair[0].is_floating_point()]
        for old, new in pairs:
            if not count or not old.is_floating_point():
                old.copy_(new)
        if averaged:
            update_average(self.decay, *map(list, zip(*averaged, strict=True)), count)
        self.n_averaged += 1


def update_average(decay: float, average: list[Tensor], current: list[Tensor], count: int) -> None:
    """The exponential moving average of `count` earlier weights and the `current` ones, in place.

    The bias towards the first weights is taken out, as Adam does it (Kingma and Ba 2015, section 3): without that, a
    seventh of the average of 1000 steps with decay 0.998 would be the weights after the first of them.
    """
    count += 1
    share = (1 - decay) / (1 - decay**count) if decay < 1 else 1 / count
    get_ema_multi_avg_fn(1 - share)(average, current, count)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients that there are."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Share:
    """This process' share of a batch, and random numbers that do not depend on how many processes there are."""

    def __init__(self, device: torch.device):
        (self.rank, self.count), self.device = processes(), device

    def of(self, whole: Tensor) -> Tensor:
        """This process' part of what belongs to a batch, where it is. Raises UserError when it cannot be shared evenly."""
        if len(whole) % self.count:
            raise UserError(
                f"a batch of {len(whole)} images cannot be shared by {self.count} processes; change batch_sizes"
            )
        return whole[self.rank :: self.count]

    def randn(self, generator: torch.Generator, count: int, *shape: int) -> Tensor:
        """This process' `count` of standard normal tensors of `shape`, on the device."""
        return to_device(self.of(torch.randn(count * self.count, *shape, generator=generator)), self.device)


class Data:
    """What a batch is drawn from: real images (without any, the teacher's), and pairs of noise and the teacher's image."""

    def __init__(self, store: TrajectoryStore, images: Tensor | None, preset: Preset, device: torch.device):
        self.store, self.preset, self.device, self.mine = store, preset, device, Share(device)
        self.final = store.final()
        self.images = self.final if images is None else images

    def real(self, generator: torch.Generator) -> Tensor:
        """This process' share of a batch of real images, drawn at random: `(b, c, s, s)` in [-1, 1] on the device."""
        chosen = torch.randint(len(self.images), (self.preset.batch_size(0),), generator=generator)
        return self._shown(rows_of(self.images, self.mine.of(chosen)))

    def pairs(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """This process' share of trajectories: the noise and the teacher's image from it."""
        mine = self.mine.of(indices)
        noise = seeded_noise(mine.tolist(), self.preset.image_shape, self.store.config["trajectory_seed"])
        return to_device(noise, self.device), self._shown(self.final[mine])

    def _shown(self, x: Tensor) -> Tensor:
        return as_images(to_device(x, self.device)).contiguous(memory_format=torch.channels_last)


def rows_of(images: Tensor | CachedImages, indices: Tensor) -> Tensor:
    """Some images `(n, c, h, w)`, as they are stored; `trajectories.as_images` shows them in [-1, 1]."""
    return images.stored(indices) if isinstance(images, CachedImages) else images[indices]


def expected_image(student: nn.Module, preset: Preset, xt: Tensor, t: Tensor) -> Tensor:
    """The student's image of x_t: of a U-Net at t, or of the submodules, which know noise alone; float32."""
    if preset.architecture == "unet":
        return student(xt, t).float()
    return student(make_latent(xt, preset.latent).contiguous(memory_format=torch.channels_last)).float()


def timestep(n: Tensor, grid: int) -> Tensor:
    """The n-th of `grid` evenly spaced timesteps, n = 1..grid for 1000 / grid - 1 to 999; -1, the clean image, for n = 0."""
    return n * TRAIN_TIMESTEPS // grid - 1


def descend(loss: Tensor, student: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None) -> dict:
    """One step of the student down the gradient of `loss`, over all processes; returns what a record says of it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(student.parameters())
    norm = gradient_norm(student.parameters())
    optimizer.step()
    if average is not None:
        average.update_parameters(student)
    return {"student_loss": loss.detach(), "student_gradient": norm}


def prepared(student: nn.Module, preset: Preset, device: torch.device) -> dict[str, nn.Module]:
    """The first modules of a loop: the student in training on the device, its batch normalisations over all processes, and
    its moving average, where the preset has one."""
    student = with_global_batches(student).to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    return {"student": student} | ({"average": MovingAverage(student, preset.ema)} if preset.ema else {})


def adam(module: nn.Module, preset: Preset) -> torch.optim.Adam:
    """The preset's optimizer of all of a module's parameters."""
    return torch.optim.Adam(module.parameters(), lr=preset.learning_rate, betas=preset.betas, fused=True)


def settle(student: nn.Module, average: MovingAverage | None) -> None:
    """Leave the reported weights in the student: the moving average where there is one."""
    if average is not None:
        student.load_state_dict(average.module.state_dict())
    student.requires_grad_(True).eval()


def autocast(preset: Preset, device: torch.device) -> torch.autocast:
    """The precision of the preset's training on the device."""
    dtype = precision(preset.train_dtype, device)
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
