"""The diffusion teacher: load any diffusers UNet2DModel with its scheduler, or train a small one."""

import json
import math
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from advkd.checkpoints import CHECKPOINT_EVERY, load_checkpoint, read_checkpoint_state, save_checkpoint
from advkd.data import batch_generator
from advkd.devices import precision
from advkd.files import check_weights, differences, fingerprint, first_line, move_whole, writing
from advkd.presets import ASSETS, PINNED, TRAIN_TIMESTEPS, Preset, UserError, load_preset, own_preset

SCHEDULERS = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_FILES = ["*.json", "*.safetensors"]  # formats that cannot carry code


@dataclass
class Teacher:
    """A pre-trained denoiser. `fingerprint` tells its weights and noise schedule apart from any other's.

    `revision` is the commit of the hub that they came from, None for a folder.
    """

    unet: UNet2DModel
    scheduler: SchedulerMixin
    source: str
    fingerprint: str
    revision: str | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.unet.parameters())


def load_teacher(preset: Preset, source: str | None = None) -> Teacher:
    """The teacher of `preset`, or the one at `source` (a folder in diffusers format, or a hub id), in float32.

    Raises UserError at once when it is neither on disk nor in the hub's cache nor reachable, and when it does not fit
    the preset's image size and channels.
    """
    source = source or preset.teacher
    wanted = preset.teacher_revision
    if source != preset.teacher and wanted == PINNED.get(preset.teacher):  # that of another repository
        wanted = PINNED.get(source)
    folder = _find(source, wanted)
    unet_at = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_at = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    check_weights(unet_at)
    try:
        unet = UNet2DModel.from_pretrained(unet_at, use_safetensors=True, torch_dtype=torch.float32)
        described = _read_config(scheduler_at / "scheduler_config.json")
        name, predicted = described.get("_class_name"), described.get("prediction_type", "epsilon")
        if name not in SCHEDULERS:
            raise UserError(f"teacher {source!r} has a {name}; supported schedulers: {', '.join(SCHEDULERS)}")
        if predicted not in PREDICTIONS:
            raise UserError(
                f"teacher {source!r} predicts {predicted!r}; supported prediction types: {', '.join(PREDICTIONS)}"
            )
        scheduler = SCHEDULERS[name].from_pretrained(scheduler_at)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"teacher {source!r} has no UNet2DModel (safetensors) and scheduler: {first_line(error)}"
        ) from error
    shape = (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size)
    if shape != (preset.channels, preset.channels, preset.image_size_px):
        raise UserError(
            f"teacher {source!r} maps {shape[0]} to {shape[1]} channels at {shape[2]} px, "
            f"but preset {preset.name!r} has {preset.channels} at {preset.image_size_px}; preset 'own' takes any"
        )
    if scheduler.config.num_train_timesteps != TRAIN_TIMESTEPS:
        raise UserError(
            f"teacher {source!r} has {scheduler.config.num_train_timesteps} timesteps; only {TRAIN_TIMESTEPS} are supported"
        )
    schedule = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    weights_and_schedule = fingerprint(unet.state_dict(), json.dumps(schedule, sort_keys=True, default=list))
    revision = folder.name if folder.parent.name == "snapshots" else None
    if revision != wanted and revision:
        warnings.warn(
            f"teacher {source!r} is not pinned: the hub gave its commit {revision}, and may give another one later; "
            f"keep to it with --set teacher_revision={revision}",
            stacklevel=2,
        )
    return Teacher(unet.eval().requires_grad_(False), scheduler, source, weights_and_schedule, revision)


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged (no JSON object)")
    return config


def teacher_shape(source: str, revision: str | None = None) -> tuple[int, int]:
    """Side in pixels and channels of the images of the teacher at `source`; see `load_teacher` for what it may be."""
    folder = _find(source, revision or PINNED.get(source))
    path = (folder / "unet" if (folder / "unet").is_dir() else folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config["sample_size"]), int(config["in_channels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"teacher {source!r} has no UNet2DModel that tells its size ({path}: {error})") from error


def find_preset(name: str, recipe: str = "improved", teacher: str = "", **overrides) -> Preset:
    """The preset `name`; "own" is what fits the teacher (a folder or a hub id): see `presets.own_preset`.

    `overrides` are single fields; an empty `images` counts as not given, as does any with the paper's recipe, which
    knows no real images. Raises UserError as `load_preset` does, and for "own" without a teacher.
    """
    if not overrides.get("images") or (recipe == "paper" and not overrides.get("real_share")):
        overrides.pop("images", None)
    if name != "own":
        return load_preset(name, recipe, **overrides)
    if not teacher:
        raise UserError("preset 'own' follows from a teacher: give one, a folder in diffusers format or a hub id")
    return own_preset(teacher, *teacher_shape(teacher, overrides.get("teacher_revision")), recipe, **overrides)


def _find(source: str, revision: str | None) -> Path:
    """The folder of a teacher: the package's own, a local one, the hub's cache, the hub; in this order."""
    if source.startswith("assets/") and (ASSETS.parent / source).is_dir():
        return ASSETS.parent / source
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise UserError(
            f"teacher {source!r} is a file; give the folder in diffusers format that holds unet/ and scheduler/"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    provide = (
        f"teacher {source!r} is not on this machine: give a folder in diffusers format (unet/ and scheduler/ as "
        f"safetensors), or fetch it once where there is a network: hf download {source}{f' --revision {revision}' if revision else ''}"
    )
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FILES, local_files_only=True))
    except HFValidationError as error:
        raise UserError(f"teacher {source!r} is neither a folder that exists nor a hub id") from error
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT):
            raise UserError(f"{provide} (the hub cannot be reached from here)") from None
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FILES))
    except OSError as error:
        raise UserError(f"{provide} ({error})") from error


def _reachable(url: str) -> bool:
    """One quick request, so that no network is an answer at once instead of half a minute of retries."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def untrained_unet(
    image_size_px: int, channels: int, widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
) -> UNet2DModel:
    """The architecture of google/ddpm-celebahq-256 with random weights: 113,673,219 parameters for 3 channels of any size."""
    attention = len(widths) - 2
    kinds = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(len(widths))]
    return UNet2DModel(
        sample_size=image_size_px,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=kinds,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def new_teacher(preset: Preset, seed: int = 0) -> tuple[UNet2DModel, DDPMScheduler]:
    """A small untrained U-Net (digits 1.06M, glyphs 2.7M parameters) with a linear schedule of 1000 steps.

    The digits' is the DDPM paper's. The glyphs' fill the image with colour, which a schedule whose last step still
    holds some signal cannot start from noise: zero terminal SNR with v-prediction (Lin et al. 2024, section 3).
    """
    coloured = preset.channels == 3
    widths = (32, 64, 96, 96) if coloured else (32, 64, 64)
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True} if coloured else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=preset.image_size_px,
            in_channels=preset.channels,
            out_channels=preset.channels,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=2,  # 16 channels a group: with 4, group norm takes half of the time on a CPU
            attention_head_dim=16,
            dropout=0.1,
        )
    return unet, DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="linear", clip_sample=True, **schedule
    )


@dataclass(frozen=True)
class TeacherRecord:
    """One step of teacher training; `heldout_loss` is of the averaged weights, every 500 steps and at the end."""

    step: int
    images_seen: int
    loss: float
    heldout_loss: float | None


def train_teacher(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Tensor,
    heldout: Tensor,
    *,
    steps: int = 8000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    ema: float = 0.999,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Iterator[TeacherRecord]:
    """Train a denoiser on `images` `(n, c, h, w)` in [-1, 1]; yields a record a step, leaves the average in `unet`.

    The simple loss of DDPM (Ho et al. 2020, eq. 14) for the scheduler's prediction type, Adam, warm-up and cosine
    decay. `heldout` images are only measured, never trained on. `checkpoint` is written every 500 steps, after their
    record was taken; `resume` goes on from it to the same weights as a run that was not stopped. Raises UserError if it
    belongs to another run, and if a loss is not finite.
    """
    optimizer = torch.optim.Adam(unet.parameters(), learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _warm_cosine(n, steps))
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema))
    parts = {"unet": unet, "average": average}, {"optimizer": optimizer}
    run = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "ema": ema, "seed": seed}
    first = 0
    if resume and checkpoint and checkpoint.exists():
        state = read_checkpoint_state(checkpoint)
        if different := differences(state["run"], run):
            raise UserError(f"{checkpoint} belongs to another run ({'; '.join(different)})")
        first = load_checkpoint(checkpoint, *parts)["step"]
        decay.last_epoch = first
        optimizer.param_groups[0]["lr"] = learning_rate * _warm_cosine(first, steps)
    unet.train().to(memory_format=torch.channels_last)
    for step in range(first + 1, steps + 1):
        generator = batch_generator(seed, step)
        x0 = images[torch.randint(len(images), (batch_size,), generator=generator)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())  # dropout draws from the global state
            loss = denoising_loss(unet, scheduler, x0, generator)
        if not math.isfinite(value := loss.item()):
            raise UserError(
                f"the loss is {value} at step {step}; the last checkpoint is kept. Check the images, or train with a "
                f"smaller learning_rate than {learning_rate}"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay.step()
        average.update_parameters(unet)
        heldout_loss, due = None, step % CHECKPOINT_EVERY == 0 or step == steps
        if due:
            with torch.no_grad():
                heldout_loss = denoising_loss(
                    average.module.eval(), scheduler, heldout, batch_generator(seed, 0)
                ).item()
        yield TeacherRecord(step, step * batch_size, value, heldout_loss)
        if checkpoint and due:  # after the caller's log, which is never behind it
            save_checkpoint(checkpoint, *parts, {"step": step, "run": run})
    unet.load_state_dict(average.module.state_dict())
    unet.eval()


def _warm_cosine(step: int, steps: int, warm: int = 200) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def denoising_loss(unet: UNet2DModel, scheduler: DDPMScheduler, x0: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the denoiser at uniform timesteps, of whatever it predicts: epsilon, v or the image."""
    eps = torch.randn(x0.shape, generator=generator)
    t = torch.randint(TRAIN_TIMESTEPS, (len(x0),), generator=generator)
    xt = scheduler.add_noise(x0, eps, t)
    told = {"epsilon": eps, "v_prediction": scheduler.get_velocity(x0, eps, t), "sample": x0}
    target = told[scheduler.config.prediction_type]
    dtype = precision("bfloat16", x0.device)
    with torch.autocast(x0.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        prediction = unet(xt.to(memory_format=torch.channels_last), t).sample
    return F.mse_loss(prediction.float(), target)


def save_teacher(unet: UNet2DModel, scheduler: DDPMScheduler, folder: Path) -> None:
    """Write a teacher in diffusers format, weights in half precision (load_teacher widens them)."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".half.") as half:
            DDPMPipeline(unet.half(), scheduler).save_pretrained(half)
            move_whole(Path(half), folder, "model_index.json")
    unet.float()
