"""Numbers against independent oracles: exact arithmetic, float64 formulas, finite differences, diffusers' schedulers."""

import math
from fractions import Fraction
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from advkd import losses
from advkd.data import block_mean, from_uint8, make_latent, sample_generators, sample_noise, seeded_noise, to_uint8
from advkd.denoiser import Denoiser, noise_levels
from advkd.discriminator import Discriminator, UnconditionalDiscriminator
from advkd.presets import UserError, load_preset, resolution, stage_times
from advkd.student import Student
from advkd.teacher import Teacher, denoising_loss
from advkd.training import MovingAverage, Plan, timestep, update_average
from advkd.trajectories import denoise, make_scheduler, states

few = settings(deadline=None, max_examples=25, derandomize=True, database=None)
many = settings(deadline=None, max_examples=100, derandomize=True, database=None)
SIZES = st.integers(3, 11).map(lambda n: 2**n)
SEEDS = st.integers(0, 2**32 - 1)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = {"linear": {}, "zero SNR": {"rescale_betas_zero_snr": True}}


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- stages, steps and batches: integers and fractions ---------------------------------------------------------------


@many
@given(submodules=st.integers(1, 40), size=SIZES)
def test_sizes_double_from_8_px_to_the_image(submodules, size):
    sizes = [resolution(k, submodules, size) for k in range(submodules)]
    levels = [2**n for n in range(3, size.bit_length())]
    assert sizes == sorted(sizes) and set(sizes) <= set(levels) and sizes[-1] == size
    if submodules >= len(levels):
        counts = [sizes.count(level) for level in levels]
        assert sizes[0] == 8 and max(counts) - min(counts) <= 1, "each size has its even share of the submodules"
    else:
        assert len(set(sizes)) == submodules, "a size is left out before one comes twice"


def test_sizes_of_the_paper():
    assert [resolution(k, 11, 256) for k in range(11)] == [2 ** (k // 2 + 3) for k in range(11)]


@many
@given(submodules=st.integers(1, 1001))
def test_stage_times_fall_evenly_from_999(submodules):
    times = stage_times(submodules)
    assert len(times) == submodules - 1 and all(a > b for a, b in pairwise(times))
    for j, t in enumerate(times):
        assert 0 <= t <= 999 and abs(t - (999 - Fraction(1000 * j, max(submodules - 1, 1)))) <= Fraction(1, 2)


def test_stage_times_of_the_paper():
    assert stage_times(11) == tuple(1099 - 100 * j for j in range(1, 11))


@many
@given(grid=st.integers(1, 1000))
def test_grids_of_timesteps_end_in_noise_and_begin_with_the_image(grid):
    times = timestep(torch.arange(grid + 1), grid).tolist()
    assert times[0] == -1 and times[-1] == 999 and all(a < b for a, b in pairwise(times))
    assert all(0 <= Fraction(1000 * n, grid) - 1 - t < 1 for n, t in enumerate(times))


PLANS = dict(
    trajectories=st.integers(4, 60),
    submodules=st.integers(1, 4),
    sizes=st.lists(st.integers(2, 16), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)


def tiny(recipe: str, submodules: int, **fields):
    widths = (2,) * len({resolution(k, submodules, 16) for k in range(submodules)})
    return load_preset("digits", recipe, submodules=submodules, widths=widths, **fields)


@few
@given(epochs=st.sampled_from([0.05, 0.5, 1.0, 1.5, 2.0]), decay=st.sampled_from([0.0, 0.3, 1.0]), **PLANS)
def test_a_staged_plan_is_whole_epochs_of_whole_batches(trajectories, submodules, sizes, seed, epochs, decay):
    p = tiny("paper", submodules, batch_sizes=tuple(sizes), epochs=epochs, seed=seed, decay_share=decay)
    if trajectories < max(p.batch_size(k) for k in range(submodules)):
        with pytest.raises(UserError, match="fewer than a batch"):
            Plan(p, trajectories)
        return
    plan, steps = Plan(p, trajectories), []
    for k in range(submodules):
        size = p.batch_size(k)
        for local in range(max(1, round(epochs * (k + 1) * (trajectories // size)))):
            steps.append((k, size, local % (trajectories // size), local))
    assert plan.steps == len(steps) == sum(plan.stages.values())
    epoch = set()
    for step, (k, size, position, local) in enumerate(steps):
        indices = plan.batch(step).tolist()
        epoch = set(indices) if position == 0 else epoch | set(indices)
        assert len(epoch) == (position + 1) * size, "no trajectory comes twice in an epoch"
        assert epoch <= set(range(trajectories))
        assert plan.stage_of(step) == k and plan.is_first(step) == (local == 0)
    seen = list(accumulate(size for _, size, _, _ in steps))
    assert [plan.images_seen(step) for step in range(plan.steps)] == seen
    assert torch.equal(plan.batch(len(steps) - 1), Plan(p, trajectories).batch(len(steps) - 1))
    with pytest.raises(ValueError, match="no such step"):
        plan.stage_of(plan.steps)


@few
@given(steps=st.integers(1, 40), fresh=st.sampled_from([0.0, 0.25, 0.5, 0.75]), decay=st.floats(0, 1), **PLANS)
def test_a_joint_plan_counts_fresh_images_and_lets_the_rate_fall_to_zero(
    trajectories, submodules, sizes, seed, steps, fresh, decay
):
    p = tiny("improved", submodules, batch_sizes=(2 * sizes[0],), steps=steps, fresh_share=fresh, seed=seed)
    p, size = p.replace(decay_share=decay), 2 * sizes[0]
    plan = Plan(p, trajectories)
    assert plan.steps == steps and plan.stages == {submodules - 1: steps}
    for step in range(steps):
        indices = plan.batch(step)
        assert len(indices) == size - round(size * fresh) and ((indices >= 0) & (indices < trajectories)).all()
        assert plan.images_seen(step) == (step + 1) * size
    rates = [plan.learning_rate(step) for step in range(steps)]
    for step, rate in enumerate(rates):
        falling = Fraction(decay) * steps
        share = min(Fraction(1), (steps - step) / falling) if falling else Fraction(1)
        assert rate == pytest.approx(p.learning_rate * float(share), rel=1e-12)
    assert min(rates) > 0 and rates == sorted(rates, reverse=True)


# ---- latents and 8 bits ----------------------------------------------------------------------------------------------


@few
@given(side=st.sampled_from([4, 8, 16, 32]), data=st.data(), channels=st.integers(1, 3))
def test_block_means_are_an_orthonormal_projection_of_each_channel(side, data, channels):
    size = data.draw(st.sampled_from([s for s in (1, 2, 4, 8, 16, 32) if s <= side]))
    basis = torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)
    matrix = block_mean(basis, size).flatten(1).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size * size, dtype=torch.float64), atol=1e-14, rtol=0)
    noise = randn(side, 2, channels, side, side)
    small, block = block_mean(noise, size), side // size
    blocks = noise.numpy().reshape(2, channels, size, block, size, block)
    np.testing.assert_allclose(small.numpy(), blocks.mean((3, 5)) * block, atol=1e-12)
    if side >= 4 * size:  # a mean of means, and what the student is given at two sizes agree
        torch.testing.assert_close(block_mean(block_mean(noise, 2 * size), size), small)


def test_block_means_of_normal_noise_have_the_variance_1():
    latents = make_latent(torch.randn(500_000, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert latents.shape == (500_000, 1, 4, 4)  # 8 million numbers: the variance is known to 0.0005
    assert abs(latents.var().item() - 1) < 0.002 and abs(latents.mean().item()) < 0.002
    across = latents.flatten(1).T.cov()
    assert (across - torch.eye(16)).abs().max() < 0.01, "and no correlation between places"


def test_the_full_latent_is_the_noise_itself():
    noise = torch.randn(2, 3, 8, 8)
    assert make_latent(noise, "full") is noise


@many
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_8_bits_are_the_nearest_level_of_any_number(values):
    levels = to_uint8(torch.tensor(values, dtype=torch.float32)).tolist()
    for x, level in zip(values, levels):
        exact = min(max((x + 1) * 127.5, 0.0), 255.0)
        assert abs(exact - level) <= 0.5 + 1e-4, x


@few
@given(seed=SEEDS, channels=st.integers(1, 3), side=st.integers(1, 8))
def test_8_bit_images_survive_the_round_trip(seed, channels, side):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2, channels, side, side), generator=generator, dtype=torch.uint8)
    shown = from_uint8(images)
    assert torch.equal(to_uint8(shown), images) and shown.dtype == torch.float32
    np.testing.assert_allclose(shown.numpy(), images.numpy().astype(float) / 127.5 - 1, atol=1e-7)


# ---- noise schedules against diffusers -------------------------------------------------------------------------------


class Answer(nn.Module):
    """A U-Net whose answer at (x_t, t) is a formula."""

    def __init__(self, formula):
        super().__init__()
        self.formula, self.dtype, self.device = formula, torch.float32, torch.device("cpu")

    def forward(self, xt, t):
        return SimpleNamespace(sample=self.formula(xt, t))


@pytest.fixture(scope="module")
def make_denoiser(make_unet, linear_schedule):
    """A factory of a Denoiser with a formula in place of its U-Net, and diffusers' scheduler of the same schedule."""

    def make(prediction, schedule, formula):
        config = dict(prediction_type=prediction, **SCHEDULES[schedule])
        unet, scheduler = make_unet(8), linear_schedule(**config)
        denoiser = Denoiser(dict(unet.config), {k: v for k, v in scheduler.config.items() if not k.startswith("_")})
        denoiser.unet = Answer(formula)
        ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, timestep_spacing="trailing")
        return denoiser, ddim

    return make


def wavy(xt, t):
    return torch.sin(3 * xt + t.view(-1, 1, 1, 1) / 300)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_images_are_noised_as_diffusers_does(make_denoiser, schedule):
    denoiser, ddim = make_denoiser("v_prediction", schedule, wavy)
    t = torch.arange(1000 if schedule == "zero SNR" else 999)  # the linear schedule's last step is noise alone here
    x0, eps = randn(0, len(t), 1, 2, 2).float(), randn(1, len(t), 1, 2, 2).float()
    torch.testing.assert_close(denoiser.noised(x0, eps, t), ddim.add_noise(x0, eps, t), atol=1e-3, rtol=0)
    torch.testing.assert_close(denoiser.noised(x0, eps, t)[:999], ddim.add_noise(x0, eps, t)[:999])
    last = torch.tensor([999, -1])
    assert torch.equal(denoiser.noised(x0[:2], eps[:2], last), torch.stack([eps[0], x0[1]])), "noise; a clean image"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_are_a_point_on_the_circle(linear_schedule, schedule):
    scheduler = linear_schedule(**SCHEDULES[schedule])
    alpha, sigma = (x.double().numpy() for x in noise_levels(scheduler))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    assert (np.diff(alpha) < 0).all() and (np.diff(sigma) >= 0).all() and (alpha[-1], sigma[-1]) == (0, 1)
    betas = np.linspace(1e-4, 0.02, 1000)
    levels = np.sqrt(np.cumprod(1 - betas))
    if schedule == "zero SNR":  # Lin et al. 2024, algorithm 1
        levels = (levels - levels[-1]) * levels[0] / (levels[0] - levels[-1])
    np.testing.assert_allclose(alpha[:-1], levels[:-1], atol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_expected_image_is_that_of_diffusers_for_every_prediction(make_denoiser, prediction, schedule):
    denoiser, ddim = make_denoiser(prediction, schedule, wavy)
    ddim.set_timesteps(1000)
    ratio, limit = denoiser.sigma / denoiser.alpha, denoiser.config.gain_limit
    for t in (0, 1, 99, 299, 599, 600, 700, 899, 998, 999):
        xt, at = randn(t, 3, 1, 2, 2).float(), torch.full((3,), t)
        exact = t < 999 and not (prediction == "epsilon" and ratio[t] > limit)
        if exact:  # where an error in epsilon counts in full
            expected = ddim.step(wavy(xt, at), t, xt).pred_original_sample
            torch.testing.assert_close(denoiser(xt, at), expected, atol=2e-5, rtol=2e-5)
        elif t == 999:  # noise alone: what is added to nothing of x_t
            told = {"epsilon": limit * (xt - wavy(xt, at)), "v_prediction": -wavy(xt, at), "sample": wavy(xt, at)}
            torch.testing.assert_close(denoiser(xt, at), told[prediction])
    assert prediction == "epsilon" or (ratio > limit).any(), "only a prediction of epsilon is limited"


@few
@given(
    t=st.integers(0, 998), seed=SEEDS, prediction=st.sampled_from(PREDICTIONS), schedule=st.sampled_from([*SCHEDULES])
)
def test_a_denoiser_that_is_told_the_truth_says_the_image(make_denoiser, t, seed, prediction, schedule):
    x0, eps = randn(seed, 2, 2, 1, 2, 2).float()
    truth = {}
    denoiser, ddim = make_denoiser(prediction, schedule, lambda xt, t: truth[prediction])
    at = torch.full((2,), t)
    truth |= {"epsilon": eps, "v_prediction": ddim.get_velocity(x0, eps, at), "sample": x0}
    torch.testing.assert_close(denoiser(denoiser.noised(x0, eps, at), at), x0, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_ddim_steps_are_those_of_diffusers(make_denoiser, prediction, schedule, steps):
    denoiser, ddim = make_denoiser(prediction, schedule, wavy)
    ddim.set_timesteps(steps)
    times = ddim.timesteps.tolist()
    assert times == timestep(torch.arange(steps, 0, -1), steps).tolist()
    for t, following in pairwise([*times, -1]):
        if t == 999 and (prediction == "epsilon" or schedule == "linear"):
            continue  # our last step is noise alone, theirs holds a rest of the image
        xt, at = randn(t, 2, 1, 2, 2).float(), torch.full((2,), t)
        step = ddim.step(wavy(xt, at), t, xt)
        ours = denoiser.ddim(xt, step.pred_original_sample, at, torch.full((2,), following))
        torch.testing.assert_close(ours, step.prev_sample, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_teacher_that_is_told_the_truth_has_no_loss(linear_schedule, prediction, schedule):
    scheduler = linear_schedule(prediction_type=prediction, **SCHEDULES[schedule])
    x0 = randn(3, 16, 1, 4, 4).float()

    def truth(xt, t):  # x_t and the image tell the noise
        alpha = scheduler.alphas_cumprod[t].double().sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        eps = (xt - alpha * x0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction].float()

    assert denoising_loss(Answer(truth), scheduler, x0, torch.Generator().manual_seed(0)) < 1e-6
    assert denoising_loss(Answer(wavy), scheduler, x0, torch.Generator().manual_seed(0)) > 0.1


CASES = [(p, s) for p in PREDICTIONS for s in SCHEDULES if (p, s) != ("epsilon", "zero SNR")]  # that divides by 0


@pytest.mark.parametrize(("prediction", "schedule"), CASES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver"])
def test_trajectories_of_a_teacher_that_knows_one_image_end_there(linear_schedule, sampler, prediction, schedule):
    scheduler = linear_schedule(prediction_type=prediction, **SCHEDULES[schedule])
    image = torch.linspace(-0.9, 0.9, 4).view(1, 1, 2, 2)

    def knows(xt, t):
        alpha = scheduler.alphas_cumprod[t].double().sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        eps = (xt.double() - alpha * image) / sigma
        answer = {"epsilon": eps, "v_prediction": alpha * eps - sigma * image, "sample": image.expand_as(eps)}
        return answer[prediction].float()

    teacher = Teacher(Answer(knows), scheduler, "one image", "")
    generators = sample_generators(range(3), 0)
    noise = sample_noise(generators, (1, 2, 2))
    walk = list(denoise(teacher, noise, make_scheduler(teacher, sampler, 20), generators))
    assert [t for t, _, _ in walk] == list(range(999, 0, -50))
    for t, _, x0 in walk:
        torch.testing.assert_close(x0, image.expand(3, -1, -1, -1), atol=2e-3 if t == 999 else 2e-4, rtol=0)
    torch.testing.assert_close(walk[-1][1], image.expand(3, -1, -1, -1), atol=2e-4, rtol=0)
    read = states(teacher, noise, make_scheduler(teacher, sampler, 20), sample_generators(range(3), 0), 11)
    assert len(read) == 11 and torch.equal(*read[-1])


@few
@given(steps=st.integers(1, 1000), sampler=st.sampled_from(["ddpm", "ddim", "dpm-solver"]))
def test_samplers_start_at_999_and_are_evenly_spaced(steps, sampler):
    teacher = Teacher(None, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear"), "", "")
    times = make_scheduler(teacher, sampler, steps).timesteps.tolist()
    assert len(times) in (steps, steps + 1), "rounding may give one more step where 1000 is no multiple"
    assert times[0] == 999 and times == sorted(set(times), reverse=True)
    for i, t in enumerate(times):
        assert abs(t - (999 - Fraction(1000 * i, steps))) <= Fraction(1, 2) + Fraction(1, 10**6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver"])
@pytest.mark.parametrize("steps", [n for n in range(10, 1001, 10) if 1000 % n == 0])
def test_samplers_pass_through_the_papers_stage_times(sampler, steps):
    teacher = Teacher(None, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear"), "", "")
    times = make_scheduler(teacher, sampler, steps).timesteps.tolist()
    assert len(times) == steps and set(stage_times(11)) <= set(times)


# ---- losses against float64 by hand ----------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def tensors(*lists) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in lists]


def close(found: torch.Tensor, expected: float):
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@many
@given(real=LOGITS, fake=LOGITS)
def test_logistic_losses_by_hand(real, fake):
    r, f = tensors(real, fake)
    a, b = np.array(real), np.array(fake)
    close(losses.discriminator_loss(r, f), softplus(-a).mean() + softplus(b).mean())
    close(losses.generator_loss(f), softplus(-b).mean())
    weights = np.exp(b - b.max()) / np.exp(b - b.max()).sum()
    close(losses.generator_loss(f, "forward-kl"), -(weights * b).sum() / 2)
    (gradient,) = torch.autograd.grad(losses.generator_loss(f, "forward-kl"), f)
    np.testing.assert_allclose(gradient, -weights / 2, atol=1e-12)


@many
@given(real=st.lists(LOGITS, min_size=1, max_size=3), fake=st.lists(LOGITS, min_size=1, max_size=3))
def test_hinge_losses_by_hand(real, fake):
    expected = sum(np.maximum(0, 1 - np.array(x)).mean() for x in real)
    expected += sum(np.maximum(0, 1 + np.array(x)).mean() for x in fake)
    close(losses.hinge_discriminator_loss(tensors(*real), tensors(*fake)), expected)
    close(losses.hinge_generator_loss(tensors(*fake)), -sum(np.mean(x) for x in fake))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e3, 1e20, 1e37])
def test_extreme_logits_give_finite_losses_and_gradients(size, dtype):
    real, fake = (torch.tensor([-size, 0.0, size], dtype=dtype, requires_grad=True) for _ in range(2))
    found = [
        losses.discriminator_loss(real, fake),
        losses.generator_loss(fake),
        losses.generator_loss(fake, "forward-kl"),
        losses.hinge_discriminator_loss([real], [fake]),
        losses.hinge_generator_loss([fake]),
    ]
    for loss in found:
        gradients = torch.autograd.grad(loss, [real, fake], allow_unused=True)
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients if g is not None)


@few
@given(seed=SEEDS, heads=st.integers(1, 3), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_losses_of_images_by_hand(seed, heads, size):
    images, targets = (size * randn(seed + i, heads, 4, 3, 2, 2) for i in range(2))
    far = (images - targets).numpy()
    close(losses.reconstruction_loss(list(images), list(targets)), sum(np.abs(d).mean() for d in far))
    weight = randn(seed, 4).abs()
    expected = np.mean([w * (d**2).mean() for w, d in zip(weight.numpy(), far[0])])
    close(losses.distillation_loss(images[0], targets[0], weight), expected)


def test_the_teachers_expectation_is_a_constant_of_the_distillation():
    x0, expected = tensors([[1.0, 2.0]], [[0.5, -1.0]])
    losses.distillation_loss(x0, expected, torch.ones(1, dtype=torch.float64)).backward()
    assert expected.grad is None
    np.testing.assert_allclose(x0.grad, [[0.5, 3.0]])


@few
@given(seed=SEEDS, t=st.integers(0, 998))
def test_sds_weights_give_the_gradient_of_score_distillation(linear_schedule, seed, t):
    alpha, sigma = (x[t].double() for x in noise_levels(linear_schedule()))
    x, eps, eps_hat = randn(seed, 3, 2, 1, 3, 3)
    xt = alpha * x + sigma * eps
    x.requires_grad_()
    weight = losses.distillation_weights(alpha, sigma, "sds").expand(2)
    losses.distillation_loss(x, (xt - sigma * eps_hat) / alpha, weight).backward()
    torch.testing.assert_close(x.grad * x.numel(), sigma**2 * (eps_hat - eps), rtol=1e-6, atol=1e-8)
    assert losses.distillation_weights(alpha, sigma, "exponential") == alpha


def critic_of(first, second):
    return lambda x: torch.tanh(x.flatten(1) @ first.T) @ second


def slopes(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The gradient of `critic_of` with respect to x `(b, n)`, from calculus."""
    return ((1 - np.tanh(x @ first.T) ** 2) * second) @ first


@few
@given(seed=SEEDS, count=st.integers(1, 5))
def test_penalties_of_a_network_by_hand(seed, count):
    real, fake = randn(seed, 2, count, 1, 2, 3)
    first, second, weight = randn(seed + 1, 4, 6), randn(seed + 2, 4), randn(seed + 3, count, 1, 1, 1).sigmoid()
    critic, a, b = critic_of(first, second), first.numpy(), second.numpy()
    flat = real.flatten(1).numpy()
    slope = slopes(flat, a, b)
    np.testing.assert_allclose(losses.input_gradient(critic, real).detach().flatten(1), slope, atol=1e-12)
    close(losses.r1_penalty(critic, real), (slope**2).sum(1).mean())
    between = (weight * real + (1 - weight) * fake).flatten(1).numpy()
    norms = np.sqrt((slopes(between, a, b) ** 2).sum(1))
    close(losses.gradient_penalty(critic, real, fake, weight), ((norms - 1) ** 2).mean())


@few
@given(seed=SEEDS, heads=st.integers(1, 3), places=st.integers(1, 4))
def test_the_penalty_on_features_by_hand(seed, heads, places):
    features = [randn(seed + k, 3, 2, places).float() for k in range(heads)]
    weights = [randn(seed + 10 + k, 2).float().requires_grad_() for k in range(heads)]

    def apply(given):  # logits (b, places) of each head: tanh of a sum over the channels
        return [torch.tanh((x * w.view(-1, 1)).sum(1)) for x, w in zip(given, weights)]

    def by_hand(*ws):
        total = 0
        for x, w in zip(features, ws):
            inner = 1 - np.tanh((x.double().numpy() * w[:, None]).sum(1)) ** 2
            slope = w[None, :, None] * inner[:, None] / places
            total += (slope**2).sum((1, 2)).mean()
        return total

    found, at = losses.feature_r1_penalty(apply, features), [w.detach().double().numpy() for w in weights]
    assert found.item() == pytest.approx(by_hand(*at), rel=1e-5)
    found.backward()
    for k, w in enumerate(weights):  # second order, against differences of the float64 formula
        for i in range(2):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in at]
                moved[k][i] += sign * 1e-5
                ends.append(by_hand(*moved))
            assert w.grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


@few
@given(seed=SEEDS, count=st.integers(1, 4))
def test_feature_matching_by_hand(seed, count):
    images, targets = (randn(seed + i, count, 1, 2, 2) for i in range(2))
    first, second = randn(seed + 2, 5, 4), randn(seed + 3, 3, 5)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.LeakyReLU(0.2), nn.Linear(5, 3), nn.LeakyReLU(0.2))
    layers.double().load_state_dict(
        {"1.weight": first, "1.bias": first[:, 0], "3.weight": second, "3.bias": second[:, 0]}
    )

    def features(x):
        for w in (first.numpy(), second.numpy()):
            x = x @ w.T + w[:, 0]
            x = np.where(x > 0, x, 0.2 * x)
            yield x

    pairs = zip(features(images.flatten(1).numpy()), features(targets.flatten(1).numpy()))
    expected = np.mean([np.abs(a - b).mean() / np.abs(b).mean() for a, b in pairs])
    assert losses.feature_loss(layers, images, targets).item() == pytest.approx(expected, rel=1e-5)


# ---- gradients against differences, in float64 -----------------------------------------------------------------------


def test_gradients_of_the_losses():
    real, fake = (randn(i, 6).requires_grad_() for i in range(2))
    images, targets = randn(2, 2, 1, 3, 3).requires_grad_(), randn(3, 2, 1, 3, 3)
    assert gradcheck(losses.discriminator_loss, (real, fake))
    assert gradcheck(losses.generator_loss, (fake,))
    assert gradcheck(lambda r, f: losses.hinge_discriminator_loss([r], [f]), (real, fake))
    assert gradcheck(lambda f: losses.hinge_generator_loss([f, 2 * f]), (fake,))
    assert gradcheck(lambda x: losses.reconstruction_loss([x, x[..., :2]], [targets, targets[..., :2]]), (images,))
    assert gradcheck(lambda x: losses.distillation_loss(x, targets, randn(4, 2).abs()), (images,))


@pytest.mark.parametrize("kind", ["gp", "r1"])
def test_gradients_of_the_penalties_in_a_whole_critic(kind):
    torch.manual_seed(0)
    critic = UnconditionalDiscriminator(8, 1, width=2).double()
    names, values = zip(*((n, p) for n, p in critic.named_parameters() if p.numel() < 200))
    real, fake = randn(0, 2, 3, 1, 8, 8)

    def penalty(*parameters):
        def logits(x):
            return torch.func.functional_call(critic, dict(zip(names, parameters)), x)

        if kind == "r1":
            return losses.r1_penalty(logits, real)
        return losses.gradient_penalty(logits, real, fake, torch.full((3, 1, 1, 1), 0.3, dtype=torch.float64))

    assert len(names) > 4 and gradcheck(penalty, values, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("latent", ["block-mean", "full"])
def test_gradients_of_a_student(block, latent, training):
    torch.manual_seed(0)
    student = Student(16, 1, 3, (2, 3), block=block, latent=latent).double().train(training)
    given = randn(0, 2, *student.latent_shape).requires_grad_()
    assert gradcheck(lambda x: tuple(student.images(x)), (given,), fast_mode=True)
    names, values = zip(*student.named_parameters())

    def images(*parameters):
        return torch.func.functional_call(student, dict(zip(names, parameters)), given.detach())

    assert gradcheck(images, values, fast_mode=True)


@pytest.mark.parametrize("size", [8, 16])
def test_gradients_of_the_critics(size):
    torch.manual_seed(0)
    image, latent = randn(0, 3, 1, size, size).requires_grad_(), randn(1, 3, 1, 4, 4).requires_grad_()
    assert gradcheck(Discriminator(size, 1).double().eval(), (image, latent), fast_mode=True)
    assert gradcheck(Discriminator(size, 1).double().train(), (image, latent), fast_mode=True)
    critic = UnconditionalDiscriminator(size, 1, width=2).double()
    assert gradcheck(critic, (image,), fast_mode=True) and gradgradcheck(critic, (image,), fast_mode=True)


@pytest.mark.parametrize("how", ["block-mean", "full"])
def test_gradients_of_the_latent(how):
    noise = randn(0, 2, 2, 8, 8).requires_grad_()
    assert gradcheck(lambda x: make_latent(x, how), (noise,)) and gradgradcheck(
        lambda x: make_latent(x, how), (noise,), fast_mode=True
    )


# ---- averages and seeds ----------------------------------------------------------------------------------------------


@many
@given(decay=st.one_of(st.sampled_from([0.0, 0.5, 0.998, 1.0]), st.floats(0, 1)), count=st.integers(1, 30), seed=SEEDS)
def test_the_moving_average_is_its_closed_form(decay, count, seed):
    weights = randn(seed, count, 3)
    average = [weights[0].clone()]
    for n in range(1, count):
        update_average(decay, average, [weights[n]], n)
    shares = np.array([Fraction(decay) ** (count - 1 - i) for i in range(count)])
    expected = (shares / shares.sum()).astype(float) @ weights.numpy()
    np.testing.assert_allclose(average[0], expected, rtol=1e-9, atol=1e-9)


@few
@given(decay=st.sampled_from([0.0, 0.9, 0.998]), count=st.integers(1, 8), seed=SEEDS)
def test_a_models_average_covers_weights_and_statistics_and_copies_counters(decay, count, seed):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    average, kept = MovingAverage(model, decay), []
    for n in range(count):
        with torch.no_grad():
            for i, value in enumerate([*model.parameters(), model[1].running_mean, model[1].running_var]):
                value.copy_(randn(seed + 100 * n + i, *value.shape))
            model[1].num_batches_tracked.fill_(n)
        average.update_parameters(model)
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
    shares = np.array([decay ** (count - 1 - n) for n in range(count)])
    for name, value in average.module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == count - 1
            continue
        expected = sum(s * k[name] for s, k in zip(shares / shares.sum(), kept))
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert average.n_averaged == count


@many
@given(
    indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=8), seed=st.integers(0, 4000), side=st.integers(1, 5)
)
def test_a_samples_noise_follows_from_its_index_alone(indices, seed, side):
    shape = (2, side, side)
    together, generators = seeded_noise(indices, shape, seed), sample_generators(indices, seed)
    first, second = sample_noise(generators, shape), sample_noise(generators, shape)
    assert torch.equal(first, together)
    for position, i in enumerate(indices):
        (alone,) = sample_generators([i], seed)
        assert torch.equal(together[position : position + 1], sample_noise([alone], shape))
        assert torch.equal(second[position : position + 1], sample_noise([alone], shape)), "the next draw too"
    assert torch.equal(seeded_noise(np.array(indices), shape, seed), together)


@many
@given(
    a=st.tuples(st.integers(0, 4000), st.integers(0, 10**6)), b=st.tuples(st.integers(0, 4000), st.integers(0, 10**6))
)
def test_no_two_samples_of_any_two_seeds_share_a_stream(a, b):
    assume(a != b)
    (first,), (second,) = (sample_generators([index], seed) for seed, index in (a, b))
    assert first.initial_seed() != second.initial_seed()


def test_shares_of_the_average_after_a_thousand_steps():
    """What the bias correction is for: without it the first weights would keep a seventh."""
    average = [torch.zeros(1, dtype=torch.float64)]
    for n in range(1, 1000):
        update_average(0.998, average, [torch.ones(1, dtype=torch.float64)], n)
    share_of_first = 0.998**999 * (1 - 0.998) / (1 - 0.998**1000)
    assert average[0].item() == pytest.approx(1 - share_of_first, abs=1e-12) and share_of_first < 1e-3
    assert math.isclose(0.998**999, 0.1354, rel_tol=1e-3)
