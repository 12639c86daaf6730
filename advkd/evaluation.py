"""Frechet distance, kernel distance, precision and recall through torch-fidelity, each with its protocol; time."""

import math
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from tqdm.auto import tqdm

from advkd.data import FACTORS, to_uint8
from advkd.denoiser import Denoiser
from advkd.extractor import FEATURES, Extractor, load_extractor, register
from advkd.files import first_line, quiet, sha256
from advkd.pipeline import FewStepPipeline, StudentPipeline
from advkd.presets import ASSETS, TRAIN_TIMESTEPS, UserError
from advkd.student import count_parameters
from advkd.teacher import Teacher

INCEPTION = "inception-v3-compat"
INCEPTION_FEATURES = 2048
INCEPTION_KEY = "Conv2d_1a_3x3.conv.weight"


class _Images(Dataset):
    """Images in [-1, 1] as torch-fidelity wants them: bare uint8 tensors."""

    def __init__(self, images: Tensor, rgb: bool):
        self.images = to_uint8(images.expand(-1, 3, -1, -1) if rgb and images.shape[1] == 1 else images).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Metric:
    """A feature space to compare images in, with the name of its distance.

    By default the shipped classifier of `data`; its distance is FD-digits or FD-glyphs and never called FID. With
    `inception` it is the Inception of the FID, from the weights file at that path (or "download", which fetches it).
    `extractor` is any other, under the name `data`.
    """

    def __init__(
        self, data: str = "digits", *, inception: Path | str | None = None, extractor: Extractor | None = None
    ):
        self.rgb, self.weights = inception is not None, None
        if inception is not None:
            self.extractor, self.label, self.features = INCEPTION, "FID", INCEPTION_FEATURES
            if str(inception) != "download":
                self.weights = _safe_weights(Path(inception))
        elif extractor is None and data not in FACTORS:
            raise UserError(
                "there is no classifier of one's own images to compare them by; give torch-fidelity's Inception weights, a "
                "file or 'download': inception=FILE (--inception FILE, -p inception FILE)"
            )
        else:
            model = extractor or load_extractor(ASSETS / f"{data}-extractor")
            self.extractor, self.label, self.features = register(model, data), f"FD-{data}", FEATURES

    def protocol(self) -> dict:
        """What a number depends on beside the images."""
        file = Path(self.weights or _downloaded())
        weights = {"weights_sha256": sha256(file)} if self.rgb and file.exists() else {}
        return {
            "metric": self.label,
            "extractor": self.extractor,
            "features": self.features,
            "resize": "299 px, in the extractor" if self.rgb else "none",
        } | weights

    def compare(self, samples: Tensor, reference: Tensor, few: bool = False) -> dict[str, float]:
        """`fd`, `kid`, `precision` and `recall` of `samples` against `reference`, images `(n, c, h, w)` in [-1, 1].

        KID is the mean over 100 subsets of 500 images (fewer where there are fewer). Precision and recall: Kynkaanniemi
        et al. 2019, 3 neighbours. Raises UserError for fewer samples or references than features, whose covariance is
        singular, unless `few` says that this is wanted.
        """
        count = min(len(samples), len(reference))
        self._check_count(count, few)
        values = self._calculate(samples, reference, kid=True, prc=True, kid_subset_size=min(500, count))
        names = {
            "fd": "frechet_inception_distance",
            "kid": "kernel_inception_distance_mean",
            "precision": "precision",
            "recall": "recall",
        }
        return {name: float(values[key]) for name, key in names.items()}

    def distance(self, samples: Tensor, reference: Tensor, few: bool = False) -> float:
        """The Frechet distance alone, as `compare` has it."""
        self._check_count(min(len(samples), len(reference)), few)
        return float(self._calculate(samples, reference)["frechet_inception_distance"])

    def _check_count(self, count: int, few: bool) -> None:
        if count < self.features and not few:
            raise UserError(
                f"{count} images are too few for {self.features} features; take more (--count), or allow few (--few)"
            )

    def _calculate(self, samples: Tensor, reference: Tensor, **metrics) -> dict[str, float]:
        if self.rgb and self.weights is None:
            self.weights = _safe_weights(_download())
        return torch_fidelity.calculate_metrics(
            input1=_Images(samples, self.rgb),
            input2=_Images(reference, self.rgb),
            feature_extractor=self.extractor,
            feature_extractor_weights_path=self.weights,
            fid=True,
            **metrics,
            batch_size=250,
            cuda=self.extractor == INCEPTION and torch.cuda.is_available(),  # the shipped ones are small
            cache=False,
            save_cpu_ram=True,
            verbose=False,
        )

    def fd_of_subsets(
        self, samples: Tensor, reference: Tensor, size: int, few: bool = False
    ) -> tuple[float, float, int]:
        """Mean and standard deviation of the distance over the disjoint subsets of `size` samples, and their number.

        The Frechet distance falls as samples are added: only at the same size are two models comparable. Raises
        UserError for fewer than two subsets, and for subsets of fewer samples than features unless `few`.
        """
        if len(samples) < 2 * size:
            raise UserError(f"{len(samples)} images do not make two subsets of {size}; take more images")
        subsets = samples[: len(samples) // size * size].split(size)
        distances = [self.distance(subset, reference, few) for subset in subsets]
        return statistics.mean(distances), statistics.stdev(distances), len(distances)

    def evaluate(self, samples: Tensor, train: Tensor, heldout: Tensor, few: bool = False) -> dict[str, float]:
        """The quality fields of a result row: against the train split, and the distance to the held-out split."""
        on_train = self.compare(samples, train, few)
        return {
            "fd_train": on_train["fd"],
            "fd_heldout": self.distance(samples, heldout, few),
            "kid_train": on_train["kid"],
            "precision": on_train["precision"],
            "recall": on_train["recall"],
        }


def _downloaded() -> Path:
    """Where the published Inception lies once it was fetched."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)


def _download() -> Path:
    """Fetch it where that was not done yet; the last part of its name is the beginning of its SHA-256."""
    file = _downloaded()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), file.stem.rsplit("-")[-1], progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights cannot be fetched from {URL_INCEPTION_V3} ({first_line(error)}); give their file"
            ) from error
    return file


def _safe_weights(path: Path) -> str:
    """The path of a file that holds tensors and nothing else: torch-fidelity unpickles whatever it is given."""
    if not path.is_file():
        raise UserError(f"{path} is no Inception weights file; give one, or 'download'")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} does not hold weights alone and is not opened ({first_line(error)})") from error
    if not isinstance(weights, dict) or INCEPTION_KEY not in weights:
        raise UserError(f"{path} does not hold torch-fidelity's Inception ({INCEPTION_KEY} is missing)")
    return str(path)


def sample_student(
    pipeline: StudentPipeline | FewStepPipeline,
    count: int,
    seed: int,
    first_index: int = 0,
    batch_size: int = 250,
    progress: bool = True,
    steps: int = 1,
    noise: Tensor | None = None,
) -> Tensor:
    """The student's images `(count, c, h, w)` in [-1, 1] for `count` samples of `seed`, or for given `noise`, in smaller
    batches where they are large. Raises UserError for more than one of `steps` where the student has no timesteps."""
    few = isinstance(pipeline, FewStepPipeline)
    if steps > 1 and not few:
        raise UserError(f"steps is {steps}, but this student makes its images in one")
    how, images = {"output_type": "pt"} | ({"steps": steps} if few else {}), []
    size = max(1, min(batch_size, 2**22 // math.prod(pipeline.student.image_shape)))  # 21 at 256 px: 3 GB at the most
    for start in tqdm(range(0, count, size), desc="student", unit="batch", disable=quiet(progress)):
        these = None if noise is None else noise[start : min(start + size, count)]
        images.append(pipeline(min(size, count - start), seed, first_index + start, these, **how).images.cpu())
    return torch.cat(images)


@torch.inference_mode()
def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median wall-clock time of `call()` in ms, after three calls that are not counted."""
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[3:])


def nearest(samples: Tensor, references: Tensor) -> Tensor:
    """For each sample the index of the reference at the smallest pixel distance (L2), `(n,)`."""
    return torch.cdist(samples.flatten(1), references.flatten(1)).argmin(1)


def pull_to_train(samples: Tensor, train: Tensor, heldout: Tensor) -> float:
    """Share of the samples nearer (pixel L2) to a training image than to any of equally many held-out images.

    0.5 is neutral, 1 means copies of the training images that are compared with. It says nothing of a collapsed student.
    """
    count = min(len(train), len(heldout))
    to_train, to_heldout = (torch.cdist(samples.flatten(1), x[:count].flatten(1)).amin(1) for x in (train, heldout))
    return (to_train < to_heldout).float().mean().item()


def near_copies(samples: Tensor, train: Tensor, heldout: Tensor, share: float = 0.01) -> float:
    """Share of the samples that lie as near (pixel L2) to a training image as only `share` of the held-out images do.

    By definition `share` for real images; a student that copies has more.
    """
    to_train = [torch.cdist(x.flatten(1), train.flatten(1)).amin(1) for x in (samples, heldout)]
    return (to_train[0] < torch.quantile(to_train[1], share)).float().mean().item()


def density_coverage(samples: Tensor, reference: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 3 and 4) of feature vectors `(n, d)` and `(m, d)`.

    Around each reference lies a ball up to its k-th nearest other reference. Density is how many balls a sample lies in,
    over k (about 1 for real samples; it may exceed 1); coverage is the share of balls with a sample in them.
    """
    radii = torch.cdist(reference, reference).kthvalue(neighbours + 1, dim=1).values  # the first is itself
    inside = torch.cdist(samples, reference) < radii
    return inside.float().sum(1).mean().item() / neighbours, inside.any(0).float().mean().item()


def student_row(pipeline: StudentPipeline | FewStepPipeline, recipe: str | None, steps: int = 1) -> dict:
    """What a result row says of a student before it is measured."""
    student = pipeline.student
    return {
        "model": "student",
        "recipe": recipe,
        "sampler": "one-step" if steps == 1 else "few-step",
        "steps": steps,
        "parameters": count_parameters(student),
        "deployable_parameters": count_parameters(student.generator()),
        "size_mb": count_parameters(student) * 4e-6,
    }


def teacher_row(teacher: Teacher, sampler: str, steps: int) -> dict:
    """What a result row says of a teacher and its sampler before they are measured."""
    return {
        "model": "teacher",
        "recipe": None,
        "sampler": sampler,
        "steps": steps,
        "parameters": teacher.parameters,
        "deployable_parameters": teacher.parameters,
        "size_mb": teacher.parameters * 4e-6,
    }


def student_latency_ms(pipeline: StudentPipeline | FewStepPipeline, batch: int = 1, steps: int = 1) -> float:
    """Time per image of the deployable generator, float32, from a given latent; a U-Net's is that of one step times
    `steps`."""
    student = pipeline.student.generator().eval()
    given = [torch.randn(batch, *student.latent_shape, device=student.device)]
    if isinstance(student, Denoiser):
        given.append(torch.full((batch,), TRAIN_TIMESTEPS - 1, device=student.device))
    return milliseconds(lambda: student(*given)) * steps / batch


def teacher_latency_ms(teacher: Teacher, steps: int, batch: int = 1) -> float:
    """Time per image of the teacher, float32: one measured step of the U-Net times the number of steps."""
    unet = teacher.unet
    size = (batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    xt, t = torch.randn(size, device=unet.device), torch.tensor(500, device=unet.device)
    return milliseconds(lambda: unet(xt, t)) * steps / batch


def protocol(metric: Metric, images: int, seed: int, train: Tensor, heldout: Tensor) -> dict:
    """Everything that the numbers of a table depend on: metric, images, references, seeds, device, versions."""
    packages = ("torch", "diffusers", "torch-fidelity", "scikit-learn")
    return metric.protocol() | {
        "images": images,
        "sampling_seed": seed,
        "reference_train": f"train split, {len(train)} images",
        "reference_heldout": f"held-out split, {len(heldout)} images",
        "size_mb": "all parameters in float32, 10^6 bytes",
        "ms_per_image": "batch 1, float32, median of 20; teacher: one U-Net step times the number of steps",
        "device": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
