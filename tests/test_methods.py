"""ADD and the baselines: losses by hand, targets against DDIM, whose weights move, resuming."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from advkd import losses, presets, run, train_add, train_consistency, training
from advkd.data import load_images, seeded_noise
from advkd.denoiser import Denoiser
from advkd.features import BatchNormLocal, DinoFeatures, Head, Heads, TeacherFeatures, augmented, make_heads
from advkd.pipeline import FewStepPipeline, StudentPipeline
from advkd.presets import UserError, load_preset
from advkd.run import CHECKPOINT, finish, load_run, read_run, train_run
from advkd.student import Student
from advkd.teacher import load_teacher
from advkd.train_consistency import consistency_target, pseudo_huber
from advkd.train_dmd import matching_loss
from advkd.train_progressive import two_steps
from advkd.training import timestep
from advkd.trajectories import generate_trajectories

METHODS = ("add", "regression", "progressive", "consistency", "dmd")


@pytest.fixture
def method(teacher_folder, tiny):
    """A factory of tiny presets of a method."""
    return lambda recipe, **fields: load_preset("digits", recipe, teacher=str(teacher_folder), **(tiny | fields))


@pytest.fixture
def denoiser(teacher, method):
    return Denoiser.from_teacher(teacher, method("add"))


@pytest.fixture(scope="module")
def images(improved):
    return load_images(improved, "train")[0][:32]


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# Losses, by hand


def test_hinge_losses_by_hand():
    real = [torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[0.0], [3.0]])]
    fake = [torch.tensor([[-2.0, 0.0], [1.0, -1.0]]), torch.tensor([[0.5], [-3.0]])]
    of_real = (0 + 0.5 + 2 + 0) / 4 + (1 + 0) / 2
    of_fake = (0 + 1 + 2 + 0) / 4 + (1.5 + 0) / 2
    assert losses.hinge_discriminator_loss(real, fake).item() == pytest.approx(of_real + of_fake)
    assert losses.hinge_generator_loss(fake).item() == pytest.approx(-(-0.5 + -1.25))


def test_the_penalty_is_of_the_logits_with_respect_to_the_features():
    features = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])]  # one image, two layers
    # D_1 = sum of squares, D_2 = 5 x: gradients (2, 4) and (5, 0).
    heads = lambda x: [x[0].square().sum(1, keepdim=True), 5 * x[1][:, :1]]  # noqa: E731
    assert losses.feature_r1_penalty(heads, features).item() == pytest.approx(4 + 16 + 25)
    twice = [x.repeat(2, 1) for x in features]
    assert losses.feature_r1_penalty(heads, twice).item() == pytest.approx(45), "a mean over images"


def test_distillation_by_hand_and_without_gradient_into_the_target():
    x0 = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2).clone().requires_grad_()
    expected = torch.full((2, 1, 2, 2), 0.5, requires_grad=True)
    loss = losses.distillation_loss(x0, expected, torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx((1 * 0.25 + 3 * 0.25) / 2)
    loss.backward()
    assert expected.grad is None
    torch.testing.assert_close(x0.grad[1], torch.full((1, 2, 2), 3 * 2 * 0.5 / 4 / 2))


def test_the_sds_weights_give_the_gradient_of_score_distillation():
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
    x0, eps, eps_hat = (torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(n)) for n in range(3))
    x0.requires_grad_()
    expected = (alpha * x0.detach() + sigma * eps - sigma * eps_hat) / alpha
    losses.distillation_loss(x0, expected, losses.distillation_weights(alpha, sigma, "sds")).backward()
    torch.testing.assert_close(x0.grad * 4, sigma**2 * (eps_hat - eps))  # a mean over 4 numbers; w(t) = sigma^2
    assert losses.distillation_weights(alpha, sigma, "exponential") is alpha


def test_distribution_matching_descends_along_the_difference_of_the_scores():
    x0 = torch.tensor([[1.0, 3.0]]).view(1, 1, 1, 2).requires_grad_()
    real, fake = torch.zeros(1, 1, 1, 2), torch.tensor([2.0, 4.0]).view(1, 1, 1, 2)
    matching_loss(x0, real, fake).backward()
    torch.testing.assert_close(x0.grad.flatten(), torch.tensor([2.0, 4.0]) / 2 / 2)  # / mean |x0 - real| / numbers


def test_pseudo_huber_is_the_distance_far_away():
    x, y = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 2.0)
    assert pseudo_huber(x, y).item() == pytest.approx(8, rel=1e-3) and pseudo_huber(x, x).item() == 0


# The U-Net student


def test_a_denoiser_expects_what_its_teacher_does_where_the_gain_is_not_limited(teacher, denoiser):
    xt = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler.from_config(teacher.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    for t in (10, 400):
        with torch.no_grad():
            eps = teacher.unet(xt, t).sample
            found = denoiser(xt, torch.full((2,), t))
        expected = scheduler.step(eps, t, xt).pred_original_sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert denoiser.gain.max() == denoiser.config.gain_limit


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions_become_images_as_in_diffusers(kind, make_unet, linear_schedule):
    scheduler = linear_schedule(prediction_type=kind)
    denoiser = Denoiser(dict(make_unet().config), dict(scheduler.config)).eval()
    xt, t = torch.randn(1, 1, 16, 16), 700
    with torch.no_grad():
        output, found = denoiser.unet(xt, t).sample, denoiser(xt, torch.tensor([t]))
    scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    expected = scheduler.step(output, t, xt).pred_original_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_last_timestep_is_noise_alone_and_minus_one_the_clean_image(denoiser, images):
    eps = torch.randn(2, 1, 16, 16)
    ends = denoiser.noised(images[:2], eps, torch.tensor([999, -1]))
    assert torch.equal(ends[0], eps[0]) and torch.equal(ends[1], images[1])


def test_ddim_steps_are_those_of_diffusers(teacher, denoiser, images):
    scheduler = DDIMScheduler.from_config(teacher.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    xt = denoiser.noised(images[:1], torch.randn(1, 1, 16, 16), torch.tensor([749]))
    with torch.no_grad():
        ours = denoiser.ddim(xt, denoiser(xt, torch.tensor([749])), torch.tensor([749]), torch.tensor([499]))
        output = teacher.unet(xt, 749).sample
    alpha = scheduler.alphas_cumprod[749].sqrt()
    x0 = alpha * xt - min(denoiser.config.gain_limit, ((1 - alpha**2).sqrt() / alpha).item()) * (
        output - (1 - alpha**2).sqrt() * xt
    )
    sample_scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type="sample")
    sample_scheduler.set_timesteps(4)
    torch.testing.assert_close(ours, sample_scheduler.step(x0, 749, xt).prev_sample, rtol=1e-4, atol=1e-4)


def test_a_pipeline_is_loaded_by_its_own_class_or_a_child(denoiser, tmp_path):
    class Child(FewStepPipeline):
        pass

    FewStepPipeline(denoiser).save_pretrained(tmp_path / "few")
    StudentPipeline(Student.from_preset(load_preset("digits"))).save_pretrained(tmp_path / "one")
    assert isinstance(Child.from_pretrained(tmp_path / "few"), Child)
    for kind, folder, right in (
        (StudentPipeline, "few", "FewStepPipeline"),
        (FewStepPipeline, "one", "StudentPipeline"),
    ):
        with pytest.raises(UserError, match=f"that of a {right}; load it with {right}.from_pretrained"):
            kind.from_pretrained(tmp_path / folder)


def test_images_of_few_steps_follow_from_the_index_alone(denoiser, tmp_path):
    pipeline = FewStepPipeline(denoiser)
    for steps in (1, 2, 4):
        whole = pipeline(5, seed=3, steps=steps, output_type="pt").images
        part = pipeline(2, seed=3, first_index=3, steps=steps, output_type="pt").images
        torch.testing.assert_close(part, whole[3:], rtol=1e-4, atol=1e-5)
    noise = seeded_noise(range(5), (1, 16, 16), 3)
    torch.testing.assert_close(pipeline(noise=noise, seed=3, steps=4, output_type="pt").images, whole)
    pipeline.save_pretrained(tmp_path)
    again = load_run(tmp_path)
    assert isinstance(again, FewStepPipeline) and again.student.config.timesteps == [999, 749, 499, 249]
    assert torch.equal(again(5, seed=3, steps=4, output_type="pt").images, whole)

    with pytest.raises(UserError, match=r"steps is 3, but must be 1 or 2 or 4: .* \[999, 749, 499, 249\]"):
        pipeline(1, steps=3)
    with pytest.raises(UserError, match="no output_type 'jpg'"):
        pipeline(1, output_type="jpg")
    with pytest.raises(UserError, match=r"noise has the shape \(1, 3, 16, 16\)"):
        pipeline(noise=torch.zeros(1, 3, 16, 16))


# The critic


def test_local_batches_are_normalised_by_themselves():
    layer = BatchNormLocal(3)
    x = torch.randn(16, 3, 5, generator=torch.Generator().manual_seed(0)) * 4 + 7
    y = layer(x)
    for group in (y[0::2], y[1::2]):  # every second of sixteen: two groups of eight
        torch.testing.assert_close(group.mean((0, 2)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(group.var((0, 2), correction=0), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(layer(x[0::2]), y[0::2])  # what one of two processes would see
    assert layer(x[:6]).shape == (6, 3, 5)


@pytest.mark.parametrize(("dims", "shape", "places"), [(1, (4, 6, 10), 10), (2, (4, 6, 5, 5), 25)])
def test_a_head_gives_a_logit_for_every_place_and_its_norms_are_one(dims, shape, places):
    torch.manual_seed(0)
    head = Head(6, dims, condition_size=3)
    features, condition = torch.randn(shape), torch.randn(4, 3)
    for _ in range(200):  # power iterations
        logits = head(features, condition)
    assert logits.shape == (4, places)
    assert not torch.equal(logits, head(features, condition + 1))
    for convolution in (head.enter, head.mix[0], head.leave):
        norm = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=0.02)


def test_each_kind_of_images_has_a_logit_of_its_own():
    torch.manual_seed(0)
    head = Head(6, 2, kinds=3).eval()  # no power iterations
    features = torch.randn(8, 6, 5, 5)
    of_kind = [head(features, kind=torch.full((8,), n)) for n in range(3)]
    assert of_kind[0].shape == (8, 25) and not torch.equal(of_kind[0], of_kind[1])
    kind = torch.tensor([0, 1, 2, 2, 1, 0, 1, 2])
    torch.testing.assert_close(head(features, kind=kind), torch.stack(of_kind)[kind, torch.arange(8)])
    torch.testing.assert_close(head(features), torch.cat(of_kind, dim=1))  # where none is named
    norm = torch.linalg.matrix_norm(head.leave.weight.flatten(1), 2).item()
    assert norm <= 1.1  # of all kinds together


def test_the_penalty_on_images_goes_through_the_features(tmp_path, method, store, images, monkeypatch):
    """R1 of the logits that the loop has, against differences of the images."""
    found, penalty = {}, losses.r1_penalty

    def noted(critic, real):
        found.update(critic=critic, real=real, value=penalty(critic, real))
        return found["value"]

    monkeypatch.setattr(losses, "r1_penalty", noted)
    monkeypatch.setattr(run, "make_heads", lambda *args: found.setdefault("heads", make_heads(*args)))
    p = method("add", image_penalty_weight=0.7, penalty_every=2, steps=1, train_dtype="float32")
    (record,) = train_run(p, store, tmp_path / "with", images=images, device="cpu")
    critic, real = found["critic"], found["real"]
    monkeypatch.undo()
    (without,) = train_run(
        p.replace(image_penalty_weight=0.0), store, tmp_path / "without", images=images, device="cpu"
    )
    added = 0.7 * 2 * found["value"].item()
    assert added > 0 and record.critic_loss == pytest.approx(without.critic_loss + added, rel=1e-4)
    found["heads"].eval()  # no power iterations
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(real.shape, generator=generator)
    slope = (losses.input_gradient(critic, real) * along).sum().item()
    with torch.no_grad():
        apart = [critic(real + h * along).sum().item() for h in (3e-4, -3e-4)]
    assert slope == pytest.approx((apart[0] - apart[1]) / 6e-4, rel=0.05, abs=1e-3)


def test_features_are_the_teachers_at_the_noise_level_that_is_drawn(denoiser, images):
    features = TeacherFeatures(denoiser, mean=-1.0, sd=2.0)
    ratio = denoiser.sigma / denoiser.alpha
    eps, z = torch.randn(3, 1, 16, 16), torch.tensor([[-30.0], [(ratio[499].log() + 1) / 2 - 1e-4], [30.0]])
    seen, condition = features(images[:3], eps, z)
    assert [x.shape[1] for x in seen] == features.channels and condition.shape == (3, features.condition_size)
    reached = []
    hook = denoiser.unet.mid_block.register_forward_hook(lambda *a: reached.append(a[2]))
    t = torch.tensor([0, 499, 998])
    denoiser.unet(denoiser.noised(images[:3], eps, t), t)
    hook.remove()
    torch.testing.assert_close(seen[-1], reached[0])
    heads = make_heads(features, seed=0)
    assert isinstance(heads, Heads) and len(heads(seen, condition)) == len(features.channels)
    first, second = (make_heads(features, seed=0).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A tiny DINOv2 with random weights, for one's own weights are not shipped."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=4, num_attention_heads=2, image_size=224, patch_size=56)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dino_features_are_its_hidden_states_with_the_class_token(dino_folder):
    features = DinoFeatures.from_pretrained(str(dino_folder))
    images = torch.rand(2, 1, 16, 16).requires_grad_()
    z = torch.zeros(2, 8)
    z[:, 5:7] = 9  # what is cut out lies in a corner
    seen, condition = features(images, torch.randn(2, 1, 16, 16), z)
    assert condition.shape == (2, 0) and [x.shape for x in seen] == [(2, 12, 16)] * 5
    rgb = nn.functional.interpolate((augmented(images, z) + 1) / 2, 224, mode="bicubic", antialias=True).expand(
        -1, 3, -1, -1
    )
    mean, sd = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    states = features.model((rgb - mean) / sd, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[2], (states[2][:, 1:] + states[2][:, :1]).transpose(1, 2))
    sum(x.sum() for x in seen).backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in features.model.parameters())
    logits = make_heads(features, seed=0)(seen, condition)
    assert [x.shape for x in logits] == [(2, 16)] * 5


def test_augmentation_by_hand():
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(1, 3, 8, 8) * torch.tensor([1.0, 0.5, 0.2]).view(
        1, 3, 1, 1
    )
    middle = torch.zeros(1, 8)
    far = middle.clone()
    far[:, 5:7] = 9
    plain = augmented(image, far)
    torch.testing.assert_close(plain[..., :6, :6], image[..., :6, :6])
    assert (plain[..., 6:, 6:] == 0).all(), "the square that is cut out overlaps the corner"
    assert (augmented(image, middle)[..., 2:6, 2:6] == 0).all()
    moved = far.clone()
    moved[:, 3] = 9  # a row from further down
    torch.testing.assert_close(augmented(image, moved)[..., :5, :5], image[..., 1:6, :5])
    bright, grey, flat = far.clone(), far.clone(), far.clone()
    bright[:, 0], grey[:, 1], flat[:, 2] = 9, -9, -9
    torch.testing.assert_close(augmented(image, bright)[..., :5, :5], image[..., :5, :5] + 0.5)
    assert augmented(image, grey)[..., :5, :5].std(1).max() < 1e-6
    around = image - image.mean()
    torch.testing.assert_close(augmented(image, flat)[..., :5, :5], (image.mean() + around / 2)[..., :5, :5])


def test_add_trains_on_dino_features(tmp_path, method, dino_folder, store, images):
    preset = method("add", features=str(dino_folder))
    last = finish(train_run(preset, store, tmp_path / "run", images=images, device="cpu"))
    assert last.step == preset.steps and last.critic_loss > 0


def test_another_network_is_no_dino(tmp_path):
    from transformers import ViTConfig, ViTModel

    small = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, patch_size=56)
    ViTModel(ViTConfig(**small)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="another network than a DINOv2"):
        DinoFeatures.from_pretrained(str(tmp_path / "vit"))
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no DINOv2 that can be read"):
        DinoFeatures.from_pretrained(str(tmp_path / "vit"))


def test_other_weights_of_dino_are_another_run(tmp_path, method, dino_folder, store, images):
    from transformers import Dinov2Model

    folder = tmp_path / "dino"
    model = Dinov2Model.from_pretrained(dino_folder)
    model.save_pretrained(folder)
    preset = method("add", features=str(folder), steps=1)
    finish(train_run(preset, store, tmp_path / "run", images=images, device="cpu"))
    with torch.no_grad():
        model.layernorm.weight.mul_(2)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="belongs to another preset"):
        finish(train_run(preset, store, tmp_path / "run", images=images, device="cpu"))


def test_another_preset_is_named_by_the_values_that_files_leave_out(tmp_path, method, store, images):
    finish(train_run(method("add", steps=1), store, tmp_path, images=images, device="cpu"))
    with pytest.raises(UserError, match=r"another preset \(gain_limit: made with 4.0, wanted 8.0\)"):
        finish(train_run(method("add", steps=1, gain_limit=8.0), store, tmp_path, images=images, device="cpu"))


@pytest.mark.parametrize("source", ["no/such/folder/at-all", ""])
def test_features_that_cannot_be_read_are_named(tmp_path, source):
    with pytest.raises(UserError, match="are no DINOv2 that can be read"):
        DinoFeatures.from_pretrained(source or str(tmp_path))


# Targets


def test_one_step_to_the_target_is_two_steps_of_the_teacher(denoiser, images):
    t, middle, end = torch.tensor([999, 499, 249]), torch.tensor([874, 374, 124]), torch.tensor([749, 249, -1])
    xt = denoiser.noised(images[:3], torch.randn(3, 1, 16, 16), t)
    with torch.no_grad():
        target = two_steps(denoiser, xt, t, middle, end)
        halfway = denoiser.ddim(xt, denoiser(xt, t), t, middle)
        wanted = denoiser.ddim(halfway, denoiser(halfway, middle), middle, end)
    torch.testing.assert_close(denoiser.ddim(xt, target, t, end), wanted, rtol=1e-3, atol=1e-3)


def test_a_consistent_target_ends_in_the_teachers_image(teacher, method, denoiser, images):
    other = Denoiser.from_teacher(teacher, method("consistency", start="random", seed=5))
    t, end = torch.tensor([499, 49]), torch.tensor([449, -1])
    xt = denoiser.noised(images[:2], torch.randn(2, 1, 16, 16), t)
    with torch.no_grad():
        target = consistency_target(other, denoiser, xt, t, end)
        expected = denoiser(xt, t)
        after = denoiser.ddim(xt, expected, t, end)
        torch.testing.assert_close(target[:1], other(after[:1], end[:1]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_consistency_follows_the_moving_average_where_there_is_one(tmp_path, monkeypatch, method, store, images, ema):
    made, asked = [], []

    class Watched(train_consistency._Loop):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self.modules)

    def watched(followed, *rest):
        target = consistency_target(followed, *rest)
        asked.append((followed, snapshot(followed), snapshot(made[0]["student"]), target.requires_grad))
        return target

    monkeypatch.setattr(train_consistency, "_Loop", Watched)
    monkeypatch.setattr(train_consistency, "consistency_target", watched)
    finish(train_run(method("consistency", ema=ema, steps=3), store, tmp_path, images=images, device="cpu"))
    assert [followed for followed, *_ in asked] == [made[0]["average" if ema else "student"]] * 3
    assert not any(gradient for *_, gradient in asked)
    name = "unet.conv_in.weight"
    followed = [weights[f"module.{name}" if ema else name] for _, weights, *_ in asked]
    current = [weights[name] for *_, weights, _ in asked]
    assert not torch.equal(followed[0], followed[1]) and not torch.equal(followed[1], followed[2])
    assert torch.equal(followed[1], current[1]), "the average of one step is that step"
    assert torch.equal(followed[2], current[2]) == (not ema)


def test_timesteps_are_even_and_end_with_noise():
    assert timestep(torch.arange(5), 4).tolist() == [-1, 249, 499, 749, 999]
    assert timestep(torch.tensor([0, 1, 16]), 16).tolist() == [-1, 61, 999]


# Training


@pytest.mark.parametrize("recipe", METHODS)
def test_a_method_moves_its_student_and_nothing_that_is_frozen(tmp_path, monkeypatch, method, store, images, recipe):
    p, frozen = method(recipe, steps=20), []  # the progress bar speaks every 20
    load = Denoiser.from_teacher.__func__

    def watched(cls, teacher, preset):
        made = load(cls, teacher, preset)
        frozen.append((made, snapshot(made)))
        return made

    monkeypatch.setattr(Denoiser, "from_teacher", classmethod(watched))
    last = finish(train_run(p, store, tmp_path, images=images if p.real_share else None, device="cpu"))
    moved = {
        i
        for i, (made, before) in enumerate(frozen)
        if any(not torch.equal(made.state_dict()[n], x) for n, x in before.items())
    }
    assert moved == ({0, 2} if recipe == "dmd" else {0})  # the student, and DMD's second score
    assert last.step == 20 and last.images_seen == 80 and last.student_gradient > 0
    assert (last.critic_loss is None) == (recipe not in ("add", "dmd"))
    assert load_run(tmp_path)(2, output_type="pt").images.shape == (2, 1, 16, 16)
    assert read_run(tmp_path)["preset"]["method"] == recipe
    teacher = load_teacher(p)
    assert not any(
        torch.equal(a, b)
        for a, b in zip(load_run(tmp_path).student.unet.parameters(), teacher.unet.parameters(), strict=True)
        if a.ndim > 1
    )


# What a step descends, from what the networks said in it


class Watch:
    """Notes each call of a Denoiser, `(who, x_t, t, image)`, and the gradients that reach the images."""

    def __init__(self, monkeypatch):
        self.calls, self.gradients, forward = [], {}, Denoiser.forward

        def noted(denoiser, xt, t):
            image, n = forward(denoiser, xt, t), len(self.calls)
            self.calls.append((denoiser, xt.detach(), t, image.detach().clone()))
            if image.requires_grad:
                image.register_hook(lambda gradient: self.gradients.update({n: gradient.clone()}))
            return image

        monkeypatch.setattr(Denoiser, "forward", noted)


def signal_to_noise(denoiser, t):
    return (denoiser.alpha[t] / denoiser.sigma[t]).square().view(-1, 1, 1, 1)


@pytest.fixture
def one_step(tmp_path, method, store, images, monkeypatch):
    """A factory of the last record of a method's first `taken` steps (all), in float32, with what its networks said in them."""

    def take(recipe, steps=1, taken=None, **fields):
        p, watch = method(recipe, train_dtype="float32", steps=steps, **fields), Watch(monkeypatch)
        given = images if p.real_share else None
        *_, record = islice(train_run(p, store, tmp_path / "run", images=given, device="cpu"), taken or steps)
        return record, watch  # before the student is saved, and its images shown

    return take


def paired(store, noise):
    """The teacher's images from the noise."""
    every = store.latents("full")
    found = [int((every == x).flatten(1).all(1).nonzero()) for x in noise]
    return store.images(torch.tensor(found))


def test_regression_descends_the_error_of_its_pairs(one_step, store):
    record, watch = one_step("regression")
    ((_, noise, t, image),) = watch.calls
    assert t.tolist() == [999] * 4
    assert record.student_loss == pytest.approx((image - paired(store, noise)).square().mean().item(), rel=1e-5)


def test_progressive_distillation_descends_the_error_of_two_steps_weighted_by_the_signal(one_step):
    record, watch = one_step("progressive", steps=5, taken=1)
    (teacher, xt, t, _), (again, _, middle, _), (student, seen, at, image) = watch.calls[-3:]
    assert teacher is again is not student and torch.equal(xt, seen) and torch.equal(t, at)
    n = ((t + 1) * 16 / 1000).round().long()  # of the first phase's sixteen steps
    assert torch.equal(t, timestep(n, 16)) and torch.equal(middle, timestep(2 * n - 1, 32))
    with torch.no_grad():
        target = two_steps(teacher, xt, t, middle, timestep(n - 1, 16))
    weight = signal_to_noise(teacher, t).clamp(min=1)
    assert record.student_loss == pytest.approx((weight * (image - target).square()).mean().item(), rel=1e-4)


@pytest.mark.parametrize("steps", [5, 8, 12])
def test_the_rate_of_progressive_distillation_falls_to_zero_with_each_phase(
    tmp_path, method, store, images, monkeypatch, steps
):
    rates, step = [], torch.optim.Adam.step

    def noted(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    p = method("progressive", steps=steps, learning_rate=3e-4)
    phases = [record.stage for record in train_run(p, store, tmp_path, images=images, device="cpu")]
    assert phases == sorted(phases) and len(set(phases)) == 5
    for phase in set(phases):
        of_phase = [rate for rate, k in zip(rates, phases, strict=True) if k == phase]
        assert of_phase == pytest.approx([3e-4 * (1 - n / len(of_phase)) for n in range(len(of_phase))])


def test_consistency_distillation_descends_the_distance_to_what_the_next_point_gives(one_step):
    record, watch = one_step("consistency", student_grid=20)
    (teacher, xt, t, expected), (followed, after, end, there), (student, _, at, image) = watch.calls
    assert torch.equal(t, at) and ((t + 1) % 50 == 0).all() and student is not followed is not teacher
    assert torch.equal(end, (t - 50).clamp(min=0))
    torch.testing.assert_close(after, teacher.ddim(xt, expected, t, t - 50))
    target = torch.where((t == 49).view(-1, 1, 1, 1), after, there)
    assert record.student_loss == pytest.approx(pseudo_huber(image, target).item(), rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_dmd_descends_along_the_difference_and_its_second_denoiser_learns_as_a_teacher(one_step, store, weight):
    fields = {"reconstruction_weight": weight, "adversarial_weight": 2.0, "batch_sizes": (12,)}
    record, watch = one_step("dmd", steps=2, **fields)  # in the first the two denoisers are the same
    first = len(watch.calls) // 2
    (_, noise, last, x0), (teacher, xt, t, real), (second, same, _, fake), *pairs, learnt = watch.calls[first:]
    real, fake = real.clamp(-1, 1), fake.clamp(-1, 1)
    assert not torch.equal(real, fake)
    assert last.tolist() == [999] * 12 and teacher is not second and torch.equal(xt, same) and learnt[0] is second
    scale = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(watch.gradients[first], 2 * (fake - real) / scale / x0.numel(), rtol=1e-4, atol=1e-7)
    matching = 0.5 * ((fake - real) / scale).square().mean().item()
    of_pairs = sum((image - paired(store, noise)).square().mean().item() for _, noise, _, image in pairs)
    assert len(pairs) == bool(weight) and record.student_loss == pytest.approx(
        2 * matching + weight * of_pairs, rel=1e-4
    )
    assert record.reconstruction_loss == (pytest.approx(of_pairs, rel=1e-5) if weight else None)

    _, xt, t, image = learnt  # a prediction of epsilon is to be the noise, as in a teacher's training
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in (second.alpha[t], second.sigma[t]))
    predicted, noise = (xt - alpha * image) / sigma, (xt - alpha * x0) / sigma
    share = ((sigma / alpha) / second.gain[t].view(-1, 1, 1, 1)).square()  # 1 where the gain is not limited
    assert (share == 1).any() and (share > 1).any()
    assert record.critic_loss == pytest.approx((share * (predicted - noise).square()).mean().item(), rel=1e-3)


@pytest.mark.parametrize("how", ["exponential", "sds"])
def test_add_descends_towards_what_its_teacher_makes_of_the_students_images(one_step, how):
    fields = {"adversarial_weight": 0.0, "distillation_weight": 2.5, "distillation": how, "simulated_share": 0.0}
    record, watch = one_step("add", **fields)
    (_, _, _, fake), (teacher, xt, t, expected) = watch.calls
    assert (t >= 20).all() and (t < 980).all()
    alpha, sigma = teacher.alpha[t].view(-1, 1, 1, 1), teacher.sigma[t].view(-1, 1, 1, 1)
    noise = (xt - alpha * fake) / sigma
    assert noise.std().item() == pytest.approx(1, abs=0.15), "the student's images are noised"
    weight = alpha if how == "exponential" else alpha * sigma / 2
    apart = fake - expected.clamp(-1, 1)
    assert record.reconstruction_loss == pytest.approx((weight * apart.square()).mean().item(), rel=1e-4)
    assert record.student_loss == pytest.approx(2.5 * record.reconstruction_loss, rel=1e-5)
    torch.testing.assert_close(watch.gradients[0], 2.5 * 2 * weight * apart / apart.numel(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("recipe", METHODS)
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path, monkeypatch, method, store, images, recipe
):
    monkeypatch.setattr("advkd.checkpoints.CHECKPOINT_EVERY", 2)
    p = method(recipe, steps=10)  # progressive: five phases
    given = {"images": images if p.real_share else None, "device": "cpu"}
    finish(train_run(p, store, tmp_path / "whole", **given))
    broken = train_run(p, store, tmp_path / "broken", **given)
    for record in broken:
        if record.step == 7:
            broken.close()
            break
    assert (tmp_path / "broken" / CHECKPOINT).exists()
    finish(train_run(p, store, tmp_path / "broken", **given))
    whole, resumed = (snapshot(load_run(tmp_path / name).student) for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("recipe", ["add", "regression", "dmd"])
def test_our_submodules_can_be_the_student(tmp_path, method, store, images, recipe):
    fields = {"architecture": "submodules", "latent": "block-mean", "student_timesteps": (999,)}
    p = method(recipe, **fields, **({"warm_up_steps": 2} if recipe == "add" else {}))
    records = list(train_run(p, store, tmp_path, images=images if p.real_share else None, device="cpu"))
    assert len(records) == 6 and load_run(tmp_path)(2, output_type="pt").images.shape == (2, 1, 16, 16)
    if recipe == "add":
        assert [record.critic_loss is None for record in records] == [True, True, False, False, False, False]


@pytest.mark.parametrize("parts", [{"adversarial_weight": 0.0}, {"distillation_weight": 0.0}, {"start": "random"}])
def test_the_parts_of_add_can_be_left_out(tmp_path, method, store, images, parts):
    last = finish(train_run(method("add", **parts), store, tmp_path, images=images, device="cpu"))
    assert (last.critic_loss is None) == ("adversarial_weight" in parts)
    assert (last.reconstruction_loss is None) == ("distillation_weight" in parts)


def test_the_heads_keep_their_rate_while_the_students_falls(tmp_path, method, store, images, monkeypatch):
    rates, step = {0.0: [], 0.9: []}, torch.optim.AdamW.step  # by beta 1

    def noted(optimizer, *args, **kwargs):
        assert optimizer.defaults["betas"] in (train_add.HEADS_BETAS, (0.9, 0.99))
        rates[optimizer.defaults["betas"][0]].append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    p = method("add", learning_rate=1e-4, critic_learning_rate=4e-4, decay_share=0.5, betas=(0.9, 0.99))
    finish(train_run(p, store, tmp_path, images=images, device="cpu"))
    assert rates[0.9] == pytest.approx([1e-4, 1e-4, 1e-4, 1e-4, 2e-4 / 3, 1e-4 / 3])
    assert rates[0.0] == pytest.approx([4e-4] * 6)


def test_the_critic_is_told_the_timestep_of_every_image(tmp_path, method, store, images, monkeypatch):
    asked, told, forward = [], [], Heads.forward
    expect = train_add.expected_image

    def noted_student(student, preset, xt, t):
        asked.append(t)
        return expect(student, preset, xt, t)

    def noted_heads(heads, features, condition=None, kind=None):
        told.append(kind)
        return forward(heads, features, condition, kind)

    monkeypatch.setattr(train_add, "expected_image", noted_student)
    monkeypatch.setattr(Heads, "forward", noted_heads)
    p = method("add", steps=1)
    finish(train_run(p, store, tmp_path, images=images, device="cpu"))
    *_, t = asked  # after those of the chain
    assert len(told) == 5, "real and made images, both penalties, the student's loss"
    on_real, *others = told
    assert on_real is None, "real images are to be real at every timestep"
    assert all(torch.equal(torch.tensor(p.student_timesteps)[kind], t) for kind in others)


@pytest.mark.parametrize("how", ["hinge", "non-saturating"])
def test_the_adversarial_losses_of_add_sum_over_the_heads(tmp_path, method, store, images, monkeypatch, how):
    """The losses of the records, from the logits that the heads gave."""
    given, forward = [], Heads.forward
    monkeypatch.setattr(Heads, "forward", lambda *args: given.append(forward(*args)) or given[-1])
    p = method("add", steps=2, penalty_every=9, adversarial=how, distillation_weight=0.0, train_dtype="float32")
    *_, record = train_run(p, store, tmp_path, images=images, device="cpu")  # the second: without penalties
    real, fake, of_student = ([x.detach().double().numpy() for x in logits] for logits in given[-3:])
    loss = {"hinge": lambda x: np.maximum(0, 1 - x), "non-saturating": lambda x: np.log1p(np.exp(-x))}[how]
    of_critic = sum(loss(x).mean() + loss(-y).mean() for x, y in zip(real, fake, strict=True))
    own = sum((-x if how == "hinge" else loss(x)).mean() for x in of_student)
    assert record.critic_loss == pytest.approx(of_critic, rel=1e-5)
    assert record.student_loss == pytest.approx(own, rel=1e-5)


def test_the_limit_of_the_gain_is_the_students_alone(tmp_path, method, store, images, monkeypatch):
    given, train = {}, run.train_add

    def noted(student, *args, teacher, **options):
        given.update(student=student, teacher=teacher)
        return train(student, *args, teacher=teacher, **options)

    monkeypatch.setattr(run, "train_add", noted)
    finish(train_run(method("add", gain_limit=2.0, steps=1), store, tmp_path, images=images, device="cpu"))
    for name, limit in (("student", 2.0), ("teacher", 8.0)):
        of = given[name]
        torch.testing.assert_close(of.gain[:-1], (of.sigma / of.alpha)[:-1].clamp(max=limit))
        assert of.gain[-1] == of.config.gain_limit == limit
    assert load_run(tmp_path).student.config.gain_limit == 2.0


def test_students_that_were_saved_before_there_was_a_limit_have_that_of_then(denoiser, tmp_path):
    denoiser.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("gain_limit") == 4.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Denoiser.from_pretrained(tmp_path).gain.max() == 8.0


def test_the_student_is_trained_on_its_own_chain_as_it_is_sampled(tmp_path, method, store, images, monkeypatch):
    made, expect, noised = [], train_add.expected_image, Denoiser.noised
    begun = []

    def noted(student, preset, xt, t):
        made.append((t, expect(student, preset, xt, t)))
        return made[-1][1]

    monkeypatch.setattr(train_add, "expected_image", noted)
    monkeypatch.setattr(Denoiser, "noised", lambda self, x0, eps, t: begun.append(x0) or noised(self, x0, eps, t))
    p = method("add", steps=1, batch_sizes=(32,), simulated_share=1.0, adversarial_weight=0.0)
    finish(train_run(p, store, tmp_path, images=images, device="cpu"))
    *chain, (t, last) = made
    assert [(x.unique().tolist(), len(x)) for x, _ in chain] == [
        ([now], int((t < now).sum())) for now in (999, 749, 499)
    ]
    assert last.requires_grad and not any(image.requires_grad for _, image in chain)
    shown = begun[3]  # what is noised for the student, after the chain's three
    for (now, image), end in zip(chain, (749, 499, 249), strict=True):  # the chain of those at `end` ends there
        ended = t[t < now[0]] == end
        torch.testing.assert_close(shown[t == end], image[ended].clamp(-1, 1))
    real = images.flatten(1)
    assert all((x == real).all(1).any() for x in shown[t == 999].flatten(1)), "noise alone begins with real images"


def test_no_image_of_a_batch_need_begin_with_a_chain(tmp_path, method, store, images, monkeypatch):
    """And what is drawn is the same then, so that processes stay together."""
    drawn, randn = [], training.Share.randn
    monkeypatch.setattr(training.Share, "randn", lambda share, *args: drawn.append(args[1:]) or randn(share, *args))
    for name, share in (("none", 1e-9), ("all", 1.0)):
        p = method("add", steps=1, simulated_share=share)
        finish(train_run(p, store, tmp_path / name, images=images, device="cpu"))
    half = len(drawn) // 2
    assert half > 4 and drawn[:half] == drawn[half:]


def test_penalties_of_add_are_lazy(tmp_path, method, store, images, monkeypatch):
    p = method("add", steps=3, penalty_every=2, penalty_weight=0.5, train_dtype="float32", image_penalty_weight=0.0)
    first, second, third = train_run(p, store, tmp_path / "with", images=images, device="cpu")
    assert second.penalty is None and first.penalty > 0 and third.penalty > 0
    (without,) = train_run(
        p.replace(penalty_weight=0.0, steps=1), store, tmp_path / "without", images=images, device="cpu"
    )
    assert first.critic_loss == pytest.approx(without.critic_loss + 2 * 0.5 * first.penalty, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        (
            "improved",
            {"critic_learning_rate": 1e-3},
            "critic_learning_rate is 0.001, but method 'advkd' does not use it",
        ),
        ("improved", {"image_penalty_weight": 1.0}, "image_penalty_weight is 1.0, but .* image_penalty_weight=0.0"),
        ("dmd", {"simulated_share": 0.5}, r"simulated_share is 0.5, but method 'dmd' does not use it \(only add\)"),
        ("regression", {"adversarial_weight": 2.0}, r"adversarial_weight is 2.0, but .*\(only advkd, add, dmd\)"),
        (
            "consistency",
            {"reconstruction_weight": 5.0},
            "reconstruction_weight is 5.0, but .* reconstruction_weight=0.0",
        ),
        ("improved", {"start": "random"}, "start is 'random', but method 'advkd' does not use it"),
        ("add", {"student_grid": 40}, "student_grid is 40, but method 'add' does not use it"),
        ("progressive", {"steps": 4}, "steps is 4, but progressive distillation from 16 to 1 timesteps has 5 phases"),
        (
            "add",
            {"adversarial": "forward-kl"},
            "adversarial is 'forward-kl', but method 'add' knows 'non-saturating' and",
        ),
        ("improved", {"adversarial": "hinge"}, "adversarial is 'hinge', but method 'advkd' knows 'non-saturating' and"),
        ("add", {"gain_limit": 0.0}, "gain_limit is 0.0, but must be positive"),
        ("add", {"simulated_share": 1.5}, r"simulated_share is 1.5, but must lie in \[0, 1\]"),
        ("add", {"image_penalty_weight": -1.0}, "image_penalty_weight is -1.0, but must not be negative"),
        ("add", {"critic_learning_rate": -1e-3}, "critic_learning_rate is -0.001, but must not be negative"),
        ("improved", {"architecture": "unet"}, "architecture is 'unet', but Adv-KD trains submodules"),
        ("progressive", {"architecture": "submodules"}, "method 'progressive'"),
        ("add", {"architecture": "submodules"}, r"student_timesteps \(249, 499, 749, 999\)"),
        ("add", {"student_timesteps": (249, 499)}, r"student_timesteps is \(249, 499\)"),
        ("add", {"student_timesteps": (999, 999)}, "must be different timesteps"),
        ("add", {"real_share": 0.5}, "real_share 0.5"),
        ("add", {"method": "gan"}, "method is 'gan', but must be one of 'advkd', 'add'"),
        ("progressive", {"student_grid": 12}, "student_grid is 12, but must be 1 times a power of two"),
        ("consistency", {"student_grid": 1}, "student_grid is 1, but must be 2 to 1000"),
        ("add", {"feature_noise": (1.0,)}, r"feature_noise is \(1.0,\), but must be a mean"),
        ("add", {"distillation_weight": -1.0}, "distillation_weight is -1.0, but must not be negative"),
    ],
)
def test_what_makes_no_sense_is_refused(method, recipe, fields, message):
    with pytest.raises(UserError, match=message):
        method(recipe, **fields)


@pytest.mark.parametrize("recipe", ["improved", "paper", *METHODS])
def test_what_a_method_does_not_read_is_refused(method, recipe):
    p = method(recipe)
    other = {bool: lambda x: not x, int: lambda x: x + 2, float: lambda x: 0.5 if x != 0.5 else 0.25}
    changed = {"target": "xt", "critic": "conditional", "penalty": "gp+clip", "start": "random", "distillation": "sds"}
    changed |= {"unsupervised": (0,), "features": "dino", "feature_noise": (-2.0, 1.0), "student_timesteps": (499, 999)}
    for field, readers in presets._READ_BY.items():
        if p.method not in readers:
            value = changed[field] if field in changed else other[type(getattr(p, field))](getattr(p, field))
            with pytest.raises(UserError, match=rf"^{field} is .* but method '{p.method}' does not use it"):
                p.replace(**{field: value})


def test_a_store_of_noisy_states_alone_teaches_any_method(tmp_path, method, teacher):
    p = method("regression", stored=("xt",))
    store = generate_trajectories(teacher, p, tmp_path / "store")
    assert finish(train_run(p, store, tmp_path / "run", device="cpu")).step == 6
    with pytest.raises(UserError, match=r"stored is \(\), but must hold one at least"):
        p.replace(stored=())


def test_a_store_of_another_teacher_is_refused(tmp_path, method, store, make_unet, linear_schedule, images):
    from diffusers import DDPMPipeline

    DDPMPipeline(make_unet(seed=9), linear_schedule()).save_pretrained(tmp_path / "other")
    p, opened = method("add"), type(store)(store.folder)
    opened.teacher = str(tmp_path / "other")
    with pytest.raises(UserError, match="is not the one that made"):
        finish(train_run(p, opened, tmp_path / "run", images=images, device="cpu"))


@pytest.mark.parametrize("recipe", ["add", "progressive", "consistency"])
def test_without_images_the_teachers_stand_in(tmp_path, method, store, monkeypatch, recipe):
    drawn, real = [], training.Data.real
    monkeypatch.setattr(training.Data, "real", lambda data, generator: drawn.append(real(data, generator)) or drawn[-1])
    finish(train_run(method(recipe, real_share=0.0, steps=5), store, tmp_path, device="cpu"))
    teachers = store.images().flatten(1)
    assert all((x == teachers).all(1).any() for images in drawn for x in images.flatten(1))
