"""The ablations that the paper lacks: one change at a time at equal compute, as resumable jobs with committed rows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from advkd.evaluation import protocol, sample_student
from advkd.figures import save_table
from advkd.files import write_json
from advkd.presets import Preset, load_preset, resolution
from advkd.quality import Judge
from advkd.run import load_run, read_run, train_side_by_side
from advkd.student import match_parameters, parameters

SEEDS = (0, 1, 2)
SAMPLING_SEED = 21
IMAGES = 5000
IMAGES_SEEN = 64_000  # by the critic, of the student's: the budget of every row that does not say otherwise
SCORE = "score.json"
SHOWN = [
    "group",
    "setting",
    "seed",
    "parameters",
    "train_seconds",
    "fd_train",
    "fd_heldout",
    "precision",
    "recall",
    "coverage",
    "pull_to_train",
]

# From the paper's recipe to ours, one change at a time, in the order in which a reader would make them.
WATERFALL = {
    "paper's recipe": (),
    "+ a latent as in sampling": ("latent",),
    "+ R1, nothing clipped": ("penalty", "penalty_weight", "penalty_every"),
    "+ critic without latent": ("critic", "critic_width"),
    "+ Adam (0, 0.99), 1e-3": ("learning_rate", "betas"),
    "+ x0 targets": ("target",),
    "+ L1 on every head": ("reconstruction_weight",),
    "+ DDIM-50, 5000 pairs": ("trajectories", "sampler", "sampler_steps"),
    "+ all stages at once": ("schedule", "batch_sizes"),
    "+ residual, light heads": ("block", "head", "widths"),
    "+ fresh latents": ("fresh_share",),
    "+ real images": ("real_share",),
}


@dataclass(frozen=True)
class Job:
    """One row to be: the setting of a group, and all that it takes to train it."""

    group: str
    setting: str
    preset: Preset


@cache
def jobs(name: str, images_seen: int = IMAGES_SEEN, seeds: tuple[int, ...] = SEEDS) -> list[Job]:
    """All rows of the study for the preset `name`; settings of several groups that are one training share it."""
    return [
        Job(group, setting, _budget(preset, round(times * images_seen)).replace(seed=seed))
        for group, setting, preset, times in _settings(name)
        for seed in seeds
    ]


def _settings(name: str) -> Iterator[tuple[str, str, Preset, float]]:
    """Group, setting, preset, and how many times the budget."""
    base, paper = load_preset(name), load_preset(name, "paper")

    def change(group: str, settings: dict[str, dict]) -> Iterator[tuple[str, str, Preset, int]]:
        for setting, overrides in settings.items():
            yield group, setting, base.replace(**overrides), 1

    def each(field: str, *values) -> Iterator[tuple[str, str, Preset, int]]:
        yield from change(field, {str(value): {field: value} for value in values})

    yield "waterfall", "paper's recipe, 10 times the compute", paper, 10
    changed = paper
    for setting, fields in WATERFALL.items():
        changed = changed.replace(**{field: getattr(base, field) for field in fields})
        yield "waterfall", setting, changed, 1
    yield "waterfall", "+ decay, average, bf16: the improved recipe", base, 1
    for k in (1, 3, 5, 7, 11):
        sizes = len({resolution(i, k, base.image_size_px) for i in range(k)})
        fewer = base.replace(submodules=k, widths=base.widths[-sizes:])
        yield "submodules", f"K = {k}", fewer, 1
        yield "submodules, equal parameters", f"K = {k}", match_parameters(fewer, parameters(base)), 1
    for times in (0.25, 0.5, 1, 2, 4):
        yield "size", f"{times} times the parameters", match_parameters(base, int(times * parameters(base))), 1
    yield from change(
        "unsupervised head", {"none": {}} | {f"{k}": {"unsupervised": (k,)} for k in range(base.submodules)}
    )
    shares = {f"{share:.0%}": {"trajectories": int(base.trajectories * share)} for share in (0.1, 0.25, 0.5, 1)}
    yield from change("share of the trajectories", shares)
    yield from each("latent", "shrink8bit", "block-mean", "full")
    samplers = [("ddim", 10), ("ddim", 20), ("ddim", 50), ("ddim", 100), ("ddpm", 100)]
    few = {"trajectories": paper.trajectories}
    yield from change(
        f"sampler ({paper.trajectories} trajectories)",
        {f"{s.upper()}-{n}": few | {"sampler": s, "sampler_steps": n} for s, n in samplers},
    )
    yield from each("target", "xt", "x0")
    yield from each("reconstruction_weight", 0.0, 0.03, 0.1, 0.3, 1.0)
    yield from change(
        "losses",
        {
            "both": {},
            "adversarial alone": {"reconstruction_weight": 0.0},
            "reconstruction alone": {"adversarial_weight": 0.0},
        },
    )
    paired = {"real_share": 0.0, "fresh_share": 0.0}
    yield from change("critic (pairs alone)", {c: paired | {"critic": c} for c in ("conditional", "unconditional")})
    staged = {"schedule": "staged", "fresh_share": 0.0}
    yield from change("schedule (no fresh latents)", {"joint": {"fresh_share": 0.0}, "staged": staged})
    yield from each("penalty_weight", 0.0, 0.03, 0.1, 0.3, 1.0)
    yield from change("penalty", {"r1": {}, "gp+clip": {"penalty": "gp+clip", "penalty_weight": 10.0}})
    yield from each("adversarial", "non-saturating", "forward-kl")
    yield from each("critic_noise", 0.0, 0.15)
    yield from each("ema", 0.0, 0.99, 0.998)
    yield from each("decay_share", 0.0, 0.4)
    yield from each("real_share", 0.0, 0.25, 0.5, 0.75, 1.0)
    yield from each("fresh_share", 0.0, 0.5, 0.75)
    yield from each("feature_weight", 0.0, 0.1, 0.3)
    yield from each("block", "plain", "residual")
    yield from each("head", "terminal", "light")
    # What trades distance for recall, with all the recipe's steps.
    whole = base.steps * base.batch_size(0) / IMAGES_SEEN
    paired = {"latent": "full", "adversarial": "forward-kl"}
    for setting, overrides in {
        "the recipe": {},
        "full noise": {"latent": "full"},
        "full noise, forward KL": paired,
        "full noise, forward KL, features 0.1": paired | {"feature_weight": 0.1, "reconstruction_weight": 0.05},
        "full noise, features 0.3": {"latent": "full", "feature_weight": 0.3},
    }.items():
        yield "trade-off (3.5 times the budget)", setting, base.replace(**overrides), whole


def _budget(preset: Preset, images_seen: int) -> Preset:
    """The preset with as many steps or epochs as show the critic `images_seen` images."""
    if preset.schedule == "joint":
        return preset.replace(steps=images_seen // preset.batch_size(0))
    passes = preset.submodules * (preset.submodules + 1) / 2
    return preset.replace(epochs=images_seen / (passes * preset.trajectories))


def ablate(judge: Judge, chosen: list[Job], workers: int = 1) -> Iterator[dict]:
    """Train and score what is missing of the jobs; yields their rows as they are ready, those of a failed training with
    its `error`. What is finished is only read, so an interrupted study goes on where it stopped."""
    wanted = {}
    for job in chosen:
        wanted.setdefault(job.preset, []).append(job)
    for preset, folder, error in train_side_by_side(list(wanted), workers):
        measured = {"error": error} if error else _score(judge, folder)
        for job in wanted[preset]:
            about = {"group": job.group, "setting": job.setting, "seed": preset.seed}
            sizes = {"parameters": parameters(preset), "preset_hash": preset.config_hash}
            yield about | sizes | measured


def _score(judge: Judge, folder: Path) -> dict:
    """What the judge says of a run, kept beside it."""
    path, asked = folder / SCORE, {"sampling_seed": SAMPLING_SEED, "images": IMAGES, "by": judge.metric.extractor}
    if path.exists() and (kept := json.loads(path.read_text()))["asked"] == asked:
        return kept["measured"]
    measured = {"train_seconds": read_run(folder)["seconds"]}
    measured |= judge.measure(sample_student(load_run(folder), IMAGES, SAMPLING_SEED, progress=False))
    write_json(path, {"asked": asked, "measured": measured})
    return measured


def keep(name: str, row: dict, details: dict) -> Path:
    """Write `row` into `figures/<name>/ablations.json`, in the place of an older one of its setting and seed.

    Rows that no job of today would make, because the presets have changed, are dropped. Returns the path.
    """
    places = {(j.group, j.setting, j.preset.seed, j.preset.config_hash): i for i, j in enumerate(jobs(name))}
    path = Path(f"figures/{name}/ablations.json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {_place(places, r): r for r in [*rows, row]}
    ordered = [rows[place] for place in sorted(rows) if place >= 0]
    return save_table(ordered, details, path.parent, path.stem, {field: field for field in SHOWN})[0]


def _place(places: dict, row: dict) -> int:
    return places.get((row["group"], row["setting"], row["seed"], row["preset_hash"]), -1)


def ablation_protocol(judge: Judge) -> dict:
    """What the numbers of the study depend on."""
    return protocol(judge.metric, IMAGES, SAMPLING_SEED, judge.train, judge.heldout) | {
        "training_seeds": list(SEEDS),
        "images_seen": f"{IMAGES_SEEN} of the student's by the critic in every training, unless the setting says more",
        "train_seconds": "wall clock, students side by side with one thread each",
        "weights": "the last (averaged) ones of a fixed budget",
    }
