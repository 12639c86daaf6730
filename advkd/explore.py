"""Sliders for a one-step student: through its submodules, and from one latent to another.

Each call saves its figure, a strip of all positions, and returns what a notebook shows: a live widget in JupyterLab, the
strip where nobody can move a slider (ADVKD_PROGRESS=0: the stored notebooks that GitHub shows, nbval, CI).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from advkd.data import make_latent, seeded_noise
from advkd.figures import png, save_figure, show_strip
from advkd.files import quiet
from advkd.pipeline import StudentPipeline
from advkd.presets import UserError, stage_times
from advkd.trajectories import TrajectoryStore

SHOWN_PX = 224
SAMPLES = 10_000  # to choose from, of a seed
POSITIONS = 11  # of an interpolation, in its strip
_picture = partial(ipywidgets.Image, format="png", width=SHOWN_PX, height=SHOWN_PX)


def browse_submodules(
    pipeline: StudentPipeline, store: TrajectoryStore, target: str, folder: Path | str, name: str, sample: int = 0
) -> "Submodules | Figure":
    """The image of head k beside the teacher's state k + 1, from the same noise: a slider, or a strip over all k.

    `target` is the state's picture, "xt" or "x0"; `sample` is a trajectory's index. The strip becomes `<folder>/<name>.png`.
    Raises UserError for a sample, a target or submodules that the store does not have, and for a student without heads.
    """
    widget = Submodules(pipeline, store, target, sample)
    return _slider_or(widget.strip(), widget, folder, name)


def interpolate(
    pipeline: StudentPipeline,
    folder: Path | str,
    name: str,
    pairs: Sequence[tuple[int, int]] = ((0, 1), (2, 3), (4, 5)),
    seed: int = 1,
) -> "Interpolation | Figure":
    """Images on the way from one latent to another (`slerp`): a slider for one pair, or a strip for each of `pairs`.

    A pair are the indices of two samples of `seed`. The strips become `<folder>/<name>.png`. Raises UserError for no pairs
    and for an index beyond `SAMPLES`.
    """
    if not pairs:
        raise UserError("pairs is empty, but an interpolation needs two samples")
    widgets = [Interpolation(pipeline, pair, seed) for pair in pairs]
    times = torch.linspace(0, 1, POSITIONS).tolist()
    rows = {f"{w.ends[0].value} to {w.ends[1].value}": [w.image(t) for t in times] for w in widgets}
    strip = show_strip(rows, [f"{t:.1f}" for t in times], pipeline.student.config.image_size_px)
    return _slider_or(strip, widgets[0], folder, name)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The latent a share `t` of the way from `a` to `b`, of any one shape: `a` at 0, `b` at 1, exactly.

    Along the great circle (Shoemake 1985), while the norm goes evenly from one to the other: on a straight line it would
    fall to 0.7 of theirs halfway, and N(0, I) has next to no latents as short as that. Raises UserError for opposite
    latents, between which all ways are equally short.
    """
    x, y = a.double().flatten(), b.double().flatten()
    angle = torch.acos((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
    if torch.pi - angle < 1e-6:
        raise UserError("the latents are opposite, so that no way between them is the shortest; take another pair")
    shares = (1 - t, t) if angle < 1e-6 else [(torch.sin(s * angle) / torch.sin(angle)).item() for s in (1 - t, t)]
    norm = (1 - t) * x.norm() + t * y.norm()
    return shares[0] * (norm / x.norm()).float() * a + shares[1] * (norm / y.norm()).float() * b


class Submodules(ipywidgets.VBox):
    """A slider through the submodules, and a field for the sample; arguments and errors as of `browse_submodules`."""

    def __init__(self, pipeline: StudentPipeline, store: TrajectoryStore, target: str, sample: int = 0):
        _check(pipeline)
        self.pipeline, self.store, self.target = pipeline, store, target
        self.count = len(pipeline.student.stages)
        if store.config["submodules"] != self.count:
            raise UserError(f"the student has {self.count} submodules, the trajectories {store.config['submodules']}")
        if target not in (kept := store.made_with()["stored"]):
            raise UserError(f"target is {target!r}, but the trajectories keep {', '.join(kept)}")
        _check_sample(sample, len(store))
        self.slider = ipywidgets.IntSlider(0, 0, self.count - 1, description="submodule")
        self.sample = _field(sample, len(store), "sample")
        self.pictures, self.said = [_picture(), _picture()], ipywidgets.Label()
        titled = zip(("teacher", "student"), self.pictures, strict=True)
        columns = [ipywidgets.VBox([ipywidgets.Label(title), picture]) for title, picture in titled]
        super().__init__([ipywidgets.HBox([self.slider, self.sample]), ipywidgets.HBox(columns), self.said])
        _on_change(self._draw, self.slider, self.sample)

    def images(self, k: int) -> tuple[Tensor, Tensor]:
        """The teacher's state k + 1 and head k's image of the chosen sample, `(c, r, r)` in [-1, 1] both."""
        state = self.store.targets(k, self.target, torch.tensor([self.sample.value]))[0]
        return state, self.pipeline(noise=self._noise(), stage=k, output_type="pt").images[0]

    def strip(self) -> Figure:
        """Noise and all submodules as a figure, the teacher above the student."""
        noise, side = self._noise()[0], self.pipeline.student.config.image_size_px
        teacher, student = zip(*map(self.images, range(self.count)), strict=True)
        labels = ["noise", *(f"state {k + 1}" for k in range(self.count))]
        return show_strip({"teacher": [noise, *teacher], "student": [noise, *student]}, labels, side)

    def _noise(self) -> Tensor:
        shape = self.pipeline.student.image_shape
        return seeded_noise([self.sample.value], shape, self.store.config["trajectory_seed"])

    def _draw(self) -> None:
        k, times = self.slider.value, stage_times(self.count)
        for picture, image in zip(self.pictures, self.images(k), strict=True):
            picture.value = png(image[None], 1, SHOWN_PX)
        when = f"after t = {times[k]}" if k < len(times) else "the final image"
        self.said.value = f"head {k} imitates state {k + 1}, {when}; {self.pipeline.student.resolution(k)} px"


class Interpolation(ipywidgets.VBox):
    """A slider from one latent to another, and fields for the two samples; arguments and errors as of `interpolate`."""

    def __init__(self, pipeline: StudentPipeline, pair: tuple[int, int] = (0, 1), seed: int = 1):
        _check(pipeline)
        for index in pair:
            _check_sample(index, SAMPLES)
        self.pipeline, self.seed = pipeline, seed
        self.slider = ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="way")
        self.ends = [
            _field(index, SAMPLES, name) for index, name in zip(pair, ("from sample", "to sample"), strict=True)
        ]
        self.pictures, self.said = [_picture(), _picture(), _picture()], ipywidgets.Label()
        super().__init__([ipywidgets.HBox([*self.ends, self.slider]), ipywidgets.HBox(self.pictures), self.said])
        _on_change(self._draw, self.slider, *self.ends)

    def latent(self, t: float) -> Tensor:
        """The latent `(1, c, h, w)` a share `t` of the way."""
        student, indices = self.pipeline.student, [end.value for end in self.ends]
        noise = seeded_noise(indices, student.image_shape, self.seed)
        return slerp(*make_latent(noise, student.sampled_from).split(1), t)

    def image(self, t: float) -> Tensor:
        """The student's image `(c, s, s)` in [-1, 1] of that latent."""
        return self.pipeline(noise=self.latent(t), output_type="pt").images[0]

    def _draw(self) -> None:
        times = (0, self.slider.value, 1)
        for picture, t in zip(self.pictures, times, strict=True):
            picture.value = png(self.image(t)[None], 1, SHOWN_PX)
        norms = [f"{self.latent(t).norm():.2f}" for t in times]
        self.said.value = f"Norm of the latent: {norms[1]}, between {norms[0]} (left) and {norms[2]} (right)"


def _slider_or(strip: Figure, widget: ipywidgets.VBox, folder: Path | str, name: str) -> ipywidgets.VBox | Figure:
    save_figure(strip, folder, name)
    plt.close(strip)  # the notebook shows what is returned, and nothing beside it
    return strip if quiet(True) else widget


def _on_change(draw: Callable[[], None], *inputs: ipywidgets.Widget) -> None:
    for widget in inputs:
        widget.observe(lambda _: draw(), "value")
    draw()


def _field(index: int, count: int, name: str) -> ipywidgets.BoundedIntText:
    style, layout = {"description_width": "initial"}, {"width": "170px"}
    return ipywidgets.BoundedIntText(index, 0, count - 1, description=name, style=style, layout=layout)


def _check(pipeline: StudentPipeline) -> None:
    if not isinstance(pipeline, StudentPipeline):
        raise UserError("this is a few-step student, which has neither submodules nor a latent to go through")


def _check_sample(index: int, count: int) -> None:
    if index not in range(count):
        raise UserError(f"sample is {index}, but must lie in 0..{count - 1}")
