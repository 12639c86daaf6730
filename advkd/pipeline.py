"""Distilled students as diffusers pipelines: noise to images in one call, and a folder or a repository to share."""

import json
import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from huggingface_hub import CommitInfo, create_repo, upload_folder
from torch import Tensor

from advkd.card import (
    CARD,
    call_options,
    checked_facts,
    save_grid,
    with_measurement,
    write_card,
    write_measurements,
)
from advkd.data import make_latent, sample_generators, sample_noise
from advkd.denoiser import Denoiser
from advkd.files import check_weights, locked, read_object, remove_halves, sha256, write_json, writing
from advkd.presets import UserError
from advkd.student import Student

OUTPUT_TYPES = ("pil", "np", "pt")
INDEX = "model_index.json"  # what diffusers knows a saved pipeline by
COMPONENTS = (["advkd.student", "Student"], ["advkd.denoiser", "Denoiser"])  # the students that it may name


def verify_weights(folder: Path) -> None:
    """Compare a saved student's weights with their checksums. Raises UserError naming a file that changed."""
    facts = read_object(folder / INDEX, f"remove {folder} and train or fetch it again").get("facts")
    weights = facts.get("weights") if isinstance(facts, dict) else None
    for name, digest in (weights if isinstance(weights, dict) else {}).items():
        file = folder / "student" / Path(name).name
        if not file.exists() or sha256(file) != digest:
            raise UserError(f"{file} is damaged or missing; remove {folder} and train or fetch it again")


class SharedPipeline(DiffusionPipeline):
    """What both pipelines have in common: a student, what is known of it, and how it is saved and shared.

    `facts` (see `card.run_facts`) travel in `model_index.json`, so that whoever loads a student and saves it elsewhere
    keeps them. Raises UserError when they are no dictionary that JSON can write.
    """

    def __init__(self, student: Student | Denoiser, facts: dict | None = None):
        super().__init__()
        self.register_modules(student=student)
        self.register_to_config(facts=checked_facts(facts))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "SharedPipeline":
        """Load what `save_pretrained` wrote, from a folder or the hub; arguments are those of diffusers.

        Nothing that was written by others is executed: the weights are safetensors, the student is this package's. Raises
        UserError for a `model_index.json` that names anything else, and for arguments that ask for it.
        """
        asked = {"use_safetensors": (True, None), "custom_pipeline": (None,), "trust_remote_code": (False, None)}
        for name, harmless in asked.items():
            if (value := kwargs.pop(name, None)) not in harmless:
                raise UserError(f"{name} is {value!r}, which could execute code of others; leave it out")
        if os.path.isdir(pretrained_model_name_or_path):
            check_weights(Path(pretrained_model_name_or_path) / "student")
            verify_weights(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """As diffusers reads it, checked: see `from_pretrained`."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in config.items():
            if name == "student" and value not in COMPONENTS:
                raise UserError(f"{INDEX} names the student {value!r}, but must name one of {COMPONENTS}")
            if name not in ("student", "facts") and not name.startswith("_"):
                raise UserError(f"{INDEX} names {name!r} as {value!r}, but a student's pipeline has no such part")
        kinds = {kind.__name__: kind for kind in SharedPipeline.__subclasses__()}
        made = config.get("_class_name")
        if made in kinds and not issubclass(cls, kinds[made]):  # or it would load, and fail when it samples
            raise UserError(f"{INDEX} is that of a {made}; load it with {made}.from_pretrained")
        return loaded

    @property
    def facts(self) -> dict:
        """A copy of what is known of the student; empty for a pipeline made by hand."""
        return checked_facts(self.config["facts"])

    def record(self, **facts) -> None:
        """Add to the facts, in place of earlier ones of the same names."""
        self.register_to_config(facts=checked_facts(self.facts | facts))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> CommitInfo | None:
        """Write the pipeline with its model card (`README.md`) and a grid of its images (`samples.png`).

        Arguments are those of diffusers. With `push_to_hub`, and with nothing else, what was written goes to the hub, other
        files of the folder do not: to `repo_id` (default: the folder's name) with `commit_message`, `private`, `token`,
        `create_pr` and `subfolder` as in `push_to_hub`; returns its commit then. Raises UserError for `safe_serialization=False`.
        """
        if not safe_serialization:
            raise UserError(
                "safe_serialization is False, which would pickle the weights; they are saved as safetensors alone"
            )
        names = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
        hub, folder, repository = {name: kwargs.pop(name, None) for name in names}, Path(save_directory), None
        if push_to_hub:
            about = {"private": hub["private"], "token": hub["token"], "exist_ok": True}
            repository = create_repo(hub["repo_id"] or folder.absolute().name, **about).repo_id

        # The card comes first, since model_index.json, which diffusers writes last, says that a folder is whole.
        def save(there: Path) -> None:
            with writing(there):
                remove_halves(there, INDEX, CARD, "samples.png")
                remove_halves(there / "student", "config.json")
                self._write_card(there, repository or ".", variant)
                super(SharedPipeline, self).save_pretrained(
                    there, safe_serialization, variant, max_shard_size, **kwargs
                )

        save(folder)
        if not push_to_hub:
            return None
        with tempfile.TemporaryDirectory() as alone:  # what else lies in the folder stays here
            save(Path(alone))
            return upload_folder(
                repo_id=repository,
                folder_path=alone,
                path_in_repo=hub["subfolder"],
                commit_message=hub["commit_message"] or f"Upload {type(self).__name__}",
                token=hub["token"],
                create_pr=hub["create_pr"],
            )

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Write `model_index.json` in one step, with the checksums of the weights that lie beside it.

        It does not say where the student was loaded from, nor does the student's own file: that is nobody else's concern.
        """
        folder = Path(save_directory)
        if not (about := folder / "student" / "config.json").exists():
            return super().save_config(save_directory, push_to_hub, **kwargs)
        config = json.loads(about.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_json(about, config)
        self.record(
            weights={
                file.name: sha256(file) for file in sorted(about.parent.glob("diffusion_pytorch_model*.safetensors"))
            }
        )
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)
        write_json(folder / INDEX, index)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> CommitInfo:
        """Create the repository `repo_id` on the hub where there is none, and send it what `save_pretrained` writes.

        Arguments are those of diffusers, but the card that goes up is ours, in place of one that is there.
        """
        hub = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            files = {"safe_serialization": safe_serialization, "variant": variant, "subfolder": subfolder}
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **files, **hub)

    def add_measurement(self, row: dict, protocol: dict, folder: Path | str | None = None) -> None:
        """Keep a measured row with its protocol, in place of an earlier one by the same metric in as many steps.

        With `folder`, where this pipeline was saved, its card says so too. Only the card's measurements are written anew:
        what its owner wrote around them stays. Raises UserError when no pipeline was saved there.
        """
        self.record(**with_measurement(self.facts, row, protocol))
        if folder is None:
            return
        path = Path(folder) / INDEX
        if not path.exists():
            raise UserError(f"{folder} holds no pipeline (no {INDEX}); save it there first: save_pretrained")
        with locked(path):
            index = json.loads(path.read_text(encoding="utf-8"))
            there = index.get("facts") or {}
            kept = {"measurements": there.get("measurements", []), "weights": there.get("weights", {})}
            self.record(**with_measurement(self.facts | kept, row, protocol))
            write_json(path, index | {"facts": self.facts})
            if (Path(folder) / CARD).exists():
                write_measurements(Path(folder), self.facts)
            else:
                self._write_card(Path(folder))

    def _write_card(self, folder: Path, source: str = ".", variant: str | None = None) -> None:
        options = call_options(self.student)
        count = options.pop("batch_size")
        size = max(1, 2**20 // math.prod(self.student.image_shape))  # of a batch, since training may fill the memory
        parts = range(0, count, size)
        images = [self(min(size, count - i), first_index=i, output_type="pt", **options).images.cpu() for i in parts]
        save_grid(torch.cat(images), folder)
        write_card(folder, type(self).__name__, self.student, self.facts, source, variant)


class StudentPipeline(SharedPipeline):
    """One-step sampling: `StudentPipeline.from_pretrained(folder)(batch_size=16, seed=0).images`."""

    def __init__(self, student: Student, facts: dict | None = None):
        super().__init__(student, facts)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        seed: int = 0,
        first_index: int = 0,
        noise: Tensor | None = None,
        stage: int | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Images of the samples `first_index`, `first_index` + 1, ... of `seed`: each depends on its index alone.

        `noise` `(b, c, h, w)`, standard normal, takes the place of the seeded noise; the teacher started from the same
        noise makes the comparable image. At 4 x 4 it is the latent itself. `stage` picks a submodule's head. `output_type` is "pil", "np"
        (`(b, h, w, c)` in [0, 1]) or "pt" (`(b, c, h, w)` in [-1, 1]). Raises UserError for any other, and for noise
        of another shape.
        """
        shape = self.student.image_shape
        generators = _generators(batch_size, seed, first_index, output_type)
        noise = _checked(sample_noise(generators, shape) if noise is None else noise, shape, self.student.latent_shape)
        latent = make_latent(noise.to(self.device), self.student.sampled_from).to(self.student.dtype)
        training = self.student.training
        images = self.student.eval()(latent, stage).float()
        self.student.train(training)
        return _output(images, output_type)


class FewStepPipeline(SharedPipeline):
    """Sampling in a few steps: `FewStepPipeline.from_pretrained(folder)(batch_size=16, seed=0, steps=2).images`."""

    def __init__(self, student: Denoiser, facts: dict | None = None):
        super().__init__(student, facts)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        seed: int = 0,
        first_index: int = 0,
        noise: Tensor | None = None,
        steps: int = 1,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Images as `StudentPipeline` makes them: expect the image, go on to the next timestep, expect again.

        `steps` has to divide the number of the student's timesteps, of which it takes every n-th. Fresh noise between
        them follows from `seed` and the sample's index. Raises UserError for other steps, and as `StudentPipeline` does.
        """
        student, timesteps = self.student, list(self.student.config.timesteps)
        if steps not in range(1, len(timesteps) + 1) or len(timesteps) % steps:
            fits = [str(n) for n in range(1, len(timesteps) + 1) if len(timesteps) % n == 0]
            raise UserError(
                f"steps is {steps}, but must be {' or '.join(fits)}: the student's timesteps are {timesteps}"
            )
        count = batch_size if noise is None else len(noise)
        generators = _generators(count, seed, first_index, output_type)
        seeded = sample_noise(generators, student.latent_shape)
        xt = _checked(seeded if noise is None else noise, student.latent_shape).to(self.device)
        training, timesteps = student.training, timesteps[:: len(timesteps) // steps]
        student.eval()
        times = torch.tensor(timesteps, device=xt.device)[:, None].expand(-1, count)
        x0 = student(xt.to(student.dtype), times[0]).clamp(-1, 1)
        for t, following in pairwise(times):
            if student.config.deterministic:
                xt = student.ddim(xt, x0, t, following)
            else:
                xt = student.noised(x0, sample_noise(generators, student.latent_shape).to(xt), following)
            x0 = student(xt.to(student.dtype), following).clamp(-1, 1)
        student.train(training)
        return _output(x0, output_type)


def _generators(count: int, seed: int, first_index: int, output_type: str) -> list[torch.Generator]:
    """One for each sample; bad arguments are refused before the student works."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"there is no output_type {output_type!r}; output types: {', '.join(OUTPUT_TYPES)}")
    if count < 1:
        raise UserError(f"batch_size is {count}, but must be at least 1")
    return sample_generators(range(first_index, first_index + count), seed)


def _checked(noise: Tensor, *shapes: tuple[int, int, int]) -> Tensor:
    if noise.ndim != 4 or tuple(noise.shape[1:]) not in shapes:
        raise UserError(f"noise has the shape {tuple(noise.shape)}, but must be (b, {', '.join(map(str, shapes[0]))})")
    return noise


def _output(images: Tensor, output_type: str) -> ImagePipelineOutput:
    if output_type == "pt":
        return ImagePipelineOutput(images=images)
    array = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    pil = DiffusionPipeline.numpy_to_pil
    return ImagePipelineOutput(images=pil(array) if output_type == "pil" else array)
