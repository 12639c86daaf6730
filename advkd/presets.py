"""What an experiment is: the data, the teacher, the trajectories, the student and its training, in one frozen record."""

import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ASSETS = Path(__file__).parent / "assets"
TRAIN_TIMESTEPS = 1000  # every teacher here is a 1000-step diffusion model
LATENT_SIDE = 4  # the student's input is a 4 x 4 map (Adv-KD, section 3)


class UserError(ValueError):
    """An error that the user can mend: the command line prints its message alone and exits with status 2."""


@dataclass(frozen=True)
class Preset:
    """One experiment, read from top to bottom in the order of the data flow."""

    name: str
    recipe: str
    # real images
    data: Literal["digits", "glyphs", "folder"]  # the last: any images, see data.load_images
    image_size_px: int
    channels: int
    # teacher
    teacher: str  # a folder in diffusers format (below "assets/": the package's own), or a hub id
    teacher_revision: str | None
    # trajectories
    trajectories: int
    sampler: Literal["ddpm", "ddim", "dpm-solver"]
    sampler_steps: int
    trajectory_seed: int  # of the noise; sample i has a seed of its own
    teacher_dtype: Literal["float32", "bfloat16"]
    shard_size: int  # trajectories per file, and the teacher's batch
    # student
    submodules: int  # K
    widths: tuple[int, ...]  # feature channels at each resolution, coarse to fine
    block: Literal["plain", "residual"]
    head: Literal["terminal", "light"]
    latent: Literal["shrink8bit", "block-mean", "full"]  # what of state 0 the student is given; see data.make_latent
    target: Literal["xt", "x0"]  # what each head imitates: the noisy state, or the teacher's x0-prediction there
    # critic
    critic: Literal["conditional", "unconditional"]
    critic_width: int
    critic_noise: float  # standard deviation of the noise that is added to all images that the critic sees
    penalty: Literal["gp+clip", "r1"]
    penalty_weight: float
    penalty_every: int  # lazy regularisation: steps between two penalties
    real_share: float  # share of real training images among what the critic is told is real, the rest is the teacher's
    # optimisation
    seed: int  # of weights and batches
    schedule: Literal["staged", "joint"]
    epochs: float  # staged: stage k trains for epochs * (k + 1) passes over the trajectories
    steps: int  # joint: optimizer steps
    batch_sizes: tuple[int, ...]  # one for every stage, or one for all
    fresh_share: float  # share of each batch that are fresh latents without a trajectory
    adversarial: Literal["non-saturating", "forward-kl", "hinge"]  # the adversarial losses, see `losses`
    adversarial_weight: float
    reconstruction_weight: float  # weight of the L1 loss of every head
    unsupervised: tuple[int, ...]  # submodules whose heads have no L1 loss
    feature_weight: float  # weight of feature matching between the last image and its target, in the critic's layers
    learning_rate: float
    betas: tuple[float, float]
    decay_share: float  # the learning rate falls linearly to 0 over this last share of the steps
    ema: float  # decay of the moving average, which is reported and which consistency distillation follows; 0: none
    train_dtype: Literal["float32", "bfloat16"]
    # What has a default was added later: it counts in no hash and no file while it has it, so that what was made before
    # is still found.
    images: str = ""  # folder of images, where `data` is "folder"
    stored: tuple[str, ...] = ("xt", "x0")  # targets that a trajectory keeps of every state
    teacher_compile: bool = False  # the teacher through torch.compile: faster after a minute, other rounding
    method: Literal["advkd", "add", "regression", "progressive", "consistency", "dmd"] = "advkd"
    architecture: Literal["submodules", "unet"] = "submodules"  # the student is Adv-KD's, or the teacher's U-Net
    start: Literal["teacher", "random"] = "teacher"  # a U-Net's first weights
    student_timesteps: tuple[int, ...] = (999,)  # those that a U-Net is sampled at
    student_grid: int = 0  # timesteps of progressive distillation's first student, and of consistency distillation
    distillation_weight: float = 0.0  # of ADD's score distillation
    distillation: Literal["exponential", "sds"] = "exponential"  # its weighting of the timesteps
    warm_up_steps: int = 0  # of ADD: pair regression first
    features: str = ""  # a DINOv2 for ADD's critic, a folder or a hub id, in place of the teacher's features
    critic_learning_rate: float = 0.0  # of ADD's heads, does not fall; 0: the student's first
    feature_noise: tuple[float, ...] = (0.0, 1.0)  # mean and sd of log(sigma / alpha) of what ADD's critic is shown
    image_penalty_weight: float = 0.0  # of R1 on the images that ADD's critic is shown, lazy too
    simulated_share: float = 0.0  # of ADD's inputs that begin as images of the student's own chain, not as real ones
    gain_limit: float = 8.0  # the most by which an error in epsilon counts in a U-Net student's image, see `Denoiser`

    def __post_init__(self):
        check(self)

    def resolution(self, k: int) -> int:
        """Side in pixels of submodule k's image, `k` in 0..K-1; see `resolution`."""
        return resolution(k, self.submodules, self.image_size_px)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side in pixels of every submodule's image."""
        return tuple(self.resolution(k) for k in range(self.submodules))

    def batch_size(self, k: int) -> int:
        """Batch size of stage k."""
        return self.batch_sizes[min(k, len(self.batch_sizes) - 1)]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.image_size_px, self.image_size_px

    @property
    def learns_from_trajectories(self) -> bool:
        """Whether the training asks for what the teacher made of noise, or for real images and the teacher alone."""
        return learns_from_trajectories(vars(self))

    @property
    def config_hash(self) -> str:
        """12 hexadecimal digits that change when any field does, the same on every machine and Python."""
        return config_hash(asdict(self))

    def replace(self, **overrides) -> "Preset":
        """A copy with other field values. Raises UserError that lists the fields when one does not exist."""
        return _with(self, overrides)


def learns_from_trajectories(fields: dict) -> bool:
    """`Preset.learns_from_trajectories` of the fields of a preset."""
    return fields["method"] in ("advkd", "regression") or bool(fields["warm_up_steps"]) or not fields["real_share"]


def asdict(preset: Preset) -> dict:
    """The fields of a preset as JSON knows them, but those that have their default."""
    late = late_fields()
    values = {name: x for name, x in dataclasses.asdict(preset).items() if name not in late or x != late[name]}
    return json.loads(json.dumps(values))


def late_fields() -> dict:
    """The fields of a preset that have a default, with it."""
    return {f.name: f.default for f in dataclasses.fields(Preset) if f.default is not dataclasses.MISSING}


def complete(fields: dict) -> dict:
    """The fields of a preset as `asdict` or a file has them, with those that they leave out."""
    return late_fields() | fields


def resolution(k: int, submodules: int, image_size_px: int) -> int:
    """Side in pixels of the image of submodule `k`.

    Adv-KD's law 2 ** (k // 2 + 3) at 256 px and K = 11, carried over to any size and K: the doublings from 8 px to
    `image_size_px` are spread evenly over the submodules. Fewer submodules than sizes leave out sizes, never the last.
    """
    levels = int(math.log2(image_size_px // 8)) + 1
    return 8 * 2 ** (k * levels // submodules if submodules >= levels else ((k + 1) * levels - 1) // submodules)


def stage_times(submodules: int) -> tuple[int, ...]:
    """Timesteps after whose denoising step states 1..K-1 are read; state K is the final image.

    For K = 11: 999, 899, ..., 99, Adv-KD's t = 1099 - 100 j.
    """
    return tuple(
        TRAIN_TIMESTEPS - 1 - round((j - 1) * TRAIN_TIMESTEPS / max(submodules - 1, 1)) for j in range(1, submodules)
    )


def config_hash(config: dict) -> str:
    """12 hexadecimal digits of the SHA-256 of `config` written as canonical JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def check(p: Preset) -> None:
    """Raise UserError that names the field, its value and what is possible when a preset makes no sense."""
    for field in dataclasses.fields(p):
        _check_type(field, getattr(p, field.name))
    size, k = p.image_size_px, p.submodules
    if size < 8 or size & (size - 1):
        raise UserError(f"image_size_px is {size}, but must be a power of two, 8 or more")
    if not 1 <= k <= TRAIN_TIMESTEPS:
        raise UserError(f"submodules is {k}, but must be 1 or more" + (f", {TRAIN_TIMESTEPS} at most" if k > 1 else ""))
    sizes = sorted(set(p.resolutions))
    if len(p.widths) != len(sizes):
        raise UserError(f"widths has {len(p.widths)} entries {p.widths}, but the submodules' images have {sizes} px")
    if min(p.widths) < 1:
        raise UserError(f"widths is {p.widths}, but must be positive")
    if not 0 < p.sampler_steps <= TRAIN_TIMESTEPS or (
        TRAIN_TIMESTEPS % p.sampler_steps and k > 1
    ):  # one reads no times
        raise UserError(
            f"sampler_steps is {p.sampler_steps}, but must divide {TRAIN_TIMESTEPS}, as 50, 100 or 1000 do"
            + (f"; with one submodule, 1 to {TRAIN_TIMESTEPS}" if k == 1 else "")
        )
    for field in dataclasses.fields(p):
        allowed, value = getattr(field.type, "__args__", ()), getattr(p, field.name)
        if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
            raise UserError(f"{field.name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")
    _check_read(p)  # before what speaks of Adv-KD alone
    if not p.stored or not set(p.stored) <= {"xt", "x0"} or (p.method == "advkd" and p.target not in p.stored):
        wanted = f"the target {p.target!r}" if p.method == "advkd" else "one at least"
        raise UserError(f"stored is {p.stored}, but must hold {wanted}, and nothing but 'xt' and 'x0'")
    if p.images and p.data != "folder":
        raise UserError(f"images is {p.images!r}, but preset {p.name!r} has images of its own: images=''")
    if p.data == "digits" and p.channels != 1:
        raise UserError(f"channels is {p.channels}, but the digits are grey: channels=1")
    for field in ("real_share", "fresh_share", "simulated_share", "decay_share", "ema"):
        if not 0 <= getattr(p, field) <= 1:
            raise UserError(f"{field} is {getattr(p, field)}, but must lie in [0, 1]")
    if not p.batch_sizes or min(p.batch_sizes) < 2:
        raise UserError(f"batch_sizes is {p.batch_sizes}, but needs at least one size, and 2 or more images in each")
    if len(p.betas) != 2 or not all(0 <= beta < 1 for beta in p.betas):
        raise UserError(f"betas is {p.betas}, but must be two numbers in [0, 1)")
    if p.critic == "conditional" and (p.real_share or p.fresh_share):
        raise UserError(
            "critic is 'conditional', which needs a trajectory for every image: real_share=0, fresh_share=0"
        )
    if p.schedule == "staged" and p.fresh_share:
        raise UserError(f"fresh_share is {p.fresh_share}, but staged training has only paired latents: fresh_share=0")
    for field in ("reconstruction_weight", "feature_weight"):
        smallest = min(p.batch_sizes)
        if getattr(p, field) and smallest == round(smallest * p.fresh_share):
            raise UserError(
                f"fresh_share is {p.fresh_share} of {p.batch_sizes} images, which leaves no pair to compare: {field}=0"
            )
    if beyond := [i for i in p.unsupervised if i not in range(k)]:
        raise UserError(f"unsupervised names submodule {beyond[0]}, but there are 0 to {k - 1}")
    if not any((p.adversarial_weight, p.reconstruction_weight, p.feature_weight, p.distillation_weight)):
        raise UserError(
            "adversarial_, reconstruction_, feature_ and distillation_weight are 0: the student has nothing to learn from"
        )
    first = k - 1 if p.schedule == "joint" else 0  # the first stage
    if p.reconstruction_weight and set(range(first + 1)) <= set(p.unsupervised):
        raise UserError(
            f"unsupervised is {p.unsupervised}, which leaves stage {first} no head to reconstruct: reconstruction_weight=0"
        )
    if p.critic == "conditional" and p.latent == "full":
        raise UserError("critic is 'conditional', which takes a 4 x 4 latent: latent='block-mean'")
    _check_method(p)
    for field in (
        "critic_noise",
        "penalty_weight",
        "adversarial_weight",
        "reconstruction_weight",
        "feature_weight",
        "distillation_weight",
        "critic_learning_rate",
        "image_penalty_weight",
        "warm_up_steps",
        "student_grid",
        "trajectory_seed",
        "seed",
    ):
        if getattr(p, field) < 0:
            raise UserError(f"{field} is {getattr(p, field)}, but must not be negative")
    for field in ("trajectory_seed", "seed"):
        if getattr(p, field) >= 2**63:
            raise UserError(
                f"{field} is {getattr(p, field)}, but must be below 2 ** 63, as random generators take them"
            )
    for field in (
        "critic_width",
        "trajectories",
        "shard_size",
        "channels",
        "penalty_every",
        "learning_rate",
        "epochs",
        "steps",
        "gain_limit",
    ):
        if getattr(p, field) <= 0:
            raise UserError(f"{field} is {getattr(p, field)}, but must be positive")


def _check_type(field: dataclasses.Field, value: object) -> None:
    """Values may come from JSON, which has other types than Python: true is no number, and NaN is one."""
    kinds = getattr(field.type, "__args__", (field.type,))
    number, whole = not isinstance(value, bool) and isinstance(value, int | float), isinstance(value, int)
    if typing.get_origin(field.type) is tuple:
        name = {int: "whole numbers", float: "finite numbers", str: "names"}[kinds[0]]
        entry = {int: int, float: int | float, str: str}[kinds[0]]
        fits = isinstance(value, tuple | list) and all(
            isinstance(x, entry) and not isinstance(x, bool) and (kinds[0] is str or math.isfinite(x)) for x in value
        )
        wanted = f"a tuple of {name}"
    elif field.type in (int, float):
        fits = number and (whole or field.type is float) and math.isfinite(value)
        wanted = "a whole number" if field.type is int else "a finite number"
    elif field.type is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif typing.get_origin(field.type) is typing.Literal:
        return  # all that is possible is listed, later
    else:
        fits, wanted = isinstance(value, str) or (value is None and type(None) in kinds), "text"
    if not fits:
        raise UserError(f"{field.name} is {value!r}, but must be {wanted}")


_OTHERS = ("add", "regression", "progressive", "consistency", "dmd")
# Fields that not every method reads, and which do: where a change would do nothing it is refused. Not here are those that
# the student's architecture decides about.
_READ_BY = {
    **dict.fromkeys(("target", "critic", "critic_width", "critic_noise", "penalty"), ("advkd",)),
    **dict.fromkeys(("unsupervised", "feature_weight"), ("advkd",)),
    **dict.fromkeys(("penalty_weight", "penalty_every"), ("advkd", "add")),
    "adversarial_weight": ("advkd", "add", "dmd"),
    "reconstruction_weight": ("advkd", "dmd"),
    "real_share": ("advkd", "add", "progressive", "consistency"),
    "fresh_share": ("advkd", "add", "regression", "dmd"),
    "decay_share": ("advkd", "add", "regression", "consistency", "dmd"),
    "student_grid": ("progressive", "consistency"),
    **dict.fromkeys(("start", "student_timesteps", "gain_limit"), _OTHERS),
    **dict.fromkeys(("distillation_weight", "distillation", "warm_up_steps", "features", "feature_noise"), ("add",)),
    **dict.fromkeys(("critic_learning_rate", "image_penalty_weight", "simulated_share"), ("add",)),
}


def _check_read(p: Preset) -> None:
    own = _RECIPES["improved"] | late_fields() | _METHODS.get(p.method, {})
    for field, methods in _READ_BY.items():
        value = getattr(p, field)
        if p.method not in methods and value != own[field]:
            raise UserError(
                f"{field} is {value!r}, but method {p.method!r} does not use it (only {', '.join(methods)}): "
                f"{field}={own[field]!r}"
            )


def _check_method(p: Preset) -> None:
    times, last = p.student_timesteps, TRAIN_TIMESTEPS - 1
    known = {"advkd": ("non-saturating", "forward-kl"), "add": ("non-saturating", "hinge")}.get(
        p.method, ("non-saturating",)
    )
    if p.adversarial not in known:
        raise UserError(
            f"adversarial is {p.adversarial!r}, but method {p.method!r} knows {' and '.join(map(repr, known))}"
        )
    if p.method == "advkd" and p.architecture == "unet":
        raise UserError(
            "architecture is 'unet', but Adv-KD trains submodules: architecture='submodules', or another method"
        )
    if p.method == "advkd":
        return
    if p.schedule == "staged" or p.real_share not in (0, 1):
        raise UserError(
            f"schedule is {p.schedule!r} and real_share {p.real_share}, but method {p.method!r} knows 'joint' and 0 or 1"
        )
    if p.architecture == "submodules" and (p.method in ("progressive", "consistency") or times != (last,)):
        raise UserError(
            f"architecture is 'submodules', which know noise alone, but method {p.method!r} has student_timesteps {times}; "
            f"with ({last},) they can learn by advkd, add, dmd and regression"
        )
    if sorted({*times, last}) != sorted(times) or min(times) < 0 or max(times) > last:
        raise UserError(f"student_timesteps is {times}, but must be different timesteps, the last of them {last}")
    if len(p.feature_noise) != 2 or p.feature_noise[1] < 0:
        raise UserError(f"feature_noise is {p.feature_noise}, but must be a mean and a standard deviation")
    halvings = math.log2(max(p.student_grid, 1) / len(times))
    if p.method == "progressive" and (halvings < 0 or halvings % 1):
        raise UserError(f"student_grid is {p.student_grid}, but must be {len(times)} times a power of two")
    if p.method == "progressive" and 0 < p.steps <= halvings:
        raise UserError(
            f"steps is {p.steps}, but progressive distillation from {p.student_grid} to {len(times)} timesteps has "
            f"{round(halvings) + 1} phases of a step or more"
        )
    if p.method == "consistency" and not 2 <= p.student_grid <= TRAIN_TIMESTEPS:
        raise UserError(f"student_grid is {p.student_grid}, but must be 2 to {TRAIN_TIMESTEPS}")


# What the experiments are about ...
_EMBEDDED = dict(teacher_revision=None, trajectory_seed=0, seed=0, teacher_dtype="bfloat16", shard_size=125)


# Commits of the hub's teachers, so that nobody's later change of a repository changes an experiment. Those of church and
# bedroom could not be established where this was written: whoever loads them is told the commit, which stores keep too.
PINNED = {
    "google/ddpm-celebahq-256": "cd5c944777ea2668051904ead6cc120739b86c4d",
    "google/ddpm-cifar10-32": "267b167dc01f0e4e61923ea244e8b988f84deb80",
}


def _hub(teacher: str, image_size_px: int) -> dict:
    return dict(
        data="folder",
        image_size_px=image_size_px,
        channels=3,
        teacher=teacher,
        teacher_revision=PINNED.get(teacher),
        trajectory_seed=0,
        seed=0,
        teacher_dtype="bfloat16",
        shard_size=max(64, min(256, 2**22 // image_size_px**2)),
    )


_DATA = {
    "digits": dict(
        data="digits",
        image_size_px=16,
        channels=1,
        teacher="assets/digits-teacher",  # shipped with the package
        **_EMBEDDED,
    ),
    "glyphs": dict(
        data="glyphs",
        image_size_px=32,
        channels=3,
        teacher="assets/glyphs-teacher",
        **_EMBEDDED,
    ),
    "celebahq": _hub("google/ddpm-celebahq-256", 256),
    "cifar10": _hub("google/ddpm-cifar10-32", 32),
    "lsun-church": _hub("google/ddpm-church-256", 256),
    "lsun-bedroom": _hub("google/ddpm-bedroom-256", 256),
}
# The teachers' FIDs as published, whose protocols differ from each other and from anything measured here.
PUBLISHED_FID = {
    "celebahq": (60.99, "Adv-KD (arXiv 2405.20675), table 1; ancestral, 1000 steps"),
    "cifar10": (3.17, "DDPM (arXiv 2006.11239), table 1, of the averaged weights; the hub's are not averaged"),
    "lsun-church": (7.89, "DDPM (arXiv 2006.11239), table 3"),
    "lsun-bedroom": (6.36, "DDPM (arXiv 2006.11239), table 3"),
}
# ... and how a student is made and trained.
_RECIPES = {
    "paper": dict(
        submodules=11,
        block="plain",
        head="terminal",
        latent="shrink8bit",
        target="xt",
        critic="conditional",
        critic_width=32,
        critic_noise=0.0,
        penalty="gp+clip",
        penalty_weight=10.0,
        penalty_every=1,
        real_share=0.0,
        schedule="staged",
        epochs=10,
        steps=1,  # staged training counts epochs
        batch_sizes=(64, 64, 64, 64, 64, 64, 64, 64, 32, 16, 16),
        fresh_share=0.0,
        adversarial="non-saturating",
        adversarial_weight=1.0,
        reconstruction_weight=0.0,
        unsupervised=(),
        feature_weight=0.0,
        learning_rate=1e-4,
        betas=(0.5, 0.999),
        decay_share=0.0,
        ema=0.0,
        train_dtype="float32",
    ),
    "improved": dict(
        submodules=11,
        block="residual",
        head="light",
        latent="block-mean",
        target="x0",
        critic="unconditional",
        critic_width=32,
        critic_noise=0.0,
        penalty="r1",
        penalty_weight=0.1,
        penalty_every=8,
        real_share=0.5,
        schedule="joint",
        epochs=1,  # joint training counts steps
        steps=3500,
        batch_sizes=(64,),
        fresh_share=0.75,
        adversarial="non-saturating",
        adversarial_weight=1.0,
        reconstruction_weight=0.1,
        unsupervised=(),
        feature_weight=0.0,
        learning_rate=1e-3,
        betas=(0.0, 0.99),
        decay_share=0.4,
        ema=0.998,
        train_dtype="bfloat16",
    ),
}
# The other methods are recipes too: the improved one, whose optimisation they share, with these fields instead.
_UNET = dict(
    architecture="unet",
    latent="full",
    real_share=1.0,
    fresh_share=0.0,
    reconstruction_weight=0.0,
    penalty_weight=0.0,
    learning_rate=3e-4,
    betas=(0.9, 0.999),
)
_METHODS = {
    "add": _UNET
    | dict(
        method="add",
        student_timesteps=(249, 499, 749, 999),
        penalty_weight=1e-5,
        penalty_every=4,
        image_penalty_weight=1.0,
        distillation_weight=0.5,
        learning_rate=2e-4,
        betas=(0.0, 0.99),
        critic_learning_rate=3e-3,
        feature_noise=(-1.0, 1.5),
        simulated_share=0.5,
        gain_limit=4.0,
    ),
    "regression": _UNET | dict(method="regression", real_share=0.0),
    # Here the average is a target too, in progressive distillation the teacher of the next phase: with 0.998 it would be one
    # of 500 steps, longer than a phase of budget 1.
    "progressive": _UNET | dict(method="progressive", student_grid=16, ema=0.95),
    "consistency": _UNET
    | dict(method="consistency", student_grid=20, student_timesteps=(249, 499, 749, 999), ema=0.95),
    # The paper's 0.25 is that of pairs compared by LPIPS; of a squared error it is too little to hold the images apart.
    "dmd": _UNET | dict(method="dmd", real_share=0.0, reconstruction_weight=4.0),
}


def _weights(image_size_px: int, channels: int) -> dict[str, float]:
    """The improved recipe's L1 and R1 weights, 0.1 on the digits, carried over to images of n numbers.

    R1 is a squared gradient: images are n ** 0.5 further apart, so the same slope between them has 1 / n of it. L1 is a
    mean whose gradient has the norm n ** -0.5; its factor is a guess that worked. With both left at 0.1 the glyphs lose
    their colours, with L1's alone scaled they keep them; R1's alone was not tried, nor anything beyond 32 px.
    """
    times = channels * image_size_px**2 / 256
    return {"reconstruction_weight": round(0.1 * times**0.5, 2), "penalty_weight": round(0.1 * times, 2)}


# What depends on both: how wide, and on how many trajectories of which sampler. The paper's 20,000 trajectories of 1000
# steps would take two CPU cores six hours on the digits, so these have 1,500 of 100.
_SCALES = {
    ("digits", "paper"): dict(widths=(16, 32), trajectories=1500, sampler="ddpm", sampler_steps=100),
    ("digits", "improved"): dict(widths=(44, 16), trajectories=5000, sampler="ddim", sampler_steps=50),
    ("glyphs", "paper"): dict(widths=(16, 32, 64), trajectories=1500, sampler="ddpm", sampler_steps=100),
    ("glyphs", "improved"): dict(
        widths=(64, 32, 16),
        trajectories=5000,
        sampler="ddim",
        sampler_steps=50,
        steps=10_000,
        **_weights(32, 3),
    ),
}


def _scale(image_size_px: int, channels: int, recipe: str) -> dict:
    """What `_SCALES` says, for images of any size: the paper's counts, and widths that follow from the size.

    From 128 px on nearly all of a student's time goes into its finest maps, so the improved student is wide where the
    maps are small. At 256 px: 2.34M parameters with its heads, 4.6 GFLOP an image against the paper's 44.6.
    """
    levels = int(math.log2(image_size_px // 8)) + 1
    if recipe == "paper":
        widths = (16, 32, 64, *(128,) * max(levels - 3, 0))[:levels]
        return dict(widths=widths, trajectories=20_000, sampler="ddpm", sampler_steps=1000, stored=("xt",))
    coarse_to_fine = (128, 96, 64, 32, 16) if levels < 6 else (*(160,) * (levels - 5), 128, 96, 48, 24, 16)
    return dict(
        widths=coarse_to_fine[-levels:],
        trajectories=20_000,
        sampler="ddim",
        sampler_steps=50,
        stored=("x0",),
        steps=10_000 if levels < 4 else 50_000,
        **_weights(image_size_px, channels),
    )


def load_preset(name: str, recipe: str = "improved", **overrides) -> Preset:
    """The preset `name` with `recipe`, single fields replaced by `overrides`.

    Raises UserError that lists what exists when the name, the recipe or a field is unknown.
    """
    if name not in _DATA:
        raise UserError(f"there is no preset {name!r}; presets: {', '.join(_DATA)}")
    return _build(name, recipe, _DATA[name], overrides)


def own_preset(teacher: str, image_size_px: int, channels: int, recipe: str = "improved", /, **overrides) -> Preset:
    """An experiment with a teacher of one's own, "own": submodules, widths and weights follow from the images' shape."""
    if image_size_px < 8 or image_size_px & (image_size_px - 1):
        raise UserError(f"teacher {teacher!r} makes images of {image_size_px} px; it must be a power of two, 8 or more")
    if channels not in (1, 3):
        raise UserError(f"teacher {teacher!r} makes images of {channels} channels; it must be 1 or 3")
    for field, makes in (("image_size_px", image_size_px), ("channels", channels)):
        if overrides.get(field, makes) != makes:
            raise UserError(f"{field} is {overrides[field]!r}, but teacher {teacher!r} makes {makes}; leave it out")
    data = _hub(teacher, image_size_px) | {"channels": channels}
    return _build("own", recipe, data, overrides)


def _build(name: str, recipe: str, data: dict, overrides: dict) -> Preset:
    if recipe not in _RECIPES | _METHODS:
        raise UserError(f"there is no recipe {recipe!r}; recipes: {', '.join(_RECIPES | _METHODS)}")
    base = "paper" if recipe == "paper" else "improved"
    scale = _SCALES.get((name, base)) or _scale(data["image_size_px"], data["channels"], base)
    values = _RECIPES[base] | scale | _METHODS.get(recipe, {})
    if data["data"] == "folder":  # without images of one's own there is the teacher alone
        values |= {"real_share": 0.0}
    if overrides.get("images"):  # images are given to be used
        wanted = _METHODS.get(recipe, _RECIPES[base])["real_share"]
        overrides = {"real_share": wanted} | overrides
        if not overrides["real_share"]:
            raise UserError(f"recipe {recipe!r} trains without real images; leave them out")
    return _with(Preset(name=name, recipe=recipe, **(data | values)), overrides)


def _with(preset: Preset, overrides: dict) -> Preset:
    known = [field.name for field in dataclasses.fields(Preset)]
    if unknown := [name for name in overrides if name not in known]:
        raise UserError(f"a preset has no field {unknown[0]!r}; fields: {', '.join(known)}")
    if (
        isinstance(overrides.get("teacher"), str) and overrides["teacher"] != preset.teacher
    ):  # one commit names one repository's files
        overrides = {"teacher_revision": PINNED.get(overrides["teacher"])} | overrides
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}
    return dataclasses.replace(preset, **values)
