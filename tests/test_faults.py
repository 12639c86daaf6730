"""Kills, full disks, damaged files, two processes at once, interrupts: the command that is given again ends with the
bytes of one that nothing happened to, or says which file to remove.

`pytest tests/test_faults.py --kills 200` kills two hundred times; the default is one for each job.
"""

import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from PIL import Image

from advkd import ablations, checkpoints, folder, quality, reproduce, teacher
from advkd.__main__ import cli
from advkd.ablations import Job
from advkd.checkpoints import save_checkpoint
from advkd.files import alone, remove_halves
from advkd.folder import load_folder
from advkd.presets import UserError, load_preset

ROOT = Path(__file__).parents[1]
JOBS = ("trajectories", "train", "teacher", "ablate", "reproduce")
CLOCKS = {"seconds", "cpu_seconds", "train_seconds"}  # what no two runs have in common
FORK = multiprocessing.get_context("fork")


class Command:
    """A command line in a process of its own, started in `folder`; what it says on its last line of stderr is kept."""

    def __init__(self, folder, *arguments, before=lambda: None):
        folder.mkdir(exist_ok=True)
        self.heard, says = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_run, args=(folder, [str(a) for a in arguments], before, says))
        self.process.start()
        says.close()
        self.started = psutil.Process(self.process.pid)

    def cpu_seconds(self):
        """CPU time that it has taken with the processes that it started; other jobs on the machine leave it as it is."""
        try:
            alive = [self.started, *self.started.children(recursive=True)]
            return sum(sum(process.cpu_times()[:2]) for process in alive)
        except psutil.NoSuchProcess:
            return float("inf")

    def killed_after(self, seconds):
        """Kill it once it has taken so much CPU time; whether it was still running."""
        while self.process.is_alive() and self.cpu_seconds() < seconds:
            time.sleep(0.001)
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def end(self):
        """Wait for it; its exit status and what it said on stderr."""
        try:
            told = self.heard.recv() if self.heard.poll(300) else ""
        except EOFError:
            told = ""
        self.process.join()
        return self.process.exitcode, told


def _run(folder, arguments, before, says):
    os.chdir(folder)
    before()
    status = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", io.StringIO())  # what pytest gives is a file
        patch.setattr("sys.stderr", io.StringIO())
        try:
            cli.main(arguments, prog_name="advkd")
        except SystemExit as end:
            status = end.code or 0
        finally:
            says.send(sys.stderr.getvalue())
    os._exit(status)


def made(folder):
    """Everything that was made below `folder`, without clocks, logs and what papermill and TensorBoard date."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        dated = file.suffix in (".ipynb", ".csv", ".md") and "curve" not in name and "student" not in name
        if "logs/" in name or file.name.startswith(".") or dated:
            continue
        content = file.read_bytes()
        files[name] = _without_clocks(json.loads(content)) if file.suffix == ".json" else content
    return files


def _without_clocks(value):
    if isinstance(value, dict):
        return {key: _without_clocks(x) for key, x in value.items() if key not in CLOCKS}
    return [_without_clocks(x) for x in value] if isinstance(value, list) else value


@pytest.fixture
def often(monkeypatch):
    """Checkpoints every second step."""
    for module in (checkpoints, teacher):
        monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)


@pytest.fixture
def commands(tmp_path, monkeypatch, often, request, teacher_folder, improved, make_unet, linear_schedule):
    """Of a job's name, its command line, the same at the first call and at every later one."""
    monkeypatch.setattr("advkd.teacher.new_teacher", lambda *_: (make_unet(dropout=0.1), linear_schedule()))
    store = tmp_path / "a-store"
    tiny = ["--teacher", teacher_folder, "--sampler", "ddpm", "--sampler-steps", 10, "--set", "teacher_dtype=float32"]
    tiny += ["--set", "submodules=3", "--set", "widths=[4, 6]", "--set", "shard_size=5"]
    fields = {"submodules": 3, "widths": [4, 6], "batch_sizes": [4], "train_dtype": "float32", "real_share": 0.5}

    def command(job):
        if job == "trajectories":
            return ["trajectories", "--preset", "digits", *tiny, "--count", 60, "--out", "store"]
        if job == "train":
            if not store.exists():
                assert (
                    Command(tmp_path, "trajectories", "--preset", "digits", *tiny, "--count", 12, "--out", store).end()[
                        0
                    ]
                    == 0
                )
            given = [f"--set={name}={json.dumps(value)}" for name, value in fields.items()]
            return [
                "train",
                "--preset",
                "digits",
                "--trajectories",
                store,
                "--steps",
                30,
                *given,
                "--resume",
                "--out",
                "run",
            ]
        if job == "teacher":
            return ["teacher", "--steps", 15, "--resume", "--out", "teacher"]
        request.getfixturevalue({"ablate": "study", "reproduce": "checkout"}[job])
        return [job, "--preset", "digits"] + (["--workers", 1] if job == "ablate" else [])

    return command


@pytest.fixture
def study(monkeypatch, improved):
    """A study of four trainings that take a moment, and its judge, which takes longer to make."""
    settings = [improved.replace(steps=steps, seed=seed) for steps in (6, 10) for seed in (0, 1)]
    chosen = [Job("steps", str(p.steps), p) for p in settings]
    judge = quality.Judge(load_preset("digits"))
    monkeypatch.setattr(quality, "Judge", lambda _: judge)
    monkeypatch.setattr(ablations, "jobs", lambda _: chosen)
    monkeypatch.setattr(ablations, "IMAGES", 70)
    ablations._places.cache_clear()
    yield
    ablations._places.cache_clear()


CELL = """
from pathlib import Path
import torch
from advkd.figures import save_table
from advkd.presets import load_preset
from advkd.run import finish, train_run
from advkd.teacher import load_teacher
from advkd.trajectories import generate_trajectories

p = load_preset("digits", "improved", teacher=teacher, trajectories=40, shard_size=5, sampler_steps=10, submodules=3,
                widths=(4, 6), batch_sizes=(4,), steps=40, teacher_dtype="float32", train_dtype="float32")
store = generate_trajectories(load_teacher(p), p, "runs/digits/store")
last = finish(train_run(p, store, "runs/digits/run", images=torch.zeros(8, 1, 16, 16)))
_ = save_table([{"step": last.step, "loss": last.student_loss}], {}, "figures/digits", name)
"""


@pytest.fixture
def checkout(monkeypatch, teacher_folder):
    """What `reproduce` runs in a folder that it finds empty: two notebooks that make a store, a student and two tables."""

    def lay():
        Path("pyproject.toml").touch()
        Path("notebooks").mkdir(exist_ok=True)
        for name in ("a", "b"):
            head = f"preset: str = 'digits'  # help\nname: str = '{name}'  # help\nteacher: str = '{teacher_folder}'  # help"
            declare = nbformat.v4.new_code_cell(head, metadata={"tags": ["parameters"]})
            notebook = nbformat.v4.new_notebook(cells=[declare, nbformat.v4.new_code_cell(CELL)])
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            for number, cell in enumerate(notebook.cells):
                cell["id"] = f"{name}-{number}"
            if not (path := Path("notebooks", f"{name}.ipynb")).exists():
                nbformat.write(notebook, path)

    monkeypatch.setattr(reproduce, "NOTEBOOKS", ("a", "b"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    find = reproduce.files.project_root
    monkeypatch.setattr(reproduce.files, "project_root", lambda: lay() or find())


@pytest.mark.parametrize("job", JOBS)
def test_whatever_was_killed_ends_with_the_bytes_of_what_was_not(tmp_path, request, commands, job):
    wanted = -(-request.config.getoption("--kills") // len(JOBS))
    arguments, rng, kills, tries = commands(job), random.Random(job), 0, 0
    undisturbed = Command(tmp_path / "undisturbed", *arguments)
    while undisturbed.process.is_alive():
        if (now := undisturbed.cpu_seconds()) < float("inf"):  # else it has just ended
            took = now
        time.sleep(0.01)
    assert undisturbed.end()[0] == 0
    expected = made(tmp_path / "undisturbed")
    while kills < wanted:
        tries += 1
        assert tries < 20 * wanted, f"{kills} of {wanted} kills met a process that was still running"
        there = tmp_path / f"killed-{tries}"
        for _ in range(rng.randint(1, 4)):
            kills += Command(there, *arguments).killed_after(rng.uniform(0, took))
        status, told = Command(there, *arguments).end()
        assert status == 0, told
        assert made(there) == expected
        shutil.rmtree(there)
    print(f"{job}: {kills} kills, 0 losses, 0 differences")


@pytest.mark.parametrize(
    ("job", "limit"),
    [*((job, limit) for job in JOBS[:3] for limit in (0, 700, 6000)), ("ablate", 6000)],
)
def test_a_full_disk_is_named_and_room_mends_it(tmp_path, commands, job, limit):
    arguments = commands(job)
    assert Command(tmp_path / "undisturbed", *arguments).end()[0] == 0
    # The most bytes that a file may have: unlike permissions and quotas, root has to obey it too.
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    status, told = Command(tmp_path / "full", *arguments, before=full).end()
    assert status == 2 and re.fullmatch(
        r"advkd: error: \S+ cannot be written \([^\n]+\); make room for it [^\n]+\n", told
    )
    assert Command(tmp_path / "full", *arguments).end() == (0, "")
    assert made(tmp_path / "full") == made(tmp_path / "undisturbed")


def truncated(content, rng):
    """All but the end."""
    return content[: rng.randrange(len(content))]


def flipped(content, rng):
    """One bit is another."""
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped])
@pytest.mark.parametrize(
    ("job", "file"),
    [
        ("trajectories", "store/manifest.json"),
        ("trajectories", "store/shard-00003.safetensors"),
        ("train", "run/checkpoint.safetensors"),
        ("train", "run/student/student/diffusion_pytorch_model.safetensors"),
        ("teacher", "teacher/checkpoint.safetensors"),
    ],
)
def test_a_damaged_file_is_named_and_made_again(tmp_path, monkeypatch, commands, job, file, damage):
    arguments, rng, whole = commands(job), random.Random(file), tmp_path / "whole"
    half = "checkpoint" in file  # is read again where a run was cut off
    assert Command(whole, *arguments).end()[0] == 0
    if half:
        stopped = {"train": "advkd.run.SharedPipeline.save_pretrained", "teacher": "advkd.teacher.save_teacher"}[job]
        with monkeypatch.context() as patch:
            patch.setattr(stopped.replace("run.Shared", "pipeline.Shared"), lambda *_, **__: os._exit(9))
            assert Command(tmp_path / "cut", *arguments).end()[0] == 9
    for n in range(3):
        there = tmp_path / f"damaged-{n}"
        shutil.copytree(tmp_path / "cut" if half else whole, there)
        content = (there / file).read_bytes()
        (there / file).write_bytes(damage(content, rng))
        status, told = Command(there, *arguments).end()
        if status:
            assert status == 2 and re.fullmatch(r"advkd: error: [^\n]+\n", told) and Path(file).name in told, told
            first, named = re.match(r"advkd: error: (\S+) .*remove ([^\s;,]+)", told).groups()
            path = there / (first if named == "it" else named)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            assert Command(there, *arguments).end()[0] == 0
        assert made(there) == made(whole)


@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_damaged_cache_of_images_is_named_and_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for n in range(12):
        Image.new("RGB", (8, 8), (20 * n, 0, 0)).save(tmp_path / "images" / f"{n:02d}.png")
    expected, rng = load_folder("images", 8, 3, "train")[:], random.Random(0)
    (cache,) = (tmp_path / "runs" / "images").iterdir()
    for name in 3 * ["images.u8", "index.json"]:
        content = (cache / name).read_bytes()
        (cache / name).write_bytes(damage(content, rng))
        folder._digest_of.cache_clear()  # as in a process of its own
        try:
            found = load_folder("images", 8, 3, "train")[:]
        except UserError as error:
            assert str(cache.relative_to(tmp_path)) in str(error) and "remove" in str(error)
            shutil.rmtree(cache)
            found = load_folder("images", 8, 3, "train")[:]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("job", JOBS[:3])
def test_of_two_processes_one_works_and_the_other_waits(tmp_path, commands, job):
    arguments = commands(job)
    assert Command(tmp_path / "alone", *arguments).end()[0] == 0
    there = tmp_path / "both"
    with alone(there / arguments[-1]):  # a process that works there, until a second one has come to wait for it
        waiting = [Command(there, *arguments) for _ in range(2)]
        time.sleep(1)
        assert all(command.process.is_alive() for command in waiting) and not list(there.rglob("*.json"))
    ended = [command.end() for command in waiting]
    assert [status for status, _ in ended] == [0, 0]
    assert all("another process works in" in told for _, told in ended)
    assert made(there) == made(tmp_path / "alone")


def test_only_what_a_killed_write_left_is_removed(tmp_path):
    left = [".curves.csv.a_0b9zxy.csv", ".curves.csv.12345678.csv"]
    others = [".env.prod.bak", ".curves.csv.of-mine.csv", ".coverage.host.123", "curves.csv", ".run.json.abcdefgh.json"]
    for name in left + others:
        (tmp_path / name).touch()
    (tmp_path / ".curves.csv.folder00.d").mkdir()
    remove_halves(tmp_path, "curves.csv")
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".curves.csv.folder00.d"}


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path, module = tmp_path / "checkpoint.safetensors", torch.nn.Linear(2, 2)
    save_checkpoint(path, {"module": module}, {}, {"step": 1})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("advkd.checkpoints.save_file", full)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors cannot be written \(No space left on device\)"):
        save_checkpoint(path, {"module": module}, {}, {"step": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_cell_that_is_run_again_ends_with_the_same_student(tmp_path, monkeypatch, store, teacher_folder):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manager, client = start_new_kernel(cwd=str(tmp_path))
    prepare = f"""
import os, signal, torch
from advkd import checkpoints
from advkd.presets import load_preset
from advkd.run import finish, train_run
from advkd.trajectories import TrajectoryStore
checkpoints.CHECKPOINT_EVERY = 5
torch.set_num_threads(1)
store = TrajectoryStore({str(store.folder)!r})
p = load_preset("digits", teacher={str(teacher_folder)!r}, submodules=3, widths=(4, 6), batch_sizes=(4,), steps=60,
                train_dtype="float32", **store.made_with())
"""
    images = "torch.zeros(8, 1, 16, 16)"
    cell = f"for record in train_run(p, store, {{!r}}, images={images}):\n    record.step == at and os.kill(os.getpid(), signal.SIGINT)"

    def ask(code):
        """Run a cell; the names of its errors."""
        ended = []

        def hear(message):
            if message["msg_type"] == "error":
                ended.append(message["content"]["ename"])

        client.execute_interactive(code, output_hook=hear, timeout=120)
        return ended

    try:
        assert ask(prepare) == [] and ask("at = None") == [] and ask(cell.format("whole")) == []
        assert ask("at = 33") == [] and ask(cell.format("run")) == ["KeyboardInterrupt"]
        assert not (tmp_path / "run" / "student").exists() and (tmp_path / "run" / "checkpoint.safetensors").exists()
        assert ask("at = None") == [] and ask(cell.format("run")) == []
    finally:
        manager.shutdown_kernel(now=True)
    whole, again = made(tmp_path / "whole"), made(tmp_path / "run")
    assert again == whole and "student/student/diffusion_pytorch_model.safetensors" in whole
