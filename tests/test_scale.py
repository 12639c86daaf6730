"""One's own teachers and images, several processes, and what a power cut leaves: by the command line, as a user would."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import papermill
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from advkd import presets, train_advkd, training, trajectories
from advkd.__main__ import cli
from advkd.data import load_images
from advkd.files import sha256
from advkd.presets import UserError, load_preset
from advkd.run import finish, load_run, train_run
from advkd.student import Student
from advkd.teacher import untrained_unet
from advkd.trajectories import TrajectoryStore, generate_trajectories

ROOT = Path(__file__).parents[1]


def invoke(*arguments):
    """A command in this process; what it says."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def checksums(folder):
    return {file.name: sha256(file) for file in sorted(Path(folder).iterdir())}


def make_teacher(folder, size_px, channels, scheduler, attention=False, seed=0):
    kinds = ["AttnDownBlock2D" if attention else "DownBlock2D", "AttnUpBlock2D" if attention else "UpBlock2D"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=size_px,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(4, 8),
            down_block_types=("DownBlock2D", kinds[0]),
            up_block_types=(kinds[1], "UpBlock2D"),
            norm_num_groups=2,
            attention_head_dim=4,
        )
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Forty pieces of scikit-learn's two photographs, as a user's folder."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(20):
            top, left = 80 * (number // 5), 100 * (number % 5)
            Image.fromarray(photograph[top : top + 100, left : left + 120]).save(folder / f"{name}-{number:02d}.png")
    return folder


SHAPES = {
    "3 x 64 px, attention, v-prediction, zero terminal SNR": dict(
        size_px=64,
        channels=3,
        attention=True,
        scheduler=DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ),
    "1 x 32 px, x0-prediction, DDIM": dict(size_px=32, channels=1, scheduler=DDIMScheduler(prediction_type="sample")),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("recipe", ["improved", "paper"])
def test_a_teacher_and_images_of_ones_own_run_end_to_end(tmp_path, monkeypatch, photographs, shape, recipe):
    monkeypatch.chdir(tmp_path)

    monkeypatch.setitem(presets._RECIPES[recipe], "batch_sizes", (8,))
    teacher = make_teacher(tmp_path / "teacher", **shape)
    few = ["--sampler", "dpm-solver", "--sampler-steps", 10, "--count", 8]
    told = invoke("trajectories", "--teacher", teacher, "--recipe", recipe, *few, "--out", "store")
    assert f"own: {shape['channels']} x {shape['size_px']} x {shape['size_px']}, recipe {recipe}" in told
    assert f"submodule 10: {shape['size_px']} px, the final image" in told
    images = ["--images", photographs] if recipe == "improved" else []
    budget = ["--steps", 2] if recipe == "improved" else ["--epochs", 0.02]
    invoke("train", "--trajectories", "store", "--recipe", recipe, *images, *budget, "--out", "run")
    samples = load_run(tmp_path / "run")(batch_size=2, output_type="pt").images
    assert samples.shape == (2, shape["channels"], shape["size_px"], shape["size_px"]) and samples.isfinite().all()


def test_notebook_3_trains_with_a_teacher_of_the_papers_architecture_and_a_folder_of_images(
    tmp_path, monkeypatch, photographs
):
    for name in ("pyproject.toml", "notebooks"):  # a checkout of its own, so that nothing is written to this one
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    unet = untrained_unet(32, 3, widths=(32, 32, 64, 64, 64, 64))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    fields = {"trajectories": 16, "sampler_steps": 10, "batch_sizes": [8], "shard_size": 8}
    given = {"preset": "own", "teacher": str(tmp_path / "teacher"), "images": str(photographs), "steps": 2}
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "03_train.ipynb"),
        str(tmp_path / "out.ipynb"),
        given | {"paper_epochs": 0.1, "overrides": json.dumps(fields)},
        cwd=str(tmp_path),
        kernel_name="python3",
        progress_bar=False,
    )
    figures = {file.name for file in (tmp_path / "figures" / "own").iterdir()}
    assert {"strip.png", "recipes.png", "training_curves.png", "critic_answers.json"} <= figures
    assert load_run(next((tmp_path / "runs" / "own").glob("improved-*"))).student.config.image_size_px == 32


def train_in(rank, port, cases):
    """One of two processes of distributed trainings, as a launcher would start it that keeps their store."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launched |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for case in cases:
        train(*case)


def train(preset, store, images, folder):
    finish(train_run(preset, TrajectoryStore(store), folder, images=images, device="cpu", progress=False))


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, improved, paper, store, teacher_folder, tiny):
    images = load_images(improved, "train")[0][:32]
    softmax_and_features = improved.replace(adversarial="forward-kl", feature_weight=0.3, ema=0.0)
    trained = {"improved": improved, "softmax and features": softmax_and_features, "paper": paper}
    for method in ("add", "regression", "progressive", "consistency", "dmd"):
        fields = tiny | {"batch_sizes": (16,), "student_grid": 4 if method in ("progressive", "consistency") else 0}
        trained[method] = load_preset("digits", method, teacher=str(teacher_folder), **fields)
    for name, preset in trained.items():
        train(preset, store.folder, images, tmp_path / name / "of-1")
    # The store is open from here on: a free port that is only chosen here, a test beside this one could take.
    rendezvous = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cases = [(preset, store.folder, images, tmp_path / name / "of-2") for name, preset in trained.items()]
    torch.multiprocessing.spawn(train_in, (rendezvous.port, cases), nprocs=2)
    for name in trained:
        one, two = (pd.read_csv(tmp_path / name / f"of-{count}" / "curves.csv") for count in (1, 2))
        assert len(one) == len(two) == (18 if name == "paper" else 6)
        # Rounding grows with the steps: a norm by four images makes the paper's critic chaotic.
        pd.testing.assert_frame_equal(one[:6], two[:6], rtol=1e-3, atol=1e-5)
        if name in ("improved", "softmax and features"):
            files = [next((tmp_path / name / f"of-{count}").rglob("student/student/*.safetensors")) for count in (1, 2)]
            first, (one, two) = Student.from_preset(trained[name]).state_dict(), map(load_file, files)
            # A bias before a normalisation has no gradient but rounding, which Adam makes a step of.
            for key in [key for key in first if first[key].ndim > 1 or "running" in key]:
                moved = (one[key] - first[key]).norm()
                assert (one[key] - two[key]).norm() <= 0.05 * moved, key


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, improved, store):
    monkeypatch.setattr(training, "processes", lambda: (0, 3))
    with pytest.raises(UserError, match=r"a batch has 4, 2, 2 images .* 4 cannot be shared by 3 processes"):
        next(
            train_advkd.train_advkd(
                Student.from_preset(improved), None, store, improved, images=torch.zeros(1), device="cpu"
            )
        )


@pytest.mark.parametrize("method", ["add", "regression", "progressive", "consistency", "dmd"])
def test_a_batch_that_processes_cannot_share_is_refused_by_every_method(
    tmp_path, monkeypatch, improved, store, teacher_folder, tiny, method
):
    monkeypatch.setattr(training, "processes", lambda: (0, 3))
    preset = load_preset("digits", method, teacher=str(teacher_folder), **tiny | {"batch_sizes": (16,)})
    images = load_images(improved, "train")[0][:32] if preset.real_share else None
    message = "multiple of 24" if method == "add" else "a batch of 16 images cannot be shared by 3 processes"
    with pytest.raises(UserError, match=message):
        finish(train_run(preset, store, tmp_path, images=images, device="cpu"))


def test_two_processes_make_the_store_of_one(tmp_path):
    teacher = make_teacher(tmp_path / "teacher", 32, 3, DDPMScheduler())
    arguments = [
        "trajectories",
        "--teacher",
        teacher,
        "--count",
        160,
        "--sampler-steps",
        10,
        "--sampler",
        "ddpm",
        "--set",
        "shard_size=64",
    ]
    invoke(*arguments, "--out", tmp_path / "one")
    launcher = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--main_process_port", "0"]  # any free one
    launcher += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "-m", "advkd", "--threads", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--out", str(tmp_path / "two")], env=environment, check=True, timeout=300)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two") and len(checksums(tmp_path / "two")) == 4


def killed_after(seconds, target, *arguments):
    """Run `target` in a process of its own and end it, as a power cut does; whether it was still running. The seconds
    are of its CPU time, which tests beside this one leave as it is."""

    def run_until_the_cut():
        signal.setitimer(signal.ITIMER_PROF, seconds)
        target(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run_until_the_cut)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGPROF


def test_a_store_that_was_killed_ten_times_ends_with_the_same_bytes(tmp_path, teacher, improved):
    preset = improved.replace(trajectories=60, sampler="ddpm")
    undisturbed, started = tmp_path / "undisturbed", time.process_time()
    generate_trajectories(teacher, preset, undisturbed)
    took, kills = time.process_time() - started, 0
    rng = random.Random(0)
    for _ in range(10):
        kills += killed_after(rng.uniform(0, took / 5), generate_trajectories, teacher, preset, tmp_path / "killed")
    generate_trajectories(teacher, preset, tmp_path / "killed")
    assert kills >= 5 and checksums(tmp_path / "killed") == checksums(undisturbed)


def test_a_store_that_was_killed_before_it_was_sealed_is_sealed(tmp_path, monkeypatch, teacher, improved, store):
    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "_seal", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate_trajectories(teacher, improved, tmp_path)
    assert len(TrajectoryStore(tmp_path)) == 12 and list(tmp_path.glob("shard-*.json"))
    (tmp_path / ".shard-00001.safetensors.a_half_9.safetensors").write_bytes(b"half a file")
    generate_trajectories(teacher, improved, tmp_path)
    assert checksums(tmp_path) == checksums(store.folder)


def test_a_training_that_was_killed_goes_on_to_equal_weights_ten_times_out_of_ten(
    tmp_path, monkeypatch, improved, store
):
    monkeypatch.setattr("advkd.checkpoints.CHECKPOINT_EVERY", 5)
    preset, images = improved.replace(steps=30), load_images(improved, "train")[0][:32]
    train(preset, store.folder, images, tmp_path / "undisturbed")
    started = time.process_time()
    train(preset, store.folder, images, tmp_path / "again")  # the first one of a process takes longer
    took, rng, kills = time.process_time() - started, random.Random(0), 0
    for n in range(10):
        folder = tmp_path / f"killed-{n}"
        kills += killed_after(rng.uniform(0, took), train, preset, store.folder, images, folder)
        train(preset, store.folder, images, folder)
        weights = [next(f.rglob("student/student/*.safetensors")) for f in (tmp_path / "undisturbed", folder)]
        assert sha256(weights[0]) == sha256(weights[1])
        assert (folder / "curves.csv").read_bytes() == (tmp_path / "undisturbed" / "curves.csv").read_bytes()
    assert kills >= 5
