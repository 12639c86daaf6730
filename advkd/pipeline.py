"""Distilled students as diffusers pipelines: noise to images in one call."""

from itertools import pairwise

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from advkd.data import make_latent, sample_generators, sample_noise
from advkd.denoiser import Denoiser
from advkd.presets import UserError
from advkd.student import Student

OUTPUT_TYPES = ("pil", "np", "pt")


class StudentPipeline(DiffusionPipeline):
    """One-step sampling: `StudentPipeline.from_pretrained(folder)(batch_size=16, seed=0).images`."""

    def __init__(self, student: Student):
        super().__init__()
        self.register_modules(student=student)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        seed: int = 0,
        first_index: int = 0,
        noise: Tensor | None = None,
        stage: int | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Images of the samples `first_index`, `first_index` + 1, ... of `seed`: each depends on its index alone.

        `noise` `(b, c, h, w)`, standard normal, takes the place of the seeded noise; the teacher started from the same
        noise makes the comparable image. At 4 x 4 it is the latent itself. `stage` picks a submodule's head. `output_type` is "pil", "np"
        (`(b, h, w, c)` in [0, 1]) or "pt" (`(b, c, h, w)` in [-1, 1]). Raises UserError for any other, and for noise
        of another shape.
        """
        shape = self.student.image_shape
        generators = _generators(batch_size, seed, first_index, output_type)
        noise = _checked(sample_noise(generators, shape) if noise is None else noise, shape, self.student.latent_shape)
        how = "full" if self.student.config.latent == "full" else "block-mean"
        latent = make_latent(noise.to(self.device), how).to(self.student.dtype)
        training = self.student.training
        images = self.student.eval()(latent, stage).float()
        self.student.train(training)
        return _output(images, output_type)


class FewStepPipeline(DiffusionPipeline):
    """Sampling in a few steps: `FewStepPipeline.from_pretrained(folder)(batch_size=16, seed=0, steps=2).images`."""

    def __init__(self, student: Denoiser):
        super().__init__()
        self.register_modules(student=student)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        seed: int = 0,
        first_index: int = 0,
        noise: Tensor | None = None,
        steps: int = 1,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Images as `StudentPipeline` makes them: expect the image, go on to the next timestep, expect again.

        `steps` has to divide the number of the student's timesteps, of which it takes every n-th. Fresh noise between
        them follows from `seed` and the sample's index. Raises UserError for other steps, and as `StudentPipeline` does.
        """
        student, timesteps = self.student, list(self.student.config.timesteps)
        if steps not in range(1, len(timesteps) + 1) or len(timesteps) % steps:
            raise UserError(f"steps is {steps}, but must divide the number of the student's timesteps, {timesteps}")
        count = batch_size if noise is None else len(noise)
        generators = _generators(count, seed, first_index, output_type)
        seeded = sample_noise(generators, student.latent_shape)
        xt = _checked(seeded if noise is None else noise, student.latent_shape).to(self.device)
        training, timesteps = student.training, timesteps[:: len(timesteps) // steps]
        student.eval()
        times = torch.tensor(timesteps, device=xt.device)[:, None].expand(-1, count)
        x0 = student(xt, times[0]).clamp(-1, 1)
        for t, following in pairwise(times):
            if student.config.deterministic:
                xt = student.ddim(xt, x0, t, following)
            else:
                xt = student.noised(x0, sample_noise(generators, student.latent_shape).to(xt), following)
            x0 = student(xt, following).clamp(-1, 1)
        student.train(training)
        return _output(x0, output_type)


def _generators(count: int, seed: int, first_index: int, output_type: str) -> list[torch.Generator]:
    """One for each sample; bad arguments are refused before the student works."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"there is no output_type {output_type!r}; output types: {', '.join(OUTPUT_TYPES)}")
    if count < 1:
        raise UserError(f"batch_size is {count}, but must be at least 1")
    return sample_generators(range(first_index, first_index + count), seed)


def _checked(noise: Tensor, *shapes: tuple[int, int, int]) -> Tensor:
    if noise.ndim != 4 or tuple(noise.shape[1:]) not in shapes:
        raise UserError(f"noise has the shape {tuple(noise.shape)}, but must be (b, {', '.join(map(str, shapes[0]))})")
    return noise


def _output(images: Tensor, output_type: str) -> ImagePipelineOutput:
    if output_type == "pt":
        return ImagePipelineOutput(images=images)
    array = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    pil = DiffusionPipeline.numpy_to_pil
    return ImagePipelineOutput(images=pil(array) if output_type == "pil" else array)
