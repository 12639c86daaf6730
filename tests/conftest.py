"""Tiny stand-ins for what the package works on: a random teacher, two presets and a store of trajectories."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from advkd.presets import load_preset
from advkd.teacher import load_teacher
from advkd.trajectories import generate_trajectories

ROOT = Path(__file__).parents[1]
TINY = dict(
    trajectories=12,
    shard_size=5,
    sampler_steps=10,
    submodules=3,
    widths=(4, 6),
    batch_sizes=(4,),
    epochs=1,
    steps=6,
    teacher_dtype="float32",
    train_dtype="float32",
)


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=5, help="kill -9 that often, over all jobs of test_faults.py together"
    )


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded():
    matplotlib.use("agg")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVKD_PROGRESS", "0")
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start, beside other tests
        yield


@pytest.fixture(scope="session")
def lacking():
    """What to do where something is missing that pip has not: skip the test, or fail it with ADVKD_REQUIRE_BROWSER, as in CI."""

    def lack(what: str):
        if os.environ.get("ADVKD_REQUIRE_BROWSER"):
            pytest.fail(f"ADVKD_REQUIRE_BROWSER is set, but there is no {what}")
        pytest.skip(f"no {what}")

    return lack


@pytest.fixture
def browser(lacking):
    """A headless Chromium that talks to nobody by itself."""
    from playwright.sync_api import expect, sync_playwright  # slow to import, and only needed here

    expect.set_options(timeout=60_000)  # beside other jobs a browser takes its time

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None) or lacking("Chromium on the path")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=quiet)
        yield chromium
        chromium.close()


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab on loopback in `tmp_path`, with its token: the address to open. Its kernels show progress, as readers see it."""
    state = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    state |= {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name not in ("ADVKD_PROGRESS", "ADVKD_FIGURES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root"]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [*command, f"--notebook-dir={tmp_path}"], env=environment | state, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield _address(tmp_path, server)
    finally:
        server.terminate()
        server.wait(30)


def _address(tmp_path, server) -> str:
    for _ in range(600):
        for line in (tmp_path / "lab.log").read_text().splitlines():
            if "http://127.0.0.1" in line and "token=" in line:
                return line[line.index("http://127.0.0.1") :].strip()
        assert server.poll() is None, (tmp_path / "lab.log").read_text()
        time.sleep(0.1)
    raise TimeoutError((tmp_path / "lab.log").read_text())


@pytest.fixture(scope="session")
def tiny():
    """The fields of a preset that make it tiny."""
    return TINY


@pytest.fixture(scope="session")
def make_unet():
    """A factory of tiny U-Nets with random weights that follow from `seed`."""

    def make(size_px=16, channels=1, blocks=2, dropout=0.0, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet2DModel(
                sample_size=size_px,
                in_channels=channels,
                out_channels=channels,
                layers_per_block=1,
                block_out_channels=(4,) * blocks,
                down_block_types=("DownBlock2D",) * blocks,
                up_block_types=("UpBlock2D",) * blocks,
                norm_num_groups=2,
                add_attention=False,
                dropout=dropout,
            )

    return make


@pytest.fixture(scope="session")
def linear_schedule():
    """A factory of the DDPM paper's noise schedule."""
    return lambda **config: DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", **config)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, make_unet, linear_schedule):
    """A tiny teacher in diffusers format: unet/ and scheduler/."""
    folder = tmp_path_factory.mktemp("teacher")
    DDPMPipeline(make_unet(), linear_schedule()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def improved(teacher_folder):
    """The improved recipe, joint and with a moving average, in 6 steps."""
    chosen = dict(ema=0.9, real_share=0.5, fresh_share=0.5, reconstruction_weight=0.3, learning_rate=1e-3)
    chosen |= dict(latent="block-mean", adversarial="non-saturating", critic_noise=0.0)
    return load_preset("digits", "improved", teacher=str(teacher_folder), **chosen, **TINY)


@pytest.fixture(scope="session")
def paper(teacher_folder):
    """The paper's recipe in three stages of 3, 6 and 9 steps."""
    return load_preset("digits", "paper", teacher=str(teacher_folder), **TINY)


@pytest.fixture(scope="session")
def teacher(improved):
    return load_teacher(improved)


@pytest.fixture(scope="session")
def store(tmp_path_factory, teacher, improved):
    """Twelve trajectories in three shards; tests read it and leave it as it is."""
    return generate_trajectories(teacher, improved, tmp_path_factory.mktemp("store") / "trajectories")
