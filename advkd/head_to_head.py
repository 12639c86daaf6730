"""Adv-KD beside other methods under one protocol: one-step and few-step students of one teacher, as much training each."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from advkd.benchmark import memory_mb
from advkd.data import load_images, to_uint8
from advkd.devices import label, pick_device, precision
from advkd.evaluation import sample_student, student_latency_ms, student_row, teacher_row
from advkd.figures import figures_folder
from advkd.files import locked, read_object, write_atomic, write_json
from advkd.presets import Preset, UserError, load_preset
from advkd.quality import IMAGES, SAMPLING_SEEDS, TRAINING_SEEDS, Judge, judge_protocol, score, teacher_images
from advkd.run import load_run, new_pipeline, train_run, train_side_by_side
from advkd.teacher import load_teacher
from advkd.trajectories import generate_trajectories, trajectory_dir

# What is compared: the recipe, the fields that differ from it, and the numbers of steps that the student is sampled in.
# The submodules have the improved recipe's learning rate, but for ADD, where it ends in few modes (FD 14, recall 0.10; seed 3),
# and need a warm-up where others inherit weights.
_OURS = {"architecture": "submodules", "student_timesteps": (999,)}
_PUBLISHED_ADD = {  # a logit for each of the student's timesteps stays, and so do the rates of learning
    "adversarial": "hinge",
    "distillation_weight": 2.5,
    "image_penalty_weight": 0.0,
    "simulated_share": 0.0,
    "gain_limit": Preset.gain_limit,
}
CONTESTANTS = {
    "Adv-KD": ("improved", {}, (1,)),
    "ADD": ("add", {}, (1, 2, 4)),
    "ADD, losses as published": ("add", _PUBLISHED_ADD, (1, 4)),
    "ADD, adversarial alone": ("add", {"distillation_weight": 0.0}, (1, 4)),
    "ADD, distillation alone": ("add", {"adversarial_weight": 0.0}, (1, 4)),
    "ADD, random start": ("add", {"start": "random"}, (1, 4)),
    "ADD, submodules": ("add", _OURS | {"learning_rate": 3e-4}, (1,)),
    "regression": ("regression", {}, (1,)),
    "regression, submodules": ("regression", _OURS, (1,)),
    "progressive distillation": ("progressive", {}, (1,)),
    "consistency distillation": ("consistency", {}, (1, 2, 4)),
    "DMD": ("dmd", {}, (1,)),
}
TEACHERS = {"teacher, DDIM": "ddim", "teacher, DPM-Solver++": "dpm-solver"}
TEACHER_STEPS = (1, 2, 4, 8, 16, 50)
# Times the improved recipe's training, which takes hours of a CPU on the glyphs: there a quarter comes before the whole.
BUDGETS = {"digits": (1, 4), "glyphs": (0.25, 1)}
# Steps that take as long as the improved recipe's training on one thread of one machine; the rows' `compute` says how nearly.
STEPS = {
    "digits": {
        "ADD": 720,
        "ADD, losses as published": 900,
        "ADD, adversarial alone": 870,
        "ADD, distillation alone": 1320,
        "ADD, random start": 720,
        "ADD, submodules": 1400,
        "regression": 2300,
        "regression, submodules": 4700,
        "progressive distillation": 1340,
        "consistency distillation": 1480,
        "DMD": 580,
    },
    "glyphs": {
        "ADD": 1650,
        "ADD, losses as published": 2070,
        "ADD, adversarial alone": 2090,
        "ADD, distillation alone": 2370,
        "ADD, random start": 1650,
        "ADD, submodules": 3830,
        "regression": 3560,
        "regression, submodules": 17200,
        "progressive distillation": 2270,
        "consistency distillation": 2200,
        "DMD": 1000,
    },
}
WARM_UP = 0.25  # share of ADD's steps with our submodules, which inherit no weights
SCORE = "head_to_head-{steps}.json"
MEMORY_BATCH = 64
TIMED_STEPS = 32  # after the first eight; whole turns of lazy penalties, also where a quarter is warm-up
KEPT = 36  # images of each row's first seed that are committed, for grids and for votes
# What papers report of one step; parameters where they, or the paper of the network that they use, give them.
PUBLISHED = [
    dict(zip(("method", "data", "FID (paper)", "parameters (paper)", "source"), row, strict=True))
    for row in (
        ("pair regression", "CIFAR-10", "9.36", "35.7M", "Luhman and Luhman 2021 (arXiv 2101.02388); DDPM's U-Net"),
        ("progressive distillation", "CIFAR-10", "9.12", "", "Salimans and Ho 2022 (arXiv 2202.00512)"),
        ("consistency distillation", "CIFAR-10", "3.55", "", "Song et al. 2023 (arXiv 2303.01469), abstract"),
        ("DMD", "ImageNet, 64 px", "2.62", "", "Yin et al. 2024 (arXiv 2311.18828), abstract"),
        ("GAN distillation, GDD", "CIFAR-10", "1.54", "", "Zheng and Yang 2024 (arXiv 2405.20750), abstract"),
        ("ADD", "COCO, zero-shot, 512 px", "20.6", "", "Sauer et al. 2023 (arXiv 2311.17042), ablations"),
        ("Adv-KD", "CelebA-HQ, 256 px", "142.54", "2.43M", "arXiv 2405.20675, table 1"),
    )
]
SHOWN = {
    "method": "method",
    "budget": "budget",
    "steps": "steps",
    "seed": "seed",
    "parameters": "parameters",
    "compute": "training compute",
    "device": "trained on",
    "dtype": "dtype",
    "train_seconds": "training, s",
    "teacher_evaluations": "teacher's evaluations beforehand",
    "trajectories_compute": "compute of trajectories",
    "ms_per_image": "ms per image",
    "peak_memory_mb": "peak MB",
    "fd_train": "FD, train",
    "fd_heldout": "FD, held out",
    "fd_unseen": "unseen space, train",
    "kid_train": "KID",
    "precision": "precision",
    "recall": "recall",
    "pull_to_train": "nearer to train",
    "near_copies": "near-copies",
}
SUMMARY = {  # of means over seeds
    **{field: SHOWN[field] for field in ("method", "budget", "steps")},
    "seeds": "seeds",
    **{field: SHOWN[field] for field in ("parameters", "compute", "teacher_evaluations", "trajectories_compute")},
    **{field: SHOWN[field] for field in ("ms_per_image", "peak_memory_mb", "fd_train")},
    "fd_train_sd": "±",
    **{field: SHOWN[field] for field in ("fd_heldout", "fd_unseen", "kid_train", "precision", "recall")},
    "recall_sd": "±",
    **{field: SHOWN[field] for field in ("pull_to_train", "near_copies")},
}
GLANCE = {  # of the README's table
    "data": "data",
    **{field: SUMMARY[field] for field in ("method", "budget", "steps", "seeds", "parameters", "compute")},
    **{field: SUMMARY[field] for field in ("trajectories_compute", "ms_per_image", "fd_train", "fd_heldout")},
    **{field: SUMMARY[field] for field in ("fd_unseen", "recall", "near_copies")},
}


@dataclass(frozen=True)
class Job:
    """A training to be: a method with `budget` times the compute of the improved recipe."""

    method: str
    budget: float
    preset: Preset


@cache
def jobs(name: str) -> list[Job]:
    """All trainings of the study for the preset `name`."""
    if name not in STEPS:
        raise UserError(f"there is no study for the preset {name!r}; presets: {', '.join(STEPS)}")
    if missing := sorted(CONTESTANTS.keys() - {"Adv-KD"} - STEPS[name].keys()):
        raise UserError(f"nobody said how many steps of {missing[0]!r} are budget 1; add them to STEPS[{name!r}]")
    found = []
    for method, (recipe, fields, _) in CONTESTANTS.items():
        base = load_preset(name, recipe, **_fields(name, fields))
        for budget in BUDGETS[name]:
            steps = round(budget * (base.steps if method == "Adv-KD" else STEPS[name][method]))
            warm_up = round(WARM_UP * steps) if (base.method, base.architecture) == ("add", "submodules") else 0
            sized = base.replace(steps=steps, warm_up_steps=warm_up)
            found += [Job(method, budget, sized.replace(seed=seed)) for seed in TRAINING_SEEDS]
    return found


def _fields(name: str, fields: dict) -> dict:
    """Our submodules keep what the improved recipe trains them with, unless `fields` say otherwise."""
    if fields.get("architecture") != "submodules":
        return fields
    ours = load_preset(name)
    return {field: getattr(ours, field) for field in ("latent", "learning_rate", "betas")} | fields


def compare(judge: Judge, chosen: list[Job], workers: int = 1) -> Iterator[tuple[dict, Tensor | None]]:
    """Train and measure what is missing of the jobs; yields a row for each of a student's numbers of steps as it is ready,
    with, of the first seed, its first images `(KEPT, c, h, w)` in [-1, 1]; those of a failed training with its `error`.
    What is finished is only read."""
    wanted = {job.preset: job for job in chosen}
    costs = {p.architecture: sampling_cost(p.name, p.architecture) for p in wanted}  # before anything else is busy
    computes = {p: {"compute": relative_compute(p), "trajectories_compute": trajectories_compute(p)} for p in wanted}
    for preset, folder, error in train_side_by_side(list(wanted), workers):
        method, budget = wanted[preset].method, wanted[preset].budget
        about = {"method": method, "budget": budget, "seed": preset.seed, "preset_hash": preset.config_hash}
        about |= {"teacher_evaluations": teacher_evaluations(preset)} | computes[preset]
        for steps in CONTESTANTS[method][2]:
            row = student_row(new_pipeline(preset, judge.teacher), preset.recipe, steps) | about
            if error:
                yield row | {"error": error}, None
                continue
            asked = comparison_protocol(judge)
            row |= score(judge, folder, SCORE.format(steps=steps), asked, SAMPLING_SEEDS[0], steps)
            row |= _times(costs[preset.architecture], steps) | {"images": IMAGES}
            first = preset.seed == TRAINING_SEEDS[0]
            yield (
                row,
                sample_student(load_run(folder), KEPT, SAMPLING_SEEDS[0], progress=False, steps=steps)
                if first
                else None,
            )


def compare_teacher(judge: Judge, preset: Preset) -> Iterator[tuple[dict, Tensor | None]]:
    """The rows of the teacher, of each sampler with each number of steps, and of each sampling seed; with the first seed's
    first images. What is finished is only read."""
    cost = sampling_cost(preset.name, "unet")
    for method in TEACHERS:
        for steps in TEACHER_STEPS:
            for seed in SAMPLING_SEEDS:
                row, images = compare_sampler(judge, preset, method, steps, seed)
                yield row | _times(cost, steps), images if seed == SAMPLING_SEEDS[0] else None


def compare_sampler(judge: Judge, preset: Preset, method: str, steps: int, seed: int) -> tuple[dict, Tensor]:
    """The row, without times, of the teacher with a method of `TEACHERS` and a sampling seed, and its first images."""
    images = teacher_images(judge.teacher, preset, TEACHERS[method], steps, seed, IMAGES)
    row = teacher_row(judge.teacher, TEACHERS[method], steps) | {"method": method, "seed": seed, "images": IMAGES}
    where = pick_device()
    row |= {"sampled_on": label(where), "dtype": precision(preset.teacher_dtype, where)}
    return row | judge.measure(images), images[:KEPT]


def teacher_evaluations(preset: Preset) -> int:
    """How often the teacher is asked for the trajectories that a training needs, before it begins."""
    return preset.trajectories * preset.sampler_steps if preset.learns_from_trajectories else 0


def relative_compute(preset: Preset) -> float:
    """CPU-seconds that a training takes, in those of the improved recipe's."""
    return _cpu_seconds(preset) / _cpu_seconds(load_preset(preset.name))


def trajectories_compute(preset: Preset) -> float:
    """CPU-seconds that a training's trajectories take before it begins, in those of the improved recipe's training."""
    if not (asked := teacher_evaluations(preset)):
        return 0.0
    recipe = load_preset(preset.name)  # of whose trajectories all trainings take theirs
    timed = recipe.replace(teacher_dtype="float32", trajectories=max(recipe.batch_sizes))
    return asked * _kept_seconds(_measure_evaluation, timed) / _cpu_seconds(recipe)


def _cpu_seconds(preset: Preset) -> float:
    timed = {"steps": TIMED_STEPS + 9, "train_dtype": "float32", "seed": 0, "trajectories": max(preset.batch_sizes)}
    if preset.warm_up_steps:  # the share of it that is timed is that of the whole
        timed["warm_up_steps"] = 8 + round(TIMED_STEPS * preset.warm_up_steps / preset.steps)
    return preset.steps * _kept_seconds(_measure_step, preset.replace(**timed))


@cache
def _kept_seconds(measure: Callable[[Preset], float], preset: Preset) -> float:
    """What `measure` says, once on a machine, in a process of its own; kept below `runs/`."""
    path = Path("runs") / preset.name / f"{measure.__name__.split('_')[-1]}-{preset.config_hash}.json"
    if not path.exists():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            write_json(path, {"cpu_seconds": pool.submit(measure, preset).result()})
    return read_object(path, "remove it, and it is measured again")["cpu_seconds"]


def _measure_step(preset: Preset) -> float:
    """CPU-seconds of a step on one thread, without the first, which are slower, and the last, which writes a checkpoint."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        teacher, runs = load_teacher(preset), Path(folder)
        store = generate_trajectories(teacher, preset, runs / trajectory_dir(teacher, preset).name, progress=False)
        images = load_images(preset, "train")[0] if preset.real_share else None
        training = train_run(preset, store, runs / "run", images=images, device="cpu", progress=False)
        clock = {record.step: time.process_time() for record in training}
    return (clock[preset.steps - 1] - clock[8]) / TIMED_STEPS


def _measure_evaluation(preset: Preset) -> float:
    """CPU-seconds on one thread that one of the teacher's evaluations takes for one image, with what is made of it."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        teacher = load_teacher(preset)
        began = time.process_time()
        generate_trajectories(teacher, preset, Path(folder) / "trajectories", device="cpu", progress=False)
        return (time.process_time() - began) / teacher_evaluations(preset)


@cache
def sampling_cost(name: str, architecture: str) -> dict:
    """Time and memory of sampling, measured in a process of its own; neither depends on the weights."""
    preset = load_preset(name, "improved" if architecture == "submodules" else "add")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_cost, preset, torch.get_num_threads()).result()


def _times(cost: dict, steps: int) -> dict:
    return {"ms_per_image": cost["ms_per_step"] * steps, "peak_memory_mb": cost["peak_memory_mb"]}


def _measure_cost(preset: Preset, threads: int) -> dict:
    torch.set_num_threads(threads)
    teacher, cpu = load_teacher(preset), torch.device("cpu")
    before = memory_mb(cpu, restart=True)
    pipeline = new_pipeline(preset, teacher)
    sample_student(pipeline, MEMORY_BATCH, 0, progress=False)
    peak = None if before is None else memory_mb(cpu) - before
    return {"peak_memory_mb": peak, "ms_per_step": student_latency_ms(pipeline)}


def at_a_glance(data: str, table: list[dict]) -> list[dict]:
    """Of the means of a study, what `GLANCE` shows: every method as it is, without its parts or another network, with the
    training of Adv-KD's recipe or less, by budget, and the teacher in four and in fifty steps."""
    students = [row for row in table if row["method"] not in TEACHERS and ", " not in row["method"]]
    students = sorted((row for row in students if row["budget"] <= 1), key=lambda row: row["budget"])
    teachers = [row for row in table if row["method"] in TEACHERS and row["steps"] in (4, 50)]
    return [{"data": data} | row for row in students + teachers]


def keep_images(folder: Path | str, row: dict, images: Tensor) -> None:
    """Put a row's images into `<folder>/head_to_head.safetensors`, with 8 bits; all start from the same noise."""
    path = figures_folder(folder) / "head_to_head.safetensors"
    with locked(path):
        kept = load_file(path) if path.exists() else {}
        write_atomic(path, lambda temporary: save_file(kept | {image_key(row): to_uint8(images)}, temporary))


def image_key(row: dict) -> str:
    """The name of a row's images."""
    return f"{row['method']}, {row['steps']} steps" + (f", budget {row['budget']}" if row.get("budget") else "")


def comparison_place(name: str, row: dict) -> tuple | None:
    """The place of a row in the table of the preset `name`: by method, budget, steps and seed; None where no job of today
    would make it."""
    order = [*CONTESTANTS, *TEACHERS]
    if row["method"] in TEACHERS:
        wanted = row["steps"] in TEACHER_STEPS and row["seed"] in SAMPLING_SEEDS
    else:
        made = row["method"], row["budget"], row["seed"], row["preset_hash"]
        wanted = made in _made(name) and row["steps"] in CONTESTANTS[row["method"]][2]
    return (order.index(row["method"]), row.get("budget", 0), row["steps"], row["seed"]) if wanted else None


@cache
def _made(name: str) -> set[tuple]:
    return {(job.method, job.budget, job.preset.seed, job.preset.config_hash) for job in jobs(name)}


def comparison_protocol(judge: Judge) -> dict:
    """What the numbers of the comparison depend on."""
    return judge_protocol(judge, IMAGES, list(SAMPLING_SEEDS)) | {
        "seed": "students: of the training, sampled with the first sampling seed; teacher: of the sampling",
        "training_seeds": list(TRAINING_SEEDS),
        "budget": "times the steps that take as long as the improved recipe's training on one thread; see `compute`",
        "compute": f"CPU-seconds in those of the improved recipe's training: its steps times those of one, the mean of "
        f"{TIMED_STEPS} in float32 on one thread, apart from the row's training; no trajectories",
        "train_seconds": "wall clock on the row's `device` and `threads`, which differ, beside another training; no trajectories",
        "teacher_evaluations": "before the training, for its trajectories: images x sampler steps",
        "trajectories_compute": "CPU-seconds that these take, in the same unit, in float32 on one thread: those of as many as the "
        "recipe trains on at once, times their number",
        "peak_memory_mb": f"a batch of {MEMORY_BATCH}: resident memory over that before the student was made",
    }
