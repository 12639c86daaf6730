"""Noise to the teacher's states at the stages' times, and a memory-mapped, resumable store of them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from advkd.data import from_uint8, make_latent, sample_generators, sample_noise, seeded_noise, to_uint8
from advkd.files import differences, quiet, sha256, write_atomic, write_json
from advkd.presets import Preset, UserError, config_hash, stage_times
from advkd.teacher import Teacher

MANIFEST = "manifest.json"


def make_scheduler(teacher: Teacher, sampler: str, steps: int) -> SchedulerMixin:
    """The teacher's noise schedule as a diffusers scheduler with `steps` respaced steps that start at t = 999.

    "ddpm" is ancestral (Ho et al. 2020), "ddim" deterministic (Song et al. 2021, eta = 0). Trailing spacing makes every
    number of steps that divides 1000 and is a multiple of 10 pass exactly through Adv-KD's t = 999, 899, ..., 99.
    """
    kinds = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
    if sampler not in kinds:
        raise UserError(f"there is no sampler {sampler!r}; samplers: {', '.join(kinds)}")
    scheduler = kinds[sampler].from_config(teacher.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


@torch.inference_mode()
def denoise(
    teacher: Teacher, noise: Tensor, scheduler: SchedulerMixin, generators: Sequence[torch.Generator]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run the teacher from `noise` `(b, c, h, w)`; yields `(t, x_t after the step at t, the x0 predicted at t)`.

    The U-Net runs in its own dtype, the state stays in float32. Ancestral noise comes from each sample's generator.
    """
    unet = teacher.unet
    xt = noise
    for t in scheduler.timesteps:
        prediction = unet(xt.to(unet.dtype, memory_format=torch.channels_last), t.expand(len(xt))).sample.float()
        extra = {} if isinstance(scheduler, DDIMScheduler) else {"generator": list(generators)}
        step = scheduler.step(prediction, t, xt, **extra)
        xt = step.prev_sample
        yield int(t), xt, step.pred_original_sample


def states(
    teacher: Teacher, noise: Tensor, scheduler: SchedulerMixin, generators: Sequence[torch.Generator], submodules: int
) -> list[tuple[Tensor, Tensor]]:
    """States 1..K of a trajectory as pairs (x_t, x0-prediction), each `(b, c, h, w)` at full size.

    State j < K is read at the first step at or below its stage time; state K is the final image, twice.
    """
    times = stage_times(submodules)
    read: list[tuple[Tensor, Tensor]] = []
    for t, xt, x0 in denoise(teacher, noise, scheduler, generators):
        while len(read) < len(times) and t <= times[len(read)]:
            read.append((xt, x0))
    return read + [(xt, xt)] * (submodules - len(read))


def sample_teacher(
    teacher: Teacher, preset: Preset, sampler: str, steps: int, indices: Sequence[int], seed: int, progress: bool = True
) -> Tensor:
    """The teacher's images `(n, c, h, w)` in [-1, 1] for the samples `indices`."""
    scheduler, images = make_scheduler(teacher, sampler, steps), []
    bar = tqdm(total=len(indices), desc=f"teacher {sampler}-{steps}", unit="image", disable=quiet(progress))
    with bar, _computing_in(teacher, preset.teacher_dtype):
        for start in range(0, len(indices), preset.shard_size):
            generators = sample_generators(indices[start : start + preset.shard_size], seed)
            noise = sample_noise(generators, preset.image_shape)
            *_, (_, image, _) = denoise(teacher, noise, scheduler, generators)
            images.append(image.clamp(-1, 1))
            bar.update(len(image))
    return torch.cat(images)


@contextmanager
def _computing_in(teacher: Teacher, dtype: str) -> Iterator[None]:
    """Within the block the teacher computes in another dtype, channels last; its float32 weights come back after it."""
    unet = teacher.unet
    float32 = {name: value.clone() for name, value in unet.state_dict().items()}
    torch.nn.Module.to(unet, getattr(torch, dtype), memory_format=torch.channels_last)
    try:
        yield
    finally:
        torch.nn.Module.to(unet, torch.float32)
        unet.load_state_dict(float32)


def trajectory_config(teacher: Teacher, preset: Preset) -> dict:
    """Everything that the bytes of a store depend on."""
    fields = (
        "trajectories sampler sampler_steps trajectory_seed image_size_px channels submodules teacher_dtype shard_size"
    )
    return {"teacher_fingerprint": teacher.fingerprint} | {name: getattr(preset, name) for name in fields.split()}


def trajectory_dir(teacher: Teacher, preset: Preset) -> Path:
    """Where the notebooks keep a preset's trajectories: `runs/<name>/trajectories-<sampler>-<hash>`, shared by its recipes."""
    what = f"{preset.sampler}{preset.sampler_steps}-{preset.trajectories}"
    return Path("runs") / preset.name / f"trajectories-{what}-{config_hash(trajectory_config(teacher, preset))}"


def generate_trajectories(
    teacher: Teacher, preset: Preset, folder: Path | str, progress: bool = True
) -> "TrajectoryStore":
    """Run the teacher for samples 0..n-1 and store what the stages need; goes on where an earlier call stopped.

    Every shard is one file, written atomically, of samples whose seeds follow from their indices alone: an interrupted
    store ends byte-identical to an uninterrupted one (same machine, same number of threads). Raises UserError
    naming the differing fields if `folder` holds a store of another configuration.
    """
    folder, config = Path(folder), trajectory_config(teacher, preset)
    manifest = _read_manifest(folder) or {
        "config_hash": config_hash(config),
        "config": config,
        "teacher": teacher.source,
        "shards": {},
    }
    if different := differences(manifest["config"], config):
        raise UserError(
            f"{folder} holds other trajectories ({'; '.join(different)}); choose another folder or remove it"
        )
    scheduler = make_scheduler(teacher, preset.sampler, preset.sampler_steps)
    starts = range(0, preset.trajectories, preset.shard_size)
    bar = tqdm(total=preset.trajectories, desc="trajectories", unit="image", disable=quiet(progress))
    with bar, _computing_in(teacher, preset.teacher_dtype):
        for number, start in enumerate(starts):
            indices = range(start, min(start + preset.shard_size, preset.trajectories))
            path = folder / f"shard-{number:05d}.safetensors"
            if path.name not in manifest["shards"] or not path.exists():
                tensors = _shard(teacher, preset, scheduler, indices)
                write_atomic(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
                manifest["shards"][path.name] = {"first": start, "count": len(indices), "sha256": sha256(path)}
                write_json(folder / MANIFEST, manifest)
            bar.update(len(indices))
    store = TrajectoryStore(folder)
    store.verify()
    return store


def _shard(teacher: Teacher, preset: Preset, scheduler: SchedulerMixin, indices: range) -> dict[str, Tensor]:
    generators = sample_generators(indices, preset.trajectory_seed)
    noise = sample_noise(generators, preset.image_shape)
    tensors = {how: make_latent(noise, how) for how in ("block-mean", "shrink8bit")}
    for k, (xt, x0) in enumerate(states(teacher, noise, scheduler, generators, preset.submodules)):
        if not xt.isfinite().all():
            raise UserError(f"the teacher {teacher.source!r} gives values that are not finite; check its weights")
        size = preset.resolution(k)
        tensors[f"xt_{k}"] = F.adaptive_avg_pool2d(xt, size).half()
        tensors[f"x0_{k}"] = to_uint8(F.adaptive_avg_pool2d(x0, size))
    return tensors


def _read_manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text()) if path.exists() else None
        if manifest is not None and not {"config", "shards"} <= manifest.keys():
            raise ValueError("no config, no shards")
        return manifest
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {folder} and generate it again") from error


def as_images(stored: Tensor) -> Tensor:
    """Stored targets, uint8 x0-predictions or half-precision x_t, as float32 images in [-1, 1], tanh's range."""
    return from_uint8(stored) if stored.dtype == torch.uint8 else stored.float().clamp(-1, 1)


class TrajectoryStore:
    """Trajectories on disk: opened by memory map, nothing is read before a column of it is asked for."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        if manifest is None:
            raise UserError(
                f"{folder} holds no trajectories (no {MANIFEST}); make them with: python -m advkd trajectories"
            )
        self.config, self.shards = manifest["config"], manifest["shards"]
        self.teacher = manifest.get("teacher")  # where its weights came from; the configuration has their fingerprint
        if (have := sum(s["count"] for s in self.shards.values())) < len(self):
            raise UserError(f"{folder} holds {have} of {len(self)} trajectories; run the command that made it again")

    def __len__(self) -> int:
        return self.config["trajectories"]

    def column(self, name: str) -> Tensor:
        """One stored quantity of all trajectories, as stored: "block-mean", "shrink8bit", "xt_<k>" or "x0_<k>"."""
        parts = []
        for file in sorted(self.shards):
            with safe_open(self.folder / file, "pt") as shard:
                parts.append(shard.get_tensor(name))
        return torch.cat(parts)

    def latents(self, how: str) -> Tensor:
        """The student's inputs, float32; see `make_latent`. The full noise `(n, c, s, s)` follows from the seed."""
        if how != "full":
            return self.column(how)
        config = self.config
        shape = (config["channels"], config["image_size_px"], config["image_size_px"])
        return seeded_noise(range(len(self)), shape, config["trajectory_seed"])

    def targets(self, k: int, target: str) -> Tensor:
        """Submodule k's targets `(n, c, r, r)` in [-1, 1], float32; `target` is "xt" or "x0"."""
        return as_images(self.column(f"{target}_{k}"))

    def verify(self) -> None:
        """Compare every shard with its checksum. Raises UserError that names a shard that changed."""
        for file, entry in self.shards.items():
            if not (self.folder / file).exists() or sha256(self.folder / file) != entry["sha256"]:
                raise UserError(
                    f"{self.folder / file} is damaged or missing; remove it and run the command that made it again"
                )
