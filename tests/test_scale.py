"""One's own teachers and images, several processes, and what a power cut leaves: by the command line, as a user would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from sklearn.datasets import load_sample_images

from advkd.files import sha256
from advkd.run import load_run

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
def test_a_teacher_and_images_of_ones_own_run_end_to_end(tmp_path, photographs, shape, recipe):
    teacher = make_teacher(tmp_path / "teacher", **shape)
    few = ["--sampler", "dpm-solver", "--sampler-steps", 10, "--count", 64]
    told = advkd("trajectories", "--teacher", teacher, "--recipe", recipe, *few, "--out", tmp_path / "store")
    assert f"own: {shape['channels']} x {shape['size_px']} x {shape['size_px']}, recipe {recipe}" in told
    assert "submodule 10: " in told and f"{shape['size_px']} px, the final image" in told
    images = ["--images", photographs] if recipe == "improved" else []
    budget = ["--steps", 2] if recipe == "improved" else ["--epochs", 0.02]
    options = ["--trajectories", tmp_path / "store", "--recipe", recipe, *images, *budget, "--out", tmp_path / "run"]
    advkd("train", *options, cwd=tmp_path)
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
