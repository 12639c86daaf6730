"""The other methods' student: the teacher's U-Net, made to say the clean image at a few timesteps."""

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from advkd.presets import Preset
from advkd.teacher import Teacher


class Denoiser(ModelMixin, ConfigMixin):
    """`(x_t, t)` to the image x_0 that a U-Net expects, `(b, c, s, s)` each; `t` is `(b,)`.

    `unet_config` and `scheduler_config` are those of a UNet2DModel and a DDPMScheduler, `timesteps` those that the student is
    sampled at, from noise to image: with fresh noise between them, or without (`deterministic`, DDIM's way). The last
    timestep of the schedule is noise alone (zero terminal SNR), as in sampling.

    From a prediction of epsilon the image is alpha x_t - (sigma / alpha) (epsilon - sigma x_t), where an error counts 157
    times at t = 999. That factor is limited to `gain_limit`, which keeps the gradients of a student that starts from its
    teacher's weights in one range; 8 changes nothing below t = 641 of a linear schedule, 4 nothing below t = 527. A teacher
    that answers in a training (of all methods but Adv-KD and regression) has the default limit too.
    """

    @register_to_config
    def __init__(
        self,
        unet_config: dict,
        scheduler_config: dict,
        timesteps: tuple[int, ...] = (999,),
        deterministic: bool = False,
        gain_limit: float = Preset.gain_limit,
    ):
        super().__init__()
        self.unet = UNet2DModel.from_config(unet_config)
        scheduler = DDPMScheduler.from_config(scheduler_config)
        alpha, sigma = noise_levels(scheduler)
        skip, gain = {
            "epsilon": (sigma, (sigma / alpha).clamp(max=gain_limit)),
            "v_prediction": (torch.zeros_like(sigma), sigma),
            "sample": (alpha, torch.full_like(alpha, -1.0)),
        }[scheduler.config.prediction_type]
        for name, level in {"alpha": alpha, "sigma": sigma, "skip": skip, "gain": gain}.items():
            self.register_buffer(name, level, persistent=False)

    @classmethod
    def from_teacher(cls, teacher: Teacher, preset: Preset) -> "Denoiser":
        """A student of the teacher's architecture: with its weights, or with random ones that follow from `preset.seed`."""
        config = {key: x for key, x in teacher.unet.config.items() if not key.startswith("_")} | {"dropout": 0.0}
        schedule = {key: x for key, x in teacher.scheduler.config.items() if not key.startswith("_")}
        with torch.random.fork_rng():
            torch.manual_seed(preset.seed)
            timesteps = tuple(sorted(preset.student_timesteps, reverse=True))
            student = cls(config, schedule, timesteps, preset.method == "progressive", preset.gain_limit)
        if preset.start == "teacher":
            student.unet.load_state_dict(teacher.unet.state_dict())
        return student

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """The expected image, not clamped."""
        (alpha, _), (skip, gain) = self.levels(t), (x[t].view(-1, 1, 1, 1) for x in (self.skip, self.gain))
        return alpha * xt - gain * (self.unet(xt, t).sample.float() - skip * xt)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, `(b, 1, 1, 1)` each; at t = -1 the image is clean."""
        levels = (torch.where(t >= 0, x[t], clean) for x, clean in ((self.alpha, 1.0), (self.sigma, 0.0)))
        return tuple(x.view(-1, 1, 1, 1) for x in levels)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps; noise alone at the last timestep."""
        alpha, sigma = self.levels(t)
        return alpha * x0 + sigma * eps

    def ddim(self, xt: Tensor, x0: Tensor, t: Tensor, following: Tensor) -> Tensor:
        """The DDIM step from x_t and the image that is expected there to another timestep (Song et al. 2021, equation 12)."""
        alpha, sigma = self.levels(t)
        return self.noised(x0, (xt - alpha * x0) / sigma, following)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Those of the input, the same."""
        return self.image_shape

    def generator(self) -> "Denoiser":
        """The deployable part: all of it."""
        return self


def noise_levels(scheduler: SchedulerMixin) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t eps, `(1000,)` each, with zero terminal SNR.

    The last step of a linear schedule still holds 0.6 % of the image; here it is noise alone, as in sampling, and the other
    steps stay what the teacher knows (ADD, section 3.1; the rescaling of Lin et al. 2024 would change them all).
    """
    alphas_cumprod = scheduler.alphas_cumprod.double()
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    alpha[-1], sigma[-1] = 0, 1
    return alpha.float(), sigma.float()
