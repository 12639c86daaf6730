"""Adv-KD's adversarial training: the paper's stage-by-stage recipe and the improved joint one, in one loop."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkd import losses
from advkd.data import batch_generator
from advkd.devices import average_gradients, free_bytes, pick_device, to_device, with_global_batches
from advkd.presets import Preset, UserError
from advkd.training import (
    MovingAverage,
    Plan,
    Share,
    TrainRecord,
    autocast,
    descend,
    gradient_norm,
    rows_of,
    settle,
    walk,
)
from advkd.trajectories import Column, TrajectoryStore, as_images


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
    are real training images, wanted where `preset.real_share > 0`. `checkpoint` is a file written as
    `checkpoints.checkpoint_due` says; with `resume` training goes on from it and gives the weights of a run that was not stopped.
    Several processes (`accelerate launch`) share every batch and take the steps of one, to rounding; the first
    writes. Of a GPU the records of 50 steps are read at once.
    Raises UserError if the checkpoint was made with another preset and if a loss is not finite.
    """
    if preset.real_share and images is None:
        raise UserError(f"real_share is {preset.real_share}, but no real images were given")
    trajectories.check_fits(preset)
    device = pick_device(device)
    loop = _Loop(student.to(device), make_critic, trajectories, preset, images, device)
    yield from walk(loop, preset, trajectories, checkpoint, resume)


class _Loop:
    """What a step needs: modules, optimizers and data on the device."""

    def __init__(self, student, make_critic, trajectories, preset, images, device):
        self.student, self.make_critic, self.preset, self.device = student, make_critic, preset, device
        self.mine = Share(device)
        self.plan = Plan(preset, len(trajectories))
        self.steps = self.plan.steps
        for k in self.plan.stages:
            if uneven := [n for n in self._parts(k) if n % self.mine.count]:
                raise UserError(
                    f"a batch has {', '.join(map(str, self._parts(k)))} images (all, with a trajectory, shown as the teacher's) "
                    f"at stage {k}, but {uneven[0]} cannot be shared by {self.mine.count} processes; change batch_sizes"
                )
        with_global_batches(student)
        student.train().requires_grad_(True).to(memory_format=torch.channels_last)
        self.modules: dict[str, nn.Module] = {"student": student}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.store = trajectories
        self.latents = trajectories.latents(preset.latent)
        if self.latents.nbytes < free_bytes(device) / 4:
            self.latents = self.latents.to(device)
        self.images = images  # possibly rendered when asked for, so they stay where they are
        self.stage = None
        self.targets: dict[int, Tensor] = {}

    def enter(self, step: int) -> None:
        """A fresh critic, fresh optimizers and a fresh moving average for the step's stage; submodules beyond it are
        frozen."""
        p, k = self.preset, self.plan.stage_of(step)
        self.stage = k
        heads = range(k + 1) if p.reconstruction_weight else [k]
        self.targets = {i: self.store.column(f"{p.target}_{i}") for i in heads}
        if sum(column.nbytes for column in self.targets.values()) < free_bytes(self.device) / 2:
            self.targets = {i: column[:].to(self.device) for i, column in self.targets.items()}
        critic = with_global_batches(self.make_critic(k)).to(self.device, memory_format=torch.channels_last).train()
        for i, submodule in enumerate(self.student.stages):
            submodule.requires_grad_(i <= k)
        self.modules["critic"] = critic
        if p.ema:
            self.modules["average"] = MovingAverage(self.student, p.ema)
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

    def step(self, step: int) -> tuple[int, int, dict[str, Tensor]]:
        """One critic update, then one student update, on the same images of the student; of several processes, each has
        its share of the batch."""
        p, plan = self.preset, self.plan
        k = plan.stage_of(step)
        if plan.is_first(step):
            self.enter(step)
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = plan.learning_rate(step)
        generator = batch_generator(p.seed, step, 1)
        total, paired, _ = self._parts(k)
        batch = self.mine.of(plan.batch(step))
        fresh = self.mine.randn(generator, (total - paired) // self.mine.count, *self.latents.shape[1:])
        of_pairs = to_device(self.latents[to_device(batch, self.latents.device)], self.device)
        latents = torch.cat([of_pairs, fresh]).contiguous(memory_format=torch.channels_last)
        targets = {i: self._rows(column, batch) for i, column in self.targets.items()}
        with autocast(self.preset, self.device):
            images = (
                self.student.images(latents, k, first=len(batch))
                if p.reconstruction_weight
                else [self.student(latents, k)]
            )
        fake = images[-1].float()
        real = self._real(targets[k], k, generator)
        real, shown = self._veil(real, generator), self._veil(fake.detach(), generator)
        values = self._train_critic(real, shown, latents, generator, step)
        values |= self._train_student(images, self._veil(fake, generator), latents, targets)
        return k, plan.images_seen(step), values

    def _rows(self, column: Tensor | Column, indices: Tensor) -> Tensor:
        if isinstance(column, Tensor):
            return as_images(column[to_device(indices, self.device)])
        return as_images(to_device(column[indices], self.device))

    def _real(self, targets: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """What the critic is told is real: this batch's targets, topped up with other trajectories and real images."""
        total, paired, teachers = self._parts(k)
        others = torch.randint(len(self.store), (teachers,), generator=generator)[paired:]
        parts = [targets[: teachers // self.mine.count], self._rows(self.targets[k], self.mine.of(others))]
        if from_data := total - teachers:
            chosen = self.mine.of(torch.randint(len(self.images), (from_data,), generator=generator))
            images = as_images(to_device(rows_of(self.images, chosen), self.device))
            parts.append(F.adaptive_avg_pool2d(images, targets.shape[-1]))
        return torch.cat(parts).contiguous(memory_format=torch.channels_last)

    def _veil(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What the critic sees of images: with noise, which hides single training images from it but no distribution."""
        if not self.preset.critic_noise:
            return images
        return images + self.preset.critic_noise * self.mine.randn(generator, *images.shape)

    def _train_critic(self, real, fake, latents, generator, step):
        """Logistic loss and the recipe's penalty; with "gp+clip" every weight is clamped to [-0.1, 0.1] afterwards."""
        p, critic, optimizer = self.preset, self.modules["critic"], self.optimizers["critic_optimizer"]
        with autocast(self.preset, self.device):
            logits = critic(real, latents), critic(fake, latents)
        loss = losses.discriminator_loss(*(x.float() for x in logits))
        penalty = None
        if step % p.penalty_every == 0:
            penalty = self._penalty(lambda x: critic(x, latents), real, fake, generator)
        total = loss if penalty is None else loss + p.penalty_weight * p.penalty_every * penalty
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(critic.parameters())
        gradient = gradient_norm(critic.parameters())
        optimizer.step()
        if p.penalty == "gp+clip":
            with torch.no_grad():
                for parameter in critic.parameters():
                    parameter.clamp_(-0.1, 0.1)
        values = {"critic_loss": total.detach(), "critic_gradient": gradient}
        return values if penalty is None else values | {"penalty": penalty.detach()}

    def _penalty(self, critic, real, fake, generator) -> Tensor:
        if self.preset.penalty == "r1":
            return losses.r1_penalty(critic, real)
        weight = self.mine.of(torch.rand(len(real) * self.mine.count, 1, 1, 1, generator=generator))
        return losses.gradient_penalty(critic, real, fake, to_device(weight, self.device))

    def _train_student(self, images, fake, latents, targets):
        """The adversarial loss of the last image, and L1 of the supervised heads on the paired part of the batch."""
        p, critic = self.preset, self.modules["critic"].requires_grad_(False)
        with autocast(self.preset, self.device):
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
            with autocast(self.preset, self.device):
                total = total + p.feature_weight * losses.feature_loss(critic.image, *pair)
        made = descend(total, self.student, self.optimizers["student_optimizer"], self.modules.get("average"))
        critic.requires_grad_(True)
        return made | {"reconstruction_loss": l1.detach()}

    def finish(self) -> None:
        """Leave the reported weights in the student: the moving average where there is one."""
        settle(self.student, self.modules.get("average"))
