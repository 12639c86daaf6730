import math

import numpy as np
import pytest
import torch

from advkd import losses

REAL, FAKE = [1.5, -0.25, 30.0], [0.5, -2.0, -40.0]


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def test_discriminator_loss_by_hand():
    expected = sum(softplus(-x) for x in REAL) / 3 + sum(softplus(x) for x in FAKE) / 3
    assert float(losses.discriminator_loss(torch.tensor(REAL), torch.tensor(FAKE))) == pytest.approx(expected, rel=1e-6)
    zero = losses.discriminator_loss(torch.zeros(2), torch.zeros(5))
    assert float(zero) == pytest.approx(2 * math.log(2))


def test_the_forward_kl_weighs_by_the_ratio_of_densities():
    logits = torch.tensor(FAKE, requires_grad=True)
    losses.generator_loss(logits, "forward-kl").backward()
    weights = np.exp(FAKE) / np.exp(FAKE).sum()
    np.testing.assert_allclose(logits.grad, -weights / 2, rtol=1e-6)
    undecided = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    for x, how in zip(undecided, ("forward-kl", "non-saturating"), strict=True):
        losses.generator_loss(x, how).backward()
    assert torch.equal(undecided[0].grad, undecided[1].grad)


def test_generator_loss_by_hand():
    expected = sum(softplus(-x) for x in FAKE) / 3
    assert float(losses.generator_loss(torch.tensor(FAKE))) == pytest.approx(expected, rel=1e-6)


def test_each_side_pulls_its_own_way():
    real, fake = torch.tensor(REAL, requires_grad=True), torch.tensor(FAKE, requires_grad=True)
    losses.discriminator_loss(real, fake).backward()
    torch.testing.assert_close(real.grad, -torch.sigmoid(-torch.tensor(REAL)) / 3)
    torch.testing.assert_close(fake.grad, torch.sigmoid(torch.tensor(FAKE)) / 3)
    fake.grad = None
    losses.generator_loss(fake).backward()
    torch.testing.assert_close(fake.grad, -torch.sigmoid(-torch.tensor(FAKE)) / 3)


def test_input_gradient_of_a_linear_critic_is_its_weight():
    weight = torch.randn(1, 4, 4)
    gradient = losses.input_gradient(lambda x: (x * weight).sum((1, 2, 3)) + 3, torch.randn(5, 1, 4, 4))
    torch.testing.assert_close(gradient, weight.expand(5, 1, 4, 4))


def test_feature_loss_by_hand():
    scale = torch.nn.Conv2d(1, 1, 1, bias=False)
    scale.weight.data.fill_(2.0)
    layers = torch.nn.Sequential(scale, torch.nn.LeakyReLU(0.5), torch.nn.Flatten())
    images = torch.tensor([1.0, -1.0, 3.0]).view(3, 1, 1, 1).requires_grad_()
    targets = torch.tensor([2.0, -3.0, 3.0]).view(3, 1, 1, 1)  # features 2, -1, 6 against 4, -3, 6
    loss = losses.feature_loss(layers, images, targets)
    assert loss.item() == pytest.approx((2 + 2 + 0) / (4 + 3 + 6))
    twice = losses.feature_loss(
        torch.nn.Sequential(*layers[:2], *layers), images, targets
    )  # features 4, -1, 12; 8, -3, 12
    assert twice.item() == pytest.approx((4 / 13 + (4 + 2 + 0) / (8 + 3 + 12)) / 2)
    loss.backward()
    assert images.grad[0] < 0 < images.grad[1] and images.grad[2] == 0


def test_penalties_of_a_linear_critic():
    weight = torch.tensor([3.0, 4.0]).view(1, 1, 2).double().requires_grad_()  # norm 5

    def critic(x):
        return (x * weight).sum((1, 2, 3))

    real, fake = torch.randn(2, 6, 1, 1, 2, dtype=torch.float64)
    gp = losses.gradient_penalty(critic, real, fake, torch.rand(6, 1, 1, 1, dtype=torch.float64))
    r1 = losses.r1_penalty(critic, real)
    assert gp.item() == pytest.approx((5 - 1) ** 2)
    assert r1.item() == pytest.approx(25)
    (of_gp,), (of_r1,) = torch.autograd.grad(gp, weight), torch.autograd.grad(r1, weight)
    torch.testing.assert_close(of_gp, 2 * (5 - 1) * weight.detach() / 5)
    torch.testing.assert_close(of_r1, 2 * weight.detach())


def test_gradient_penalty_is_taken_between_real_and_fake():
    real, fake = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), -1.0)
    weight = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().sum((1, 2, 3))  # gradient 2 x, norm 4 |x| for four equal pixels

    penalty = losses.gradient_penalty(critic, real, fake, weight)
    torch.testing.assert_close(seen[0][:, 0, 0, 0], torch.tensor([-1.0, 0.5, 2.0]))
    assert penalty.item() == pytest.approx(((4 - 1) ** 2 + (2 - 1) ** 2 + (8 - 1) ** 2) / 3)


def test_r1_by_hand_of_a_quadratic_critic():
    real = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    penalty = losses.r1_penalty(lambda x: x.square().sum((1, 2, 3)), real)
    assert penalty.item() == pytest.approx(float((2 * real).square().sum() / 4))


@pytest.mark.parametrize("kind", ["gp", "r1"])
def test_second_order_gradients_reach_the_critic_and_match_differences(kind):
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    first = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)

    def penalty(first, second):
        def critic(x):
            return torch.tanh(x.flatten(1) @ first.T) @ second

        if kind == "r1":
            return losses.r1_penalty(critic, real)
        return losses.gradient_penalty(critic, real, fake, torch.full((3, 1, 1, 1), 0.3, dtype=torch.float64))

    assert torch.autograd.gradcheck(penalty, (first, second))
    penalty(first, second).backward()
    assert first.grad.abs().min() > 0 and second.grad.abs().min() > 0


def test_penalties_do_not_touch_the_images():
    real = torch.randn(2, 1, 2, 2, requires_grad=True)
    weight = torch.ones(1, 2, 2, requires_grad=True)
    losses.r1_penalty(lambda x: (x * weight).square().sum((1, 2, 3)), real).backward()
    assert real.grad is None and weight.grad is not None


def test_reconstruction_loss_is_the_sum_over_heads_of_any_size():
    images = [torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 4, 4)]
    targets = [torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 4, 4), -0.25)]
    assert float(losses.reconstruction_loss(images, targets)) == pytest.approx(0.5 + 0.25)
    with pytest.raises(ValueError, match="zip"):
        losses.reconstruction_loss(images, targets[:1])
