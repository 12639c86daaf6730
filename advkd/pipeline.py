"""The distilled student as a diffusers pipeline: noise to images in one call."""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from advkd.data import make_latent, seeded_noise
from advkd.presets import UserError
from advkd.student import Student


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
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"there is no output_type {output_type!r}; output types: pil, np, pt")
        config = self.student.config
        shape = (config.channels, config.image_size_px, config.image_size_px)
        if noise is None:
            if batch_size < 1:
                raise UserError(f"batch_size is {batch_size}, but must be at least 1")
            noise = seeded_noise(range(first_index, first_index + batch_size), shape, seed)
        if noise.ndim != 4 or tuple(noise.shape[1:]) not in (shape, self.student.latent_shape):
            raise UserError(f"noise has the shape {tuple(noise.shape)}, but must be (b, {', '.join(map(str, shape))})")
        how = "full" if config.latent == "full" else "block-mean"
        latent = make_latent(noise.to(self.device), how).to(self.student.dtype)
        training = self.student.training
        images = self.student.eval()(latent, stage).float()
        self.student.train(training)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        array = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(array) if output_type == "pil" else array)
