"""What a shared student says of itself: its facts, a model card for the hub, and a grid of its images."""

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from torchvision.utils import save_image

from advkd.denoiser import Denoiser
from advkd.files import write_atomic, write_text
from advkd.presets import ASSETS, TRAIN_TIMESTEPS, UserError, late_fields, learns_from_trajectories
from advkd.student import Student, count_parameters

CARD, GRID = "README.md", "samples.png"
SEED = 0  # of the grid
START, END = (
    "<!-- measurements -->",
    "<!-- /measurements -->",
)  # what is between them is written anew, the rest is its owner's
UNKNOWN = "not recorded"
SHIPPED = "assets/"  # teachers that come with the package
HUB = "hf:"  # images of the hub
# The fields of a preset that a reader wants first, in groups that only some students have; the others are in the pipeline's
# index.
RECIPE = {
    "all": "recipe method schedule steps epochs batch_sizes learning_rate betas decay_share ema train_dtype seed",
    "submodules": "submodules widths block head latent target",
    "unet": "start student_timesteps student_grid gain_limit",
    "advkd": "critic critic_noise fresh_share",
    "add": "distillation distillation_weight features feature_noise critic_learning_rate image_penalty_weight simulated_share",
    "weights": "penalty penalty_weight adversarial adversarial_weight reconstruction_weight feature_weight",
}
MEASURED = {
    "fd_train": "{metric}, train split",
    "fd_heldout": "held-out split",
    "kid_train": "KID, train split",
    "precision": "precision",
    "recall": "recall",
    "pull_to_train": "nearer to train",
    "near_copies": "near copies",
    "ms_per_image": "ms per image",
}
DATA = {
    "digits": "scikit-learn's 1797 handwritten digits, resized; 1197 are the train split, 600 are held out",
    "glyphs": "letters in fonts that matplotlib ships, rendered from their index",
}
SOURCES = {
    "digits": "The digits are UCI's Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998; CC BY 4.0).",
    "glyphs": "The letters' fonts have licences of their own, which matplotlib ships with them.",
}
METHODS = {  # whose papers are to be cited too
    "add": "adversarial diffusion distillation, Sauer et al. 2023 (arXiv 2311.17042)",
    "regression": "pair regression, Luhman and Luhman 2021 (arXiv 2101.02388)",
    "progressive": "progressive distillation, Salimans and Ho 2022 (arXiv 2202.00512)",
    "consistency": "consistency distillation, Song et al. 2023 (arXiv 2303.01469)",
    "dmd": "distribution matching distillation, Yin et al. 2024 (arXiv 2311.18828)",
}
CITATION = """```bibtex
@article{mekonnen2024advkd,
  title = {Adv-KD: Adversarial Knowledge Distillation for Faster Diffusion Sampling},
  author = {Mekonnen, Kidist Amde and Dall'Asen, Nicola and Rota, Paolo},
  journal = {arXiv preprint arXiv:2405.20675},
  year = {2024},
  url = {https://arxiv.org/abs/2405.20675}
}

@software{advkd,
  title = {advkd: a reproducible companion to Adv-KD},
  author = {{The advkd authors}},
  license = {Apache-2.0}
}
```"""


def run_facts(made: dict) -> dict:
    """The facts of a training run from its `run.json` (see `run.train_run`), without the places of files on this machine.

    A teacher of the hub keeps its id, images of the hub theirs; of a folder the name is left.
    """
    preset, teacher = made["preset"], made.get("teacher") or {}
    source, images = teacher.get("source") or preset.get("teacher", ""), preset.get("images", "")
    of_hub = source.count("/") == 1 and not source.startswith((".", "~")) and not Path(source).exists()
    known = is_shipped(source) or of_hub or teacher.get("revision")
    shown = {"teacher": source if known else Path(source).name}
    shown |= {"images": images if images.startswith(HUB) else Path(images).name} if images else {}
    shown |= {"features": Path(preset["features"]).name} if preset.get("features") else {}
    training = ("device", "dtype", "threads", "processes", "seconds", "cpu_seconds")
    return {
        "preset": preset | shown,
        "trajectories": made["trajectories"],
        "teacher_revision": teacher.get("revision"),
        "features": made.get("features", {}).get("weights"),
        "images": made.get("images", {}).get("decoded"),
        "training": {field: made[field] for field in training if made.get(field)},
    }


def checked_facts(facts: dict | None) -> dict:
    """A copy of `facts` as JSON knows it. Raises UserError when it is no dictionary that JSON can write."""
    try:
        copy = json.loads(json.dumps({} if facts is None else facts, sort_keys=True))  # as diffusers writes them
    except (TypeError, ValueError):
        copy = None
    if not isinstance(copy, dict):
        raise UserError(f"facts is {facts!r}, but must be a dictionary that JSON can write; see card.run_facts")
    return copy


def with_measurement(facts: dict, row: dict, protocol: dict) -> dict:
    """`facts` with a measured row and its protocol, in place of an earlier one by the same metric in as many steps.

    `row` is what `evaluation.student_row` and `Metric.evaluate` say, `protocol` what `evaluation.protocol` does. Raises
    UserError when the protocol does not name its metric.
    """
    if "metric" not in protocol:
        raise UserError(f"protocol is {protocol!r}, but must name its metric; see evaluation.protocol")

    def place(measurement: dict) -> tuple[str, int]:
        return measurement["protocol"]["metric"], measurement["row"].get("steps", 1)

    new = {"row": row, "protocol": protocol}
    kept = [m for m in facts.get("measurements", []) if place(m) != place(new)]
    return checked_facts(facts | {"measurements": sorted([*kept, new], key=place)})


class _Known(dict):
    """A preset as it was kept, maybe by another version: a field that it lacks is not recorded."""

    def __missing__(self, field: str) -> str:
        return UNKNOWN


def grid_size(student: Student | Denoiser) -> int:
    """How many images the grid has: 64 up to 64 px, 16 up to 256 px, 4 beyond."""
    px = student.image_shape[-1]
    return 64 if px <= 64 else 16 if px <= 256 else 4


def call_options(student: Student | Denoiser) -> dict:
    """What a pipeline is called with to make the grid: the fixed seed, and all steps of a student that knows several."""
    steps = {"steps": len(student.config.timesteps)} if isinstance(student, Denoiser) else {}
    return {"batch_size": grid_size(student), "seed": SEED} | steps


def save_grid(images: Tensor, folder: Path) -> None:
    """Write images `(n, c, h, w)` in [-1, 1] as a square grid to `samples.png` in `folder`, atomically."""
    style = {"nrow": round(len(images) ** 0.5), "normalize": True, "value_range": (-1, 1), "format": "png"}
    write_atomic(folder / GRID, lambda file: save_image(images, file, **style))


def write_card(
    folder: Path, pipeline: str, student: Student | Denoiser, facts: dict, source: str = ".", variant: str | None = None
) -> None:
    """Write the model card of a student to `README.md` in `folder`, atomically; see `make_card`."""
    write_text(folder / CARD, str(make_card(pipeline, student, facts, source, variant)))


def write_measurements(folder: Path, facts: dict) -> None:
    """Put the measurements of `facts` between their marks in the card of `folder`, atomically; the rest of it stays, as
    does a card without the marks."""
    before, start, rest = (folder / CARD).read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if end:
        write_text(folder / CARD, f"{before}{start}\n{_measurements(facts)}\n{end}{after}")


def make_card(
    pipeline: str, student: Student | Denoiser, facts: dict, source: str = ".", variant: str | None = None
) -> ModelCard:
    """The model card of `student` in the pipeline of that class name; it says "not recorded" where `facts` have nothing.

    `source` is what its lines of Python load, a hub id or the folder of the card, `variant` that of the weights' files.
    The same arguments make the same text: it holds no date.
    """
    preset = _Known(late_fields() | facts["preset"]) if facts.get("preset") else {}
    title = f"{preset['name']}, recipe {preset['recipe']}" if preset else "unknown data"
    parts = [
        f"# A distilled diffusion student: {title}",
        _about(student),
        f"![Samples of seed {SEED}, none left out]({GRID})",
        "## Sampling\n\n" + _sampling(pipeline, student, source, variant),
        "## Data and teacher\n\n" + _origin(preset, facts),
        "## Recipe\n\n" + _recipe(preset, student),
        f"{START}\n{_measurements(facts)}\n{END}",
        "## Limitations\n\n" + _limitations(preset),
        "## Licence\n\n" + _licence(preset),
        "## Citation\n\n" + _method(preset) + CITATION,
    ]
    return ModelCard(f"---\n{_front_matter(preset, facts).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _front_matter(preset: dict, facts: dict) -> ModelCardData:
    images = preset.get("images", "")
    return ModelCardData(
        license="apache-2.0" if _is_ours(preset) else "other" if preset else "unknown",
        license_name=None if _is_ours(preset) or not preset else "of-its-teacher-and-data",
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["advkd", "knowledge-distillation", "diffusion-distillation", *([preset["method"]] if preset else [])],
        base_model=preset["teacher"] if facts.get("teacher_revision") else None,
        datasets=[images.removeprefix(HUB)] if images.startswith(HUB) else None,
    )


def _is_ours(preset: dict) -> bool:
    """Whether a student has learnt from nothing but what the package ships."""
    return bool(preset) and preset["data"] in DATA and is_shipped(preset["teacher"]) and not preset["features"]


def is_shipped(teacher: str) -> bool:
    """Whether a teacher comes with the package."""
    return teacher.startswith(SHIPPED) and (ASSETS.parent / teacher).is_dir()


def _about(student: Student | Denoiser) -> str:
    channels, height, width = student.image_shape
    with torch.random.fork_rng(devices=[]):  # the generator's first weights are drawn before they are replaced
        all_of_it, deployed = count_parameters(student), count_parameters(student.generator())
    parameters = f"{deployed:,}" if deployed == all_of_it else f"{all_of_it:,}, of which sampling needs {deployed:,}"
    if isinstance(student, Denoiser):
        what, steps = "its teacher's U-Net, trained to say the clean image at a few timesteps", _steps(student)
    else:
        what, steps = f"a chain of {len(student.stages)} submodules that stand for the teacher's denoising phases", "1"
    return (
        "A diffusion teacher, distilled with `advkd`, a companion to Adv-KD ([arXiv 2405.20675]"
        f"(https://arxiv.org/abs/2405.20675)): {what}.\n\n"
        f"| | |\n| --- | --- |\n| images | {channels} x {height} x {width}, unconditional |\n| steps | {steps} |\n"
        f"| parameters | {parameters} |\n| size | {all_of_it * 4e-6:.3g} MB in float32 |"
    )


def _steps(student: Denoiser) -> str:
    times = list(student.config.timesteps)
    divisors = [str(n) for n in range(1, len(times) + 1) if len(times) % n == 0]
    return f"{' or '.join(divisors)} (timesteps {', '.join(map(str, times))})"


def _sampling(pipeline: str, student: Student | Denoiser, source: str, variant: str | None) -> str:
    options = ", ".join(f"{name}={value}" for name, value in call_options(student).items())
    load = f'"{source}"' + (f', variant="{variant}"' if variant else "")
    where = ", in this folder" if source == "." else ""
    return (
        f"With the package `advkd` installed{where}:\n\n```python\nfrom advkd.pipeline import {pipeline}\n\n"
        f"pipeline = {pipeline}.from_pretrained({load})\nimages = pipeline({options}).images\n```\n\n"
        f"`images` are the {grid_size(student)} of `{GRID}`, as PIL images. Every image follows from `seed` and its index "
        "alone, whatever the batch."
    )


def _origin(preset: dict, facts: dict) -> str:
    if not preset:
        return f"- Real images: {UNKNOWN}\n- Teacher: {UNKNOWN}\n- Trajectories: {UNKNOWN}"
    made, teacher, images = facts.get("trajectories", {}), preset["teacher"], preset["images"]
    data = DATA.get(preset["data"], f"`{images}`" if images else "none given")
    if identity := facts.get("images"):
        data += f" (decoded as `{identity}`)"
    used = f"their share in training is {_value(preset['real_share'])}"
    if facts.get("teacher_revision"):
        where = f"[{teacher}](https://huggingface.co/{teacher}), revision `{facts['teacher_revision']}`"
    else:
        where = f"`{teacher}`, " + ("shipped with `advkd`" if is_shipped(teacher) else "a folder")
    if learns_from_trajectories(preset):
        trajectories = (
            f"{_value(made.get('trajectories', preset['trajectories']))} of the teacher's, {preset['sampler']} with "
            f"{preset['sampler_steps']} of {TRAIN_TIMESTEPS} steps in {preset['teacher_dtype']}, noise of seed "
            f"{preset['trajectory_seed']}"
        )
    else:
        trajectories = "none; the training asked the teacher itself"
    return (
        f"- Real images: {data}; {used}\n"
        f"- Teacher: {where}; fingerprint of weights and schedule `{made.get('teacher_fingerprint', UNKNOWN)}`\n"
        f"- Trajectories: {trajectories}"
    )


def _method(preset: dict) -> str:
    other = preset and METHODS.get(preset["method"])
    return f"The student was trained by {other}; please cite it too.\n\n" if other else ""


def _recipe(preset: dict, student: Student | Denoiser) -> str:
    if not preset:
        return f"The recipe was {UNKNOWN}."
    chosen = {"all", "weights", "unet" if isinstance(student, Denoiser) else "submodules", preset["method"]}
    idle = {"joint": "epochs", "staged": "steps"}.get(preset["schedule"])
    fields = [
        f for group, names in RECIPE.items() if group in chosen for f in names.split() if f in preset and f != idle
    ]
    rows = "\n".join(f"| `{field}` | {_value(preset[field])} |" for field in fields)
    return f"Fields of `advkd.presets.Preset`; all of them are in `model_index.json`.\n\n| | |\n| --- | --- |\n{rows}"


def _measurements(facts: dict) -> str:
    """The part of the card that grows after it was written."""
    training = facts.get("training", {})
    spent = [
        f"{training[key]:,.0f} {text}"
        for key, text in (("seconds", "s"), ("cpu_seconds", "s of the CPU"))
        if key in training
    ]
    on = [
        f"{training[key]}{text}"
        for key, text in (("device", ""), ("dtype", ""), ("threads", " threads"))
        if key in training
    ]
    on += [f"{training['processes']} processes"] if "processes" in training else []
    lines = [
        f"## Measurements\n\n- Training ran on: {', '.join(on) or UNKNOWN}\n- Training took: {', '.join(spent) or UNKNOWN}"
    ]
    measurements = facts.get("measurements", [])
    if not measurements:
        lines.append(f"- Metrics: {UNKNOWN}")
    for measurement in measurements:
        row, protocol = measurement["row"], measurement["protocol"]
        fields = [field for field in MEASURED if row.get(field) is not None]
        steps = row.get("steps", 1)
        lines += [
            f"\n### {protocol['metric']}, {steps} step{'s' if steps != 1 else ''}\n",
            "| " + " | ".join(MEASURED[field].format(metric=protocol["metric"]) for field in fields) + " |",
            "|" + " --- |" * len(fields),
            "| " + " | ".join(f"{row[field]:.4g}" for field in fields) + " |\n",
            "Protocol:\n",
            *(f"- {key}: {_value(protocol[key])}" for key in sorted(protocol)),
        ]
    if missing := _missing([m["row"] for m in measurements], {m["protocol"]["metric"] for m in measurements}):
        lines.append(f"\nNot measured: {'; '.join(missing)}.")
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(value[key])}" for key in sorted(value))
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _missing(rows: list[dict], metrics: set[str]) -> list[str]:
    """What no measurement says."""
    found = [
        (any(row.get("recall") is not None for row in rows), "how much of the data it covers (recall)"),
        (
            any(row.get(field) is not None for row in rows for field in ("pull_to_train", "near_copies")),
            "whether it repeats training images (`pull_to_train` and `near_copies` of `advkd.evaluation` tell)",
        ),
        ("FID" in metrics, "an FID, to which distances in other feature spaces (FD-digits, FD-glyphs) do not compare"),
    ]
    return [text for measured, text in found if not measured]


def _limitations(preset: dict) -> str:
    lines = [
        "It is unconditional and knows one data set: it draws what its teacher and its training images show, at this size, "
        "and has no use beyond. What they lack or show too often, so does it.",
        "A distilled student usually covers less of the data than its teacher, and adversarial training on few images "
        "invites it to repeat them. The measurements say how much, where they were made.",
        "One training with one seed; another seed gives other weights and other numbers.",
    ]
    if preset.get("data") not in DATA:
        lines.append("Where training images show people, samples may resemble them.")
    return "\n".join(f"- {line}" for line in lines)


def _licence(preset: dict) -> str:
    if not preset:
        return f"Of the weights: {UNKNOWN}; it follows from the teacher and the data. The package `advkd` is under Apache-2.0."
    if _is_ours(preset):
        return f"Weights and package: Apache-2.0, trained from what the package ships. {SOURCES[preset['data']]}"
    return (
        "The package `advkd` is under Apache-2.0. These weights were made from a teacher and from images that it does not "
        "ship: their own licences apply."
    )
