"""The ablations that the paper lacks: one change at a time, as resumable jobs with committed rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from advkd.presets import Preset, load_preset, resolution
from advkd.quality import IMAGES, Judge, judge_protocol, score
from advkd.run import train_side_by_side
from advkd.student import match_parameters, parameters

SEEDS = (0, 1, 2)
SAMPLING_SEED = 21
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
    "fd_train_subset",
    "precision",
    "recall",
    "coverage",
    "pull_to_train",
]

# From the paper's recipe to ours, one change at a time, in the order in which a reader would make them. What is left at the
# end: the falling learning rate, the moving average and bfloat16.
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

    def change(group: str, settings: dict[str, dict]) -> Iterator[tuple[str, str, Preset, float]]:
        for setting, overrides in settings.items():
            yield group, setting, base.replace(**overrides), 1

    def scaled(field: str, *times: float) -> Iterator[tuple[str, str, Preset, float]]:
        yield from change(field, {f"{getattr(base, field) * n:.3g}": {field: getattr(base, field) * n} for n in times})

    def each(field: str, *values) -> Iterator[tuple[str, str, Preset, float]]:
        yield from change(field, {str(value): {field: value} for value in values})

    yield "waterfall", "paper's recipe, 10 times as long", paper, 10
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
    yield from each("latent", "block-mean", "full")
    pairs = {"fresh_share": 0.0}  # fresh latents are N(0, 1), whatever the latents of the pairs are
    latents = {how: pairs | {"latent": how} for how in ("shrink8bit", "block-mean", "full")}
    yield from change("latent (no fresh latents)", latents)
    samplers = [("ddim", 10), ("ddim", 20), ("ddim", 50), ("ddim", 100), ("ddpm", 100)]
    few = {"trajectories": paper.trajectories}
    yield from change(
        f"sampler ({paper.trajectories} trajectories)",
        {f"{s.upper()}-{n}": few | {"sampler": s, "sampler_steps": n} for s, n in samplers},
    )
    yield from each("target", "xt", "x0")
    yield from scaled("reconstruction_weight", 0, 0.3, 1, 3, 10)
    yield from change(
        "losses",
        {
            "both": {},
            "adversarial alone": {"reconstruction_weight": 0.0},
            "reconstruction alone": {"adversarial_weight": 0.0} | pairs,
        },
    )
    paired = {"real_share": 0.0, "fresh_share": 0.0}
    yield from change("critic (pairs alone)", {c: paired | {"critic": c} for c in ("conditional", "unconditional")})
    staged = {"schedule": "staged", "fresh_share": 0.0}
    yield from change("schedule (no fresh latents)", {"joint": {"fresh_share": 0.0}, "staged": staged})
    yield from scaled("penalty_weight", 0, 0.3, 1, 3, 10)
    clipped = {"penalty": "gp+clip", "penalty_weight": 10.0, "penalty_every": 1}
    yield from change("penalty", {"r1": {}, "gp+clip": clipped})
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
    kl = {"latent": "full", "adversarial": "forward-kl"}
    for setting, overrides in {
        "the recipe": {},
        "full noise": {"latent": "full"},
        "full noise, forward KL": kl,
        "full noise, forward KL, features 0.1": kl | {"feature_weight": 0.1},
        "full noise, features 0.3": {"latent": "full", "feature_weight": 0.3},
    }.items():
        yield "trade-off (the recipe's whole budget)", setting, base.replace(**overrides), whole
    # What a shorter training gives: of the digits' 3,500 steps 1,000 (as above), 1,750, 2,400 and all.
    for share in (2 / 7, 1 / 2, 24 / 35, 1):
        yield "trade-off (training length)", f"{round(share * base.steps):,} steps", base, share * whole


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
        measured = {"error": error} if error else score(judge, folder, SCORE, ablation_protocol(judge), SAMPLING_SEED)
        for job in wanted[preset]:
            about = {"group": job.group, "setting": job.setting, "seed": preset.seed}
            sizes = {"parameters": parameters(preset), "preset_hash": preset.config_hash}
            yield about | sizes | measured


def ablation_place(name: str, row: dict) -> int | None:
    """The place of a row in the table of the preset `name`; None where no job of today would make it."""
    return _places(name).get((row["group"], row["setting"], row["seed"], row["preset_hash"]))


@cache
def _places(name: str) -> dict:
    return {(j.group, j.setting, j.preset.seed, j.preset.config_hash): i for i, j in enumerate(jobs(name))}


def ablation_protocol(judge: Judge) -> dict:
    """What the numbers of the study depend on."""
    return judge_protocol(judge, IMAGES, [SAMPLING_SEED]) | {
        "training_seeds": list(SEEDS),
        "images_seen": f"{IMAGES_SEEN} of the student's by the critic in every training, unless the setting says more",
        "train_seconds": "wall clock, on the `threads` of the row, beside other trainings",
    }
