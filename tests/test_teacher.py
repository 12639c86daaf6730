import os
import shutil
import time
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from huggingface_hub import constants
from torch import nn

from advkd import teacher as module
from advkd.data import batch_generator
from advkd.presets import ASSETS, UserError, load_preset
from advkd.student import count_parameters
from advkd.teacher import denoising_loss, load_teacher, new_teacher, save_teacher, train_teacher
from advkd.trajectories import make_scheduler, sample_teacher


def linear_alpha_bar():
    """Cumulative signal power of the DDPM paper's schedule, in float64."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_teacher_loads_from_unet_and_scheduler_folders(improved, teacher_folder, make_unet):
    teacher = load_teacher(improved)
    assert same(teacher.unet.state_dict(), make_unet().state_dict())
    assert isinstance(teacher.scheduler, DDPMScheduler)
    assert teacher.source == str(teacher_folder)
    assert not teacher.unet.training and not any(p.requires_grad for p in teacher.unet.parameters())
    assert teacher.parameters == count_parameters(make_unet())


def test_teacher_loads_from_a_flat_folder(tmp_path, improved, teacher, make_unet):
    make_unet().save_pretrained(tmp_path)
    shutil.copy(os.path.join(teacher.source, "scheduler", "scheduler_config.json"), tmp_path)
    flat = load_teacher(improved, str(tmp_path))
    assert same(flat.unet.state_dict(), teacher.unet.state_dict())
    assert flat.fingerprint == teacher.fingerprint


def test_half_precision_weights_are_widened(tmp_path, improved, make_unet, linear_schedule):
    unet = make_unet()
    save_teacher(unet, linear_schedule(), tmp_path)
    assert unet.dtype == torch.float32
    loaded = load_teacher(improved, str(tmp_path)).unet
    assert loaded.dtype == torch.float32
    assert all(
        torch.equal(p, q.half().float()) for p, q in zip(loaded.parameters(), make_unet().parameters(), strict=True)
    )


def test_scheduler_class_is_kept(tmp_path, improved, make_unet):
    make_unet().save_pretrained(tmp_path / "unet")
    DDIMScheduler(num_train_timesteps=1000).save_pretrained(tmp_path / "scheduler")
    assert isinstance(load_teacher(improved, str(tmp_path)).scheduler, DDIMScheduler)


def test_fingerprint_tells_weights_and_schedules_apart(tmp_path, improved, teacher, make_unet, linear_schedule):
    save = {
        "weights": (make_unet(seed=1), linear_schedule()),
        "schedule": (make_unet(), DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")),
        "prediction": (make_unet(), linear_schedule(prediction_type="v_prediction")),
        "betas": (make_unet(), linear_schedule(trained_betas=np.linspace(1e-4, 2e-2, 1000).tolist())),
        "other betas": (make_unet(), linear_schedule(trained_betas=np.linspace(1e-4, 3e-2, 1000).tolist())),
    }
    prints = {teacher.fingerprint}
    for name, (unet, scheduler) in save.items():
        unet.save_pretrained(tmp_path / name / "unet")
        scheduler.save_pretrained(tmp_path / name / "scheduler")
        prints.add(load_teacher(improved, str(tmp_path / name)).fingerprint)
    assert len(prints) == 6


@pytest.mark.parametrize(("size_px", "channels"), [(8, 1), (16, 3)])
def test_a_teacher_of_another_shape_is_refused(tmp_path, improved, make_unet, linear_schedule, size_px, channels):
    make_unet(size_px, channels).save_pretrained(tmp_path / "unet")
    linear_schedule().save_pretrained(tmp_path / "scheduler")
    message = f"maps {channels} to {channels} channels at {size_px} px, but preset 'digits' has 1 at 16"
    with pytest.raises(UserError, match=message):
        load_teacher(improved, str(tmp_path))


def test_a_teacher_with_an_unsupported_scheduler_is_refused(tmp_path, improved, make_unet):
    make_unet().save_pretrained(tmp_path / "unet")
    EulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="has a EulerDiscreteScheduler; supported schedulers: DDPMScheduler, DDIM"):
        load_teacher(improved, str(tmp_path))


def test_a_teacher_that_also_predicts_variances_is_refused(tmp_path, improved, make_unet, linear_schedule):
    unet = make_unet()
    UNet2DModel.from_config(unet.config, out_channels=2).save_pretrained(tmp_path / "unet")
    linear_schedule().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="maps 1 to 2 channels"):
        load_teacher(improved, str(tmp_path))


def test_a_teacher_of_other_timesteps_is_refused(tmp_path, improved, make_unet):
    make_unet().save_pretrained(tmp_path / "unet")
    DDPMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="has 500 timesteps; only 1000 are supported"):
        load_teacher(improved, str(tmp_path))


def test_a_folder_without_a_teacher_is_refused(tmp_path, improved):
    with pytest.raises(UserError, match="has no UNet2DModel"):
        load_teacher(improved, str(tmp_path))


def test_a_teacher_without_a_scheduler_is_refused(tmp_path, improved, make_unet):
    make_unet().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"scheduler_config\.json"):
        load_teacher(improved, str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path, improved, make_unet, linear_schedule):
    make_unet().save_pretrained(tmp_path / "unet", safe_serialization=False)
    linear_schedule().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="safetensors"):
        load_teacher(improved, str(tmp_path))


def test_a_missing_folder_is_no_hub_id(improved, tmp_path):
    with pytest.raises(UserError, match="neither a folder that exists nor a hub id"):
        load_teacher(improved, str(tmp_path / "not" / "there"))


@pytest.mark.parametrize("offline_by", ["network", "environment"])
def test_a_hub_teacher_without_a_network_is_refused_at_once(monkeypatch, tmp_path, offline_by):
    asked = []
    monkeypatch.setattr(module, "_reachable", lambda url: asked.append(url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline_by == "environment")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        load_teacher(load_preset("celebahq"))
    assert time.perf_counter() - start < 5
    message = str(error.value)
    assert "'google/ddpm-celebahq-256'" in message
    assert "give a folder in diffusers format (unet/ and scheduler/ as safetensors)" in message
    assert "hf download google/ddpm-celebahq-256" in message
    assert len(asked) == (offline_by == "network")


def test_reachable_asks_once_and_quickly(monkeypatch):
    answers = [None, urllib.error.HTTPError("", 405, "", {}, None), urllib.error.URLError("no network"), TimeoutError()]
    seen = []

    def urlopen(request, timeout):
        seen.append((request.get_method(), timeout <= 5))
        if (answer := answers[len(seen) - 1]) is not None:
            raise answer
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(module.urllib.request, "urlopen", urlopen)
    assert [module._reachable("https://hub.invalid") for _ in answers] == [True, True, False, False]
    assert seen == [("HEAD", True)] * 4


def test_the_shipped_teacher_of_the_glyphs_is_small_and_starts_from_noise_alone():
    preset = load_preset("glyphs")
    teacher = load_teacher(preset)
    files = [f for f in (ASSETS / "glyphs-teacher").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 6e6 and {f.suffix for f in files} <= {
        ".json",
        ".safetensors",
        ".csv",
        ".md",
    }
    assert type(teacher.unet) is UNet2DModel and teacher.scheduler.config.prediction_type == "v_prediction"
    assert make_scheduler(teacher, "ddim", 10).alphas_cumprod[-1] < 1e-6  # nothing of the image is left
    images = sample_teacher(teacher, preset, "ddim", 10, range(16), seed=0)
    assert images.shape == (16, 3, 32, 32)
    border = torch.cat([images[:, :, 0], images[:, :, -1]], dim=-1)
    colours = border.median(dim=-1).values
    assert colours.std(0).min() > 0.25, "the grounds differ in every channel"
    assert (border - colours[..., None]).abs().median() < 0.1, "each ground is of one colour"


def test_the_shipped_teacher_is_small_and_fits_the_digits():
    folder = ASSETS / "digits-teacher"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".csv", ".md"}
    teacher = load_teacher(load_preset("digits"))
    assert teacher.parameters == 1_062_497
    assert all(p.isfinite().all() for p in teacher.unet.parameters())
    assert teacher.unet.state_dict().keys() == new_teacher(load_preset("digits"))[0].state_dict().keys()


def test_a_new_teacher_follows_from_its_seed():
    preset = load_preset("digits")
    state = torch.get_rng_state()
    (first, scheduler), (again, _), (other, _) = (new_teacher(preset, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first.state_dict(), again.state_dict()) and not same(first.state_dict(), other.state_dict())
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.tensor(linear_alpha_bar()).float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoising_loss_by_hand(linear_schedule, prediction):
    times = []

    def half(xt, t):
        times.append(t)
        return SimpleNamespace(sample=0.5 * xt)

    x0 = torch.rand(64, 1, 4, 4) * 2 - 1
    scheduler = linear_schedule(prediction_type=prediction)
    loss = denoising_loss(half, scheduler, x0, torch.Generator().manual_seed(5))
    eps = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(5)).double().numpy()
    signal = linear_alpha_bar()[times[0].numpy()][:, None, None, None]
    a, s, x = np.sqrt(signal), np.sqrt(1 - signal), x0.double().numpy()
    target = a * eps - s * x if prediction == "v_prediction" else eps
    assert loss.item() == pytest.approx(np.mean((0.5 * (a * x + s * eps) - target) ** 2), rel=1e-4)
    assert times[0].min() < 100 and times[0].max() > 900


def test_training_moves_every_weight_and_leaves_the_average(linear_schedule, make_unet):
    unet, images = make_unet(8, blocks=1), torch.rand(6, 1, 8, 8) * 2 - 1
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    raw, records = [], []
    for record in train_teacher(unet, linear_schedule(), images, images[:2], steps=3, batch_size=2, ema=0.5):
        records.append(record)
        raw.append({name: p.detach().clone() for name, p in unet.named_parameters()})
    assert [(r.step, r.images_seen) for r in records] == [(1, 2), (2, 4), (3, 6)]
    assert [r.heldout_loss is None for r in records] == [True, True, False]
    assert not [name for name in before if torch.equal(raw[-1][name], before[name])]
    for name, p in unet.named_parameters():
        average = 0.5 * (0.5 * raw[0][name] + 0.5 * raw[1][name]) + 0.5 * raw[2][name]
        torch.testing.assert_close(p.detach(), average, atol=1e-7, rtol=1e-5)
    assert not unet.training


def test_heldout_images_are_only_measured(linear_schedule, make_unet):
    images, ends = torch.rand(6, 1, 8, 8) * 2 - 1, []
    for heldout in (images[:2], -images[2:4]):
        unet = make_unet(8, blocks=1)
        ends.append(
            [r.heldout_loss for r in train_teacher(unet, linear_schedule(), images, heldout, steps=2, batch_size=2)]
        )
        ends[-1].append(unet.state_dict())
    assert ends[0][1] != ends[1][1]
    assert same(ends[0][2], ends[1][2])


def test_resumed_training_gives_the_weights_of_an_uninterrupted_one(tmp_path, linear_schedule, make_unet):
    images, steps = torch.rand(6, 1, 8, 8) * 2 - 1, 502
    checkpoint, kept = tmp_path / "checkpoint.safetensors", tmp_path / "kept.safetensors"

    def start(file, **options):
        unet = make_unet(8, blocks=1, dropout=0.1)
        return unet, train_teacher(
            unet, linear_schedule(), images, images, steps=steps, batch_size=2, checkpoint=file, **options
        )

    torch.manual_seed(0)
    whole, records = start(checkpoint)
    for record in records:
        if record.step == 501:  # a checkpoint follows its record
            shutil.copy(checkpoint, kept)
    torch.manual_seed(1)  # another process has another global random state
    resumed, records = start(kept, resume=True)
    assert [record.step for record in records] == [501, 502]
    assert same(resumed.state_dict(), whole.state_dict())


def test_the_batches_follow_from_seed_and_step(linear_schedule, make_unet, monkeypatch):
    images, seen = torch.arange(6.0).view(6, 1, 1, 1).expand(-1, 1, 8, 8), []

    def loss(unet, scheduler, x0, generator):
        seen.append(x0[:, 0, 0, 0].tolist())
        return sum(p.square().sum() for p in unet.parameters())

    monkeypatch.setattr(module, "denoising_loss", loss)
    unet = nn.Conv2d(1, 1, 1)
    list(train_teacher(unet, linear_schedule(), images, images, steps=2, batch_size=4, seed=9))
    expected = [torch.randint(6, (4,), generator=batch_generator(9, step)).float().tolist() for step in (1, 2)]
    assert seen[:2] == expected
