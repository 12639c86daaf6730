"""Noise to the teacher's states at the stages' times, and a memory-mapped, resumable store of them."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from advkd.data import from_uint8, make_latent, sample_generators, sample_noise, seeded_noise, to_uint8
from advkd.devices import pick_device, precision, processes
from advkd.files import (
    alone,
    check_disk,
    differences,
    first_line,
    quiet,
    remove_halves,
    sha256,
    write_atomic,
    write_json,
)
from advkd.presets import LATENT_SIDE, Preset, UserError, config_hash, late_fields, stage_times
from advkd.teacher import Teacher

MANIFEST = "manifest.json"
SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm-solver": DPMSolverMultistepScheduler}
LATE = ("stored", "teacher_compile")  # fields of a preset that a store depends on and whose default it does not name
HALF_UP_TO_PX = 32  # noisy states of stages beyond are clamped to 8 bits: a head's tanh reaches no further


def make_scheduler(teacher: Teacher, sampler: str, steps: int) -> SchedulerMixin:
    """The teacher's noise schedule as a diffusers scheduler with `steps` respaced steps that start at t = 999.

    "ddpm" is ancestral (Ho et al. 2020), "ddim" deterministic (Song et al. 2021, eta = 0), "dpm-solver" deterministic and
    of second order (DPM-Solver++, Lu et al. 2022). Trailing spacing makes every
    number of steps that divides 1000 and is a multiple of 10 pass exactly through Adv-KD's t = 999, 899, ..., 99.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"there is no sampler {sampler!r}; samplers: {', '.join(SAMPLERS)}")
    scheduler = SAMPLERS[sampler].from_config(teacher.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


@torch.inference_mode()
def denoise(
    teacher: Teacher, noise: Tensor, scheduler: SchedulerMixin, generators: Sequence[torch.Generator]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run the teacher from `noise` `(b, c, h, w)`; yields `(t, x_t after the step at t, the x0 predicted at t)`.

    The U-Net runs in its own dtype, the state stays in float32. Ancestral noise comes from each sample's generator.
    """
    unet, xt = teacher.unet, noise.to(teacher.unet.device)
    ancestral = {"generator": list(generators)} if isinstance(scheduler, DDPMScheduler) else {}
    scheduler.set_timesteps(scheduler.num_inference_steps)  # a solver of second order remembers its last trajectory
    for t in scheduler.timesteps:
        shown = xt.to(unet.dtype, memory_format=torch.channels_last)
        prediction = unet(shown, torch.full((len(xt),), int(t), device=xt.device)).sample.float()
        step = scheduler.step(prediction, t, xt, **ancestral)
        xt = step.prev_sample
        solver = isinstance(scheduler, DPMSolverMultistepScheduler)
        yield int(t), xt, scheduler.model_outputs[-1] if solver else step.pred_original_sample


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
    teacher: Teacher,
    preset: Preset,
    sampler: str,
    steps: int,
    indices: Sequence[int],
    seed: int,
    progress: bool = True,
    device: str = "auto",
) -> Tensor:
    """The teacher's images `(n, c, h, w)` in [-1, 1] for the samples `indices`."""
    scheduler, images = make_scheduler(teacher, sampler, steps), []
    bar = tqdm(total=len(indices), desc=f"teacher {sampler}-{steps}", unit="image", disable=quiet(progress))
    with bar, _computing_in(teacher, preset.teacher_dtype, pick_device(device)):
        for start in range(0, len(indices), preset.shard_size):
            generators = sample_generators(indices[start : start + preset.shard_size], seed)
            noise = sample_noise(generators, preset.image_shape)
            *_, (_, image, _) = denoise(teacher, noise, scheduler, generators)
            images.append(image.clamp(-1, 1).cpu())
            bar.update(len(image))
    return torch.cat(images)


@contextmanager
def _computing_in(teacher: Teacher, dtype: str, device: torch.device) -> Iterator[None]:
    """Within the block the teacher computes there in that dtype (see `devices.precision`), channels last; its float32
    weights come back after it."""
    unet, before = teacher.unet, teacher.unet.device
    float32 = {name: value.clone() for name, value in unet.state_dict().items()}
    torch.nn.Module.to(unet, device, getattr(torch, precision(dtype, device)), memory_format=torch.channels_last)
    try:
        yield
    finally:
        torch.nn.Module.to(unet, before, torch.float32)
        unet.load_state_dict(float32)


def trajectory_config(teacher: Teacher, preset: Preset) -> dict:
    """Everything that the bytes of a store depend on."""
    fields = (
        "trajectories sampler sampler_steps trajectory_seed image_size_px channels submodules teacher_dtype shard_size"
    )
    config = {"teacher_fingerprint": teacher.fingerprint} | {name: getattr(preset, name) for name in fields.split()}
    late = {name: getattr(preset, name) for name in LATE if getattr(preset, name) != late_fields()[name]}
    return config | json.loads(json.dumps(late))


def trajectory_dir(teacher: Teacher, preset: Preset) -> Path:
    """Where the notebooks keep a store: `runs/<name>/trajectories-<what>-<hash of the configuration>`."""
    what = f"{preset.sampler.replace('-', '')}{preset.sampler_steps}-{preset.trajectories}"
    return Path("runs") / preset.name / f"trajectories-{what}-{config_hash(trajectory_config(teacher, preset))}"


def sample_bytes(preset: Preset) -> int:
    """Bytes that a trajectory takes on disk, without the few of its shard's header."""
    targets = sum(
        preset.channels * preset.resolution(k) ** 2 * _stored_as(target, preset.resolution(k)).itemsize
        for k in range(preset.submodules)
        for target in preset.stored
    )
    return targets + 2 * 4 * preset.channels * LATENT_SIDE**2


def generate_trajectories(
    teacher: Teacher, preset: Preset, folder: Path | str, progress: bool = True, device: str = "auto"
) -> "TrajectoryStore":
    """Run the teacher for samples 0..n-1 and store what the stages need; goes on where an earlier call stopped.

    Every shard is one file, written atomically, of samples whose seeds follow from their indices alone. So one process,
    several (`accelerate launch`: each takes its share of the shards) and an interrupted call that was made again end with
    the same bytes, on the same hardware and with the same number of threads (a CPU without bfloat16 computes in float32: its
    shards' entries in the manifest say so). Where a shard does not fit a GPU's memory, it is
    sampled in smaller batches.
    Another call that works in the folder is waited for. Raises UserError naming the differing fields if `folder` holds a
    store of another configuration, and if the disk is too small.
    """
    rank, count = processes()
    with alone(Path(folder)) if rank == 0 else nullcontext():  # of the processes of one launch, the first
        return _generate(teacher, preset, Path(folder), progress, device, rank, count)


def _generate(
    teacher: Teacher, preset: Preset, folder: Path, progress: bool, device: str, rank: int, count: int
) -> "TrajectoryStore":
    config = trajectory_config(teacher, preset)
    manifest = _read_manifest(folder) or {
        "config_hash": config_hash(config),
        "config": config,
        "teacher": teacher.source,
        "revision": teacher.revision,
        "preset": preset.name,
        "shards": {},
    }
    if different := differences(manifest["config"], config):
        raise UserError(
            f"{folder} holds other trajectories ({'; '.join(different)}); choose another folder or remove it"
        )
    starts = range(0, preset.trajectories, preset.shard_size)
    ends = (*starts[1:], preset.trajectories)
    shards = {f"shard-{n:05d}": range(*ends_of) for n, ends_of in enumerate(zip(starts, ends, strict=True))}
    mine = {name: indices for number, (name, indices) in enumerate(shards.items()) if number % count == rank}
    for name in (*mine, *([MANIFEST] if rank == 0 else [])):
        remove_halves(folder, *([name] if name == MANIFEST else [f"{name}.safetensors", f"{name}.json"]))
    missing = {name: indices for name, indices in shards.items() if not _is_made(folder, name, indices, manifest)}
    if missing:
        where = pick_device(device)
        check_disk(folder, sum(map(len, missing.values())) * sample_bytes(preset), "the trajectories")
        if rank == 0:  # says nothing of shards that are to be made
            kept = {file: entry for file, entry in manifest["shards"].items() if Path(file).stem not in missing}
            _write_manifest(folder, manifest | {"shards": kept})
        with _computing_in(teacher, preset.teacher_dtype, where):
            _make_shards(teacher, preset, folder, mine, missing, progress and rank == 0)
    if missing or list(folder.glob("shard-*.json")):
        _seal(folder, shards, rank)
    store = TrajectoryStore(folder)
    store.verify()
    return store


def _make_shards(
    teacher: Teacher, preset: Preset, folder: Path, mine: dict[str, range], missing: dict[str, range], progress: bool
) -> None:
    scheduler = make_scheduler(teacher, preset.sampler, preset.sampler_steps)
    if preset.teacher_compile:
        teacher = replace(teacher, unet=torch.compile(teacher.unet))
    of_batch = partial(_batch, teacher, preset, scheduler)
    batch = preset.shard_size  # the most; halved until the memory suffices
    dtype = str(teacher.unet.dtype).removeprefix("torch.")
    total, done = sum(map(len, mine.values())), sum(len(x) for name, x in mine.items() if name not in missing)
    with tqdm(total=total, initial=done, desc="trajectories", unit="image", disable=quiet(progress)) as bar:
        for name, indices in mine.items():
            if name not in missing:
                continue
            path = folder / f"{name}.safetensors"
            batch, tensors = _shard(of_batch, indices, batch)
            write_atomic(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
            entry = {"first": indices.start, "count": len(indices), "sha256": sha256(path)}
            # What rounding follows from, where the machine does not do as it was asked:
            entry |= {"batch": batch} if batch < preset.shard_size else {}
            entry |= {"dtype": dtype} if dtype != preset.teacher_dtype else {}
            write_json(path.with_suffix(".json"), entry)  # each process its own; they are gathered at the end
            bar.update(len(indices))


def _shard(of_batch: Callable[[range], dict[str, Tensor]], indices: range, batch: int) -> tuple[int, dict[str, Tensor]]:
    """A shard's tensors, and the size of the batches in which they were sampled: `batch`, or what fits of its halves."""
    while True:
        try:
            parts = [of_batch(indices[i : i + batch]) for i in range(0, len(indices), batch)]
            return batch, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        except RuntimeError as error:
            if batch == 1 or not should_reduce_batch_size(error):
                raise
        batch = -(-batch // 2)
        clear_device_cache(garbage_collection=True)


def _batch(teacher: Teacher, preset: Preset, scheduler: SchedulerMixin, indices: range) -> dict[str, Tensor]:
    generators = sample_generators(indices, preset.trajectory_seed)
    noise = sample_noise(generators, preset.image_shape)
    tensors = {how: make_latent(noise, how) for how in ("block-mean", "shrink8bit")}
    walk = states(teacher, noise, scheduler, generators, preset.submodules)
    for k, (xt, x0) in enumerate(walk):
        if not xt.isfinite().all():
            raise UserError(f"the teacher {teacher.source!r} gives values that are not finite; check its weights")
        size = preset.resolution(k)
        for target, state in (("xt", xt), ("x0", x0)):
            if target in preset.stored:
                small = F.adaptive_avg_pool2d(state, size)
                eight_bits = _stored_as(target, size) == torch.uint8
                tensors[f"{target}_{k}"] = (to_uint8(small) if eight_bits else small.half()).cpu()
    return tensors


def _stored_as(target: str, size_px: int) -> torch.dtype:
    return torch.float16 if target == "xt" and size_px <= HALF_UP_TO_PX else torch.uint8


def _is_made(folder: Path, name: str, indices: range, manifest: dict) -> bool:
    file = f"{name}.safetensors"
    entry = manifest["shards"].get(file, {})
    return (entry.get("first"), entry.get("count")) == (indices.start, len(indices)) and (folder / file).exists()


def _seal(folder: Path, shards: dict[str, range], rank: int) -> None:
    """Wait until every process has made its shards; the first then gathers what it says of them in the manifest."""
    start, told = time.monotonic(), False
    while True:
        manifest = _read_manifest(folder) or {"shards": {}}
        if all(_is_made(folder, name, indices, manifest) for name, indices in shards.items()):
            break
        if not told and time.monotonic() - start > 60:
            print(f"advkd: waiting for the shards of other processes in {folder}", file=sys.stderr)
            told = True
        time.sleep(0.5)
    if rank == 0:
        _write_manifest(folder, manifest | {"shards": dict(sorted(manifest["shards"].items()))})
        for name in shards:
            (folder / f"{name}.json").unlink(missing_ok=True)


def _write_manifest(folder: Path, manifest: dict) -> None:
    write_json(folder / MANIFEST, manifest | {"checksum": _checksum(manifest)})


def _checksum(manifest: dict) -> str:
    return config_hash({name: value for name, value in manifest.items() if name != "checksum"})


def _read_manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    # First the shards' own entries: whoever gathers them in the manifest writes it before they are removed.
    entries = {file.stem: _read_json(file) for file in sorted(folder.glob("shard-*.json"))}
    manifest = _read_json(path)
    if manifest is not None:
        parts = [manifest.get(part) for part in ("config", "shards")] if isinstance(manifest, dict) else [None]
        if not all(isinstance(part, dict) for part in parts) or "trajectories" not in parts[0]:
            raise UserError(f"{path} is damaged (no config, no shards); remove {folder} and generate it again")
        _check_shards(path, manifest["shards"])
        if "checksum" in manifest and manifest["checksum"] != _checksum(manifest):  # an earlier version wrote none
            raise UserError(f"{path} is damaged (its checksum differs); remove {folder} and generate it again")
        manifest["shards"] |= {f"{name}.safetensors": entry for name, entry in entries.items() if entry}
        _check_shards(path, manifest["shards"])
    return manifest


def _check_shards(path: Path, shards: dict) -> None:
    """A manifest may come from anywhere: it names files in its folder, and nothing else is opened."""
    for name, entry in shards.items():
        if not re.fullmatch(r"shard-\d{5,}\.safetensors", name):
            raise UserError(
                f"{path} names {name!r}, but a shard is a file shard-NNNNN.safetensors beside it; "
                f"remove {path.parent} and generate it again"
            )
        if not isinstance(entry, dict) or not isinstance(entry.get("count"), int) or "sha256" not in entry:
            raise UserError(f"{path} is damaged ({name} is {entry!r}); remove {path.parent} and generate it again")


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as shard:
            return shard.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is damaged or missing ({first_line(error)}); remove it and run the command that made it again"
        ) from error


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {path.parent} and generate it again") from error


def as_images(stored: Tensor) -> Tensor:
    """Stored targets, uint8 x0-predictions or half-precision x_t, as float32 images in [-1, 1], tanh's range."""
    return from_uint8(stored) if stored.dtype == torch.uint8 else stored.float().clamp(-1, 1)


class Column:
    """One stored quantity of all trajectories, memory-mapped: a row is read when it is asked for.

    Indexed by a 1-D integer tensor or a slice it gives a tensor `(n, ...)`, as stored.
    """

    def __init__(self, parts: list[Tensor]):
        self.parts, self.nbytes = parts, sum(part.nbytes for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, indices: slice | Tensor) -> Tensor:
        if isinstance(indices, slice) and indices == slice(None):
            return torch.cat(self.parts)
        rows = range(len(self))[indices] if isinstance(indices, slice) else indices.tolist()
        size = len(self.parts[0])  # of every shard but the last
        # A stack of views is ten times as fast as indexing with tensors, which copies bytes one by one.
        return torch.stack([self.parts[i // size][i % size] for i in rows])


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
        self.revision = manifest.get("revision")  # the commit of the hub, None for a folder
        self.preset = manifest.get("preset")  # its name
        if (have := sum(s["count"] for s in self.shards.values())) < len(self):
            raise UserError(f"{folder} holds {have} of {len(self)} trajectories; run the command that made it again")

    def __len__(self) -> int:
        return self.config["trajectories"]

    def check_fits(self, preset: Preset) -> None:
        """Raise UserError that names the fields where images are of another shape than the preset's, or (Adv-KD) states are."""
        names = ("image_size_px", "channels") + (("submodules",) if preset.method == "advkd" else ())
        shape = {name: getattr(preset, name) for name in names}
        if different := differences({name: self.config[name] for name in shape}, shape):
            raise UserError(f"the trajectories in {self.folder} do not fit the preset ({'; '.join(different)})")

    def made_with(self) -> dict:
        """The fields of a preset that the store was made with."""
        fields = "trajectories sampler sampler_steps trajectory_seed teacher_dtype shard_size"
        made = {field: self.config[field] for field in fields.split()}
        return made | {name: self.config.get(name, late_fields()[name]) for name in LATE}

    def column(self, name: str) -> Column:
        """One stored quantity of all trajectories, as stored: "block-mean", "shrink8bit", "xt_<k>" or "x0_<k>"."""
        parts = []
        for file in sorted(self.shards):
            parts.append(_read_tensor(self.folder / file, name))
        return Column(parts)

    def latents(self, how: str) -> Tensor:
        """The student's inputs, float32; see `make_latent`. The full noise `(n, c, s, s)` follows from the seed."""
        if how != "full":
            return self.column(how)[:]
        config = self.config
        shape = (config["channels"], config["image_size_px"], config["image_size_px"])
        return seeded_noise(range(len(self)), shape, config["trajectory_seed"])

    def targets(self, k: int, target: str, rows: slice | Tensor = slice(None)) -> Tensor:
        """Submodule k's targets `(n, c, r, r)` in [-1, 1], float32; `target` is "xt" or "x0"."""
        return as_images(self.column(f"{target}_{k}")[rows])

    def images(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """The teacher's images `(n, c, s, s)` in [-1, 1], float32: the last states, with 8 bits where both are stored."""
        return as_images(self.final()[rows])

    def final(self) -> Column:
        """The last states, as stored."""
        target = "x0" if "x0" in self.made_with()["stored"] else "xt"
        return self.column(f"{target}_{self.config['submodules'] - 1}")

    def verify(self) -> None:
        """Compare every shard with its checksum. Raises UserError that names a shard that changed."""
        for file, entry in self.shards.items():
            if not (self.folder / file).exists() or sha256(self.folder / file) != entry["sha256"]:
                raise UserError(
                    f"{self.folder / file} is damaged or missing; remove it and run the command that made it again"
                )
