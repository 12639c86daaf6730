"""How fast and how large: teacher, students, trajectories, training and the store, measured in one run on one device."""

import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from advkd.data import from_uint8, to_uint8
from advkd.devices import pick_device, precision
from advkd.discriminator import make_discriminator
from advkd.files import first_line, sha256, write_json
from advkd.presets import Preset, load_preset
from advkd.student import Student, gflop_per_image
from advkd.teacher import Teacher, untrained_unet
from advkd.train_advkd import train_advkd
from advkd.trajectories import (
    MANIFEST,
    TrajectoryStore,
    generate_trajectories,
    sample_bytes,
    trajectory_config,
)

PEAK_SIDE = 4096  # of the matrices whose product is the machine's measured peak
STORED = 128  # samples of the store that is read
SHOWN = {
    "name": "what",
    "variant": "variant",
    "batch": "batch",
    "ms_per_image": "ms per image",
    "images_per_s": "images/s",
    "gflop_per_image": "GFLOP per image",
    "share_of_peak": "of the peak",
    "peak_memory_mb": "peak MB",
    "mb_per_sample": "MB per sample",
    "device": "device",
    "threads": "threads",
    "error": "error",
}


@dataclass(frozen=True)
class Case:
    """One row to be: what `kind` of thing (a key of KINDS) is done to `batch` images at a time."""

    kind: str
    name: str
    variant: str
    batch: int
    preset: str = "celebahq"
    device: str = "cpu"
    threads: int = 1
    min_seconds: float = 1.0


Kinds = dict[str, Callable[[Case, torch.device], dict]]


def cases(preset: str, device: str, batches: tuple[int, ...] = (1, 64), min_seconds: float = 1.0) -> list[Case]:
    """All rows for a preset on a device. On a CPU the teacher is measured one image at a time, and training with 8."""
    about = {"preset": preset, "device": device, "threads": torch.get_num_threads(), "min_seconds": min_seconds}
    gpu = device.startswith("cuda")
    dtypes, variants = ("float32", "bfloat16"), ("float32", "channels_last", "bfloat16", "compiled")
    rows = [("matrix", "matrix product", dtype, 1) for dtype in dtypes]
    rows += [("teacher", "teacher step", dtype, b) for b in (batches if gpu else (1,)) for dtype in dtypes]
    rows += [("student", f"{r} student", v, b) for b in batches for r in ("paper", "improved") for v in variants]
    rows += [("trajectory", "trajectory", "10 steps", batches[-1] if gpu else 1)]
    for recipe in ("paper", "improved"):
        dtype = precision(load_preset(preset, recipe).train_dtype, torch.device(device))
        rows += [("training", f"{recipe} training step", dtype, batches[-1] if gpu else 8)]
    sizes = sorted(set(load_preset(preset).resolutions))
    rows += [("reading", f"reading {px} px", how, 64) for px in sizes for how in ("store", "png")]
    return [Case(*row, **about) for row in rows]


def benchmark(chosen: list[Case], kinds: Kinds | None = None) -> Iterator[dict]:
    """Measure the cases one after the other, each in a new process, so that its peak memory is its own; yields rows.

    `kinds` (default: KINDS) measure a case, given the device: a function for each kind, which another process can import.
    `ms_per_image` is a median. `gflop_per_image` counts two for a multiplication with its sum.
    `peak_memory_mb`: on a CPU the process' resident memory over what it had with the package imported, on a GPU what torch allocated.
    """
    for case in chosen:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                row = pool.submit(measure, case, kinds).result()
            except BrokenProcessPool:
                row = _about(case) | {"error": "its process was killed (out of memory?)"}
        yield row


def presented(rows: list[dict]) -> list[dict]:
    """Rows in the order of KINDS with their share of the peak; after each teacher step what 50 and 1000 of them take, so many
    times its time."""
    measured = [row for row in rows if "times" not in row]
    counted = [row for row in measured if row.get("gflop_per_image") and row.get("ms_per_image")]
    speeds = {id(row): row["gflop_per_image"] / row["ms_per_image"] for row in counted}
    peaks = {row["dtype"]: speeds[id(row)] for row in counted if row["kind"] == "matrix"}
    found = []
    for row in sorted(measured, key=lambda row: list(KINDS).index(row["kind"])):
        if id(row) in speeds and row.get("dtype") in peaks:
            row = row | {"share_of_peak": speeds[id(row)] / peaks[row["dtype"]]}
        found.append(row)
        if row["kind"] == "teacher" and "ms_per_image" in row:
            for times in (50, 1000):
                scaled = {field: times * row[field] for field in ("ms_per_image", "gflop_per_image")}
                rate = {"images_per_s": row["images_per_s"] / times}
                found.append(row | {"name": f"teacher, {times} steps", "times": times} | scaled | rate)
    return found


def protocol(preset: str) -> dict:
    """What the numbers depend on beside their own fields."""
    return {
        "preset": preset,
        "weights": "random: time and memory do not depend on them",
        "ms_per_image": "median, warm (trajectory: one; training: mean of 8 steps or 2 periods of the penalty); a process a row",
        "reading": "the same 64 rows of 128 every time: from the system's memory, not from a disk",
        "float32": "TF32 on a GPU",
        "gflop_per_image": "not counted of training, whose penalty is a gradient's gradient, nor where files are read",
        "share_of_peak": "of the faster matrix product of 4096 x 4096 numbers (BLAS, 1 x 1 convolution) in the same precision; Winograd's convolutions can exceed 1",
        "teacher, 50 and 1000 steps": "not measured: so many times the row of one step",
        "peak_memory_mb": "CPU: peak resident memory over that of the process with the package imported; GPU: allocated by torch",
        "runs": "with --only, rows of a kind replace those of an earlier run: compare within a kind",
        "gpu": "measured" if torch.cuda.is_available() else "not measured: none was available",
        "platform": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def measure(case: Case, kinds: Kinds | None = None) -> dict:
    """One row, see `benchmark`; what cannot be measured (no compiler, no memory) leaves its `error` there."""
    torch.set_num_threads(case.threads)
    device = pick_device(case.device)
    if device.type == "cuda":  # TF32 for products, as convolutions have it
        torch.set_float32_matmul_precision("high")
    about, before = _about(case) | {"device": _device_name(device)}, memory_mb(device, restart=True)
    try:
        found = (kinds or KINDS)[case.kind](case, device)
    except Exception as error:  # of any library: a benchmark goes on
        return about | {"error": first_line(error)}
    if before is not None:
        found = {"peak_memory_mb": memory_mb(device) - before} | found
    if "ms_per_image" in found:
        found["images_per_s"] = 1e3 / found["ms_per_image"]
    return about | found


def _about(case: Case) -> dict:
    about = {"kind": case.kind, "name": case.name, "variant": case.variant, "batch": case.batch}
    return about | {"device": case.device, "threads": case.threads}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # of Linux alone
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} CPU"


def memory_mb(device: torch.device, restart: bool = False) -> float | None:
    """The peak since the last restart, which begins at what is taken now. Where there is no GPU, as Linux counts it; None
    on other systems."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    if not Path("/proc/self/status").exists():
        return None
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6


def _timed(call: Callable[[], object], images: int, case: Case) -> dict:
    with FlopCounterMode(display=False) as counter:
        call()
    return {
        "ms_per_image": _median_ms(call, case) / images,
        "gflop_per_image": counter.get_total_flops() / 1e9 / images,
    }


def _median_ms(call: Callable[[], object], case: Case) -> float:
    from torch.utils.benchmark import Timer  # its import looks for CUDA's compiler and says so

    call()
    timer = Timer("call()", globals={"call": call}, num_threads=case.threads)
    return 1e3 * timer.blocked_autorange(min_run_time=case.min_seconds).median


def _matrix(case: Case, device: torch.device) -> dict:
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=getattr(torch, case.variant)) for _ in range(2))
    pixels = a.view(1, -1, 1, PEAK_SIDE).permute(0, 3, 1, 2)  # the rows as pixels, channels last
    ways = [_timed(call, 1, case) for call in (lambda: a @ b, lambda: F.conv2d(pixels, b[..., None, None]))]
    return min(ways, key=lambda row: row["ms_per_image"]) | {"dtype": case.variant}


@torch.inference_mode()
def _teacher_step(case: Case, device: torch.device) -> dict:
    p, dtype = load_preset(case.preset), getattr(torch, case.variant)
    unet = untrained_unet(p.image_size_px, p.channels).eval().to(device, dtype, memory_format=torch.channels_last)
    xt = torch.randn(case.batch, *p.image_shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    t = torch.full((case.batch,), 500, device=device)
    return _timed(lambda: unet(xt, t).sample, case.batch, case) | {"dtype": case.variant}


@torch.inference_mode()
def _student(case: Case, device: torch.device) -> dict:
    student = Student.from_preset(load_preset(case.preset, case.name.split()[0])).generator().eval().to(device)
    latents = torch.randn(case.batch, *student.latent_shape, device=device)
    dtype = torch.bfloat16 if case.variant == "bfloat16" else torch.float32
    if case.variant in ("channels_last", "bfloat16"):
        torch.nn.Module.to(student, dtype, memory_format=torch.channels_last)
        latents = latents.to(dtype, memory_format=torch.channels_last)
    about = {"dtype": str(dtype).removeprefix("torch.")}
    if case.variant != "compiled":
        return about | _timed(lambda: student(latents), case.batch, case)
    about["gflop_per_image"] = gflop_per_image(student)  # of one image, so that the peak is that of the compiled batch
    compiled = torch.compile(student)
    return about | {"ms_per_image": _median_ms(lambda: compiled(latents), case) / case.batch}


def _trajectory(case: Case, device: torch.device) -> dict:
    """A trajectory of 10 steps in the preset's precision with all that the store does; 50 steps take five times as long."""
    steps, p = 10, load_preset(case.preset, trajectories=case.batch, shard_size=case.batch)
    teacher = Teacher(untrained_unet(p.image_size_px, p.channels).eval(), DDPMScheduler(), "untrained", "0")
    with tempfile.TemporaryDirectory() as folder:

        def sample(n: int) -> TrajectoryStore:
            q = p.replace(sampler_steps=n)
            return generate_trajectories(teacher, q, Path(folder) / str(n), progress=False, device=str(device))

        with FlopCounterMode(display=False) as counter:
            sample(1)  # warms up, too
        start = time.perf_counter()
        store = sample(steps)
        seconds = time.perf_counter() - start
        stored = sum((store.folder / file).stat().st_size for file in store.shards) / len(store) / 1e6
    gflop = steps * counter.get_total_flops() / 1e9 / case.batch
    found = {"ms_per_image": 1e3 * seconds / case.batch, "gflop_per_image": gflop}
    return found | {"mb_per_sample": stored, "dtype": precision(p.teacher_dtype, device)}


def _training(case: Case, device: torch.device) -> dict:
    """Steps of the last stage, with the penalty as often as the recipe has it."""
    p = load_preset(case.preset, case.name.split()[0], batch_sizes=(case.batch,), trajectories=STORED)
    period, steps = p.penalty_every, max(8, 2 * p.penalty_every)
    with tempfile.TemporaryDirectory() as folder:
        store = _photographs_store(p, Path(folder))

        def train(n: int) -> float:
            q, start = p.replace(schedule="joint", steps=n), time.perf_counter()
            for _ in train_advkd(Student.from_preset(q), partial(make_discriminator, q), store, q, device=str(device)):
                pass
            return time.perf_counter() - start

        train(period)  # warms up
        shorter = train(period)  # what a training takes to begin with, such as reading the store, counts in both
        seconds = (train(period + steps) - shorter) / steps
    return {"ms_per_image": 1e3 * seconds / case.batch, "dtype": precision(p.train_dtype, device)}


def _reading(case: Case, device: torch.device) -> dict:
    """A batch of one stage's targets with 8 bits, which the device widens: from the store, or, as published, from PNGs of
    the full size."""
    px, p = int(case.name.split()[1]), load_preset(case.preset, trajectories=STORED)
    k = p.resolutions.index(px)
    order = torch.randint(STORED, (case.batch,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        if case.variant == "png":
            files = [Path(folder) / f"{n}.png" for n in range(STORED)]
            for file, image in zip(files, to_uint8(_photographs(p)), strict=True):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
            stored = sum(file.stat().st_size for file in files) / STORED * (p.submodules + 1)
            found = _timed(lambda: torch.stack([_decoded(files[i], px) for i in order.tolist()]), case.batch, case)
        else:
            column = _photographs_store(p, Path(folder)).column(f"x0_{k}")
            stored = sample_bytes(p)
            found = _timed(lambda: column[order], case.batch, case)
    return found | {"mb_per_sample": stored / 1e6, "gflop_per_image": None}


def _decoded(file: Path, px: int) -> Tensor:
    with Image.open(file) as image:
        pixels = np.asarray(image.resize((px, px), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _photographs(p: Preset) -> Tensor:
    """`(STORED, c, s, s)` in [-1, 1]: pieces of scikit-learn's two photographs, which compress like photographs."""
    from sklearn.datasets import load_sample_images

    rng, pieces = np.random.default_rng(0), []
    for photograph in load_sample_images().images:
        for _ in range(STORED // 2):
            top, left = (rng.integers(side - 256) for side in photograph.shape[:2])
            pieces.append(photograph[top : top + 256, left : left + 256])
    images = from_uint8(torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2))
    return F.interpolate(images, p.image_size_px, mode="bilinear", antialias=True)[:, : p.channels]


def _photographs_store(p: Preset, folder: Path) -> TrajectoryStore:
    """A store of the preset's form with photographs in place of a teacher's images."""
    images, noise = _photographs(p), torch.randn(STORED, p.channels, 4, 4)
    teacher = Teacher(None, None, "photographs", "0")
    shards = {}
    for number, start in enumerate(range(0, STORED, p.shard_size)):
        rows = slice(start, start + p.shard_size)
        tensors = {how: noise[rows].clone() for how in ("block-mean", "shrink8bit")}
        for k, px in enumerate(p.resolutions):
            small = F.adaptive_avg_pool2d(images[rows], px)
            tensors |= {f"{target}_{k}": to_uint8(small).contiguous() for target in p.stored}
        path = folder / f"shard-{number:05d}.safetensors"
        save_file(tensors, path)
        shards[path.name] = {"count": len(images[rows]), "sha256": sha256(path)}
    config = trajectory_config(teacher, p)
    write_json(folder / MANIFEST, {"config": config, "shards": shards, "teacher": teacher.source})
    return TrajectoryStore(folder)


KINDS = {
    "matrix": _matrix,
    "teacher": _teacher_step,
    "student": _student,
    "trajectory": _trajectory,
    "training": _training,
    "reading": _reading,
}
