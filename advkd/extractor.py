"""A data set's own feature space: a small classifier whose 64 penultimate features stand in for Inception's 2048."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from advkd.data import batch_generator, from_uint8
from advkd.files import check_weights, fingerprint, first_line, move_whole, writing
from advkd.presets import ASSETS, UserError

FEATURES = 64


class Extractor(ModelMixin, ConfigMixin):
    """A classifier of images `(b, c, s, s)` in [-1, 1]; `features` are its penultimate activations `(b, 64)`.

    `classes` are the number of classes, or of several factors' (letter, font) one number each.
    """

    @register_to_config
    def __init__(self, image_size_px: int = 16, channels: int = 1, classes: int | tuple[int, ...] = 10):
        super().__init__()
        layers, c_in = [], channels
        for c, stride in ((32, 1), (32, 2), (64, 1), (64, 2)):
            layers += [nn.Conv2d(c_in, c, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
            c_in = c
        flat = c_in * (image_size_px // 4) ** 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, FEATURES), nn.ReLU())
        self.sizes = (classes,) if isinstance(classes, int) else tuple(classes)
        self.classify = nn.Linear(FEATURES, sum(self.sizes))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits `(b, classes)` of each factor."""
        return self.classify(self.features(images)).split(self.sizes, dim=1)

    @torch.inference_mode()
    def verdicts(self, images: Tensor) -> list[Tensor]:
        """The most likely class of each factor, `(b,)`."""
        return [torch.cat(parts) for parts in zip(*([z.argmax(1) for z in self(x)] for x in images.split(500)))]


@dataclass(frozen=True)
class ExtractorRecord:
    """One step of classifier training."""

    step: int
    images_seen: int
    loss: float


def train_extractor(
    extractor: Extractor,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Iterator[ExtractorRecord]:
    """Train the classifier on the train split `images` `(n, c, h, w)` in [-1, 1], with noise and, where the images are
    grey on black, small random shifts. The loss is the sum over the factors of the class label. Raises UserError if it is
    not finite."""
    optimizer = torch.optim.AdamW(extractor.parameters(), learning_rate, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    extractor.train()
    for step in range(1, steps + 1):
        generator = batch_generator(seed, step)
        batch = torch.randint(len(images), (batch_size,), generator=generator)
        dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
        shown = images[batch]
        if shown.shape[1] == 1:
            side = shown.shape[-1]
            shown = F.pad(shown, (1, 1, 1, 1), value=-1)[..., 1 + dy :, 1 + dx :][..., :side, :side]
        noisy = shown + 0.1 * torch.randn(shown.shape, generator=generator)
        targets = torch.unravel_index(labels[batch], extractor.sizes)
        loss = sum(map(partial(F.cross_entropy, label_smoothing=0.1), extractor(noisy), targets))
        if not math.isfinite(value := loss.item()):
            raise UserError(
                f"the loss is {value} at step {step}; train with a smaller learning_rate than {learning_rate}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        yield ExtractorRecord(step, step * batch_size, value)
    extractor.eval()


@torch.inference_mode()
def accuracy(extractor: Extractor, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are classified right, in every factor."""
    found = torch.stack(extractor.eval().verdicts(images))
    return (found == torch.stack(torch.unravel_index(labels, extractor.sizes))).all(0).float().mean().item()


def save_extractor(extractor: Extractor, folder: Path) -> None:
    """Write an extractor in diffusers format; `config.json` comes last and says that it is whole."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".half.") as half:
            extractor.save_pretrained(half)
            move_whole(Path(half), folder, "config.json")


def load_extractor(folder: Path | str = ASSETS / "digits-extractor") -> Extractor:
    """A trained extractor, by default the shipped one. Raises UserError that names the folder when it holds none."""
    check_weights(Path(folder))
    try:
        return Extractor.from_pretrained(folder, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no feature extractor ({first_line(error)})") from error


@torch.no_grad()
def random_extractor(images: Tensor, seed: int = 0) -> Extractor:
    """An untrained extractor: a feature space that learnt nothing and that nobody selected by.

    Of the data it knows the scale alone: BatchNorm's statistics are those of `images` `(n, c, h, w)`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        extractor = Extractor(images.shape[-1], images.shape[1])
    for module in extractor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all calls
    for batch in images.split(2000):
        extractor.train()(batch)
    return extractor.eval()


def register(extractor: Extractor, data: str) -> str:
    """Make `extractor` known to torch-fidelity and return its name, which ends in its weights' fingerprint."""
    return _register(f"{data}-{fingerprint(extractor.state_dict())}", extractor)


@cache
def _register(name: str, extractor: Extractor) -> str:
    class Features(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_):
            super().__init__(name, features_list)
            self.extractor = extractor.eval()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (str(FEATURES),)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return str(FEATURES)

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            config = extractor.config
            return torch.zeros(1, config.channels, config.image_size_px, config.image_size_px, dtype=torch.uint8)

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.extractor.features(from_uint8(images)),)

    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, Features)
    return name
