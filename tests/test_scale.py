"""One's own teachers and images, several processes, and what a power cut leaves: by the command line, as a user would."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_sample_images

from advkd import presets, train_advkd
from advkd.__main__ import cli
from advkd.data import load_images
from advkd.files import sha256
from advkd.presets import UserError
from advkd.run import finish, load_run, train_run
from advkd.student import Student
from advkd.trajectories import TrajectoryStore

ROOT = Path(__file__).parents[1]
ADVKD = [sys.executable, "-m", "advkd", "--threads", "1"]
ENVIRONMENT = os.environ | {"ADVKD_PROGRESS": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(*arguments, processes=1, **options):
    """`python -m advkd ...`, or the same under `accelerate launch` with several processes on the CPU."""
    command = ADVKD
    if processes > 1:
        launcher = [
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
        ]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        command = [sys.executable, *launcher, *ADVKD[1:]]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def advkd(*arguments, **options):
    process = launch(*arguments, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


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

    def invoke(*arguments):
        result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

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


@pytest.fixture(scope="module")
def slow_teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"), 32, 3, DDPMScheduler())


@pytest.fixture(scope="module")
def many(slow_teacher):
    return ["--teacher", slow_teacher, "--count", 400, "--sampler-steps", 10, "--sampler", "ddpm"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, many):
    folder = tmp_path_factory.mktemp("store") / "one"
    advkd("trajectories", *many, "--out", folder)
    return checksums(folder)


def train_in(rank, port, cases):
    """One of two processes of distributed trainings, as a launcher would start it."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for case in cases:
        train(*case)


def train(preset, store, images, folder):
    finish(train_run(preset, TrajectoryStore(store), folder, images=images, device="cpu", progress=False))


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, improved, paper, store):
    images = load_images(improved, "train")[0][:32]
    softmax_and_features = improved.replace(adversarial="forward-kl", feature_weight=0.3, ema=0.0)
    trained = {"improved": improved, "softmax and features": softmax_and_features, "paper": paper}
    for name, preset in trained.items():
        train(preset, store.folder, images, tmp_path / name / "of-1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cases = [(preset, store.folder, images, tmp_path / name / "of-2") for name, preset in trained.items()]
    torch.multiprocessing.spawn(train_in, (port, cases), nprocs=2)
    for name in trained:
        one, two = (pd.read_csv(tmp_path / name / f"of-{count}" / "curves.csv") for count in (1, 2))
        assert len(one) == len(two) == (18 if name == "paper" else 6)
        # Rounding grows with the steps: a norm by four images makes the paper's critic chaotic.
        pd.testing.assert_frame_equal(one[:6], two[:6], rtol=1e-3, atol=1e-5)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, improved, store):
    monkeypatch.setattr(train_advkd, "join", lambda: (0, 3))
    with pytest.raises(UserError, match=r"a batch has 4, 2, 2 images .* 4 cannot be shared by 3 processes"):
        next(
            train_advkd.train_advkd(
                Student.from_preset(improved), None, store, improved, images=torch.zeros(1), device="cpu"
            )
        )


def test_two_processes_make_the_store_of_one(tmp_path, many, undisturbed):
    advkd("trajectories", *many, "--out", tmp_path / "two", processes=2)
    assert checksums(tmp_path / "two") == undisturbed and len(undisturbed) == 8


@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_store_is_finished_to_the_same_bytes(tmp_path, many, undisturbed, shards):
    process = launch("trajectories", *many, "--out", tmp_path / "killed", start_new_session=True)
    while len(list((tmp_path / "killed").glob("shard-*.json"))) < shards:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) < 7
    advkd("trajectories", *many, "--out", tmp_path / "killed", processes=2)
    assert checksums(tmp_path / "killed") == undisturbed
