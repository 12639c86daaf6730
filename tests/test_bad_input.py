"""What users type wrong, or hand in damaged: one line that says what is wrong and what is possible, and nothing is lost."""

import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMPipeline, DDPMScheduler, PNDMScheduler
from huggingface_hub import constants
from PIL import Image

from advkd import reproduce, run, training
from advkd import teacher as teachers
from advkd.__main__ import cli
from advkd.checkpoints import read_checkpoint_state, save_checkpoint
from advkd.files import sha256
from advkd.pipeline import StudentPipeline
from advkd.presets import load_preset
from advkd.student import Student

ROOT = Path(__file__).parents[1]

# The fields of a tiny student, and commands that are right but for what a case adds.
FEW = "--set submodules=3 --set widths=[4,6] --set teacher_dtype=float32 --set shard_size=5"
MAKE = f"trajectories --teacher teacher --count 12 --sampler-steps 10 {FEW} --out out"
LEARN = "--set submodules=3 --set widths=[4,6] --set batch_sizes=[4] --steps 6"
TRAIN = f"train --trajectories store --set real_share=0 {LEARN} --out out"
RESUME = TRAIN.replace("--out out", "--out stopped --resume")
PICTURES = (
    f"train --teacher teacher --images images {FEW} {LEARN} --set trajectories=12 --set sampler_steps=10 --out out"
)
# Regression has no critic, whose gradient would overflow before the student's first step.
DIVERGES = (
    "train --trajectories store --method regression --steps 6 --set batch_sizes=[4] --out out --set learning_rate=1e20"
)
DAMAGE = b"\x00damaged\xff"


@dataclass
class Place:
    """Where a case happens: the working directory, what was made before, and what is changed for its time."""

    path: Path
    made: Path  # a folder with teacher, store, student, few, run: to be copied
    patch: pytest.MonkeyPatch
    unet: Callable
    port: int = 0  # one that is taken
    held: list = field(default_factory=list)  # open until the end

    def copy(self, name: str, to: str = "") -> Path:
        return Path(shutil.copytree(self.made / name, self.path / (to or name)))


@dataclass(frozen=True)
class Case:
    """One mistake. `message` is a pattern of the line; `leaves` of the files that the command may honestly leave."""

    name: str
    given: Callable[[Place], object]
    command: str
    message: str
    status: int = 2
    leaves: str = ""
    says: str = ""  # a pattern of what else is on stdout than a description of the student
    usage: bool = False  # the command line's own form, of click


def nothing(place: Place) -> None:
    """The working directory is empty."""


def copies(*names: str) -> Callable[[Place], None]:
    return lambda place: [place.copy(name) for name in names] and None


def writes(name: str, content: bytes | str = DAMAGE, *names: str) -> Callable[[Place], None]:
    """A file with that content, beside copies of what was made."""

    def write(place: Place) -> None:
        copies(*names)(place)
        path = place.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def cut(name: str, original: str) -> Callable[[Place], None]:
    """A copy in which a file ends in its middle."""

    def halve(place: Place) -> None:
        place.copy(original)
        path = place.path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return halve


def edits(name: str, original: str, **changes) -> Callable[[Place], None]:
    """A copy in which a JSON file has other values; None: none."""

    def edit(place: Place) -> None:
        place.copy(original)
        path = place.path / name
        merged = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))

    return edit


def removes(name: str, original: str) -> Callable[[Place], None]:
    """A copy that lacks a file or a folder."""

    def remove(place: Place) -> None:
        place.copy(original)
        path = place.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def teaches(scheduler=DDPMScheduler, change=None, schedule: dict | None = None, **shape):
    """A teacher of another shape, or with another scheduler."""

    def teach(place: Place) -> None:
        unet = place.unet(**shape)
        if change:
            change(unet)
        DDPMPipeline(unet, scheduler(**(schedule or {}))).save_pretrained(place.path / "teacher")

    return teach


def breaks(unet) -> None:
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))


def pictures(count: int, damaged: int = 0, px: int = 16, mode: str = "L", teacher: bool = True):
    """A folder of images, the first of them damaged, beside a teacher."""

    def paint(place: Place) -> None:
        if teacher:
            place.copy("teacher")
        (place.path / "images").mkdir()
        random = np.random.default_rng(0)
        for n in range(count):
            pixels = random.integers(0, 256, (px, px) if mode == "L" else (px, px, 3), dtype=np.uint8)
            path = place.path / "images" / f"{n:03d}.png"
            Image.fromarray(pixels, mode).save(path)
            if n < damaged:
                path.write_bytes(path.read_bytes()[:20])

    return paint


def both(*steps: Callable[[Place], object]) -> Callable[[Place], None]:
    return lambda place: [step(place) for step in steps] and None


def lacks(*packages: str) -> Callable[[Place], None]:
    """Packages that are not installed."""
    return lambda place: [place.patch.setitem(sys.modules, name, None) for name in packages] and None


def lacks_onnxruntime(place: Place) -> None:
    importlib.import_module("diffusers.pipelines.onnx_utils")  # which would look for it too
    lacks("onnxruntime")(place)


def no_shards(place: Place) -> None:
    for shard in place.copy("store").glob("*.safetensors"):
        shard.unlink()


def loss_is_nan(place: Place) -> None:
    place.patch.setattr(teachers, "denoising_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))


def offline(place: Place) -> None:
    place.patch.setattr(constants, "HF_HUB_OFFLINE", True)


def takes_a_port(place: Place) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    place.port = taken.getsockname()[1]
    place.held.append(taken)


def smaller_student(place: Place) -> None:
    StudentPipeline(Student(image_size_px=8, channels=1, submodules=1, widths=(4,))).save_pretrained(
        place.path / "small"
    )


def lacks_a_step(place: Place) -> None:
    path = place.path / "stopped" / "curves.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))


def another_architecture(place: Place) -> None:
    """A checkpoint that says the right preset, but has the weights of another student."""
    path = place.path / "stopped" / "checkpoint.safetensors"
    other = Student(16, 1, 3, (8, 6), "residual", "light")
    save_checkpoint(path, {"student": other}, {}, read_checkpoint_state(path))


def checkpoints_at_every_step(place: Place) -> None:
    place.patch.setattr("advkd.checkpoints.CHECKPOINT_EVERY", 1)


def notebook(place: Place) -> None:
    """A checkout with one quick notebook."""
    (place.path / "notebooks").mkdir()
    (place.path / "pyproject.toml").touch()
    text = 'preset: str = "digits"  # help\nsteps: int = 3  # help\ncount: int = 2  # help\nshare: float = 0.5  # help'
    declare = nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]})
    body = "from advkd.presets import load_preset\n_ = load_preset(preset, steps=steps, trajectories=count)"
    made = nbformat.v4.new_notebook(cells=[declare, nbformat.v4.new_code_cell(body)])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, place.path / "notebooks" / "a.ipynb")
    place.patch.setattr(reproduce, "NOTEBOOKS", ("a",))


def sets(name: str, assignment: str, message: str, command: str = "trajectories --preset digits") -> Case:
    """A field with a wrong value; it is refused before anything is read, so that nothing needs to be there."""
    return Case(name, nothing, f"{command} --out out --set {shlex.quote(assignment)}", message)


CASES = [
    # ---- names ----
    Case("a recipe as a method", nothing, "train --method improved --out out", "'improved' is not one of", usage=True),
    Case("a recipe beside a method", nothing, "train --method add --recipe paper --out out", "--recipe paper"),
    Case(
        "a method as a recipe of the paper",
        nothing,
        "trajectories --recipe gan --out out",
        "'gan'; recipes: paper, improved, add",
    ),
    Case("a budget", nothing, "compare --budget 3", "no budget 3.0; budgets: "),
    Case("a budget that is no number", nothing, "compare --budget nan", "no budget nan; budgets: "),
    Case("a contestant", nothing, "compare --method gan", "no method 'gan'; methods: 'Adv-KD', "),
    Case("a study of another preset", nothing, "compare --preset cifar10", "'cifar10'; presets: digits"),
    Case(
        "ablations of another preset",
        nothing,
        "ablate --preset cifar10",
        "'cifar10' has no embedded images to compare with; presets: digits",
    ),
    Case("a kind of benchmark", nothing, "benchmark --only gpu", "no kind 'gpu'; kinds: matrix, teacher"),
    Case("a kind of deployment", nothing, "deploy --only gpu", "no kind 'gpu'; kinds: teacher, student, trained"),
    Case("a preset of a benchmark", nothing, "benchmark --preset mnist", "no preset 'mnist'; presets: digits"),
    Case("a preset of a deployment", nothing, "deploy --preset mnist", "no preset 'mnist'; presets: digits"),
    Case(
        "a preset of an evaluation",
        copies("student"),
        "evaluate student --preset mnist --out x.json",
        "no preset 'mnist'; presets: digits",
    ),
    Case("a preset of a teacher", nothing, "teacher --preset mnist --out out", "no preset 'mnist'; presets: digits"),
    Case(
        "a preset of an extractor", nothing, "extractor --preset mnist --out out", "no preset 'mnist'; presets: digits"
    ),
    Case("a preset of a reproduction", notebook, "reproduce --preset mnist", "no preset 'mnist'; presets: digits"),
    Case(
        "own without a teacher",
        nothing,
        "trajectories --preset own --out out",
        "'own' follows from a teacher: give one",
    ),
    Case(
        "a sampler",
        nothing,
        "trajectories --preset digits --sampler euler --out out",
        "sampler is 'euler', but must be one of 'ddpm', 'ddim'",
    ),
    Case("a format", copies("student"), "export student --format tflite --out x", "'tflite' is not 'onnx'", usage=True),
    Case("a missing option", copies("student"), "export student", "Missing option '--out'", usage=True),
    Case(
        "a word for a number",
        copies("student"),
        "sample student --count many --out x.png",
        "'many' is not a valid integer",
        usage=True,
    ),
    Case(
        "a negative seed",
        copies("student"),
        "sample student --seed -1 --out x.png",
        "-1 is not in the range",
        usage=True,
    ),
    # ---- fields ----
    sets("a size that is no power of two", "image_size_px=24", "image_size_px is 24, but must be a power of two"),
    sets("a size of 4", "image_size_px=4", "image_size_px is 4, but must be a power of two, 8 or more"),
    sets("a size as text", 'image_size_px="16px"', "image_size_px is '16px', but must be a whole number"),
    sets("a size with a fraction", "image_size_px=16.5", "image_size_px is 16.5, but must be a whole number"),
    sets("no submodules", "submodules=0", "submodules is 0, but must be 1 or more"),
    sets("negative submodules", "submodules=-3", "submodules is -3, but must be 1 or more"),
    sets(
        "more submodules than states",
        "submodules=1001",
        "submodules is 1001, but must be 1 or more, 1000 at most",
    ),
    sets("true for a number", "submodules=true", "submodules is True, but must be a whole number"),
    sets(
        "widths of another length",
        "widths=[4,6,8]",
        "widths has 3 entries .4, 6, 8., but the submodules' images have .8, 16. px",
    ),
    sets(
        "widths that fit other submodules",
        "submodules=1",
        "widths has 2 entries .44, 16., but the submodules' images have .16. px",
    ),
    sets("no widths", "widths=[]", r"widths has 0 entries \(\), but"),
    sets("a width of 0", "widths=[0,6]", r"widths is \(0, 6\), but must be positive"),
    sets("a width with a fraction", "widths=[4.5,6]", r"widths is \(4.5, 6\), but must be a tuple of whole numbers"),
    sets("a width as text", 'widths=["4","6"]', "widths is .'4', '6'., but must be a tuple of whole numbers"),
    sets("a number for a tuple", "widths=4", "widths is 4, but must be a tuple of whole numbers"),
    sets("steps that do not divide 1000", "sampler_steps=30", "sampler_steps is 30, but must divide 1000"),
    sets("more steps than timesteps", "sampler_steps=2000", "sampler_steps is 2000, but must divide 1000"),
    sets("a share above 1", "real_share=1.5", r"real_share is 1.5, but must lie in \[0, 1\]"),
    sets("a share below 0", "fresh_share=-0.1", r"fresh_share is -0.1, but must lie in \[0, 1\]"),
    sets("an average above 1", "ema=1.01", r"ema is 1.01, but must lie in \[0, 1\]"),
    sets("NaN", "learning_rate=NaN", "learning_rate is nan, but must be a finite number"),
    sets("infinity", "penalty_weight=Infinity", "penalty_weight is inf, but must be a finite number"),
    sets("a learning rate of 0", "learning_rate=0", "learning_rate is 0, but must be positive"),
    sets("a negative seed of the weights", "seed=-1", "seed is -1, but must not be negative"),
    sets(
        "a negative seed of the trajectories", "trajectory_seed=-5", "trajectory_seed is -5, but must not be negative"
    ),
    sets(
        "a seed that no generator takes",
        "seed=36893488147419103232",
        "seed is 36893488147419103232, but must be below 2 .. 63",
    ),
    sets("a batch of 1", "batch_sizes=[1]", r"batch_sizes is \(1,\), but needs .* 2 or more"),
    sets("no batch", "batch_sizes=[]", r"batch_sizes is \(\), but needs at least one size"),
    sets(
        "a batch with a fraction", "batch_sizes=[4.5]", r"batch_sizes is \(4.5,\), but must be a tuple of whole numbers"
    ),
    sets("three betas", "betas=[0,0.9,0.99]", r"betas is \(0, 0.9, 0.99\), but must be two numbers in \[0, 1\)"),
    sets("a beta of 1", "betas=[0,1]", r"betas is \(0, 1\), but must be two numbers in \[0, 1\)"),
    sets(
        "NaN in a tuple", "feature_noise=[NaN,1]", r"feature_noise is \(nan, 1\), but must be a tuple of finite numbers"
    ),
    sets("null", "ema=null", "ema is None, but must be a finite number"),
    sets("an object", 'widths={"a":1}', "widths is .'a': 1., but must be a tuple of whole numbers"),
    sets("a word for yes", "teacher_compile=yes", "teacher_compile is 'yes', but must be true or false"),
    sets("a number for a name", "teacher=5", "teacher is no field to set; write --teacher 5"),
    sets("a block", "block=dense", "block is 'dense', but must be one of 'plain', 'residual'"),
    sets(
        "a latent of a student",
        "latent=noise",
        "latent is 'noise', but must be one of 'shrink8bit', 'block-mean', 'full'",
    ),
    sets("a dtype", "teacher_dtype=float16", "teacher_dtype is 'float16', but must be one of 'float32', 'bfloat16'"),
    sets("a target that is not stored", 'stored=["xt"]', r"stored is \('xt',\), but must hold the target 'x0'"),
    sets("digits in colour", "channels=3", "channels is 3, but the digits are grey: channels=1"),
    sets("no trajectories", "trajectories=0", "trajectories is 0, but must be positive"),
    sets("an empty shard", "shard_size=0", "shard_size is 0, but must be positive"),
    sets(
        "a submodule that is not there", "unsupervised=[11]", "unsupervised names submodule 11, but there are 0 to 10"
    ),
    sets(
        "a share of fresh latents in stages",
        "schedule=staged",
        "fresh_share is 0.75, but staged training .* fresh_share=0",
    ),
    sets(
        "a student without timesteps",
        "student_timesteps=[]",
        r"student_timesteps is \(\), but must be",
        "trajectories --recipe add",
    ),
    sets(
        "a timestep with a fraction",
        "student_timesteps=[499.5,999]",
        "student_timesteps is .* whole numbers",
        "trajectories --recipe add",
    ),
    sets(
        "a grid that cannot be halved",
        "student_grid=12",
        "student_grid is 12, but must be 1 times a power of two",
        "trajectories --recipe progressive",
    ),
    sets("a field of the recipe's", "recipe=paper", "recipe is no field to set; write --recipe paper"),
    sets("a field of the preset's", "name=cifar10", "name is no field to set; write --preset cifar10"),
    Case(
        "epochs that are no number",
        nothing,
        "train --recipe paper --epochs nan --out out",
        "epochs is nan, but must be a finite number",
    ),
    Case(
        "epochs of the paper's recipe",
        nothing,
        "quality --paper-epochs nan --preset digits",
        "epochs is nan, but must be a finite number",
    ),
    Case(
        "a learning rate of the extractor",
        nothing,
        "extractor --learning-rate nan --out out",
        "--learning-rate is nan, but must be a positive",
    ),
    Case(
        "a name by --set",
        nothing,
        "trajectories --preset digits --set images=5 --out out",
        "images is 5, but must be text",
    ),
    Case(
        "another size than a teacher's of one's own",
        copies("teacher"),
        MAKE + " --set image_size_px=32",
        "image_size_px is 32, but teacher 'teacher' makes 16; leave it out",
    ),
    Case(
        "other channels than a teacher's of one's own",
        copies("store", "teacher"),
        MAKE + " --set channels=3",
        "channels is 3, but teacher 'teacher' makes 1; leave it out",
    ),
    Case(
        "a field without a value",
        nothing,
        "trajectories --preset digits --set ema --out out",
        "--set ema has no value; write --set ema=VALUE",
    ),
    # ---- teachers ----
    Case(
        "a teacher in colour",
        teaches(channels=3),
        MAKE + " --preset digits",
        "teacher 'teacher' maps 3 to 3 channels at 16 px, but preset 'digits' has 1 at 16; preset 'own'",
    ),
    Case(
        "a teacher of another size",
        teaches(size_px=8),
        MAKE + " --preset digits",
        "teacher 'teacher' maps 1 to 1 channels at 8 px, but preset 'digits' has 1 at 16",
    ),
    Case(
        "a teacher of no power of two",
        teaches(size_px=24),
        MAKE,
        "teacher 'teacher' makes images of 24 px; it must be a power of two",
    ),
    Case(
        "a teacher of two channels",
        teaches(channels=2),
        MAKE,
        "teacher 'teacher' makes images of 2 channels; it must be 1 or 3",
    ),
    Case(
        "an unknown scheduler",
        teaches(PNDMScheduler),
        MAKE,
        "teacher 'teacher' has a PNDMScheduler; supported schedulers: DDPMScheduler, DDIMScheduler",
    ),
    Case(
        "a missing scheduler",
        removes("teacher/scheduler", "teacher"),
        MAKE,
        "teacher 'teacher' has no .*scheduler_config.json",
    ),
    Case("a missing unet", removes("teacher/unet", "teacher"), MAKE, "teacher 'teacher' has no UNet2DModel"),
    Case(
        "an unknown prediction",
        edits("teacher/scheduler/scheduler_config.json", "teacher", prediction_type="flow"),
        MAKE,
        "teacher 'teacher' predicts 'flow'.*epsilon, v_prediction, sample",
    ),
    Case(
        "500 timesteps",
        teaches(schedule={"num_train_timesteps": 500}),
        MAKE,
        "teacher 'teacher' has 500 timesteps; only 1000 are supported",
    ),
    Case(
        "weights that are no numbers",
        teaches(change=breaks),
        MAKE,
        "the teacher 'teacher' gives values that are not finite; check its weights",
        leaves="out/manifest.json",
    ),
    Case(
        "cut weights",
        cut("teacher/unet/diffusion_pytorch_model.safetensors", "teacher"),
        MAKE,
        "teacher 'teacher' has no UNet2DModel.*",
    ),
    Case(
        "a damaged description",
        writes(
            "teacher/unet/config.json",
            "{",
        ),
        MAKE,
        "teacher 'teacher' has no UNet2DModel.*teacher/unet/config.json",
    ),
    Case(
        "a description that is a list",
        writes(
            "teacher/unet/config.json",
            "[]",
        ),
        MAKE,
        "teacher 'teacher' has no UNet2DModel.*teacher/unet/config.json",
    ),
    Case(
        "a damaged scheduler",
        both(copies("teacher"), writes("teacher/scheduler/scheduler_config.json", "{")),
        MAKE,
        "teacher 'teacher' has no .*scheduler_config.json",
    ),
    Case(
        "a scheduler that is a list",
        both(copies("teacher"), writes("teacher/scheduler/scheduler_config.json", "[]")),
        MAKE,
        "teacher 'teacher' has no .*scheduler_config.json",
    ),
    Case(
        "a folder that is no teacher", writes("teacher/notes.txt", "none"), MAKE, "teacher 'teacher' has no UNet2DModel"
    ),
    Case(
        "a student for a teacher",
        copies("student"),
        MAKE.replace("--teacher teacher", "--teacher student"),
        "teacher 'student' has no UNet2DModel",
    ),
    Case("a file for a teacher", writes("teacher", "none"), MAKE, "teacher 'teacher' is a file; give the folder"),
    Case(
        "a hub id without a network",
        offline,
        "trajectories --teacher someone/teacher --out out",
        "teacher 'someone/teacher' is not on this machine: give a folder .* hf download someone/teacher",
    ),
    Case(
        "neither a folder nor a hub id",
        nothing,
        "trajectories --teacher 'a b!' --out out",
        "teacher 'a b!' is neither a folder that exists nor a hub id",
    ),
    Case(
        "a teacher without a name",
        nothing,
        "trajectories --teacher '' --preset own --out out",
        "'own' follows from a teacher: give one",
    ),
    # ---- images ----
    Case(
        "no image in a folder",
        writes("images/notes.txt", "none", "teacher"),
        PICTURES,
        "no images in 'images' .looked for .png, ",
    ),
    Case("an empty folder of images", pictures(0), PICTURES, "no images in 'images'"),
    Case(
        "one damaged image of few",
        pictures(20, damaged=1),
        PICTURES,
        "1 of 20 images in 'images' cannot be read, more than 1 %: 000.png; mend or remove",
        leaves="runs/images/.*/lock",
    ),
    Case(
        "damaged images alone",
        pictures(7, damaged=7),
        PICTURES,
        "7 of 7 images in 'images' cannot be read, .* 000.png, .*, ...; mend or remove",
        leaves="runs/images/.*/lock",
    ),
    Case(
        "a file for images",
        writes("images", "none", "teacher"),
        PICTURES,
        "images 'images' is not a folder; give one with png",
    ),
    Case(
        "images that are not there", copies("teacher"), PICTURES, "images 'images' is not a folder; give one with png"
    ),
    Case(
        "images of a recipe that uses none",
        pictures(3),
        PICTURES.replace("--steps 6", "--recipe paper"),
        "--images have no effect on recipe 'paper', which trains without real images; leave them out",
    ),
    Case(
        "images of a method that uses none",
        pictures(3),
        PICTURES.replace("--steps 6", "--method regression --steps 6"),
        "recipe 'regression' trains without real images; leave them out",
    ),
    Case(
        "images of the digits",
        both(copies("store"), pictures(3)),
        TRAIN.replace("train", "train --images images", 1).replace("--set real_share=0", ""),
        "images is 'images', but preset 'digits' has images of its own: images=''",
    ),
    Case(
        "images of the hub without datasets",
        both(copies("teacher"), lacks("datasets")),
        PICTURES.replace("--images images", "--images hf:a/b"),
        "images 'hf:a/b' need the package datasets: pip install",
    ),
    # ---- stores ----
    Case(
        "a store of another sampler",
        copies("teacher", "store"),
        MAKE.replace("--out out", "--out store --sampler ddpm"),
        "store holds other trajectories .*sampler: made with 'ddim', wanted 'ddpm'.*; choose another folder",
    ),
    Case(
        "a store of another K",
        copies("store"),
        TRAIN.replace("submodules=3", "submodules=5"),
        "store do not fit the preset .submodules: made with 3, wanted 5",
    ),
    Case(
        "a store of another size",
        copies("store"),
        TRAIN + " --set image_size_px=32 --set widths=[4,6,8]",
        "image_size_px: made with 16, wanted 32",
    ),
    Case(
        "a store of another preset's images, for a method that reads images alone",
        copies("store"),
        "train --preset glyphs --trajectories store --method dmd --steps 6 --out out",
        "trajectories in store do not fit the preset .channels: made with 1, wanted 3",
    ),
    Case(
        "a store of another teacher",
        both(teaches(seed=5), copies("store")),
        MAKE.replace("--out out", "--out store") + " --set sampler=ddim",
        "store holds other trajectories .*teacher_fingerprint: made with '",
    ),
    Case(
        "a missing shard",
        removes("store/shard-00001.safetensors", "store"),
        TRAIN,
        "store/shard-00001.safetensors is damaged or missing; remove it and run the command that made it again",
    ),
    Case(
        "a damaged shard",
        both(copies("store"), writes("store/shard-00001.safetensors")),
        TRAIN,
        "store/shard-00001.safetensors is damaged or missing; remove it and run",
    ),
    Case(
        "a store without shards",
        no_shards,
        TRAIN,
        "store/shard-00000.safetensors is damaged or missing; remove it and run the command",
    ),
    Case(
        "a store that forgot its shards",
        edits("store/manifest.json", "store", shards={}),
        TRAIN,
        "store/manifest.json is damaged .its checksum differs.; remove store",
    ),
    Case(
        "a damaged manifest",
        both(copies("store"), writes("store/manifest.json")),
        TRAIN,
        "store/manifest.json is damaged .*; remove store and generate it again",
    ),
    Case(
        "a damaged manifest of a store that is continued",
        both(copies("teacher", "store"), writes("store/manifest.json", "{")),
        MAKE.replace("--out out", "--out store"),
        "store/manifest.json is damaged .*; remove store and generate it again",
    ),
    Case(
        "a store's folder that is a file",
        writes("store", "none"),
        TRAIN,
        "store holds no trajectories .*; make them with: python -m advkd trajectories",
    ),
    Case(
        "a store's teacher beside a store",
        copies("teacher", "store"),
        TRAIN + " --teacher teacher",
        "--teacher has made the --trajectories",
    ),
    Case(
        "a run for a store",
        copies("run"),
        TRAIN.replace("--trajectories store", "--trajectories run"),
        "run holds no trajectories .no manifest.json",
    ),
    Case(
        "fewer trajectories than a batch",
        copies("store"),
        "train --recipe paper --trajectories store --set submodules=3 --set widths=[4,6] --out out",
        "trajectories is 12, fewer than a batch of 64: make more of them, or have smaller batch_sizes",
    ),
    # ---- runs ----
    Case(
        "a run of another preset",
        copies("store", "stopped"),
        RESUME.replace("--steps 6", "--steps 7"),
        "stopped belongs to another preset .steps: made with 6, wanted 7.; choose another folder",
    ),
    Case(
        "a run before its first checkpoint",
        writes("early/run.json", "{}"),
        "sample early --out x.png",
        "early holds a training that was interrupted, or has not come to its first checkpoint",
    ),
    Case(
        "a run of another K",
        copies("store", "stopped"),
        RESUME + " --set block=plain",
        "stopped belongs to another preset .block: made with 'residual', wanted 'plain'",
    ),
    Case(
        "a checkpoint of another architecture",
        both(copies("store", "stopped"), another_architecture),
        RESUME,
        "stopped/checkpoint.safetensors is not a readable checkpoint .it holds another student: .*; remove it to start afresh",
        leaves="stopped/logs/.*",
    ),
    Case(
        "a damaged checkpoint",
        both(copies("store", "stopped"), writes("stopped/checkpoint.safetensors")),
        RESUME,
        "stopped/checkpoint.safetensors is not a readable checkpoint .*; remove it to start afresh",
    ),
    Case(
        "a cut checkpoint",
        both(cut("stopped/checkpoint.safetensors", "stopped"), copies("store")),
        RESUME,
        "stopped/checkpoint.safetensors is not a readable checkpoint",
    ),
    Case(
        "damaged curves",
        both(copies("store", "stopped"), writes("stopped/curves.csv")),
        RESUME,
        "stopped/curves.csv is damaged .*; remove stopped to start afresh",
    ),
    Case(
        "curves that lack a step",
        both(copies("store", "stopped"), lacks_a_step),
        RESUME,
        "stopped/curves.csv is damaged .not every step is there.; remove stopped",
    ),
    Case(
        "missing curves",
        both(removes("stopped/curves.csv", "stopped"), copies("store")),
        RESUME,
        "stopped/curves.csv is missing; remove stopped to start afresh",
    ),
    Case(
        "a missing run.json",
        both(removes("stopped/run.json", "stopped"), copies("store")),
        RESUME,
        "stopped does not say what it holds .no run.json.; choose another folder or remove it",
    ),
    Case(
        "a damaged run.json",
        both(copies("store", "stopped"), writes("stopped/run.json", "{")),
        RESUME,
        "stopped/run.json does not describe a run",
    ),
    Case(
        "a run.json that is a list",
        both(copies("store", "stopped"), writes("stopped/run.json", "[]")),
        RESUME,
        "stopped/run.json does not describe a run",
    ),
    Case(
        "a finished run without --resume",
        copies("store", "run"),
        TRAIN.replace("--out out", "--out run"),
        "run holds a run already; go on with --resume, choose another folder",
    ),
    Case(
        "a stopped run without --resume",
        copies("store", "stopped"),
        RESUME.replace(" --resume", ""),
        "stopped holds a run already; go on with --resume, choose another folder",
    ),
    Case(
        "a folder that is a file",
        writes("out", "none", "store"),
        TRAIN,
        "out.* cannot be written .*choose another place",
    ),
    Case(
        "a folder below a file",
        writes("file", "none", "store"),
        TRAIN.replace("--out out", "--out file/run"),
        "file/run.* cannot be written .*choose another place",
    ),
    Case(
        "trajectories below a file",
        writes("file", "none", "teacher"),
        MAKE.replace("--out out", "--out file/store"),
        "file.* cannot be written .*choose another place",
    ),
    Case(
        "a teacher below a file",
        writes("file", "none"),
        "teacher --steps 1 --out file/teacher",
        "file.* cannot be written .*choose another place",
    ),
    Case(
        "an extractor below a file",
        writes("file", "none"),
        "extractor --steps 1 --out file/extractor",
        "file.* cannot be written .*choose another place",
    ),
    Case(
        "a result below a file",
        writes("file", "none", "student"),
        "evaluate student --count 64 --out file/x.json",
        "file.* cannot be written .*choose another place",
    ),
    Case(
        "a page below a file",
        writes("file", "none", "student"),
        "demo student --no-serve --out file/page",
        "file.* cannot be written .*choose another place",
    ),
    Case(
        "an export below a file",
        writes("file", "none", "student"),
        "export student --out file/x.onnx",
        "file/x.onnx cannot be written .*; make room for it or choose another place",
    ),
    Case(
        "figures that are a file",
        writes("figures", "none"),
        "benchmark --preset digits --only reading",
        "figures cannot be written .*choose another place",
    ),
    Case(
        "a study below figures that are a file",
        writes("figures", "none"),
        "compare --method teacher",
        "figures/digits cannot be written .*choose another place",
    ),
    Case(
        "a damaged table of a study",
        writes("figures/digits/ablations.json", "[]"),
        "ablate --group waterfall",
        "figures/digits/ablations.json is damaged .*; restore or remove it",
    ),
    # ---- students ----
    Case(
        "a folder without a student to sample",
        writes("empty/notes.txt", "none"),
        "sample empty --out x.png",
        "empty holds no student; give the folder of a finished training .* or of a saved pipeline",
    ),
    Case(
        "a folder without a student to export",
        writes("empty/notes.txt", "none"),
        "export empty --out x.onnx",
        "empty holds no student; give the folder of a finished training .* or of a saved pipeline",
    ),
    Case(
        "a folder without a student to show",
        writes("empty/notes.txt", "none"),
        "demo empty",
        "empty holds no student; give the folder of a finished training .* or of a saved pipeline",
    ),
    Case(
        "a teacher for a student",
        copies("teacher"),
        "sample teacher --out x.png",
        "teacher holds no readable student .*'DDPMPipeline'.*",
    ),
    Case(
        "a file for a student",
        writes("student", "none"),
        "sample student --out x.png",
        "student holds no student .there is no such folder.; give the folder",
    ),
    Case(
        "a student without its weights",
        removes("student/student/diffusion_pytorch_model.safetensors", "student"),
        "sample student --out x.png",
        "student holds no readable student .*diffusion_pytorch_model.safetensors is damaged or missing",
    ),
    Case(
        "a student with cut weights",
        cut("student/student/diffusion_pytorch_model.safetensors", "student"),
        "export student --out x.onnx",
        "student holds no readable student .*diffusion_pytorch_model.safetensors is damaged or missing",
    ),
    Case(
        "an unknown latent of a student",
        edits("student/student/config.json", "student", latent="noise"),
        "sample student --out x.png",
        "student holds no readable student .*'noise'.*block-mean.*",
    ),
    Case(
        "an unknown block of a student",
        edits("student/student/config.json", "student", block="dense"),
        "sample student --out x.png",
        "student holds no readable student .*'dense'.*plain.*",
    ),
    Case(
        "too few images for a metric",
        copies("student"),
        "evaluate student --count 10 --out x.json",
        "10 images are too few for 64 features; .*--count.*--few",
    ),
    Case(
        "a smaller student",
        smaller_student,
        "evaluate small --count 64 --out x.json",
        "small makes 1 channels at 8 px, but preset 'digits' has 1 at 16",
    ),
    Case(
        "steps of a one-step student",
        copies("student"),
        "evaluate student --count 64 --steps 3 --out x.json",
        "steps is 3, but this student makes its images in one",
    ),
    Case(
        "steps of a sampled one-step student",
        copies("student"),
        "sample student --steps 3 --out x.png",
        "steps is 3, but this student makes its images in one",
    ),
    Case(
        "steps that do not divide",
        copies("few"),
        "sample few --steps 3 --out x.png",
        "steps is 3, but must be 1 or 2 or 4: the student's timesteps are .999, 749, 499, 249.",
    ),
    Case(
        "an Inception that is not there",
        copies("student"),
        "evaluate student --inception i.pth --out x.json",
        "i.pth is no Inception weights file; give one, or 'download'",
    ),
    Case(
        "an Inception of another kind",
        writes("i.pth", DAMAGE, "student"),
        "evaluate student --inception i.pth --out x.json",
        "i.pth does not hold weights alone",
    ),
    Case(
        "images for the digits' student",
        copies("student"),
        "evaluate student --images images --out x.json",
        "images is 'images', but preset 'digits' has images of its own: images=''",
    ),
    Case(
        "a reference of another preset",
        copies("student"),
        "evaluate student --preset glyphs --count 64 --out x.json",
        "student makes 1 channels at 16 px, but preset 'glyphs' has 3 at 32",
    ),
    Case(
        "a tolerance that no export keeps",
        copies("student"),
        "export student --tolerance 1e-12 --out x.onnx",
        "the exported student differs from torch by .*, more than 1e-12; not written .--tolerance.",
    ),
    Case(
        "a tolerance of 0",
        copies("student"),
        "export student --tolerance 0 --out x.onnx",
        "tolerance is 0.0, but must be a positive",
    ),
    Case(
        "a tolerance that is no number",
        copies("student"),
        "export student --tolerance nan --out x.onnx",
        "tolerance is nan, but must be a positive",
    ),
    Case(
        "a few-step student to export",
        copies("few"),
        "export few --out x.onnx",
        "few holds a few-step student .a U-Net.; only",
    ),
    Case(
        "a few-step student to show",
        copies("few"),
        "demo few --no-serve --out page",
        "few is a few-step student.*; give one of recipe 'improved'",
    ),
    Case(
        "a folder to export to",
        copies("student"),
        "export student --out student",
        "'student' is a directory",
        usage=True,
    ),
    Case(
        "an export without onnxruntime",
        both(copies("student"), lacks_onnxruntime),
        "export student --out x.onnx",
        "an export needs the package 'onnxruntime': pip install -U onnx onnxruntime onnxscript",
    ),
    Case(
        "a page without onnx",
        both(copies("student"), lacks("onnx")),
        "demo student --no-serve --out page",
        "an export needs the package 'onnx': pip install -U onnx onnxruntime onnxscript",
    ),
    Case(
        "a taken port",
        both(copies("student"), takes_a_port),
        "demo student --out page --port {port}",
        "port {port} is taken; choose another, or leave --port out",
    ),
    Case("a port beyond all", copies("student"), "demo student --port 70000", "70000 is not in the range", usage=True),
    Case(
        "no page to keep",
        copies("student"),
        "demo student --no-serve",
        "--no-serve without --out leaves nothing behind; say where to write: --out FOLDER",
    ),
    Case(
        "a student of another size to deploy",
        smaller_student,
        "deploy small --only trained",
        "small makes images of .1, 8, 8., but the trained one's are digits, .1, 16, 16.",
    ),
    Case(
        "a few-step student to deploy",
        copies("few"),
        "deploy few --only trained",
        "few holds a few-step student .a U-Net.; only students made of submodules",
    ),
    Case("no student to deploy", nothing, "deploy nowhere --only trained", "nowhere holds no student"),
    Case(
        "a damaged table of deployments",
        writes("figures/deploy.json", "{", "student"),
        "deploy student --only trained",
        "figures/deploy.json is damaged .*; remove it and measure all of it, without --only",
    ),
    Case(
        "a damaged table of benchmarks",
        writes("figures/benchmark.json", "{"),
        "benchmark --preset digits --only reading",
        "figures/benchmark.json is damaged .*; remove it and measure all of it, without --only",
    ),
    # ---- machines ----
    Case("no GPU", copies("store"), TRAIN + " --device cuda", "device 'cuda' is not available here; available: cpu"),
    Case(
        "no GPU of that number",
        copies("teacher"),
        MAKE + " --device cuda:7",
        "device 'cuda:7' is not available here; available: cpu",
    ),
    Case("no Apple", copies("teacher"), MAKE + " --device mps", "device 'mps' is not available here; available: cpu"),
    Case("no TPU", nothing, "benchmark --device tpu", "device 'tpu' is not available here; available: cpu"),
    Case("no threads", nothing, "--threads 0 compare", "0 is not in the range", usage=True),
    # ---- trainings ----
    Case(
        "a training that diverges",
        both(copies("store"), checkpoints_at_every_step),
        DIVERGES,
        "not finite at step [2-6] .*; the last checkpoint is kept. Train with a smaller learning_rate than 1e.20",
        leaves="out/.*",
    ),
    Case(
        "a teacher whose loss is no number",
        loss_is_nan,
        "teacher --steps 3 --out out",
        "the loss is nan at step 1; .* Check the images, or train with a smaller learning_rate than 0.001",
    ),
    Case(
        "a seed of a teacher that no generator takes",
        nothing,
        "teacher --seed 9223372036854775808 --out out",
        "9223372036854775808 is not in the range",
        usage=True,
    ),
    Case(
        "an extractor that diverges",
        nothing,
        "extractor --learning-rate 1e30 --steps 20 --out out",
        "the loss is (nan|inf) at step .*; train with a smaller learning_rate than 1e.30",
    ),
    Case(
        "features without transformers",
        both(copies("store"), lacks("transformers")),
        "train --trajectories store --method add --steps 2 --set features=dino --out out",
        "features 'dino' need the package transformers: pip install",
    ),
    Case(
        "features that are no DINOv2",
        both(writes("dino/config.json", "{}", "store")),
        "train --trajectories store --method add --steps 2 --set features=dino --out out",
        "features 'dino' are no DINOv2",
    ),
    Case(
        "features of another method",
        copies("store"),
        TRAIN + " --set features=dino",
        "features is 'dino', but method 'advkd' does not use it",
    ),
    # ---- notebooks ----
    Case("outside of a checkout", nothing, "reproduce", "not inside a checkout of advkd"),
    Case(
        "a parameter that no notebook has",
        notebook,
        "reproduce -p stepz 3",
        "no notebook has a parameter 'stepz'; parameters: count, preset, share, steps",
    ),
    Case("a parameter without a value", notebook, "reproduce -p steps", "requires 2 arguments", usage=True),
    Case(
        "a parameter out of range",
        notebook,
        "reproduce -p steps 0",
        "notebook a failed in cell .3. of runs/digits/a.ipynb: UserError: steps is 0, but must be positive",
        status=1,
        leaves="runs/digits/.*",
        says="a ...\n[\\s\\S]*a +\\d+ +failed.*\n",
    ),
    Case(
        "a parameter of a wrong type",
        notebook,
        "reproduce -p count text",
        "parameter count is 'text', but must be a whole number",
    ),
    Case(
        "a fraction for a whole number",
        notebook,
        "reproduce -p count 2.5",
        "parameter count is '2.5', but must be a whole number",
    ),
    Case("a word for a share", notebook, "reproduce -p share half", "parameter share is 'half', but must be a number"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, teacher_folder, store, improved, teacher):
    """What cases damage a copy of: a teacher, a store, a student of each kind, a run that is finished and one that is not."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(teacher_folder, folder / "teacher")
    shutil.copytree(store.folder, folder / "store")
    StudentPipeline(Student.from_preset(improved)).save_pretrained(folder / "student")
    few = load_preset("digits", "add", teacher=teacher.source)
    run.new_pipeline(few, teacher).save_pretrained(folder / "few")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(cli, shlex.split(TRAIN.replace("--out out", "--out run")))
        assert result.exit_code == 0, result.output
        shutil.copytree("run", "stopped", ignore=shutil.ignore_patterns("student"))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, made, make_unet):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, made, monkeypatch, make_unet)


def checksums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def filled(text: str, place: Place) -> str:
    """With what only its preparation knows; braces of JSON and of patterns stay."""
    return text.replace("{port}", str(place.port))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_one_line_that_helps_and_costs_nothing(place, case):
    case.given(place)
    before = checksums(place.path)
    result = CliRunner().invoke(cli, shlex.split(filled(case.command, place)))
    assert isinstance(result.exception, SystemExit), result.output
    assert result.exit_code == case.status, result.output
    line, message = result.stderr, filled(case.message, place)
    if case.usage:
        line = line[line.index("Error: ") :].replace("Error: ", "advkd: error: ", 1)
    assert re.fullmatch(f"advkd: error: [^\n]*{message}[^\n]*\n", line), line
    described = r"([\w-]+: \d+ x \d+ x \d+, recipe [^\n]*\n(  submodule [^\n]*\n)*)?"
    assert re.fullmatch(described + case.says, result.stdout), result.stdout
    after = checksums(place.path)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after.keys() - before if not (case.leaves and re.fullmatch(case.leaves, name))]


def test_a_shell_sees_status_2_and_one_line_on_stderr(tmp_path):
    told = {
        "export nowhere --out x.onnx": "nowhere holds no student .there is no such folder.; give the folder",
        "trajectories --set submodules=0 --out out": "submodules is 0, but must be 1 or more",
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_HOME": ""}  # torch tells where that one is
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment}
    started = [
        subprocess.Popen([sys.executable, "-m", "advkd", *shlex.split(command)], **options) for command in told
    ]  # side by side: most of their time goes into imports
    for process, message in zip(started, told.values(), strict=True):
        stdout, stderr = process.communicate()
        assert (process.returncode, stdout) == (2, ""), stderr
        assert re.fullmatch(f"advkd: error: {message}[^\n]*\n", stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_keeps_its_last_good_checkpoint(place, monkeypatch):
    place.copy("store")
    checkpoints_at_every_step(place)
    kept = []

    def keep(path, *rest):
        save_checkpoint(path, *rest)
        kept.append(path.read_bytes())

    monkeypatch.setattr(training, "save_checkpoint", keep)
    result = CliRunner().invoke(cli, shlex.split(DIVERGES))
    step = int(re.search("not finite at step ([0-9]+)", result.stderr)[1])
    path = place.path / "out" / "checkpoint.safetensors"
    assert path.read_bytes() == kept[-1]
    assert read_checkpoint_state(path)["step"] == step - 1 == len(kept)
    assert not (place.path / "out" / "student").exists()
    assert [record.step for record in run.read_curves("out")] == list(range(1, step))


def test_one_damaged_image_of_many_is_a_warning(place):
    pictures(101, damaged=1)(place)
    with pytest.warns(
        UserWarning, match="1 of 101 images cannot be read; they are listed in runs/images/.*/index.json"
    ):
        result = CliRunner().invoke(cli, shlex.split(PICTURES))
    assert result.exit_code == 0, result.output
    (index,) = place.path.glob("runs/images/*/index.json")
    assert json.loads(index.read_text())["unreadable"] == ["000.png"]


@pytest.mark.parametrize(("mode", "channels", "px"), [("L", 3, 16), ("RGB", 1, 16), ("L", 1, 8)])
def test_images_of_other_colours_or_sizes_become_what_the_teacher_makes(place, mode, channels, px):
    teaches(channels=channels)(place)
    pictures(5, px=px, mode=mode, teacher=False)(place)
    result = CliRunner().invoke(cli, shlex.split(PICTURES.replace("--steps 6", "--steps 1")))
    assert result.exit_code == 0, result.output
    shown = run.load_run("out")(batch_size=1, output_type="pt").images
    assert shown.shape == (1, channels, 16, 16)
