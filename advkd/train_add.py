"""Adversarial diffusion distillation (ADD): a few-step student between a critic on frozen features and its teacher."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from advkd import losses
from advkd.data import batch_generator
from advkd.denoiser import Denoiser
from advkd.devices import average_gradients, pick_device
from advkd.features import VIRTUAL_BATCH
from advkd.presets import Preset, UserError
from advkd.train_regression import pair_loss
from advkd.training import (
    Data,
    Plan,
    Share,
    TrainRecord,
    autocast,
    descend,
    expected_image,
    gradient_norm,
    prepared,
    settle,
    walk,
)
from advkd.trajectories import TrajectoryStore


def _of_heads(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *logits: sum(loss(*of_head) for of_head in zip(*logits, strict=True))


ADVERSARIAL = {  # of the critic and of the student, by `preset.adversarial`; of lists of logits, one for each head
    "hinge": (losses.hinge_discriminator_loss, losses.hinge_generator_loss),
    "non-saturating": (_of_heads(losses.discriminator_loss), _of_heads(losses.generator_loss)),
}
HEADS_BETAS = 0.0, 0.999
SAFE_TIMESTEPS = 20, 980  # of the teacher; at the ends it says noise, or nothing new


def train_add(
    student: nn.Module,
    trajectories: TrajectoryStore,
    preset: Preset,
    *,
    teacher: Denoiser,
    features: Callable[[Tensor, Tensor, Tensor], tuple[list[Tensor], Tensor]],
    heads: nn.Module,
    images: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> Iterator[TrainRecord]:
    """Train `student` by ADD's loss, adversarial + `preset.distillation_weight` x score distillation (ADD, equation 1).

    `features(images, eps, z)` are those of a frozen network with their condition, `heads` the critic on them, with a logit
    for each of the student's timesteps; real images are to be real by all of them. `images` are real ones `(n, c, h, w)` in
    [-1, 1]; without them the last states of the trajectories stand in. The first `preset.warm_up_steps` are pair regression
    on the trajectories, for a student that inherits no weights. Everything else is as in `train_advkd`.
    """
    device = pick_device(device)
    loop = _Loop(student, teacher, features, heads, Data(trajectories, images, preset, device), preset, device)
    yield from walk(loop, preset, trajectories, checkpoint, resume)


class _Loop:
    def __init__(self, student, teacher, features, heads, data, preset, device):
        self.preset, self.device, self.data, self.mine = preset, device, data, Share(device)
        size, count = preset.batch_size(0), self.mine.count
        whole = VIRTUAL_BATCH * count  # otherwise the heads' groups are not those of one process
        if preset.adversarial_weight and count > 1 and size % whole:
            raise UserError(
                f"{count} processes share a batch of {size} images, but the heads normalise over {VIRTUAL_BATCH} at a time: "
                f"let batch_sizes be a multiple of {whole}"
            )
        self.plan = Plan(preset, len(data.store))
        self.steps, self.features = self.plan.steps, features
        self.critic_loss, self.student_loss = ADVERSARIAL[preset.adversarial]
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.modules = prepared(student, preset, device)
        self.student = self.modules["student"]
        self.modules["critic"] = heads.to(device).train()
        rate = preset.learning_rate
        adam = {"fused": True, "weight_decay": 0.0}
        self.optimizers = {
            "student_optimizer": torch.optim.AdamW(student.parameters(), lr=rate, betas=preset.betas, **adam),
            "critic_optimizer": torch.optim.AdamW(
                heads.parameters(), lr=preset.critic_learning_rate or rate, betas=HEADS_BETAS, **adam
            ),
        }

    def enter(self, step: int) -> None:
        """There is one stage."""

    def step(self, step: int) -> tuple[int, int, dict[str, Tensor]]:
        """One critic update, then one student update, on the same images of the student."""
        p, generator = self.preset, batch_generator(self.preset.seed, step, 1)
        rate = self.plan.learning_rate(step)
        self.optimizers["student_optimizer"].param_groups[0]["lr"] = rate
        size = p.batch_size(0) // self.mine.count
        if step < p.warm_up_steps:
            return 0, self.plan.images_seen(step), self._warm_up(step)
        real = self.data.real(generator)
        eps = self.mine.randn(generator, size, *p.image_shape)
        choice = self.mine.of(torch.randint(len(p.student_timesteps), (size * self.mine.count,), generator=generator))
        choice = choice.to(self.device)
        t = torch.tensor(p.student_timesteps, device=self.device)[choice]
        if p.simulated_share:
            real = self._simulated(real, t, generator)
        with autocast(p, self.device):
            fake = expected_image(self.student, p, self.teacher.noised(real, eps, t), t)
        values = {}
        if p.adversarial_weight:
            values |= self._train_critic(self.data.real(generator), fake.detach(), choice, generator, step)
        return 0, self.plan.images_seen(step), values | self._train_student(fake, choice, generator)

    @torch.no_grad()
    def _simulated(self, real: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """Real images, but of `preset.simulated_share` what the student itself has made of noise when sampling comes to t (as
        DMD2 trains its students of several steps, Yin et al. 2024, section 4.5)."""
        p, images = self.preset, real.clone()
        times = sorted(p.student_timesteps, reverse=True)
        count = len(real) * self.mine.count
        chosen = self.mine.of(torch.rand(count, generator=generator) < p.simulated_share).to(self.device)
        xt = self.mine.randn(generator, *real.shape)
        for now, following in pairwise(times):
            eps = self.mine.randn(generator, *real.shape)
            (going,) = torch.nonzero(chosen & (t < now), as_tuple=True)
            if not len(going):  # not the end: each process draws as often as the others
                continue
            at = torch.full((len(going),), now, device=self.device)
            with autocast(p, self.device):
                images[going] = expected_image(self.student, p, xt[going], at).clamp(-1, 1)
            xt[going] = self.teacher.noised(images[going], eps[going], torch.full_like(at, following))
        return images

    def _see(self, images: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        eps, z = (self.mine.randn(generator, *shape) for shape in (images.shape, (len(images), 8)))
        with autocast(self.preset, self.device):
            return self.features(images, eps, z)

    def _train_critic(self, real: Tensor, fake: Tensor, choice: Tensor, generator: torch.Generator, step: int) -> dict:
        p, heads, optimizer = self.preset, self.modules["critic"], self.optimizers["critic_optimizer"]
        with torch.no_grad():
            (on_real, condition), (on_fake, other) = (self._see(x, generator) for x in (real, fake))
        with autocast(self.preset, self.device):
            loss = self.critic_loss(heads(on_real, condition), heads(on_fake, other, choice))
        values = {}
        if step % p.penalty_every == 0:
            penalty = losses.feature_r1_penalty(lambda x: heads(x, condition.float(), choice), on_real)
            weighted = p.penalty_weight * penalty
            if p.image_penalty_weight:
                penalty = self._image_penalty(real, choice, generator)
                weighted = weighted + p.image_penalty_weight * penalty
            loss, values = loss + p.penalty_every * weighted, {"penalty": penalty.detach()}
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(heads.parameters())
        norm = gradient_norm(heads.parameters())
        optimizer.step()
        return values | {"critic_loss": loss.detach(), "critic_gradient": norm}

    def _image_penalty(self, real: Tensor, choice: Tensor, generator: torch.Generator) -> Tensor:
        """R1 with respect to the images, through the features, of the sum over the heads of an image's mean logit."""
        eps, z = (self.mine.randn(generator, *shape) for shape in (real.shape, (len(real), 8)))

        def critic(images: Tensor) -> Tensor:
            seen, condition = self.features(images, eps, z)
            return sum(logits.mean(1) for logits in self.modules["critic"](seen, condition, choice))

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            return losses.r1_penalty(critic, real)

    def _train_student(self, fake: Tensor, choice: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        p = self.preset
        total, values = torch.zeros((), device=self.device), {}
        if p.adversarial_weight:
            heads = self.modules["critic"].requires_grad_(False)
            seen, condition = self._see(fake, generator)
            with autocast(self.preset, self.device):
                total = total + p.adversarial_weight * self.student_loss(heads(seen, condition, choice))
            heads.requires_grad_(True)
        if p.distillation_weight:
            distillation = self._distillation(fake, generator)
            total = total + p.distillation_weight * distillation
            values["reconstruction_loss"] = distillation.detach()
        average = self.modules.get("average")
        return values | descend(total, self.student, self.optimizers["student_optimizer"], average)

    def _distillation(self, fake: Tensor, generator: torch.Generator) -> Tensor:
        """How far the student's images are from what the teacher makes of them, noised (ADD, section 3.3)."""
        low, high = SAFE_TIMESTEPS
        t = self.mine.of(torch.randint(low, high, (len(fake) * self.mine.count,), generator=generator)).to(self.device)
        eps = self.mine.randn(generator, *fake.shape)
        with torch.no_grad(), autocast(self.preset, self.device):
            expected = self.teacher(self.teacher.noised(fake, eps, t), t).clamp(-1, 1)
        alpha, sigma = (x[t] for x in (self.teacher.alpha, self.teacher.sigma))
        weights = losses.distillation_weights(alpha, sigma, self.preset.distillation)
        return losses.distillation_loss(fake, expected, weights)

    def _warm_up(self, step: int) -> dict[str, Tensor]:
        """A step of pair regression, see `train_regression`."""
        loss = pair_loss(self.student, self.preset, *self.data.pairs(self.plan.batch(step)))
        return descend(loss, self.student, self.optimizers["student_optimizer"], self.modules.get("average"))

    def finish(self) -> None:
        """Leave the reported weights in the student."""
        settle(self.student, self.modules.get("average"))
