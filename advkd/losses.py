"""Losses as pure functions of tensors."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkd.devices import all_mean, batch_softmax


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic loss of the critic, E softplus(-D(real)) + E softplus(D(fake)), of logits of any shape."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor, how: str = "non-saturating") -> Tensor:
    """Adversarial loss of the student, of logits `(b,)`.

    "non-saturating": E softplus(-D(fake)) (Goodfellow et al. 2014, section 3).
    "forward-kl": -E w D(fake) / 2 with the constant weights w = exp(D) / mean exp(D). For the best critic exp(D) is the
    ratio of the densities, real to fake, and -E exp(D) grad D the gradient of KL(real || fake) (Nowozin et al. 2016, table 6),
    which punishes images that the student leaves out. Both have the gradient -1/2 where the critic is undecided.
    """
    if how == "forward-kl":
        return -(batch_softmax(fake_logits.detach()) * fake_logits).sum() / 2
    return F.softplus(-fake_logits).mean()


def input_gradient(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient of the sum of the logits with respect to the images, `(b, c, h, w)`, differentiable in the weights.

    Where the critic looks at the whole batch (BatchNorm, standard deviation over the batch) it holds the other samples'
    logits too.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    return gradient


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """E (||grad_x D(x)||_2 - 1)^2 on x = weight * real + (1 - weight) * fake, `weight` `(b, 1, 1, 1)` in [0, 1].

    Gulrajani et al. 2017, equation 3; part of Adv-KD's critic loss.
    """
    gradient = input_gradient(critic, weight * real + (1 - weight) * fake)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


def r1_penalty(critic: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """E ||grad_x D(x)||_2^2 on real images (Mescheder et al. 2018, equation 9, without its factor 1/2)."""
    return input_gradient(critic, real).flatten(1).square().sum(1).mean()


def feature_loss(layers: nn.Sequential, images: Tensor, targets: Tensor) -> Tensor:
    """Feature matching of pairs: the mean absolute difference of images `(b, c, s, s)` to their targets, after every
    LeakyReLU of the critic's `layers`, relative to the mean absolute feature of the targets; a mean over the layers.

    Perceptual (Johnson et al. 2016, section 3.2) in the features of the critic at hand, as in Larsen et al. 2016, equation 7.
    """
    with torch.no_grad():
        wanted = list(_activations(layers, targets))
    found = _activations(layers, images)
    distances = [
        F.l1_loss(x.float(), y.float()) / all_mean(y.float().abs().mean()) for x, y in zip(found, wanted, strict=True)
    ]
    return sum(distances) / len(distances)


def _activations(layers: nn.Sequential, images: Tensor) -> Iterator[Tensor]:
    for layer in layers:
        images = layer(images)
        if isinstance(layer, nn.LeakyReLU):
            yield images


def reconstruction_loss(images: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Sum over the heads of the mean absolute difference of their images `(b, c, r, r)` to their targets."""
    return sum(F.l1_loss(image, target) for image, target in zip(images, targets, strict=True))


def hinge_discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """Sum over heads k of E max(0, 1 - D_k(real)) + E max(0, 1 + D_k(fake)), of logits `(b, n)` (ADD, equation 3)."""
    real, fake = (
        sum(F.relu(1 + sign * x).mean() for x in logits) for sign, logits in ((-1, real_logits), (1, fake_logits))
    )
    return real + fake


def hinge_generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """The student's part: minus the sum over heads of E D_k(fake) (ADD, equation 2)."""
    return -sum(x.mean() for x in fake_logits)


def feature_r1_penalty(heads: Callable[[list[Tensor]], list[Tensor]], features: Sequence[Tensor]) -> Tensor:
    """Sum over heads of E ||grad D_k||_2^2 with respect to the head's input features `(b, c, *)` of real images, of the
    mean logit of an image (ADD, section 3.2: of the logits, not of the hinge loss)."""
    features = [x.detach().float().requires_grad_() for x in features]
    logits = [x.mean(1).sum() for x in heads(features)]
    gradients = torch.autograd.grad(sum(logits), features, create_graph=True)
    return sum(gradient.flatten(1).square().sum(1).mean() for gradient in gradients)


def distillation_loss(x0: Tensor, expected: Tensor, weight: Tensor) -> Tensor:
    """E c(t) ||x0 - expected||_2^2 / n of the student's images `(b, c, s, s)` with n numbers each, the teacher's expectation
    `expected` of the same images noised to t, a constant, and weights c(t) `(b,)` (ADD, equation 4)."""
    return (weight * (x0 - expected.detach()).square().flatten(1).mean(1)).mean()


def distillation_weights(alpha: Tensor, sigma: Tensor, how: str) -> Tensor:
    """c(t): "exponential", alpha_t, or "sds", alpha_t sigma_t / 2, whose gradient is that of score distillation sampling
    with its weight sigma_t^2 (ADD, section 3.3; Poole et al. 2022, section 3)."""
    return alpha if how == "exponential" else alpha * sigma / 2
