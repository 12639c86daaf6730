"""Adv-KD's adversarial training: the paper's stage-by-stage recipe and the improved joint one, in one loop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advkd import losses
from advkd.data import batch_generator
from advkd.devices import (
    all_mean,
    average_gradients,
    free_bytes,
    pick_device,
    processes,
    to_device,
    with_global_batches,
)
from advkd.files import CHECKPOINT_EVERY, differences, load_checkpoint, read_checkpoint_state, save_checkpoint
from advkd.presets import Preset, UserError, asdict
from advkd.trajectories import Column, TrajectoryStore, as_images

READ_EVERY = 50  # steps whose records are read from a GPU at once


@dataclass(frozen=True)
class TrainRecord:
    """One step: losses and the L2 norms of the gradients that the two optimizers used.

    `critic_loss` and `student_loss` are what is minimised: with the weighted penalty of this step, and with the weighted
    feature and reconstruction terms. Unweighted: `reconstruction_loss`, the sum over the heads, and `penalty`, the gradient
    penalty of this step (None where lazy regularisation leaves it out).
    """

    step: int
    stage: int
    images_seen: int
    critic_loss: float
    student_loss: float
    reconstruction_loss: float
    penalty: float | None
    critic_gradient: float
    student_gradient: float


def train_advkd(
    student: nn.Module,
    make_critic: Callable[[int], nn.Module],
    trajectories: TrajectoryStore,
    preset: Preset,
    *,
    images: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> Iterator[TrainRecord]:
    """Distil `trajectories` into `student`, in place; yields a record a step and leaves the last weights (their
    moving average, where the preset has one) in `student`.

    `make_critic(k)` gives a new critic `(image, latent) -> logits` for submodule k. `images` `(n, c, h, w)` in [-1, 1]
    are real training images, wanted where `preset.real_share > 0`. `checkpoint` is a file written every 500 steps and
    after the last; with `resume` training goes on from it and gives the weights of a run that was not stopped.
    Several processes (`accelerate launch`) share every batch and take the steps of one, to rounding; the first
    writes. Of a GPU the records of 50 steps are read at once.
    Raises UserError if the checkpoint was made with another preset and if a loss is not finite.
    """
    if preset.real_share and images is None:
        raise UserError(f"real_share is {preset.real_share}, but no real images were given")
    shape = {name: getattr(preset, name) for name in ("image_size_px", "channels", "submodules")}
    if different := differences({name: trajectories.config[name] for name in shape}, shape):
        raise UserError(f"the trajectories in {trajectories.folder} do not fit the preset ({'; '.join(different)})")
    device = pick_device(device)
    loop = _Loop(student.to(device), make_critic, trajectories, preset, images, device)
    state = {"preset": asdict(preset), "trajectories": trajectories.config, "step": 0}
    if resume and checkpoint and checkpoint.exists():
        state = read_checkpoint_state(checkpoint)
        different = differences(state["preset"], asdict(preset))
        if different := different + differences(state["trajectories"], trajectories.config):
            raise UserError(f"{checkpoint} belongs to another preset ({'; '.join(different)})")
        loop.enter_stage(loop.plan.stage_of(max(state["step"] - 1, 0)))
        load_checkpoint(checkpoint, loop.modules, loop.optimizers)
    made = []
    for step in range(state["step"], loop.plan.steps):
        made.append(loop.step(step))
        due = (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == loop.plan.steps
        if due or len(made) == (1 if device.type == "cpu" else READ_EVERY):
            yield from loop.records(made)  # first, so that the caller's log is never behind the checkpoint
            made.clear()
        if checkpoint and due and loop.rank == 0:
            save_checkpoint(checkpoint, loop.modules, loop.optimizers, state | {"step": step + 1})
    loop.finish()


def update_average(decay: float, average: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
    """The exponential moving average of `count` earlier weights and the `current` ones, in place.

    The bias towards the first weights is taken out, as Adam does it (Kingma and Ba 2015, section 3): without that, a
    seventh of the average of 1000 steps with decay 0.998 would be the weights after the first of them.
    """
    count = int(count) + 1
    share = (1 - decay) / (1 - decay**count) if decay < 1 else 1 / count
    get_ema_multi_avg_fn(1 - share)(average, current, count)


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
                raise UserError(f"trajectories is {trajectories}, fewer than a batch of {max(preset.batch_sizes)}")
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
        """Images of the student's that the critic has been shown once this step is done, over all stages."""
        k, local = self._locate(step)
        earlier = sum(n * self.preset.batch_size(i) for i, n in self.stages.items() if i < k)
        return earlier + (local + 1) * self.preset.batch_size(k)

    def learning_rate(self, step: int) -> float:
        """The constant rate, then a linear fall to zero over the last `decay_share` of the steps."""
        falling = self.preset.decay_share * self.steps
        return self.preset.learning_rate * (min(1.0, (self.steps - step) / falling) if falling else 1.0)


@dataclass
class _Made:
    """What a step left on the device: the numbers of its record, in their order."""

    step: int
    penalised: bool
    values: Tensor


class _Loop:
    """What a step needs: modules, optimizers and data on the device."""

    def __init__(self, student, make_critic, trajectories, preset, images, device):
        self.student, self.make_critic, self.preset, self.device = student, make_critic, preset, device
        self.rank, self.count = processes()
        self.plan = Plan(preset, len(trajectories))
        for k in self.plan.stages:
            if uneven := [n for n in self._parts(k) if n % self.count]:
                raise UserError(
                    f"a batch has {', '.join(map(str, self._parts(k)))} images (all, with a trajectory, shown as the teacher's) "
                    f"at stage {k}, but {uneven[0]} cannot be shared by {self.count} processes; change batch_sizes"
                )
        with_global_batches(student)
        student.train().requires_grad_(True).to(memory_format=torch.channels_last)
        self.modules: dict[str, nn.Module] = {"student": student}
        self.store = trajectories
        self.latents = trajectories.latents(preset.latent).to(device)
        self.images = images  # possibly rendered when asked for, so they stay where they are
        self.stage = None
        self.targets: dict[int, Tensor] = {}

    def enter_stage(self, k: int) -> None:
        """A fresh critic, fresh optimizers and a fresh moving average; submodules beyond `k` are frozen."""
        p, self.stage = self.preset, k
        heads = range(k + 1) if p.reconstruction_weight else [k]
        self.targets = {i: self.store.column(f"{p.target}_{i}") for i in heads}
        if sum(column.nbytes for column in self.targets.values()) < free_bytes(self.device) / 2:
            self.targets = {i: column[:].to(self.device) for i, column in self.targets.items()}
        critic = with_global_batches(self.make_critic(k)).to(self.device, memory_format=torch.channels_last).train()
        for i, submodule in enumerate(self.student.stages):
            submodule.requires_grad_(i <= k)
        self.modules["critic"] = critic
        if p.ema:
            average = AveragedModel(self.student, use_buffers=True)
            # Its own count, which lies on the CPU: the one that it is given would be waited for on a GPU.
            average.multi_avg_fn = lambda *weights: update_average(p.ema, *weights[:2], average.n_averaged)
            self.modules["average"] = average
        trainable = [q for q in self.student.parameters() if q.requires_grad]
        adam = {"lr": p.learning_rate, "betas": p.betas, "fused": True}  # fused: a tenth of a step here
        self.optimizers = {
            "student_optimizer": torch.optim.Adam(trainable, **adam),
            "critic_optimizer": torch.optim.Adam(critic.parameters(), **adam),
        }

    def _parts(self, k: int) -> tuple[int, int, int]:
        """Images of a batch: all; those with a trajectory; how many are the teacher's among what the critic is told is real."""
        total = self.preset.batch_size(k)
        paired = total if self.preset.schedule == "staged" else total - round(total * self.preset.fresh_share)
        return total, paired, total - round(total * self.preset.real_share)

    def step(self, step: int) -> "_Made":
        """One critic update, then one student update, on the same images of the student; of several processes, each has
        its share of the batch."""
        p, plan = self.preset, self.plan
        k = plan.stage_of(step)
        if plan.is_first(step):
            self.enter_stage(k)
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = plan.learning_rate(step)
        generator = batch_generator(p.seed, step, 1)
        total, paired, _ = self._parts(k)
        batch = self._mine(plan.batch(step))
        fresh = self._randn(generator, (total - paired) // self.count, *self.latents.shape[1:])
        latents = torch.cat([self.latents[to_device(batch, self.device)], fresh]).contiguous(
            memory_format=torch.channels_last
        )
        targets = {i: self._rows(column, batch) for i, column in self.targets.items()}
        with self._autocast():
            images = (
                self.student.images(latents, k, first=len(batch))
                if p.reconstruction_weight
                else [self.student(latents, k)]
            )
        fake = images[-1].float()
        real = self._real(targets[k], k, generator)
        real, shown = self._veil(real, generator), self._veil(fake.detach(), generator)
        critic_loss, penalty, critic_gradient = self._train_critic(real, shown, latents, generator, step)
        student_loss, l1, student_gradient = self._train_student(images, self._veil(fake, generator), latents, targets)
        missing = torch.full((), torch.nan, device=self.device)
        values = (
            critic_loss,
            student_loss,
            l1,
            missing if penalty is None else penalty,
            critic_gradient,
            student_gradient,
        )
        return _Made(step, penalty is not None, all_mean(torch.stack(values)))

    def records(self, made: list["_Made"]) -> Iterator[TrainRecord]:
        """What was made, read from the device. Raises UserError at the first loss or gradient that is not finite."""
        for one, values in zip(made, torch.stack([one.values for one in made]).tolist(), strict=True):
            critic_loss, student_loss, l1, penalty, *gradients = values
            k = self.plan.stage_of(one.step)
            if not all(map(math.isfinite, (critic_loss, student_loss, *gradients))):
                raise UserError(
                    f"a loss or gradient is not finite at step {one.step + 1} (stage {k}); the last checkpoint is kept"
                )
            seen = self.plan.images_seen(one.step)
            losses_of = critic_loss, student_loss, l1, penalty if one.penalised else None
            yield TrainRecord(one.step + 1, k, seen, *losses_of, *gradients)

    def _mine(self, whole: Tensor) -> Tensor:
        """This process' share of what belongs to a batch."""
        return whole[self.rank :: self.count]

    def _rows(self, column: Tensor | Column, indices: Tensor) -> Tensor:
        if isinstance(column, Tensor):
            return as_images(column[to_device(indices, self.device)])
        return as_images(to_device(column[indices], self.device))

    def _real(self, targets: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """What the critic is told is real: this batch's targets, topped up with other trajectories and real images."""
        total, paired, teachers = self._parts(k)
        others = torch.randint(len(self.store), (teachers,), generator=generator)[paired:]
        parts = [targets[: teachers // self.count], self._rows(self.targets[k], self._mine(others))]
        if from_data := total - teachers:
            chosen = self._mine(torch.randint(len(self.images), (from_data,), generator=generator))
            parts.append(F.adaptive_avg_pool2d(to_device(self.images[chosen], self.device), targets.shape[-1]))
        return torch.cat(parts).contiguous(memory_format=torch.channels_last)

    def _veil(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What the critic sees of images: with noise, which hides single training images from it but no distribution."""
        if not self.preset.critic_noise:
            return images
        return images + self.preset.critic_noise * self._randn(generator, *images.shape)

    def _train_critic(self, real, fake, latents, generator, step):
        """Logistic loss and the recipe's penalty; with "gp+clip" every weight is clamped to [-0.1, 0.1] afterwards."""
        p, critic, optimizer = self.preset, self.modules["critic"], self.optimizers["critic_optimizer"]
        with self._autocast():
            logits = critic(real, latents), critic(fake, latents)
        loss = losses.discriminator_loss(*(x.float() for x in logits))
        penalty = None
        if step % p.penalty_every == 0:
            penalty = self._penalty(lambda x: critic(x, latents), real, fake, generator)
        total = loss if penalty is None else loss + p.penalty_weight * p.penalty_every * penalty
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(critic.parameters())
        gradient = torch.nn.utils.get_total_norm([q.grad for q in critic.parameters() if q.grad is not None])
        optimizer.step()
        if p.penalty == "gp+clip":
            with torch.no_grad():
                for parameter in critic.parameters():
                    parameter.clamp_(-0.1, 0.1)
        return total.detach(), None if penalty is None else penalty.detach(), gradient

    def _penalty(self, critic, real, fake, generator) -> Tensor:
        if self.preset.penalty == "r1":
            return losses.r1_penalty(critic, real)
        weight = self._mine(torch.rand(len(real) * self.count, 1, 1, 1, generator=generator))
        return losses.gradient_penalty(critic, real, fake, to_device(weight, self.device))

    def _train_student(self, images, fake, latents, targets):
        """The adversarial loss of the last image, and L1 of the supervised heads on the paired part of the batch."""
        p, optimizer = self.preset, self.optimizers["student_optimizer"]
        critic = self.modules["critic"].requires_grad_(False)
        with self._autocast():
            logits = critic(fake, latents)
        adversarial = losses.generator_loss(logits.float(), p.adversarial)
        l1 = torch.zeros((), device=self.device)
        if p.reconstruction_weight:
            supervised = [i for i in targets if i not in p.unsupervised]
            shown = [images[i][: len(targets[i])].float() for i in supervised]
            l1 = losses.reconstruction_loss(shown, [targets[i] for i in supervised])
        total = p.adversarial_weight * adversarial + p.reconstruction_weight * l1
        if p.feature_weight:
            pair = images[-1][: len(targets[self.stage])].float(), targets[self.stage]
            pair = (x.contiguous(memory_format=torch.channels_last) for x in pair)
            with self._autocast():
                total = total + p.feature_weight * losses.feature_loss(critic.image, *pair)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(self.student.parameters())
        gradient = torch.nn.utils.get_total_norm([q.grad for q in self.student.parameters() if q.grad is not None])
        optimizer.step()
        critic.requires_grad_(True)
        if p.ema:
            self.modules["average"].update_parameters(self.student)
        return total.detach(), l1.detach(), gradient

    def _randn(self, generator: torch.Generator, count: int, *shape: int) -> Tensor:
        return to_device(self._mine(torch.randn(count * self.count, *shape, generator=generator)), self.device)

    def _autocast(self):
        dtype = getattr(torch, self.preset.train_dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def finish(self) -> None:
        """Leave the reported weights in the student: the moving average where there is one."""
        if "average" in self.modules:
            self.student.load_state_dict(self.modules["average"].module.state_dict())
        self.student.requires_grad_(True).eval()
