import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advkd.discriminator import Discriminator, UnconditionalDiscriminator, make_discriminator
from advkd.presets import UserError, load_preset, resolution
from advkd.student import Student, count_parameters

# Adv-KD's student at 256 px, submodule by submodule: (resolution, layers, parameters, parameters of its terminal).
PAPER = [
    (8, ["Up16"], 480, 2_787),
    (8, ["Conv16"], 2_352, 2_787),
    (16, ["Conv32", "Up32"], 14_016, 10_179),
    (16, ["Conv32", "Conv32"], 18_624, 10_179),
    (32, ["Conv64", "Up64"], 55_680, 38_787),
    (32, ["Conv64", "Conv64"], 74_112, 38_787),
    (64, ["Conv128", "Up128"], 221_952, 151_299),
    (64, ["Conv128", "Conv128"], 295_680, 151_299),
    (128, ["Conv128", "Up128"], 295_680, 151_299),
    (128, ["Conv128", "Conv128"], 295_680, 151_299),
    (256, ["Conv128", "Up128"], 295_680, 151_299),
]
# Its critics: (resolution, channels of the image branch, parameters).
CRITICS = [
    (8, [32], 119_841),
    (16, [32, 64], 218_273),
    (32, [32, 64, 128], 480_673),
    (64, [32, 64, 128, 128], 743_073),
    (128, [32, 64, 128, 128, 128], 1_005_473),
    (256, [32, 64, 128, 128, 128, 128], 1_267_873),
]
TINY = dict(image_size_px=16, channels=1, submodules=3, widths=(4, 6))


def leaves(module):
    return [m for m in module.modules() if not list(m.children())]


def described(module):
    """Every leaf of a module in order, with what matters of it."""
    return [describe(leaf) for leaf in leaves(module)]


def describe(leaf):
    if isinstance(leaf, nn.ConvTranspose2d):
        shape = (leaf.kernel_size, leaf.stride, leaf.padding, leaf.output_padding, leaf.dilation, leaf.groups)
        return "up", leaf.in_channels, leaf.out_channels, leaf.bias is not None, *shape
    if isinstance(leaf, nn.Conv2d):
        shape = (leaf.kernel_size, leaf.stride, leaf.padding, leaf.dilation, leaf.groups, leaf.padding_mode)
        return "conv", leaf.in_channels, leaf.out_channels, leaf.bias is not None, *shape
    if isinstance(leaf, nn.BatchNorm2d | nn.BatchNorm1d):
        return type(leaf).__name__, leaf.num_features, leaf.eps, leaf.momentum, leaf.affine, leaf.track_running_stats
    if isinstance(leaf, nn.LeakyReLU):
        return "leaky", leaf.negative_slope
    if isinstance(leaf, nn.Linear):
        return "linear", leaf.in_features, leaf.out_features, leaf.bias is not None
    return (type(leaf).__name__,)


def conv(c_in, c):
    return "conv", c_in, c, True, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"


def up(c_in, c):
    return "up", c_in, c, True, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1


def norm(c, kind="BatchNorm2d"):
    return kind, c, 1e-5, 0.1, True, True


def paper_layers(k):
    """Submodule k of the table, leaf by leaf."""
    leaves, c_in = [], channels_before(k)
    for layer in PAPER[k][1]:
        kind, c = (up, int(layer[2:])) if layer.startswith("Up") else (conv, int(layer[4:]))
        leaves += [kind(c_in, c), norm(c), ("leaky", 0.01)]
        c_in = c
    return leaves


def channels_before(k):
    return 3 if k == 0 else int("".join(filter(str.isdigit, PAPER[k - 1][1][-1])))


def built(description):
    """The plain torch layer of one description."""
    kind, *rest = description
    if kind == "conv":
        return nn.Conv2d(rest[0], rest[1], 3, padding=1)
    if kind == "up":
        return nn.ConvTranspose2d(rest[0], rest[1], 3, stride=2, padding=1, output_padding=1)
    return nn.BatchNorm2d(rest[0]) if kind == "BatchNorm2d" else nn.LeakyReLU(rest[0])


def copy_in_order(source, target):
    """Give `target` the state of `source`, matched by order alone."""
    values, names = list(source.state_dict().values()), list(target.state_dict())
    target.load_state_dict(dict(zip(names, values, strict=True)))


def randomize_statistics(module):
    """Running statistics and affine parameters that are not the identity, so that a swapped BatchNorm shows."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.05, 0.15)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    model = Student.from_preset(load_preset("celebahq", "paper"))
    randomize_statistics(model)
    return model


@pytest.fixture(scope="module")
def plain():
    """The paper's student as plain sequences of torch layers: (layers, terminal) for each submodule."""
    pairs = []
    for k in range(11):
        c = channels_before(k + 1)
        terminal = [nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.LeakyReLU(0.01)]
        terminal += [nn.Conv2d(c, 3, 3, padding=1), nn.Tanh()]
        layers = nn.Sequential(*(built(description) for description in paper_layers(k)))
        pairs.append(nn.ModuleList([layers, nn.Sequential(*terminal)]))
    return nn.ModuleList(pairs)


@pytest.mark.parametrize("k", range(11))
def test_layers_are_the_papers(student, k):
    _, _, parameters, terminal_parameters = PAPER[k]
    c = channels_before(k + 1)
    assert described(student.stages[k].layers) == paper_layers(k)
    head = [conv(c, c), norm(c), ("leaky", 0.01), conv(c, 3), ("Tanh",)]
    assert described(student.stages[k].terminal) == head
    assert count_parameters(student.stages[k].layers) == parameters
    assert count_parameters(student.stages[k].terminal) == terminal_parameters


def test_parameter_counts_are_the_papers(student):
    assert len(student.stages) == 11
    assert count_parameters(student) == 2_429_937 == sum(row[2] + row[3] for row in PAPER)
    assert count_parameters(student.generator()) == 1_721_235 == sum(row[2] for row in PAPER) + PAPER[-1][3]


def test_defaults_are_the_papers_student():
    assert count_parameters(Student()) == 2_429_937


def test_plain_layers_give_the_same_images_in_eval_mode(student, plain):
    copy_in_order(student, plain)
    student.eval(), plain.eval()
    latent = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images, features = student.images(latent), latent
        for k, (layers, terminal) in enumerate(plain):
            features = layers(features)
            expected = terminal(features)
            assert images[k].shape == (1, 3, PAPER[k][0], PAPER[k][0])
            torch.testing.assert_close(images[k], expected, atol=1e-5, rtol=0)
            assert expected.abs().max() <= 1 and expected.std() > 0.01


def test_plain_layers_give_the_same_image_in_train_mode(student, plain):
    copy_in_order(student, plain)
    student.train(), plain.train()
    latent = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = latent
        for layers, _ in plain:
            features = layers(features)
        torch.testing.assert_close(student(latent), plain[-1][1](features), atol=1e-5, rtol=0)
    for ours, theirs in zip(student.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_forward_and_images_agree_and_fit_the_resolutions():
    student = Student(**TINY, block="residual", head="light").eval()
    latent = torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        images = student.images(latent)
        assert [tuple(image.shape) for image in images] == [(2, 1, 8, 8), (2, 1, 8, 8), (2, 1, 16, 16)]
        assert all(torch.equal(student(latent, k), image) for k, image in enumerate(images))
        assert torch.equal(student(latent), images[-1])
        assert [len(student.images(latent, k)) for k in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(("block", "head"), [("plain", "terminal"), ("residual", "light")])
def test_images_stay_in_range(block, head):
    student = Student(**TINY, block=block, head=head)
    assert all(image.abs().max() <= 1 for image in student.images(100 * torch.randn(4, 1, 4, 4)))


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize(("submodules", "widths"), [(5, (4, 6, 8)), (3, (4, 6, 8)), (2, (4, 6)), (1, (4,))])
def test_the_full_noise_enters_where_the_image_grows(block, submodules, widths):
    torch.manual_seed(0)
    student = Student(32, 3, submodules, widths, block, "light", latent="full").eval()
    assert student.latent_shape == (3, 32, 32)
    noise = torch.randn(2, 3, 32, 32)
    images = student.images(noise)
    assert [image.shape[-1] for image in images] == [resolution(k, submodules, 32) for k in range(submodules)]
    for k, image in enumerate(images):
        assert torch.equal(student(noise, k), image)
        # noise that vanishes in the block means at this image's size does not reach it
        finer = (
            noise
            + (hidden := torch.randn(2, 3, 32, 32))
            - F.interpolate(F.avg_pool2d(hidden, 32 // image.shape[-1]), scale_factor=32 // image.shape[-1])
        )
        torch.testing.assert_close(student(finer, k), image, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(student(torch.randn(2, 3, 32, 32)), images[-1], atol=1e-3)


def test_residual_block_adds_its_input():
    block = Student(**TINY, block="residual", head="light").stages[1].layers[0].eval()
    nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), torch.where(x > 0, x, 0.01 * x))


def test_generator_gives_the_last_image_and_refuses_other_stages():
    student = Student(**TINY)
    randomize_statistics(student)
    generator, latent = student.eval().generator(), torch.randn(2, 1, 4, 4)
    assert not generator.training
    assert torch.equal(generator(latent), student(latent))
    assert torch.equal(generator(latent, 2), student(latent))
    with pytest.raises(UserError, match="submodule 0 has no head: this is the deployable generator"):
        generator(latent, 0)
    heads = sum(count_parameters(submodule.terminal) for submodule in student.stages[:-1])
    assert count_parameters(generator) == count_parameters(student) - heads


@pytest.mark.parametrize("stage", [-1, 3])
def test_a_stage_that_does_not_exist_is_refused(stage):
    student, latent = Student(**TINY), torch.randn(2, 1, 4, 4)
    for call in (student, student.images):
        with pytest.raises(UserError, match=f"stage is {stage}, but the student has submodules 0 to 2"):
            call(latent, stage)


@pytest.mark.parametrize("training_heads", [True, False])
def test_saving_and_loading_changes_nothing(tmp_path, training_heads):
    student = Student(**TINY, training_heads=training_heads)
    randomize_statistics(student)
    student.save_pretrained(tmp_path)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded, latent = Student.from_pretrained(tmp_path), torch.randn(2, 1, 4, 4)
    assert torch.equal(loaded.eval()(latent), student.eval()(latent))
    assert loaded.state_dict().keys() == student.state_dict().keys()
    assert dict(loaded.config)["training_heads"] is training_heads


def test_initial_weights_follow_from_the_seed_alone():
    preset, state = load_preset("digits").replace(widths=(4, 6)), torch.get_rng_state()
    first, second, other = (Student.from_preset(p) for p in (preset, preset, preset.replace(seed=1)))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [s.stages[0].terminal[0].weight for s in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def critic_description(size_px):
    image, c_in = [], 3
    for c in next(channels for size, channels, _ in CRITICS if size == size_px):
        image.append(("conv", c_in, c, False, (4, 4), (2, 2), (1, 1), (1, 1), 1, "zeros"))
        image += [norm(c)] * (c_in != 3) + [("leaky", 0.2)]
        c_in = c
    latent = [("conv", 3, 32, False, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"), norm(32), ("leaky", 0.2)]
    latent += [("conv", 32, 64, False, (3, 3), (1, 1), (0, 0), (1, 1), 1, "zeros"), norm(64), ("leaky", 0.2)]
    joint = [("linear", 16 * c_in + 256, 128, True), norm(128, "BatchNorm1d"), ("leaky", 0.2), ("linear", 128, 1, True)]
    return [*image, ("Flatten",), *latent, ("Flatten",), *joint]


@pytest.mark.parametrize(("size_px", "channels", "parameters"), CRITICS)
def test_critics_are_the_papers(size_px, channels, parameters):
    critic = Discriminator(size_px)
    assert described(critic) == critic_description(size_px)
    assert count_parameters(critic) == parameters
    image = critic.image[:-1](torch.zeros(2, 3, size_px, size_px))
    assert image.shape == (2, channels[-1], 4, 4)
    assert critic.latent[:-1](torch.zeros(2, 3, 4, 4)).shape == (2, 64, 2, 2)


class PlainCritic(nn.Module):
    """The paper's critic at 32 px, written down once more."""

    def __init__(self):
        super().__init__()
        down = dict(kernel_size=4, stride=2, padding=1, bias=False)
        self.x = nn.ModuleList([nn.Conv2d(3, 32, **down), nn.Conv2d(32, 64, **down)])
        self.x.extend([nn.BatchNorm2d(64), nn.Conv2d(64, 128, **down), nn.BatchNorm2d(128)])
        z = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)]
        self.z = nn.ModuleList([*z, nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64)])
        self.out = nn.ModuleList([nn.Linear(2048 + 256, 128), nn.BatchNorm1d(128), nn.Linear(128, 1)])

    def forward(self, image, latent):
        x = leaky(self.x[0](image))
        x = leaky(self.x[2](self.x[1](x)))
        x = leaky(self.x[4](self.x[3](x)))
        z = leaky(self.z[1](self.z[0](latent)))
        z = leaky(self.z[3](self.z[2](z)))
        joint = torch.cat([x.reshape(len(x), -1), z.reshape(len(z), -1)], dim=1)
        return self.out[2](leaky(self.out[1](self.out[0](joint))))[:, 0]


def leaky(x):
    return torch.maximum(x, 0.2 * x)


@pytest.mark.parametrize("training", [True, False])
def test_plain_critic_gives_the_same_logits(training):
    torch.manual_seed(0)
    critic, plain = Discriminator(32), PlainCritic()
    randomize_statistics(critic)
    copy_in_order(critic, plain)
    critic.train(training), plain.train(training)
    image, latent = torch.rand(5, 3, 32, 32) * 2 - 1, torch.randn(5, 3, 4, 4)
    logits = critic(image, latent)
    assert logits.shape == (5,)
    torch.testing.assert_close(logits, plain(image, latent), atol=1e-5, rtol=0)
    assert (critic(image, -latent) - logits).abs().min() > 1e-3


@pytest.mark.parametrize("size_px", [8, 16, 64])
def test_unconditional_critic_ignores_the_latent(size_px):
    critic, image = UnconditionalDiscriminator(size_px, channels=1, width=4), torch.randn(3, 1, size_px, size_px)
    logits = critic(image, torch.randn(3, 1, 4, 4))
    assert logits.shape == (3,)
    assert torch.equal(logits, critic(image, torch.randn(3, 1, 4, 4)))
    assert torch.equal(logits, critic(image))
    assert critic.image(image).shape == (3, min(size_px // 8, 4) * 4, 4, 4)
    assert not [m for m in critic.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]


def test_unconditional_critic_sees_a_collapse():
    torch.manual_seed(0)
    critic, images = UnconditionalDiscriminator(8, channels=1, width=4), torch.randn(4, 1, 8, 8)
    collapsed = images[:1].expand(4, -1, -1, -1)
    assert critic(images)[0] != critic(collapsed)[0]
    torch.testing.assert_close(critic(collapsed), critic(images[:1]).expand(4))


def test_critic_of_a_stage_follows_from_preset_and_seed():
    paper, improved = load_preset("digits", "paper"), load_preset("digits", "improved")
    first, again, next_stage = (make_discriminator(paper, k).joint[0].weight for k in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, next_stage)
    assert not torch.equal(first, make_discriminator(paper.replace(seed=1), 0).joint[0].weight)
    critics = [make_discriminator(load_preset("celebahq", "paper"), k) for k in range(11)]
    assert [count_parameters(c) for c in critics] == [dict((s, n) for s, _, n in CRITICS)[row[0]] for row in PAPER]
    assert isinstance(make_discriminator(improved, 10), UnconditionalDiscriminator)
