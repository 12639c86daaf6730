"""How good is a model: every question under one protocol, over seeds that nothing was chosen by."""

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from advkd.data import FACTORS, from_uint8, reference_images, to_uint8
from advkd.evaluation import (
    Metric,
    density_coverage,
    near_copies,
    protocol,
    pull_to_train,
    sample_student,
    student_latency_ms,
    student_row,
    teacher_latency_ms,
    teacher_row,
)
from advkd.extractor import load_extractor, random_extractor
from advkd.figures import study_hash
from advkd.files import write_json
from advkd.glyphs import ground_octant
from advkd.presets import ASSETS, Preset, UserError, load_preset
from advkd.run import load_run, read_run, train_side_by_side
from advkd.student import count_parameters
from advkd.teacher import Teacher, load_teacher
from advkd.trajectories import generate_trajectories, trajectory_dir

TRAINING_SEEDS = (3, 4, 5)  # recipes were chosen by runs with the seeds 0, 1 and 2
SAMPLING_SEEDS = (11, 12, 13)  # ... and by samples of the seeds 1 and 2
IMAGES = 3500  # of each model and sampling seed: Frechet distances are comparable at one size alone
SAMPLERS = (*(("ddim", steps) for steps in (1, 2, 5, 10, 25, 50)), ("ddpm", 100), ("ddpm", 1000))
FLOOR_IMAGES = 600  # ... and with real images at no more than are held out of the digits
SHOWN = {
    "model": "model",
    "recipe": "recipe",
    "sampler": "sampler",
    "steps": "steps",
    "seeds": "training seeds",
    "images": "images",
    "fd_train": "FD, train",
    "fd_train_sd": "±",
    "fd_heldout": "FD, held out",
    "fd_heldout_sd": "±",
    "fd_train_subset": f"FD, train, {FLOOR_IMAGES} images",
    "fd_unseen": "unseen space, train",
    "fd_unseen_heldout": "unseen space, held out",
    "kid_train": "KID",
    "precision": "precision",
    "recall": "recall",
    "recall_sd": "±",
    "density": "density",
    "coverage": "coverage",
    "pull_to_train": "nearer to train",
    "near_copies": "near-copies",
}
ABOUT = {  # of a run
    "train_seconds": "seconds",
    "cpu_seconds": "cpu_seconds",
    "threads": "threads",
    "device": "device",
    "dtype": "dtype",
}
UNSEEN_SEED = 0  # of the random network
NEIGHBOURS_ASKED = 2000  # images whose nearest real image is looked for, pixel by pixel


class Judge:
    """Asks how good samples are, on all splits of a preset's real images (the glyphs have unseen fonts as a third).

    Beside the feature space that recipes were chosen in there is one that was never looked at: a random network.
    """

    def __init__(self, preset: Preset):
        if preset.data not in FACTORS:
            raise UserError(f"preset {preset.name!r} has no embedded images to compare with; presets: digits, glyphs")
        self.data, self.teacher = preset.data, load_teacher(preset)
        self.train, self.heldout = (reference_images(preset, split)[0] for split in ("train", "heldout"))
        self.fonts = reference_images(preset, "unseen-fonts")[0] if self.data == "glyphs" else None
        self.metric = Metric(preset.data)
        network = random_extractor(self.train, UNSEEN_SEED)
        self.unseen = Metric("random", extractor=network)
        # Named by what it is made from: every type of processor rounds its weights and statistics in its own way.
        self.unseen_name = (
            f"random network: seed {UNSEEN_SEED}, {count_parameters(network):,} parameters, scaled by train"
        )
        self.classifier = load_extractor(ASSETS / f"{preset.data}-extractor")
        self.features = self._features(self.train)
        self.shares = self._shares(self.train)

    def measure(self, samples: Tensor) -> dict[str, float | list[float]]:
        """The fields of a quality row for images `(n, c, h, w)` in [-1, 1]."""
        values = self.metric.evaluate(samples, self.train, self.heldout)
        size = min(FLOOR_IMAGES, len(samples))
        subsets = samples[: len(samples) // size * size].split(size)
        values["fd_train_subset"] = statistics.mean(self.metric.distance(x, self.train) for x in subsets)
        for name, reference in (("fd_unseen", self.train), ("fd_unseen_heldout", self.heldout)):
            values[name] = self.unseen.distance(samples, reference)
        if self.fonts is not None:
            values["fd_unseen_fonts"] = self.metric.distance(samples, self.fonts)
        values["density"], values["coverage"] = density_coverage(self._features(samples), self.features)
        asked = samples[:NEIGHBOURS_ASKED], self.train, self.heldout
        values["pull_to_train"], values["near_copies"] = pull_to_train(*asked), near_copies(*asked)
        for factor, shares in self._shares(samples).items():
            values[f"shares_{factor}"] = shares.tolist()
            values[f"rarest_{factor}"] = (shares / self.shares[factor]).min().item()
        return values

    def floor(self) -> dict:
        """The row of held-out real images in the place of samples, which are fewer where fewer are held out."""
        images = self.heldout[:IMAGES]
        to_itself = ("fd_heldout", "fd_unseen_heldout", "pull_to_train", "near_copies")
        values = {field: x for field, x in self.measure(images).items() if field not in to_itself}
        return {
            "model": "real",
            "recipe": None,
            "sampler": "held-out images",
            "steps": 0,
            "images": len(images),
        } | values

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(x) for x in from_uint8(to_uint8(images)).split(500)])

    @torch.inference_mode()
    def _shares(self, images: Tensor) -> dict[str, Tensor]:
        """How often each value of each factor appears, by the classifier's verdict; the colour of the ground by eye."""
        sizes, verdicts = FACTORS[self.data], self.classifier.verdicts(from_uint8(to_uint8(images)))
        found = zip(sizes, verdicts, strict=True)
        shares = {factor: torch.bincount(values, minlength=sizes[factor]) / len(images) for factor, values in found}
        if self.data == "glyphs":
            shares["ground"] = torch.bincount(ground_octant(images), minlength=8) / len(images)
        return shares


def summarise(measured: list[dict]) -> dict:
    """Mean and, as `<field>_sd`, standard deviation over `measured` of every field; of lists the mean alone."""
    row = {}
    for field, first in measured[0].items():
        values = [m[field] for m in measured]
        if isinstance(first, list):
            row[field] = [statistics.mean(each) for each in zip(*values, strict=True)]
            continue
        row[field] = statistics.mean(values)
        row[f"{field}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def means(rows: Iterable[dict], keys: tuple[str, ...]) -> list[dict]:
    """One row for all rows with the same `keys`: `seeds`, how many there are, and mean and standard deviation of every field
    that is a number in all of them. Failed trainings are left out."""
    found = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return [
        dict(zip(keys, at, strict=True)) | {"seeds": len(alike)} | summarise([_numbers(alike, keys, r) for r in alike])
        for at, alike in found.items()
    ]


def _numbers(rows: list[dict], keys: tuple[str, ...], row: dict) -> dict:
    fields = [field for field in row if field not in (*keys, "seed")]
    return {field: row[field] for field in fields if all(isinstance(r.get(field), int | float) for r in rows)}


def teacher_images(teacher: Teacher, preset: Preset, sampler: str, steps: int, seed: int, count: int) -> Tensor:
    """The teacher's images `(count, c, h, w)` in [-1, 1], kept below `runs/` and resumable as trajectories are."""
    p = preset.replace(
        submodules=1,  # the final image alone
        widths=preset.widths[-1:],
        sampler=sampler,
        sampler_steps=steps,
        trajectory_seed=seed,
        trajectories=count,
    )
    return generate_trajectories(teacher, p, trajectory_dir(teacher, p)).targets(0, "x0")


def teacher_quality(judge: Judge, preset: Preset, sampler: str, steps: int, count: int = IMAGES) -> dict:
    """The quality row of the preset's teacher with a sampler, over the sampling seeds."""
    teacher = judge.teacher
    images = (teacher_images(teacher, preset, sampler, steps, seed, count) for seed in SAMPLING_SEEDS)
    measured = [judge.measure(x) for x in images]
    row = teacher_row(teacher, sampler, steps) | {"seeds": 0, "images": count}
    return row | summarise(measured) | {"ms_per_image": teacher_latency_ms(teacher, 1) * steps}


def student_quality(judge: Judge, presets: Iterable[Preset], workers: int = 1, count: int = IMAGES) -> dict:
    """The quality row of a recipe, over training seeds (the presets) and sampling seeds; trains what is missing."""
    measured, seconds, asked = [], [], quality_protocol(judge, count)  # of a training seed each
    presets = sorted(presets, key=lambda p: p.seed)
    folders = {preset: (folder, error) for preset, folder, error in train_side_by_side(presets, workers)}
    for preset in presets:
        folder, error = folders[preset]
        if error:
            raise UserError(f"training {folder} failed: {error}")
        pipeline = load_run(folder)
        scores = [score(judge, folder, f"quality-{seed}.json", asked, seed) for seed in SAMPLING_SEEDS]
        of_seeds = summarise([{field: x for field, x in found.items() if field not in ABOUT} for found in scores])
        measured.append({field: value for field, value in of_seeds.items() if not field.endswith("_sd")})
        seconds.append(read_run(folder)["seconds"])
    row = student_row(pipeline, preset.recipe) | {"preset_hash": presets[0].config_hash}
    row |= {"seeds": len(seconds), "images": count, "train_seconds": statistics.mean(seconds)}
    return row | summarise(measured) | {"ms_per_image": student_latency_ms(pipeline)}


def score(judge: Judge, folder: Path, name: str, asked: dict, seed: int, steps: int = 1) -> dict:
    """What the judge says of a run's samples of `seed`, kept beside it as `name`; `asked` is the study's protocol."""
    path, study, made = folder / name, study_hash(asked), read_run(folder)
    if path.exists() and (kept := json.loads(path.read_text())).get("study") == study:
        return kept["measured"]
    measured = {name: made[field] for name, field in ABOUT.items() if field in made}
    measured |= judge.measure(sample_student(load_run(folder), asked["images"], seed, progress=False, steps=steps))
    write_json(path, {"study": study, "measured": measured})
    return measured


def judge_protocol(judge: Judge, count: int, sampling_seeds: list[int]) -> dict:
    """What the numbers that a judge gives depend on."""
    return protocol(judge.metric, count, sampling_seeds, judge.train, judge.heldout) | {
        "teacher_fingerprint": judge.teacher.fingerprint,
        "weights": "the last (averaged) ones of a fixed budget, never the best by a metric",
        "fd_train_subset": f"mean over disjoint subsets of {FLOOR_IMAGES} images: for the comparison with real images",
        "unseen": judge.unseen_name,
        "pull_to_train": f"pixel L2 of the first {NEIGHBOURS_ASKED}; as many training as held-out images; 0.5 is neutral",
        "near_copies": "share nearer to a training image than 1 % of the held-out images are (pixel L2)",
        "rarest": "smallest share of a class, over its share among real images, by the same classifier",
    }


def quality_protocol(judge: Judge, count: int = IMAGES) -> dict:
    """What the numbers of the quality table depend on."""
    return judge_protocol(judge, count, list(SAMPLING_SEEDS)) | {
        "training_seeds": list(TRAINING_SEEDS),
        "mean_and_sd": "students: over training seeds, each the mean over sampling seeds; teacher: over sampling seeds",
    }


def quality(
    name: str,
    judge: Judge,
    workers: int = 1,
    paper_epochs: float = 1.0,
    samplers: Iterable[tuple[str, int]] = SAMPLERS,
    count: int = IMAGES,
) -> Iterator[dict]:
    """The rows of `figures/<name>/quality.json`, each as it is ready; the teacher with each of `samplers` (name, steps)."""
    recipes = load_preset(name), load_preset(name, "paper", epochs=paper_epochs)
    for p in recipes:
        yield student_quality(judge, [p.replace(seed=seed) for seed in TRAINING_SEEDS], workers, count)
    yield judge.floor()
    for sampler, steps in samplers:
        yield teacher_quality(judge, recipes[0], sampler, steps, count)


def quality_place(row: dict) -> tuple[int, str, int]:
    """The place of a row of `quality` in its table: students, teacher by sampler and steps, real images."""
    models = [("student", "improved"), ("student", "paper"), ("teacher", None), ("real", None)]
    return models.index((row["model"], row["recipe"])), row["sampler"], row["steps"]


def targets(rows: list[dict], data: str) -> list[dict]:
    """What was asked of the improved student before it was measured, beside what was measured: the rows of a table.

    `rows` are those of the quality table. Distances are ratios to those of the teacher: with 50 DDIM steps, or with the most
    ancestral steps that there are.
    """
    of = {(row["model"], row["recipe"], row["sampler"]): row for row in sorted(rows, key=lambda row: row["steps"])}
    student, ddim = of["student", "improved", "one-step"], of["teacher", None, "ddim"]  # 50 steps: the most of DDIM

    def ratio(what: str, field: str, teacher: dict, sign: str, bound: float) -> tuple[str, float, str, float]:
        name = f"{teacher['sampler'].upper()}-{teacher['steps']}"
        return f"{what}, to {name}'s", student[field] / teacher[field], sign, bound

    if data == "glyphs":
        asked = [
            ratio("FD, held out", "fd_heldout", ddim, "<=", 1.0),
            ratio("unseen space, held out", "fd_unseen_heldout", ddim, "<=", 1.0),
            ("rarest letter, of its share", student["rarest_letter"], ">=", 1 / 3),
            ("rarest font, of its share", student["rarest_font"], ">=", 1 / 3),
        ]
    else:
        ddpm = of["teacher", None, "ddpm"]
        asked = [
            ratio("FD, train", "fd_train", ddim, "<=", 0.7),
            ratio("FD, train", "fd_train", ddpm, "<=", 1.0),
            ratio("FD, held out", "fd_heldout", ddpm, "<=", 1.0),
            ratio("unseen space, train", "fd_unseen", ddpm, "<=", 1.0),
            ratio("unseen space, held out", "fd_unseen_heldout", ddpm, "<=", 1.15),
            ratio("recall", "recall", ddim, ">=", 0.9),
            ("nearer to train, less DDIM-50's", student["pull_to_train"] - ddim["pull_to_train"], "<=", 0.05),
            ratio("parameters", "parameters", ddim, "<=", 0.25),
        ]
    return [
        {
            "target": what,
            "measured": value,
            "asked": f"{sign} {bound:.3g}",
            "holds": "yes" if (value <= bound if sign == "<=" else value >= bound) else "no",
        }
        for what, value, sign, bound in asked
    ]
