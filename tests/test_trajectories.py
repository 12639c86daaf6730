import copy
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from advkd import devices
from advkd import trajectories as module
from advkd.data import make_latent, sample_generators, sample_noise, seeded_noise, to_uint8
from advkd.files import sha256
from advkd.presets import UserError, load_preset
from advkd.teacher import Teacher
from advkd.trajectories import (
    TrajectoryStore,
    denoise,
    generate_trajectories,
    make_scheduler,
    sample_bytes,
    sample_teacher,
    states,
    trajectory_dir,
)

KINDS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}


class Formula:
    """A denoiser that is one line, for runs of many steps."""

    dtype, device = torch.float32, torch.device("cpu")

    def __call__(self, xt, t):
        return SimpleNamespace(sample=torch.sin(3 * xt + t.view(-1, 1, 1, 1) / 300))


def oracle(unet, sampler, steps, noise, generator):
    """One trajectory by diffusers' scheduler alone: {t: (x_t after the step at t, x0 predicted at t)}."""
    scheduler = KINDS[sampler](num_train_timesteps=1000, beta_schedule="linear", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    extra, xt, visited = {"generator": generator} if sampler == "ddpm" else {}, noise[None], {}
    with torch.no_grad():
        for t in scheduler.timesteps.tolist():
            step = scheduler.step(unet(xt, torch.tensor([t])).sample, t, xt, **extra)
            xt = step.prev_sample
            visited[t] = xt[0], step.pred_original_sample[0]
    return visited


def drawn(index, seed, shape):
    """A sample's noise and its generator after that."""
    (generator,) = sample_generators([index], seed)
    return sample_noise([generator], shape)[0], generator


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_denoise_is_diffusers_own_loop(teacher, sampler):
    generators = sample_generators([4, 7], 1)
    noise = sample_noise(generators, (1, 16, 16))
    visited = list(denoise(teacher, noise, make_scheduler(teacher, sampler, 10), generators))
    assert [t for t, _, _ in visited] == list(range(999, 0, -100))
    for position, index in enumerate((4, 7)):
        expected = oracle(teacher.unet, sampler, 10, *drawn(index, 1, (1, 16, 16)))
        for t, xt, x0 in visited:
            torch.testing.assert_close(xt[position], expected[t][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(x0[position], expected[t][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [10, 50, 100, 1000])
def test_states_are_read_right_after_the_papers_times(linear_schedule, sampler, steps):
    teacher, generators = Teacher(Formula(), linear_schedule(), "formula", "0"), sample_generators([3], 0)
    noise = sample_noise(generators, (1, 4, 4))
    read = states(teacher, noise, make_scheduler(teacher, sampler, steps), generators, 11)
    expected = oracle(teacher.unet, sampler, steps, *drawn(3, 0, (1, 4, 4)))
    assert len(read) == 11 and len(expected) == steps
    for j in range(1, 11):
        xt, x0 = expected[1099 - 100 * j]
        torch.testing.assert_close(read[j - 1][0][0], xt, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read[j - 1][1][0], x0, atol=1e-4, rtol=1e-4)
    last = expected[min(expected)][0]
    torch.testing.assert_close(read[10][0][0], last, atol=1e-4, rtol=1e-4)
    assert torch.equal(read[10][0], read[10][1])


def test_ddim_is_deterministic_and_ddpm_is_seeded(teacher, improved):
    noise = seeded_noise([0], (1, 16, 16), 0)
    ends = {}
    for sampler in ("ddim", "ddpm"):
        for seed in (0, 0, 1):
            scheduler = make_scheduler(teacher, sampler, 10)
            *_, (_, xt, _) = denoise(teacher, noise, scheduler, sample_generators([0], seed))
            ends.setdefault(sampler, []).append(xt)
    assert torch.equal(ends["ddim"][0], ends["ddim"][2])
    assert torch.equal(ends["ddpm"][0], ends["ddpm"][1]) and not torch.equal(ends["ddpm"][0], ends["ddpm"][2])


def test_unknown_sampler_is_refused(teacher):
    with pytest.raises(UserError, match="no sampler 'euler'; samplers: ddpm, ddim, dpm-solver"):
        make_scheduler(teacher, "euler", 10)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_columns_are_hand_resized_states(tmp_path, teacher, improved, sampler):
    preset = improved.replace(submodules=11, sampler=sampler, trajectories=2)
    store = generate_trajectories(teacher, preset, tmp_path)
    assert len(store) == 2
    for index in range(2):
        noise, generator = drawn(index, preset.trajectory_seed, (1, 16, 16))
        for how in ("block-mean", "shrink8bit"):
            assert torch.equal(store.latents(how)[index], make_latent(noise[None], how)[0])
        visited = oracle(teacher.unet, sampler, 10, noise, generator)
        for k, side in enumerate([8] * 6 + [16] * 5):
            xt, x0 = visited[999 - 100 * k] if k < 10 else [visited[99][0]] * 2
            block = 16 // side
            xt, x0 = (x.reshape(1, side, block, side, block).mean((2, 4)) for x in (xt, x0))
            stored_xt, stored_x0 = (store.column(f"{target}_{k}")[:][index] for target in ("xt", "x0"))
            assert (stored_xt.dtype, stored_x0.dtype) == (torch.float16, torch.uint8)
            torch.testing.assert_close(stored_xt.float(), xt, atol=1e-3, rtol=1e-3)
            assert (stored_x0.int() - to_uint8(x0).int()).abs().max() <= 1
            torch.testing.assert_close(store.targets(k, "xt")[index], xt.clamp(-1, 1), atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(store.targets(k, "x0")[index], x0.clamp(-1, 1), atol=1.01 / 127.5, rtol=0)


def test_shards_and_columns_have_every_trajectory(store):
    assert len(store) == 12
    assert sorted(file.name for file in store.folder.iterdir()) == [
        "manifest.json",
        *(f"shard-0000{number}.safetensors" for number in range(3)),
    ]
    assert [len(load_file(store.folder / name)["x0_0"]) for name in sorted(store.shards)] == [5, 5, 2]
    assert store.column("xt_0")[:].shape == (12, 1, 8, 8) and store.column("x0_2")[:].shape == (12, 1, 16, 16)
    whole, some = store.column("x0_2")[:], torch.tensor([11, 0, 5, 4, 5])
    assert torch.equal(store.column("x0_2")[some], whole[some]) and len(store.column("x0_2")) == 12
    store.verify()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_trajectory_does_not_depend_on_its_shard(tmp_path, teacher, improved, sampler):
    one, three = (
        generate_trajectories(teacher, improved.replace(sampler=sampler, shard_size=size), tmp_path / str(size))
        for size in (12, 5)
    )
    assert torch.equal(one.latents("block-mean"), three.latents("block-mean"))
    for k in range(3):
        torch.testing.assert_close(one.targets(k, "xt"), three.targets(k, "xt"), atol=1e-3, rtol=0)
        torch.testing.assert_close(one.targets(k, "x0"), three.targets(k, "x0"), atol=1.01 / 127.5, rtol=0)


@pytest.mark.parametrize("finished", [1, 2])
def test_an_interrupted_store_ends_byte_identical(tmp_path, monkeypatch, teacher, improved, store, finished):
    calls, original = [], module.states

    def interrupted(*args):
        calls.append(args)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "states", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_trajectories(teacher, improved, tmp_path)
    assert sorted(contents(tmp_path)) == [
        "manifest.json",
        *(f"shard-0000{n}.{kind}" for n in range(finished) for kind in ("json", "safetensors")),
    ]
    with pytest.raises(UserError, match=f"holds {5 * finished} of 12 trajectories"):
        TrajectoryStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "states", lambda *args: calls.append(args) or original(*args))
        calls.clear()
        generate_trajectories(teacher, improved, tmp_path)
    assert len(calls) == 3 - finished
    assert contents(tmp_path) == contents(store.folder)


def test_a_finished_store_is_only_read(monkeypatch, teacher, improved, store):
    before = {file: file.stat().st_mtime_ns for file in store.folder.iterdir()}
    monkeypatch.setattr(module, "states", None)
    assert len(generate_trajectories(teacher, improved, store.folder)) == 12
    assert {file: file.stat().st_mtime_ns for file in store.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trajectory_seed", 1, "trajectory_seed: made with 0, wanted 1"),
        ("trajectories", 13, "trajectories: made with 12, wanted 13"),
        ("sampler", "ddpm", "sampler: made with 'ddim', wanted 'ddpm'"),
    ],
)
def test_a_store_of_another_configuration_is_refused(teacher, improved, store, field, value, message):
    before = contents(store.folder)
    with pytest.raises(UserError, match=message):
        generate_trajectories(teacher, improved.replace(**{field: value}), store.folder)
    assert contents(store.folder) == before
    assert trajectory_dir(teacher, improved.replace(**{field: value})) != trajectory_dir(teacher, improved)


def test_a_store_of_another_teacher_is_refused(teacher, improved, store):
    other = copy.copy(teacher)
    other.fingerprint = "another"
    with pytest.raises(UserError, match=f"teacher_fingerprint: made with '{teacher.fingerprint}', wanted 'another'"):
        generate_trajectories(other, improved, store.folder)


def test_what_does_not_touch_the_trajectories_shares_the_store(teacher, improved, store):
    other = improved.replace(seed=1, learning_rate=0.5, recipe="paper", widths=(2, 2))
    assert len(generate_trajectories(teacher, other, store.folder)) == 12
    assert trajectory_dir(teacher, other) == trajectory_dir(teacher, improved)


def test_a_damaged_shard_is_found_and_made_again(tmp_path, teacher, improved, store):
    copied = generate_trajectories(teacher, improved, tmp_path)
    copied.verify()
    shard = tmp_path / "shard-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert sha256(shard) != copied.shards[shard.name]["sha256"]
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged"):
        copied.verify()
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged or missing"):
        copied.verify()
    generate_trajectories(teacher, improved, tmp_path).verify()
    assert contents(tmp_path) == contents(store.folder)


def test_a_damaged_or_missing_manifest_is_named(tmp_path, teacher, improved):
    with pytest.raises(UserError, match=r"holds no trajectories .*python -m advkd trajectories"):
        TrajectoryStore(tmp_path)
    for damaged in ("{", "{}"):
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            generate_trajectories(teacher, improved, tmp_path)


def test_a_teacher_that_is_not_finite_is_refused(tmp_path, linear_schedule, improved, make_unet):
    unet = make_unet().eval()
    torch.nn.init.constant_(unet.conv_out.bias, math.nan)
    broken = Teacher(unet, linear_schedule(), "broken", "0")
    with pytest.raises(UserError, match="teacher 'broken' gives values that are not finite"):
        generate_trajectories(broken, improved, tmp_path)


def test_computing_in_bfloat16_leaves_the_teacher_as_it_was(
    tmp_path, linear_schedule, improved, make_unet, monkeypatch
):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)
    unet = make_unet().eval()
    dtypes = []
    unet.register_forward_pre_hook(lambda unet, args: dtypes.append((unet.dtype, args[0].dtype)))
    teacher = Teacher(unet, linear_schedule(), "half", "0")
    generate_trajectories(teacher, improved.replace(teacher_dtype="bfloat16", trajectories=2), tmp_path)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    after, before = unet.state_dict(), make_unet().state_dict()
    assert unet.dtype == torch.float32 and all(torch.equal(after[name], before[name]) for name in before)


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(tmp_path, teacher, improved, monkeypatch):
    half = improved.replace(teacher_dtype="bfloat16")
    for there in (False, True):
        monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda there=there: there)
        generate_trajectories(teacher, half, tmp_path / f"{there}", device="cpu")
    stores = {there: TrajectoryStore(tmp_path / f"{there}") for there in (False, True)}
    assert stores[False].config == stores[True].config, "a store can be carried on elsewhere"
    assert {entry.get("dtype") for entry in stores[False].shards.values()} == {"float32"}
    assert {entry.get("dtype") for entry in stores[True].shards.values()} == {None}
    generate_trajectories(teacher, improved, tmp_path / "asked", device="cpu")
    for file in stores[False].shards:
        assert (tmp_path / "False" / file).read_bytes() == (tmp_path / "asked" / file).read_bytes()


def test_sample_teacher_gives_the_stored_images(teacher, improved, store):
    images = sample_teacher(teacher, improved, "ddim", 10, range(12), improved.trajectory_seed)
    assert images.shape == (12, 1, 16, 16) and images.abs().max() <= 1
    torch.testing.assert_close(images, store.targets(2, "xt"), atol=1e-3, rtol=0)
    some = sample_teacher(teacher, improved.replace(shard_size=2), "ddim", 10, [7, 3, 9], improved.trajectory_seed)
    torch.testing.assert_close(some, images[[7, 3, 9]], atol=1e-3, rtol=0)


def test_a_compiled_teacher_makes_a_store_of_its_own(tmp_path, monkeypatch, teacher, improved, store):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda unet: compiled.append(unet) or unet)
    preset = improved.replace(teacher_compile=True)
    assert trajectory_dir(teacher, preset) != trajectory_dir(teacher, improved)
    made = generate_trajectories(teacher, preset, tmp_path)
    assert compiled == [teacher.unet] and made.made_with()["teacher_compile"]
    with pytest.raises(UserError, match="teacher_compile: made with None, wanted True"):
        generate_trajectories(teacher, preset, store.folder)


def test_the_solver_of_second_order_is_diffusers_own(teacher):
    noise = seeded_noise([4, 7], (1, 16, 16), 1)
    scheduler, xt, visited = DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="trailing"), noise, []
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            xt = scheduler.step(teacher.unet(xt, t).sample, t, xt).prev_sample
            visited.append(xt)
    made = make_scheduler(teacher, "dpm-solver", 10)
    for _ in range(2):  # again, although the solver remembers its last steps
        walk = list(denoise(teacher, noise, made, []))
        assert [t for t, _, _ in walk] == list(range(999, 0, -100))
        torch.testing.assert_close(torch.stack([x for _, x, _ in walk]), torch.stack(visited), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(walk[-1][1], walk[-1][2], atol=1e-4, rtol=1e-4)  # the last state is the image itself


def test_a_sample_at_the_papers_size_takes_a_third_of_a_megabyte():
    for recipe in ("paper", "improved"):
        assert 0.32e6 < sample_bytes(load_preset("celebahq", recipe)) <= 0.35e6


def test_the_bytes_of_a_sample_are_those_on_disk(store, improved):
    shard = load_file(store.folder / "shard-00000.safetensors")
    assert sum(tensor.nbytes for tensor in shard.values()) == 5 * sample_bytes(improved)


def test_a_disk_that_is_too_small_is_named_before_anything_is_made(tmp_path, monkeypatch, teacher, improved):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the trajectories need \d.* GB, but .* has 1e-06 GB free"):
        generate_trajectories(teacher, improved, tmp_path / "deep" / "store")
    assert not list(tmp_path.iterdir())


def test_a_shard_that_does_not_fit_is_sampled_in_smaller_batches(tmp_path, monkeypatch, teacher, improved, store):
    original, sizes = module._batch, []

    def small_memory(teacher, preset, scheduler, indices):
        sizes.append(len(indices))
        if len(indices) > 2:
            raise RuntimeError("CUDA out of memory.")
        return original(teacher, preset, scheduler, indices)

    monkeypatch.setattr(module, "_batch", small_memory)
    smaller = generate_trajectories(teacher, improved, tmp_path)
    assert sizes[:3] == [5, 3, 2] and max(sizes[2:]) == 2  # halves, and smaller from then on
    for k in range(3):
        torch.testing.assert_close(smaller.targets(k, "x0"), store.targets(k, "x0"), atol=1.01 / 127.5, rtol=0)
