"""On a small device: what teacher and students take there, in torch and as ONNX files, in one run on one machine."""

import platform
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from advkd.benchmark import Case, benchmark, memory_mb
from advkd.data import load_images, make_latent, seeded_noise
from advkd.devices import cpu_has_bfloat16
from advkd.evaluation import Metric, milliseconds, sample_student
from advkd.export import INPUT, OUTPUT, export_onnx, open_session, quantize_onnx, sample_onnx
from advkd.pipeline import StudentPipeline
from advkd.presets import Preset, UserError, load_preset
from advkd.student import Student, count_parameters, gflop_per_submodule
from advkd.teacher import untrained_unet

STRIPS = 8  # of the last image, where it is made in strips
VARIANTS = ("torch float32", "torch bfloat16", "torch compiled", "torch in strips", "onnx float32", "onnx int8")
TRAINED = ("torch float32", "onnx float32", "onnx int8")
BATCH = 64  # of the throughput
CALLS = (5, 300)  # the least and the most of a row
ONE_BY_ONE = 20  # the least where a student makes one image at a time, and the least that have a 95th percentile
FD_IMAGES, FD_SEED = 5000, 1
SHOWN = {
    "name": "what",
    "variant": "variant",
    "batch": "batch",
    "threads": "threads",
    "ms_per_image": "ms per image",
    "p95_ms": "95 % of calls, ms",
    "images_per_s": "images/s",
    "cpu_seconds_per_image": "CPU-seconds per image",
    "peak_memory_mb": "peak MB",
    "file_mb": "MB on disk",
    "gflop_per_image": "GFLOP per image",
    "parameters": "parameters",
    "fd_train": "FD-digits, train",
    "device": "device",
    "error": "error",
}
SUMMARY = {
    "name": "what",
    "variant": "variant",
    "threads": "threads",
    "ms_per_image": "ms per image",
    "p95_ms": "95 % within, ms",
    "times_paper": "times as fast as the paper's student",
    "cpu_seconds_per_image": "CPU-seconds per image",
    "peak_memory_mb": "peak MB",
    "file_mb": "MB on disk",
}
SUBMODULES = {
    "recipe": "recipe",
    "submodule": "submodule",
    "image_px": "px",
    "ms": "ms",
    "gflop": "GFLOP",
    "activations_mb": "activations, MB",
}


def cases(preset: str = "celebahq", min_seconds: float = 2.0) -> list[Case]:
    """All rows for a preset's sizes with random weights: one image at a time on one thread, on two and on all, and batches on all;
    and, of a trained student of the digits, one at a time on one thread."""
    threads = torch.get_num_threads()
    about, alone = {"preset": preset, "min_seconds": min_seconds}, sorted({1, min(2, threads), threads})
    found = [Case("teacher", "teacher step", "torch float32", 1, threads=n, **about) for n in alone]
    for name in ("paper student", "improved student"):
        for n, batch in [*((n, 1) for n in alone), (threads, BATCH)]:
            variants = [v for v in VARIANTS if batch == 1 or v != "torch in strips"]
            found += [Case("student", name, v, batch, threads=n, **about) for v in variants]
    digits = {"preset": "digits", "min_seconds": min_seconds}
    return found + [Case("trained", "improved student, digits", v, 1, threads=1, **digits) for v in TRAINED]


def deploy(chosen: list[Case], student: StudentPipeline | None = None) -> Iterator[dict]:
    """Measure the cases one after the other, each in a new process; yields rows, after a teacher's step what 50 and 1000
    of them take. `student` is a trained one of the digits, for the rows of the kind "trained".

    `ms_per_image` is a median; `p95_ms` the time that 95 % of the calls did not exceed, of a whole batch each, None for fewer
    than 20; `cpu_seconds_per_image`, of all threads, stands for energy. Raises UserError for a student that is not made
    of submodules or whose images are no digits.
    """
    if student is not None and getattr(student.student, "image_shape", None) != load_preset("digits").image_shape:
        raise UserError(
            f"{student.name_or_path} makes images of {student.student.image_shape}, but the trained one's are digits, "
            f"{load_preset('digits').image_shape}"
        )
    if student is not None and not isinstance(student, StudentPipeline):
        raise UserError(
            f"{student.name_or_path} holds a few-step student (a U-Net); only students made of submodules are exported"
        )
    with tempfile.TemporaryDirectory() as folder:
        chosen = [case for case in chosen if case.kind != "trained" or student is not None]
        for name in sorted({case.name for case in chosen if case.kind != "teacher"}):
            (case, *_) = (case for case in chosen if case.name == name)
            _write_files(student if case.kind == "trained" else _untrained(case), Path(folder) / name, chosen)
        kinds = {kind: partial(measure, folder=Path(folder)) for kind, measure in KINDS.items()}
        for row in benchmark(chosen, kinds):
            yield row
            if row["kind"] == "teacher" and "ms_per_image" in row:
                for times in (50, 1000):
                    fields = ("ms_per_image", "gflop_per_image", "cpu_seconds_per_image")
                    scaled = {field: times * row[field] for field in fields}
                    scaled |= {"images_per_s": row["images_per_s"] / times, "p95_ms": None}
                    yield row | {"name": f"teacher, {times} steps", "times": times} | scaled


def _untrained(case: Case) -> StudentPipeline:
    """A student with random weights, on which neither time nor memory depends."""
    return StudentPipeline(Student.from_preset(load_preset(case.preset, case.name.split()[0])))


def _write_files(pipeline: StudentPipeline, folder: Path, chosen: list[Case]) -> None:
    """The student as pipeline and as ONNX files, as far as the cases want them; made once, since an export takes more memory
    than what is measured."""
    wanted = {case.variant for case in chosen if case.name == folder.name}
    StudentPipeline(pipeline.student.generator()).save_pretrained(folder)
    if {"onnx float32", "onnx int8"} & wanted:
        export_onnx(pipeline.student, folder / "onnx float32")
    if "onnx int8" in wanted:
        quantize_onnx(folder / "onnx float32", folder / "onnx int8")


def _teacher(case: Case, device: torch.device, folder: Path) -> dict:
    p = load_preset(case.preset)
    unet = untrained_unet(p.image_size_px, p.channels).eval().to(memory_format=torch.channels_last)
    xt = torch.randn(case.batch, *p.image_shape).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        unet(xt, 500)
    about = {"parameters": count_parameters(unet), "file_mb": count_parameters(unet) * 4e-6, "dtype": "float32"}
    about |= {"gflop_per_image": counter.get_total_flops() / 1e9 / case.batch}
    return about | _calls(lambda: unet(xt, 500).sample, case)


def _student(case: Case, device: torch.device, folder: Path) -> dict:
    if case.variant not in VARIANTS:
        raise UserError(f"there is no variant {case.variant!r}; variants: {', '.join(VARIANTS)}")
    about = _counted(folder / case.name) | {"dtype": "int8" if case.variant == "onnx int8" else "float32"}
    if case.variant.startswith("onnx"):
        file = folder / case.name / case.variant
        return about | {"file_mb": file.stat().st_size / 1e6} | _onnx(file, case)
    before = memory_mb(device, restart=True)
    student = StudentPipeline.from_pretrained(folder / case.name).student.eval()
    about |= _torch(student, case.variant, case)
    return about if before is None else about | {"peak_memory_mb": memory_mb(device) - before}


def _torch(student: Student, variant: str, case: Case) -> dict:
    latents = torch.randn(case.batch, *student.latent_shape)
    if variant == "torch bfloat16":
        if not cpu_has_bfloat16():
            raise UserError("this CPU has no instructions for bfloat16")
        student, latents = student.to(torch.bfloat16), latents.bfloat16()
    student.to(memory_format=torch.channels_last)
    if variant == "torch in strips":
        return _calls(lambda: in_strips(student, latents), case) | {"strips": STRIPS}
    call = torch.compile(student) if variant == "torch compiled" else student
    return _calls(lambda: call(latents), case) | {"dtype": str(latents.dtype).removeprefix("torch.")}


def _onnx(file: Path, case: Case) -> dict:
    import onnxruntime  # noqa: F401, before memory is counted, as torch was

    device = torch.device("cpu")
    before = memory_mb(device, restart=True)
    session = open_session(file, case.threads)
    shape = session.get_inputs()[0].shape
    latents = {INPUT: torch.randn(case.batch, *shape[1:]).numpy()}
    found = _calls(lambda: session.run([OUTPUT], latents), case)
    return found if before is None else found | {"peak_memory_mb": memory_mb(device) - before}


def _trained(case: Case, device: torch.device, folder: Path) -> dict:
    """A trained student's time as that of another, and the distance of its images."""
    about, preset = _student(case, device, folder), load_preset(case.preset)
    pipeline = StudentPipeline.from_pretrained(folder / case.name)
    if case.variant.startswith("onnx"):
        noise = seeded_noise(range(FD_IMAGES), preset.image_shape, FD_SEED)
        images = sample_onnx(folder / case.name / case.variant, make_latent(noise, pipeline.student.sampled_from))
    else:
        images = sample_student(pipeline, FD_IMAGES, FD_SEED, progress=False)
    fd = Metric(preset.data).distance(images, load_images(preset, "train")[0])
    return about | {"fd_train": fd, "images": FD_IMAGES}


KINDS = {"teacher": _teacher, "student": _student, "trained": _trained}


def _counted(folder: Path) -> dict:
    """Parameters of a saved generator, its billions of operations for an image, counted without computing, and its weights
    on disk."""
    with torch.device("meta"):
        student = Student.from_config(Student.load_config(folder / "student"))
        gflop = sum(map(sum, gflop_per_submodule(student)))
    mb = sum(file.stat().st_size for file in (folder / "student").glob("*.safetensors")) / 1e6
    return {"parameters": count_parameters(student), "gflop_per_image": gflop, "file_mb": mb}


@torch.inference_mode()
def _calls(call: Callable[[], object], case: Case) -> dict:
    """Times of a call, repeated for at least `min_seconds` after one that warms up, and what of the processor they took."""
    call()
    least = ONE_BY_ONE if case.batch == 1 and case.kind != "teacher" else CALLS[0]
    times, cpu, start = [], time.process_time(), time.perf_counter()
    while len(times) < least or (time.perf_counter() - start < case.min_seconds and len(times) < CALLS[1]):
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    cpu = (time.process_time() - cpu) / len(times) / case.batch
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1] if len(times) >= ONE_BY_ONE else None
    found = {"ms_per_image": statistics.median(times) / case.batch, "p95_ms": p95, "calls": len(times)}
    return found | {"cpu_seconds_per_image": cpu}


@torch.no_grad()
def in_strips(student: Student, latent: Tensor, strips: int = STRIPS) -> Tensor:
    """The student's last image, its submodules of the full size computed in horizontal strips: the same numbers from fewer
    at once.

    `latent` is `(b, *student.latent_shape)`, the image `(b, c, s, s)` in [-1, 1]. A strip is computed with as many rows
    beyond its own as its convolutions reach, which are cut off. Raises UserError unless there are 1 to s strips.
    """
    size, last = student.image_shape[-1], len(student.stages) - 1
    if not 1 <= strips <= size:
        raise UserError(f"strips is {strips}, but must be 1 to {size}, the rows of the image")
    first = next(k for k in range(last + 1) if student.resolution(k) == size)
    features = latent
    for k in range(first):
        features = student.stages[k].layers(student.given(features, latent, k))
    given = student.given(features, latent, first)
    layers = nn.Sequential(*(stage.layers for stage in student.stages[first:]), student.stages[last].terminal)
    factor = size // given.shape[-2]
    reach = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in layers.modules())  # rows, each 3 x 3
    image = given.new_empty(len(given), student.image_shape[0], size, size)
    bounds = [size * n // strips for n in range(strips + 1)]
    for top, bottom in pairwise(bounds):
        low = max(top // factor - reach, 0)
        high = min(-(-bottom // factor) + reach, given.shape[-2])
        image[:, :, top:bottom] = layers(given[:, :, low:high])[:, :, top - low * factor : bottom - low * factor]
    return image


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made inside of the block; a kernel's own scratch memory is
    not seen."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return found

    def _count(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


@torch.inference_mode()
def submodule_costs(preset: Preset, repeats: int = 5) -> list[dict]:
    """What each submodule of the preset's deployable generator takes for one image, float32: `ms`, `gflop`, and the most
    that lies in `activations_mb` at once, its input with it; the last with its head. Weights are random."""
    student = Student.from_preset(preset).generator().eval().to(memory_format=torch.channels_last)
    with torch.device("meta"):
        counts = gflop_per_submodule(Student.from_preset(preset))
    latent, rows = torch.randn(1, *student.latent_shape), []
    features = latent
    for k, (stage, (layers, head)) in enumerate(zip(student.stages, counts, strict=True)):
        given = student.given(features, latent, k)
        call = partial(nn.Sequential(stage.layers, stage.terminal) if stage.terminal else stage.layers, given)
        with LiveBytes() as memory:
            call()
        row = {
            "recipe": preset.recipe,
            "submodule": k,
            "image_px": student.resolution(k),
            "ms": milliseconds(call, repeats),
        }
        row |= {"gflop": layers + (head if stage.terminal else 0), "activations_mb": (memory.peak + given.nbytes) / 1e6}
        rows.append(row)
        features = stage.layers(given)
    return rows


def activations_mb(student: Student, strips: int | None = None) -> float:
    """The most that lies in activations at once while one image is made, in 10^6 bytes; see `LiveBytes`, `in_strips`."""
    latent = torch.randn(1, *student.latent_shape)
    with torch.inference_mode(), LiveBytes() as memory:
        student(latent) if strips is None else in_strips(student, latent, strips)
    return memory.peak / 1e6


def targets(rows: list[dict]) -> list[dict]:
    """What was asked of the deployed student, beside what was measured: the rows of a table.

    The best deployable student is the fastest of the improved one's rows, one image at a time on all threads.
    """
    measured = [row for row in rows if row.get("ms_per_image")]
    threads = max((row["threads"] for row in measured), default=1)
    one = {(row["name"], row["variant"], row["threads"]): row for row in measured if row["batch"] == 1}
    trained = {v: one.get(("improved student, digits", v, 1)) for v in TRAINED}
    ours = [row for (name, _, n), row in one.items() if name == "improved student" and n == threads]
    best = min(ours, key=lambda row: row["ms_per_image"], default=None)
    paper = one.get(("paper student", "torch float32", threads))
    teacher = one.get(("teacher, 1000 steps", "torch float32", threads))
    if None in (best, paper, teacher):
        raise UserError(
            "figures/deploy.json lacks a row of teacher or students; measure it again: python -m advkd deploy"
        )
    asked = [
        (
            f"256 px: {best['variant']}, times as fast as the paper's student",
            paper["ms_per_image"] / best["ms_per_image"],
            ">=",
            10,
        ),
        (
            f"256 px: {best['variant']}, times as fast as 1000 teacher steps",
            teacher["ms_per_image"] / best["ms_per_image"],
            ">=",
            50_000,
        ),
    ]
    pairs = [("256 px", *(one.get(("improved student", f"onnx {v}", 1)) for v in ("float32", "int8")))]
    pairs = [pair for pair in pairs if all(pair)]
    if all(trained.values()):
        pairs.insert(0, ("digits", trained["onnx float32"], trained["onnx int8"]))
        fd = trained["onnx int8"]["fd_train"] / trained["onnx float32"]["fd_train"]
        asked.insert(0, ("digits: FD-digits of int8, to float32's", fd, "<=", 1.15))
    for name, exact, small in pairs:
        asked.append((f"{name}: file of int8, to float32's", small["file_mb"] / exact["file_mb"], "<=", 0.35))
        faster = small["ms_per_image"] / exact["ms_per_image"]
        asked.append((f"{name}: time of int8, to ONNX Runtime's float32, one thread", faster, "<=", 0.7))
    return [
        {
            "target": what,
            "measured": value,
            "asked": f"{sign} {bound:,.3g}" if bound < 1000 else f"{sign} {bound:,}",
            "holds": "yes" if (value <= bound if sign == "<=" else value >= bound) else "no",
        }
        for what, value, sign, bound in asked
    ]


def summary(rows: list[dict]) -> list[dict]:
    """What one image takes on all threads, as `SUMMARY` shows it: the rows of the README's table."""
    threads = max(row["threads"] for row in rows)
    found = [row for row in rows if row["batch"] == 1 and row["threads"] == threads and row["kind"] != "trained"]
    found = [row for row in found if row.get("ms_per_image")]
    paper = next(row for row in found if row["name"] == "paper student" and row["variant"] == "torch float32")
    return [row | {"times_paper": paper["ms_per_image"] / row["ms_per_image"]} for row in found]


def protocol(preset: str) -> dict:
    """What the numbers depend on beside their own fields."""
    packages = ("torch", "onnx", "onnxruntime")
    return {
        "preset": preset,
        "weights": "random at the preset's size: time and memory do not depend on them; digits: a trained student, see `trained`",
        "ms_per_image": f"median of {CALLS[0]} to {CALLS[1]} calls (`calls`) after one, of one image {ONE_BY_ONE} at least; a process a row",
        "p95_ms": f"the time that 95 % of the calls did not exceed, each of a whole batch; none for fewer than {ONE_BY_ONE} calls",
        "cpu_seconds_per_image": "of all threads, waiting ones that spin with them: stands for energy",
        "peak_memory_mb": "peak resident memory over that of the process before the model was loaded",
        "file_mb": "onnx: of the file; torch: of the weights (safetensors, float32), the teacher's counted; 10^6 bytes",
        "teacher, 50 and 1000 steps": "not measured: so many times the row of one step",
        "torch": "channels last",
        "torch in strips": f"the submodules of the full size in {STRIPS} strips",
        "onnx int8": "static, per channel, 7-bit weights, QDQ; activations to the 99.99th percentile of 4 to 256 latents",
        "fd_train": f"{FD_IMAGES} images of sampling seed {FD_SEED}, to the digits' train split",
        "bfloat16": "measured" if cpu_has_bfloat16() else "not measured: this CPU has no instructions for it",
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
