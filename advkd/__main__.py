"""The command line: python -m advkd COMMAND; `python -m advkd --help` lists them."""

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import click

from advkd.presets import Preset, UserError, load_preset, own_preset


class _Commands(click.Group):
    """User errors are one line and exit status 2; an interrupt is 130 and what was made stays."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(
                "advkd: interrupted; what was made stays (of a training, its last checkpoint if there was one)",
                err=True,
            )
            sys.exit(130)

    def main(self, *args, **kwargs):
        try:
            return super().main(*args, **kwargs)
        except (UserError, OSError) as error:
            click.echo(f"advkd: error: {error}", err=True)
            sys.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--threads", type=click.IntRange(1), help="CPU threads (default: torch's choice).")
@click.option("--deterministic", is_flag=True, help="On a GPU: the same bytes every time, by slower kernels.")
def cli(threads: int | None, deterministic: bool):
    """Distil a diffusion teacher into a student that samples in one step (Adv-KD, arXiv 2405.20675)."""
    if threads or deterministic:
        import torch

        torch.set_num_threads(threads or torch.get_num_threads())
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it alone
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False


TORCH_SEED = click.IntRange(0, 2**63 - 1)
PRESET = click.option("--preset", "name", default="digits", help="What to work on: digits, glyphs, celebahq, ...")
EMBEDDED = click.option("--preset", "name", default="digits", help="digits or glyphs, which have images of their own.")
OWN = click.option(
    "--preset",
    "name",
    help="What to work on (default: what the trajectories say; own, what fits --teacher; or digits).",
)
IMAGES = click.option("--images", help="Real images: a folder (any depth; png, jpg, webp), or hf:OWNER/NAME.")
DEVICE = click.option("--device", default="auto", help="auto, cuda, mps or cpu.")
RECIPE = click.option("--recipe", default="improved", help="How to train the student: improved, paper; or a method.")
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to write.")
COUNT = click.option("--count", type=click.IntRange(1), default=5000, help="Number of images.")
SEED = click.option("--seed", type=click.IntRange(0), default=1, help="Seed of the noise.")
SET = click.option(
    "--set",
    "fields",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any field of the preset, the value as JSON: --set submodules=7 (several times).",
)
FEW_STEPS = click.option("--steps", type=click.IntRange(1), default=1, help="Sampling steps, of a few-step student.")
WORKERS = click.option("--workers", type=click.IntRange(1), default=2, help="Students that are trained side by side.")
TEACHER = click.option("--teacher", "source", help="A folder in diffusers format, or a hub id (default: the preset's).")
STUDENT = click.argument("student", type=click.Path(path_type=Path))


@cli.command()
@EMBEDDED
@OUT
@click.option("--steps", type=click.IntRange(1), default=8000, help="Optimizer steps.")
@click.option("--seed", type=TORCH_SEED, default=0, help="Seed of weights, noise and batches.")
@click.option("--resume", is_flag=True, help="Go on from an interrupted run in the same folder.")
def teacher(name: str, out: Path, steps: int, seed: int, resume: bool):
    """Train a small diffusion teacher on the preset's train split and save it in diffusers format."""
    from advkd.files import alone

    with alone(out):
        _teach(load_preset(name), out, steps, seed, resume)
    click.echo(f"teacher: {out}")


def _teach(preset: Preset, out: Path, steps: int, seed: int, resume: bool) -> None:
    from tqdm import tqdm

    from advkd.data import load_images, reference_images
    from advkd.files import (
        differences,
        make_folder,
        quiet,
        read_object,
        read_records,
        remove_halves,
        write_csv,
        write_json,
    )
    from advkd.teacher import TeacherRecord, new_teacher, save_teacher, train_teacher

    checkpoint, run = out / "checkpoint.safetensors", out / "run.json"
    asked = {"preset": preset.name, "steps": steps, "seed": seed}
    finished = (out / "model_index.json").exists()
    if finished and not resume:
        raise UserError(f"{out} holds a finished teacher; choose another folder or remove it")
    if checkpoint.exists() and not resume:
        raise UserError(f"{out} holds an interrupted run; go on with --resume, or remove it")
    made = read_object(run, f"choose another folder or remove {out}") if finished or run.exists() else asked
    if different := differences(made, asked):
        raise UserError(f"{out} belongs to another run ({'; '.join(different)}); choose another folder or remove it")
    if finished:
        checkpoint.unlink(missing_ok=True)  # of a run that was killed just before it did so itself
        return
    unet, scheduler = new_teacher(preset, seed)
    train, heldout = load_images(preset, "train")[0], reference_images(preset, "heldout", 600)[0]
    make_folder(out)
    remove_halves(out, "checkpoint.safetensors", "curve.csv", "run.json")
    for half in out.glob(".half.*"):
        shutil.rmtree(half)
    records = train_teacher(
        unet, scheduler, train, heldout, steps=steps, seed=seed, checkpoint=checkpoint, resume=resume
    )
    earlier = out / "curve.csv"
    curve = read_records(earlier, TeacherRecord) if resume and earlier.exists() else []
    bar, recent = tqdm(total=steps, unit="step", disable=quiet(True)), []
    for record in records:
        bar.update(record.step - bar.n)
        recent.append(record.loss)
        if record.heldout_loss is not None:
            curve = [point for point in curve if point.step < record.step]
            curve.append(replace(record, loss=sum(recent) / len(recent)))  # the mean since the last point
            recent.clear()
            bar.set_postfix(loss=f"{record.loss:.4f}", heldout=f"{record.heldout_loss:.4f}")
            write_json(run, asked)
            write_csv(earlier, curve)
    save_teacher(unet, scheduler, out)
    checkpoint.unlink()


@cli.command()
@EMBEDDED
@OUT
@click.option("--steps", type=click.IntRange(1), default=3000, help="Optimizer steps.")
@click.option("--learning-rate", type=float, default=2e-3, help="Of AdamW.")
@click.option("--seed", type=TORCH_SEED, default=0, help="Seed of weights and batches.")
def extractor(name: str, out: Path, steps: int, learning_rate: float, seed: int):
    """Train the classifier whose features the images are compared in, on the preset's train split."""
    import torch
    from tqdm import tqdm

    from advkd.data import FACTORS, load_images, reference_images
    from advkd.extractor import Extractor, accuracy, save_extractor, train_extractor
    from advkd.files import make_folder, quiet

    if (out / "config.json").exists():
        raise UserError(f"{out} holds a finished extractor; choose another folder or remove it")
    preset = load_preset(name)
    train, heldout = load_images(preset, "train"), reference_images(preset, "heldout")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UserError(f"--learning-rate is {learning_rate}, but must be a positive, finite number")
    make_folder(out)
    torch.manual_seed(seed)
    sizes = tuple(FACTORS[preset.data].values())
    model = Extractor(preset.image_size_px, preset.channels, sizes if len(sizes) > 1 else sizes[0])
    records = train_extractor(model, *train, steps=steps, learning_rate=learning_rate, seed=seed)
    for _ in tqdm(records, total=steps, unit="step", disable=quiet(True)):
        pass
    save_extractor(model, out)
    click.echo(f"extractor: {out}, accuracy on held-out images {accuracy(model, *heldout):.4f}")


@cli.command()
@OWN
@RECIPE
@OUT
@click.option("--count", "trajectories", type=click.IntRange(1), help="Number of trajectories (default: the preset's).")
@click.option("--sampler", help="ddim, ddpm or dpm-solver (default: the preset's).")
@click.option(
    "--sampler-steps", type=click.IntRange(1), help="Steps of the sampler, a divisor of 1000 (default: the preset's)."
)
@click.option("--compile", "teacher_compile", is_flag=True, default=None, help="The teacher through torch.compile.")
@SET
@TEACHER
@DEVICE
def trajectories(
    name: str | None, recipe: str, out: Path, fields: tuple[str, ...], source: str | None, device: str, **given
):
    """Run the teacher and store the states that the student learns from; goes on where it was interrupted.

    In several processes, each on a device of its own: accelerate launch -m advkd trajectories ...
    """
    from advkd.student import describe
    from advkd.teacher import find_preset, load_teacher
    from advkd.trajectories import generate_trajectories

    given = _given(fields, given)
    preset = find_preset(name or ("own" if source else "digits"), recipe, source or "", **given)
    _say(describe(preset))
    store = generate_trajectories(load_teacher(preset, source), preset, out, device=device)
    _say(f"trajectories: {len(store)} in {out}")


def _given(fields: tuple[str, ...], options: dict) -> dict:
    """The fields of a preset that the command line names, by --set or by options of their own."""
    found = {field: value for field, value in options.items() if value is not None}
    for field in fields:
        name, equals, value = field.partition("=")
        if option := {"name": "--preset", "recipe": "--recipe", "teacher": "--teacher"}.get(name):
            raise UserError(f"{name} is no field to set; write {option} {value}")
        if not equals:
            raise UserError(f"--set {field} has no value; write --set {field}=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value  # a word
    return found


def _say(text: str) -> None:
    """Print it, once: of several processes, the first does."""
    from advkd.devices import processes

    if processes()[0] == 0:
        click.echo(text)


@cli.command()
@OWN
@RECIPE
@click.option(
    "--method",
    type=click.Choice(get_args(Preset.__annotations__["method"])),
    default="advkd",
    help="How to distil; all but advkd have one recipe each and train the teacher's U-Net.",
)
@click.option(
    "--trajectories",
    "store",
    type=click.Path(path_type=Path),
    help="A store to train on (default: OUT/trajectories, made first).",
)
@TEACHER
@IMAGES
@OUT
@click.option("--resume", is_flag=True, help="Go on from an interrupted run in the same folder.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps (not of the paper's recipe).")
@click.option("--epochs", type=float, help="Stage k trains for EPOCHS * (k + 1) epochs (paper recipe).")
@click.option("--seed", type=click.IntRange(0), help="Seed of weights and batches.")
@SET
@DEVICE
def train(
    name: str | None,
    recipe: str,
    method: str,
    store: Path | None,
    source: str | None,
    out: Path,
    resume: bool,
    fields: tuple[str, ...],
    device: str,
    **given,
):
    """Distil the trajectories into a student.

    In several processes, which share each batch: accelerate launch -m advkd train ...
    """
    from advkd.data import load_images
    from advkd.run import finish, train_run
    from advkd.student import describe
    from advkd.teacher import find_preset, load_teacher
    from advkd.trajectories import TrajectoryStore, generate_trajectories

    if store and source:
        raise UserError("--teacher has made the --trajectories already; give one of the two")
    given = _given(fields, given)
    if method != "advkd" and recipe not in ("improved", method):
        raise UserError(f"--method {method} has one recipe, its own; leave out --recipe {recipe}")
    recipe = recipe if method == "advkd" else method
    if store:
        opened = TrajectoryStore(store)
        opened.verify()
        name = name or opened.preset or "digits"
        shape = opened.config["image_size_px"], opened.config["channels"]
        preset = (
            own_preset(opened.teacher, *shape, recipe, **given) if name == "own" else load_preset(name, recipe, **given)
        )
        preset = preset.replace(teacher=opened.teacher, **opened.made_with())
    else:
        preset = find_preset(name or ("own" if source else "digits"), recipe, source or "", **given)
        preset = preset.replace(teacher=source or preset.teacher)
    idle = {"joint": "epochs", "staged": "steps"}[preset.schedule]
    if idle in given:
        raise UserError(f"--{idle} has no effect on recipe {recipe!r}, whose schedule is {preset.schedule!r}")
    if given.get("images") and not preset.real_share:
        raise UserError(
            f"--images have no effect on recipe {recipe!r}, which trains without real images; leave them out"
        )
    _say(describe(preset))
    images = load_images(preset, "train")[0] if preset.real_share else None  # before the teacher works for hours
    if not store:
        if not preset.learns_from_trajectories and "trajectories" not in given:
            preset = preset.replace(trajectories=max(preset.batch_sizes))  # a store also says which teacher it is
        opened = generate_trajectories(load_teacher(preset), preset, out / "trajectories", device=device)
    last = finish(train_run(preset, opened, out, images=images, resume=resume, device=device))
    _say(f"student: {out / 'student'}, {last.step} steps, {last.images_seen} images seen")


@cli.command()
@STUDENT
@click.option("--count", type=click.IntRange(1), default=64, help="Number of images.")
@SEED
@FEW_STEPS
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A PNG file: all images in one grid."
)
def sample(student: Path, count: int, seed: int, steps: int, out: Path):
    """Draw images of a trained student (a run folder or a pipeline folder)."""
    from torchvision.utils import save_image

    from advkd.evaluation import sample_student
    from advkd.files import write_atomic
    from advkd.run import load_run

    images = sample_student(load_run(student), count, seed, steps=steps)
    columns = max(1, round(count**0.5))
    write_atomic(
        out, lambda file: save_image(images, file, nrow=columns, normalize=True, value_range=(-1, 1), format="png")
    )
    click.echo(f"{count} images: {out}")


@cli.command()
@STUDENT
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Keep the page in this folder, ready to publish."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default="a free one", help="Port on 127.0.0.1.")
@click.option("--no-serve", is_flag=True, help="Only write the folder --out.")
def demo(student: Path, out: Path | None, port: int, no_serve: bool):
    """Show a trained student (a run folder or a pipeline folder) in the browser, where it generates by itself.

    The page brings onnxruntime-web along where `make web` has fetched it; else it takes it from cdn.jsdelivr.net.
    """
    from tempfile import TemporaryDirectory

    from advkd.demo import build_demo, check_port, fetched_runtime, serve_demo

    if no_serve and not out:
        raise UserError("--no-serve without --out leaves nothing behind; say where to write: --out FOLDER")
    if not no_serve:
        check_port(port)
    with TemporaryDirectory(prefix="advkd-demo-") as temporary:
        folder = out or Path(temporary)
        runtime = build_demo(student, folder, fetched_runtime())["runtime"]
        where = "the folder itself" if runtime["base"] == "ort/" else f"{runtime['base']} ('make web' brings it along)"
        click.echo(f"page: {folder}, with {runtime['package']} {runtime['version']} from {where}")
        if not no_serve:
            serve_demo(folder, port)


@cli.command()
@STUDENT
@click.option("--format", "kind", type=click.Choice(["onnx"]), default="onnx", help="Of the file.")
@click.option("--int8", is_flag=True, help="8 bits a number.")
@click.option("--heads", is_flag=True, help="All submodules' images, not the last one alone.")
@click.option("--tolerance", type=float, default=1e-4, help="The largest difference from torch, of values in [-1, 1].")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A file: any that ends with .onnx."
)
def export(student: Path, kind: str, int8: bool, heads: bool, tolerance: float, out: Path):
    """Write a trained student as a file for devices without torch, and compare it with torch."""
    from tempfile import TemporaryDirectory

    from advkd.export import export_onnx, quantize_onnx
    from advkd.pipeline import StudentPipeline
    from advkd.run import load_run

    pipeline = load_run(student)
    if not isinstance(pipeline, StudentPipeline):
        raise UserError(f"{student} holds a few-step student (a U-Net); only students made of submodules are exported")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "float32.onnx" if int8 else out
        made = export_onnx(pipeline.student, file, heads=heads, tolerance=tolerance)
        click.echo(
            f"float32: {made['file_mb']:.3f} MB, differs from torch by {made['max_difference']:.2g} (at most {tolerance:g})"
        )
        if int8:
            made = quantize_onnx(file, out)
            apart = f"{made['mean_difference']:.2g} in the mean, {made['max_difference']:.2g} at most"
            click.echo(f"int8: {made['file_mb']:.3f} MB, its images differ from float32's by {apart}")
    click.echo(f"export: {out}")


@cli.command()
@STUDENT
@click.option("--preset", "name", help="What to compare with (default: what the student was trained for, or digits).")
@COUNT
@SEED
@FEW_STEPS
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A JSON file.")
@IMAGES
@click.option("--inception", help="Inception weights file, or 'download': FID in place of FD-digits.")
@click.option("--few", is_flag=True, help="Allow fewer images than features.")
def evaluate(
    student: Path,
    name: str | None,
    count: int,
    seed: int,
    steps: int,
    out: Path,
    images: str | None,
    inception: str | None,
    few: bool,
):
    """Compare a student's images with the real ones; writes a row with its protocol, and into the student's card."""
    from advkd.data import reference_images
    from advkd.evaluation import Metric, protocol, sample_student, student_latency_ms, student_row
    from advkd.files import make_folder, write_json
    from advkd.run import load_run, read_run

    pipeline = load_run(student)
    channels, px, _ = pipeline.student.image_shape
    made = read_run(student)
    about = made["preset"] if made else {}
    name, images = name or about.get("name", "digits"), images or about.get("images")
    given = {"images": images} if images else {}
    preset = own_preset("", px, channels, **given) if name == "own" else load_preset(name, **given)
    metric, shape = Metric(preset.data, inception=inception), (channels, px)
    if shape != (preset.channels, preset.image_size_px):
        raise UserError(
            f"{student} makes {shape[0]} channels at {shape[1]} px, "
            f"but preset {name!r} has {preset.channels} at {preset.image_size_px}"
        )
    make_folder(out.parent)
    train_images, heldout = reference_images(preset, "train")[0], reference_images(preset, "heldout")[0]
    samples = sample_student(pipeline, count, seed, steps=steps)
    row = student_row(pipeline, about.get("recipe"), steps)
    row |= metric.evaluate(samples, train_images, heldout, few) | {
        "ms_per_image": student_latency_ms(pipeline, steps=steps)
    }
    judged = protocol(metric, count, seed, train_images, heldout)
    write_json(out, {"protocol": judged, "rows": [row]})
    try:
        pipeline.add_measurement(row, judged, pipeline.name_or_path)
    except OSError as error:  # a student that is only lent, which is no reason to lose the row
        click.echo(f"advkd: the model card of {student} stays as it is ({error})", err=True)
    click.echo(f"{metric.label} {row['fd_train']:.3f} (train), {row['fd_heldout']:.3f} (held out): {out}")


@cli.command()
@EMBEDDED
@click.option("--group", "groups", multiple=True, help="Only this group of settings (several times for several).")
@WORKERS
def ablate(name: str, groups: tuple[str, ...], workers: int):
    """Train and score the ablations that are missing; rows go to figures/PRESET/ablations.json as they are ready."""
    from advkd.ablations import SHOWN, ablation_place, ablation_protocol, jobs
    from advkd.ablations import ablate as run
    from advkd.figures import check_table, keep_row
    from advkd.quality import Judge

    judge, failed = Judge(load_preset(name)), 0
    chosen = jobs(name)
    if unknown := [group for group in groups if group not in {job.group for job in chosen}]:
        known = ", ".join(dict.fromkeys(repr(job.group) for job in chosen))
        raise UserError(f"there is no group {unknown[0]!r}; groups: {known}")
    check_table(f"figures/{name}", "ablations")
    for row in run(judge, [job for job in chosen if not groups or job.group in groups], workers):
        table = f"figures/{name}", "ablations", {field: field for field in SHOWN}
        path = keep_row(row, partial(ablation_place, name), ablation_protocol(judge), *table)
        failed += "error" in row
    click.echo(f"ablations: {path}" + (f", {failed} trainings failed (see `error` there)" if failed else ""))


@cli.command()
@EMBEDDED
@click.option("--paper-epochs", type=float, default=1.0, help="Budget of the paper's recipe, of its 10.")
@click.option("--sampler", "chosen", multiple=True, help="Only this sampler of the teacher: ddim-50 (several times).")
@WORKERS
def quality(name: str, paper_epochs: float, chosen: tuple[str, ...], workers: int):
    """Measure students and teacher over seeds in figures/PRESET/quality.json (hours from nothing; resumable)."""
    from advkd.figures import check_table, keep_row
    from advkd.quality import SAMPLERS, SHOWN, Judge, quality_place, quality_protocol
    from advkd.quality import quality as run

    known = {f"{sampler}-{steps}": (sampler, steps) for sampler, steps in SAMPLERS}
    if unknown := [sampler for sampler in chosen if sampler not in known]:
        raise UserError(f"there is no sampler {unknown[0]!r}; samplers: {', '.join(known)}")
    judge = Judge(load_preset(name))
    check_table(f"figures/{name}", "quality")
    protocol = quality_protocol(judge) | {"paper_epochs": f"{paper_epochs} of the paper's 10"}
    for row in run(name, judge, workers, paper_epochs, [known[sampler] for sampler in chosen or known]):
        path = keep_row(row, quality_place, protocol, f"figures/{name}", "quality", SHOWN)
    click.echo(f"quality: {path}")


@cli.command()
@EMBEDDED
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="Only this method, named as in the table: 'ADD, adversarial alone' (several times); teacher: its rows.",
)
@click.option(
    "--budget", "budgets", type=float, multiple=True, help="Only this budget; 1 is the training of Adv-KD's recipe."
)
@click.option(
    "--seed", "seeds", type=int, multiple=True, help="Only this training seed; the teacher's rows are all made."
)
@WORKERS
def compare(name: str, methods: tuple[str, ...], budgets: tuple[float, ...], seeds: tuple[int, ...], workers: int):
    """Train and measure all methods side by side in figures/PRESET/head_to_head.json (hours from nothing; resumable).

    Rows are made of the trainings in runs/: where one is missing, it is trained, also if the table has its row.
    """
    from advkd.figures import check_table, keep_row
    from advkd.head_to_head import (
        BUDGETS,
        CONTESTANTS,
        SHOWN,
        compare_teacher,
        comparison_place,
        comparison_protocol,
        jobs,
        keep_images,
    )
    from advkd.head_to_head import compare as run
    from advkd.quality import TRAINING_SEEDS, Judge

    every = jobs(name)  # refuses presets that have no study
    asked = {
        "method": (methods, (*CONTESTANTS, "teacher")),
        "budget": (budgets, BUDGETS[name]),
        "seed": (seeds, TRAINING_SEEDS),
    }
    for what, (given, known) in asked.items():
        if unknown := [x for x in given if x not in known]:
            raise UserError(f"there is no {what} {unknown[0]!r}; {what}s: {', '.join(map(repr, known))}")
    chosen = [
        job
        for job in every
        if (job.method in methods or not methods)
        and (job.budget in budgets or not budgets)
        and (job.preset.seed in seeds or not seeds)
    ]
    judge, failed = Judge(load_preset(name)), 0
    check_table(f"figures/{name}", "head_to_head")

    def rows():
        yield from run(judge, chosen, workers)
        if not methods or "teacher" in methods:
            yield from compare_teacher(judge, load_preset(name))

    for row, images in rows():
        folder = f"figures/{name}"
        table = folder, "head_to_head", SHOWN
        path = keep_row(row, partial(comparison_place, name), comparison_protocol(judge), *table)
        failed += "error" in row
        if images is not None:
            keep_images(folder, row, images)
    click.echo(f"head to head: {path}" + (f", {failed} rows of failed trainings (see `error` there)" if failed else ""))


@cli.command()
@click.option("--preset", "name", default="celebahq", help="Whose teacher and students: celebahq, cifar10, ...")
@DEVICE
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 64), help="Students' batches.")
@click.option(
    "--only",
    "kinds",
    multiple=True,
    help="Only matrix, teacher, student, trajectory, training or reading (several times); others stay.",
)
def benchmark(name: str, device: str, batches: tuple[int, ...], kinds: tuple[str, ...]):
    """Measure time and memory of teacher, students, training and store in figures/benchmark.* (half an hour on a CPU)."""
    from tqdm import tqdm

    from advkd.benchmark import KINDS, SHOWN, cases, presented, protocol
    from advkd.benchmark import benchmark as run
    from advkd.devices import pick_device
    from advkd.figures import figures_folder, plot_benchmark, save_figure, save_table
    from advkd.files import make_folder, quiet, read_object

    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"there is no kind {unknown[0]!r}; kinds: {', '.join(KINDS)}")
    chosen = [c for c in cases(name, str(pick_device(device)), batches) if not kinds or c.kind in ("matrix", *kinds)]
    path = figures_folder("figures") / "benchmark.json"
    make_folder(path.parent)
    again = "remove it and measure all of it, without --only"
    earlier = read_object(path, again) if kinds and path.exists() else None
    rows = earlier["rows"] if earlier and earlier["protocol"] == protocol(name) else []
    rows = [row for row in rows if row["kind"] not in ("matrix", *kinds)]
    for row in tqdm(run(chosen), total=len(chosen), unit="row", disable=quiet(True)):
        rows.append(row)
        save_table(presented(rows), protocol(name), "figures", "benchmark", SHOWN)
    save_figure(plot_benchmark(presented(rows)), "figures", "benchmark")
    click.echo(f"benchmark: {path}")


@cli.command()
@click.argument("student", type=click.Path(path_type=Path), required=False)
@click.option("--preset", "name", default="celebahq", help="Whose sizes, with random weights: celebahq, cifar10, ...")
@click.option("--only", "kinds", multiple=True, help="Only teacher, student or trained (several times); others stay.")
def deploy(student: Path | None, name: str, kinds: tuple[str, ...]):
    """Measure what teacher and students take on this CPU, in torch and as ONNX files, in figures/deploy.* (20 minutes).

    STUDENT is a trained one of the digits (default: the one that `make reproduce` trains).
    """
    from tqdm import tqdm

    from advkd.deploy import KINDS, SHOWN, cases, protocol
    from advkd.deploy import deploy as run
    from advkd.figures import figures_folder, save_table
    from advkd.files import differences, make_folder, quiet, read_object
    from advkd.run import default_run, load_run

    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"there is no kind {unknown[0]!r}; kinds: {', '.join(KINDS)}")
    load_preset(name)  # which must exist before anything is measured
    chosen = [case for case in cases(name) if not kinds or case.kind in kinds]
    trained = any(case.kind == "trained" for case in chosen)
    pipeline = load_run(student or default_run(load_preset("digits"))) if trained else None
    path = figures_folder("figures") / "deploy.json"
    make_folder(path.parent)
    about = protocol(name) | ({"trained": pipeline.facts.get("preset", "not recorded")} if trained else {})
    rows = []
    if kinds and path.exists():
        earlier = read_object(path, "remove it and measure all of it, without --only")
        about = {"trained": earlier["protocol"].get("trained")} | about
        if different := differences(earlier["protocol"] | {"trained": about["trained"]}, about):
            raise UserError(
                f"{path} was measured otherwise ({'; '.join(different)}); measure all of it, without --only"
            )
        rows = [row for row in earlier["rows"] if row["kind"] not in kinds]
    rows += list(tqdm(run(chosen, pipeline), unit="row", disable=quiet(True)))  # kept whole: rows are compared
    save_table(sorted(rows, key=lambda row: list(KINDS).index(row["kind"])), about, "figures", "deploy", SHOWN)
    click.echo(f"deploy: {path}")


@cli.command()
@PRESET
@click.option("--parameter", "-p", "parameters", nargs=2, multiple=True, help="A notebook parameter: -p NAME VALUE.")
@click.option("--force", is_flag=True, help="Run also what is up to date.")
def reproduce(name: str, parameters: tuple[tuple[str, str], ...], force: bool):
    """Run the notebooks in order and regenerate every figure and table of figures/<preset>/."""
    from advkd.reproduce import reproduce as run

    sys.exit(run(name, dict(parameters), force))


if __name__ == "__main__":
    cli(prog_name="python -m advkd")
