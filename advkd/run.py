"""A training run on disk: progress, curves as CSV and TensorBoard, checkpoints, the finished pipeline."""

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from advkd.card import run_facts
from advkd.checkpoints import checkpoint_due, read_checkpoint_state
from advkd.data import load_images
from advkd.denoiser import Denoiser
from advkd.devices import label, pick_device, precision, processes
from advkd.discriminator import make_discriminator
from advkd.features import DinoFeatures, TeacherFeatures, make_heads
from advkd.files import (
    alone,
    differences,
    first_line,
    quiet,
    read_records,
    remove_halves,
    write_csv,
    write_json,
    writing,
)
from advkd.pipeline import FewStepPipeline, StudentPipeline, verify_weights
from advkd.presets import Preset, UserError, complete, config_hash
from advkd.presets import asdict as preset_fields
from advkd.student import Student
from advkd.teacher import Teacher, load_teacher
from advkd.train_add import train_add
from advkd.train_advkd import train_advkd
from advkd.train_consistency import train_consistency
from advkd.train_dmd import train_dmd
from advkd.train_progressive import train_progressive
from advkd.train_regression import train_regression
from advkd.training import Plan, TrainRecord
from advkd.trajectories import TrajectoryStore, generate_trajectories, trajectory_dir

CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
CHECKPOINT, CURVES, PIPELINE, RUN = "checkpoint.safetensors", "curves.csv", "student", "run.json"


def run_dir(preset: Preset, trajectories: TrajectoryStore) -> Path:
    """Where the notebooks keep a student: `runs/<name>/<recipe>-<hash of the preset and what it learnt from>`."""
    made_from = preset_fields(preset) | {"trajectories_config": trajectories.config}
    return Path("runs") / preset.name / f"{preset.recipe}-{config_hash(made_from)}"


def default_run(preset: Preset) -> Path:
    """Where `make reproduce` leaves the preset's student; of a store that is not made yet too, for a message's sake."""
    teacher = load_teacher(preset)
    where = trajectory_dir(teacher, preset)
    return run_dir(preset, TrajectoryStore(where)) if where.exists() else Path("runs") / preset.name / preset.recipe


def train_run(
    preset: Preset,
    trajectories: TrajectoryStore,
    folder: Path | str,
    *,
    images: Tensor | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: bool = True,
) -> Iterator[TrainRecord]:
    """Train the preset's student in `folder`; yields all its records, those of an earlier, interrupted call first.

    The folder then holds `student/` (a StudentPipeline with its model card), `curves.csv`, TensorBoard events in `logs/`, the
    checkpoint and `run.json`: preset, configuration of the trajectories, teacher, device, what it computed in, threads,
    processes, seconds by the clock and of the CPU. A finished run is only read. Another process that trains in the folder is
    waited for. Raises UserError when the folder holds another run or a damaged one or, without `resume`, when it holds any.
    """
    # Processes of one launch have to find the folder alike, so none of them waits.
    with alone(Path(folder)) if processes()[1] == 1 else nullcontext():
        yield from _train(preset, trajectories, Path(folder), images, resume, device, progress)


def _train(
    preset: Preset,
    trajectories: TrajectoryStore,
    folder: Path,
    images: Tensor | None,
    resume: bool,
    device: str,
    progress: bool,
) -> Iterator[TrainRecord]:
    this = {"preset": preset_fields(preset), "trajectories": trajectories.config}
    dino = DinoFeatures.from_pretrained(preset.features) if preset.features else None
    if dino:
        this["features"] = {"weights": dino.fingerprint}
    if identity := getattr(images, "identity", None):  # of a folder, whose files may change
        this["images"] = {"decoded": identity}
    trajectories.check_fits(preset)
    _check_folder(folder, this, resume)
    total = Plan(preset, len(trajectories)).steps
    if (folder / PIPELINE / "model_index.json").exists():
        verify_weights(folder / PIPELINE)
        yield from read_curves(folder, total)
        return
    rank, count = processes()
    if rank == 0:
        remove_halves(folder, CHECKPOINT, CURVES, RUN)
    earlier = []
    if (folder / CHECKPOINT).exists():
        earlier = read_curves(folder, read_checkpoint_state(folder / CHECKPOINT)["step"])
        yield from earlier
    spent = (read_run(folder) or {}) if earlier else {}
    where = pick_device(device)
    about = this | {"device": label(where), "dtype": precision(preset.train_dtype, where)}
    about |= {"threads": torch.get_num_threads()}
    for name in ("device", "dtype"):  # of a training that went on elsewhere, all of them
        if (before := spent.get(name, about[name])) != about[name]:
            about[name] = before if before.endswith(about[name]) else f"{before}, then {about[name]}"
    about |= {"teacher": {"source": trajectories.teacher or preset.teacher, "revision": trajectories.revision}}
    about |= {"processes": count} if count > 1 else {}
    if rank == 0:
        write_json(folder / RUN, about | {clock: spent.get(clock, 0.0) for clock in CLOCKS})
    records = list(earlier)
    options = {"images": images, "checkpoint": folder / CHECKPOINT, "resume": resume, "device": device}
    pipeline, steps = _begin(preset, trajectories, options, dino)
    if rank:
        yield from steps
        return
    bar = tqdm(total=total, initial=len(earlier), desc=f"train {preset.recipe}", unit="step", disable=quiet(progress))
    start = {clock: now() - spent.get(clock, 0.0) for clock, now in CLOCKS.items()}
    logs = folder / "logs"
    with bar, _board(logs, len(earlier)) as board:
        for record in steps:
            records.append(record)
            if checkpoint_due(record.step, total):
                write_csv(folder / CURVES, records)
                write_json(folder / RUN, about | {clock: now() - start[clock] for clock, now in CLOCKS.items()})
            if record.step % 20 == 0:
                with writing(logs):
                    _log(board, record)
                losses = {"critic": record.critic_loss, "student": record.student_loss}  # some methods have no critic
                bar.set_postfix(stage=record.stage, **{k: f"{x:.2f}" for k, x in losses.items() if x is not None})
            bar.update()
            yield record
    pipeline.record(**run_facts(about))  # without the clocks: the same training makes the same files
    pipeline.save_pretrained(folder / PIPELINE)


def new_pipeline(preset: Preset, teacher: Teacher) -> StudentPipeline | FewStepPipeline:
    """The preset's student before its training, in its pipeline."""
    if preset.architecture == "unet":
        return FewStepPipeline(Denoiser.from_teacher(teacher, preset))
    return StudentPipeline(Student.from_preset(preset))


def _begin(
    preset: Preset, trajectories: TrajectoryStore, options: dict, dino: DinoFeatures | None = None
) -> tuple[StudentPipeline | FewStepPipeline, Iterator[TrainRecord]]:
    """The preset's new student in its pipeline, and its method's training of it."""
    given = trajectories, preset
    if preset.method == "advkd":
        student = Student.from_preset(preset)
        return StudentPipeline(student), train_advkd(student, partial(make_discriminator, preset), *given, **options)
    teacher = load_teacher(preset, trajectories.teacher)
    if teacher.fingerprint != trajectories.config["teacher_fingerprint"]:
        raise UserError(f"the teacher at {teacher.source} is not the one that made {trajectories.folder}")
    of_expert = preset.replace(start="teacher", gain_limit=Preset.gain_limit)  # the preset's limit is for a student
    expert = partial(Denoiser.from_teacher, teacher, of_expert)  # each a copy of its own
    pipeline = new_pipeline(preset, teacher)
    student = pipeline.student
    if preset.method == "regression":
        return pipeline, train_regression(student, *given, **options)
    if preset.method == "progressive":
        return pipeline, train_progressive(student, *given, teacher=expert(), **options)
    if preset.method == "consistency":
        return pipeline, train_consistency(student, *given, teacher=expert(), **options)
    if preset.method == "dmd":
        return pipeline, train_dmd(student, *given, teacher=expert(), fake=expert(), **options)
    if preset.method != "add":
        raise UserError(f"method {preset.method!r} has no training; add its branch to _begin in run.py")
    frozen = expert()
    features = dino or TeacherFeatures(frozen, *preset.feature_noise)
    critic = {"features": features, "heads": make_heads(features, preset.seed, len(preset.student_timesteps))}
    return pipeline, train_add(student, *given, teacher=frozen, **critic, **options)


def _check_folder(folder: Path, this: dict, resume: bool) -> None:
    if not any((folder / name).exists() for name in (CHECKPOINT, PIPELINE)):
        return  # nothing was made yet, even where an earlier call got as far as run.json
    other = "choose another folder or remove it"
    if not resume:
        raise UserError(f"{folder} holds a run already; go on with --resume, {other}")
    if not (folder / RUN).exists():
        raise UserError(f"{folder} does not say what it holds (no {RUN}); {other}")
    made = read_run(folder)
    different = differences(complete(made.get("preset", {})), complete(this["preset"]))
    different += [
        d for part, wanted in this.items() if part != "preset" for d in differences(made.get(part, {}), wanted)
    ]
    if different:
        raise UserError(f"{folder} belongs to another preset ({'; '.join(different)}); {other}")


def read_curves(folder: Path | str, steps: int | None = None) -> list[TrainRecord]:
    """The records of a run, from its CSV, or those of its first `steps`. Raises UserError when they are not all there."""
    path = Path(folder) / CURVES
    if not path.exists():
        raise UserError(f"{path} is missing; remove {folder} to start afresh")
    records = read_records(path, TrainRecord)[:steps]
    if [record.step for record in records] != list(range(1, (steps or len(records)) + 1)):
        raise UserError(f"{path} is damaged (not every step is there); remove {folder} to start afresh")
    return records


@contextmanager
def _board(folder: Path, earlier: int) -> Iterator[SummaryWriter]:
    with writing(folder):
        board = SummaryWriter(folder, purge_step=earlier)
    try:
        yield board
    finally:
        with writing(folder):
            board.close()


def _log(board: SummaryWriter, record: TrainRecord) -> None:
    for name, value in asdict(record).items():
        if name not in ("step", "images_seen") and value is not None:
            board.add_scalar(name, value, record.step)


def train_side_by_side(presets: list[Preset], workers: int = 1) -> Iterator[tuple[Preset, Path, str | None]]:
    """Train one student per preset in its `run_dir`, `workers` at a time with an equal share of the threads.

    Yields each preset with its folder and None once it is finished, or with what went wrong (a loss that is not finite);
    finished runs come at once, interrupted ones are resumed.
    """
    waiting, stores = {}, {}
    for preset in presets:
        teacher = load_teacher(preset)
        where = trajectory_dir(teacher, preset)
        if where not in stores:  # made here, so that no two processes make the same
            stores[where] = generate_trajectories(teacher, preset, where)
        folder = run_dir(preset, stores[where])
        if (folder / PIPELINE / "model_index.json").exists():
            yield preset, folder, None
        else:
            waiting[preset] = folder, where
    if not waiting:
        return
    with tqdm(total=len(waiting), desc="students", unit="student", disable=quiet(True)) as bar:
        trained = _in_processes(waiting, workers) if workers > 1 else ((p, _train_one(p, *waiting[p])) for p in waiting)
        for preset, error in trained:
            bar.update()
            yield preset, waiting[preset][0], error


def _in_processes(waiting: dict[Preset, tuple[Path, Path]], workers: int) -> Iterator[tuple[Preset, str | None]]:
    threads = (max(1, torch.get_num_threads() // workers),)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, threads)
    futures = {pool.submit(_train_one, preset, *paths): preset for preset, paths in waiting.items()}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _train_one(preset: Preset, folder: Path, trajectories: Path) -> str | None:
    images = load_images(preset, "train")[0] if preset.real_share else None
    try:
        finish(train_run(preset, TrajectoryStore(trajectories), folder, images=images, progress=False))
    except UserError as error:
        return str(error)


def finish(records: Iterable[TrainRecord]) -> TrainRecord:
    """Run a training to its end; returns its last record."""
    for record in records:
        last = record
    return last


def load_run(folder: Path | str) -> StudentPipeline | FewStepPipeline:
    """The finished student of a run folder, or a pipeline folder itself, with what `run.json` says among its facts.

    Raises UserError when it is neither.
    """
    for path in (Path(folder) / PIPELINE, Path(folder)):
        if (path / "model_index.json").exists():
            diffusers_logging.disable_progress_bar()  # one component, nothing to wait for
            try:
                name = json.loads((path / "model_index.json").read_text())["_class_name"]
                kinds = {c.__name__: c for c in (StudentPipeline, FewStepPipeline)}
                if name not in list(kinds):
                    raise UserError(f"model_index.json names the pipeline {name!r}, but must name one of {list(kinds)}")
                pipeline = kinds[name].from_pretrained(path)
            except Exception as error:  # diffusers and safetensors raise many kinds for a foreign or a damaged folder
                raise UserError(f"{path} holds no readable student ({first_line(error)})") from error
            pipeline.student.eval()
            if made := read_run(path):
                pipeline.record(**run_facts(made))
            return pipeline
    if (Path(folder) / CHECKPOINT).exists():
        raise UserError(f"{folder} holds a training that was interrupted; go on with it: the same command and --resume")
    if (Path(folder) / RUN).exists():
        raise UserError(
            f"{folder} holds a training that was interrupted, or has not come to its first checkpoint yet; train it again or wait"
        )
    why = "" if Path(folder).is_dir() else " (there is no such folder)"
    raise UserError(
        f"{folder} holds no student{why}; give the folder of a finished training (python -m advkd train --out FOLDER) or of "
        "a saved pipeline"
    )


def read_run(folder: Path | str) -> dict | None:
    """`run.json` of a run folder (or of the one around its `student/`), see `train_run`; None without one."""
    folder = Path(folder)
    path = (folder.parent if folder.name == PIPELINE and not (folder / RUN).exists() else folder) / RUN
    if not path.exists():
        return None
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        return {part: made[part] for part in ("preset", "trajectories", "device")} | made
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a run ({first_line(error)})") from error
