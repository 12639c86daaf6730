"""Sliders: they show what the pipeline makes, the way between latents keeps its norm, and a strip where nobody can move them."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from advkd.data import make_latent, seeded_noise, to_uint8
from advkd.denoiser import Denoiser
from advkd.explore import SAMPLES, SHOWN_PX, Interpolation, Submodules, browse_submodules, interpolate, slerp
from advkd.figures import png
from advkd.pipeline import FewStepPipeline, StudentPipeline
from advkd.presets import UserError, load_preset
from advkd.student import Student


@pytest.fixture(autouse=True)
def no_figures():
    """Those that other tests have left open are not these tests' concern."""
    plt.close("all")


@pytest.fixture(scope="module")
def pipeline(improved):
    return StudentPipeline(Student.from_preset(improved))


@pytest.fixture
def live(monkeypatch):
    """As in JupyterLab."""
    monkeypatch.delenv("ADVKD_PROGRESS")


def shown(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.value)))


def test_a_picture_is_the_image_with_every_pixel_as_a_square():
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    seen = np.asarray(Image.open(io.BytesIO(png(image, 1, SHOWN_PX))))
    times = len(seen) // 8
    assert times * 8 >= SHOWN_PX and seen.shape == (8 * times, 8 * times, 3)
    expected = np.kron(to_uint8(image)[0, 0].numpy().astype(int), np.ones((times, times), int))
    assert np.abs(seen.astype(int) - expected[..., None]).max() <= 1


def test_the_submodule_slider_shows_the_state_and_the_head(pipeline, store, improved):
    browser = Submodules(pipeline, store, "x0", sample=4)
    for k, sample in ((0, 4), (1, 4), (2, 4), (2, 11), (0, 11)):
        browser.slider.value, browser.sample.value = k, sample
        noise = seeded_noise([sample], improved.image_shape, improved.trajectory_seed)
        head = pipeline(noise=noise, stage=k, output_type="pt").images
        state = store.targets(k, "x0", torch.tensor([sample]))
        assert [bytes(p.value) for p in browser.pictures] == [png(x, 1, SHOWN_PX) for x in (state, head)]
        assert browser.said.value.startswith(f"head {k} imitates state {k + 1}, ")
    assert (browser.slider.min, browser.slider.max) == (0, 2) and browser.sample.max == len(store) - 1


def test_the_interpolation_slider_shows_what_the_pipeline_makes_of_the_latent(pipeline, improved):
    way, seen = Interpolation(pipeline, (3, 7), seed=2), set()
    a, b = make_latent(seeded_noise([3, 7], improved.image_shape, seed=2)).split(1)
    ends = pipeline(batch_size=1, seed=2, first_index=3, output_type="pt").images
    for t in (0.0, 0.25, 0.5, 1.0):
        way.slider.value = t
        image = pipeline(noise=slerp(a, b, t), output_type="pt").images
        assert way.pictures[1].value == png(image, 1, SHOWN_PX)
        seen.add(way.pictures[1].value)
    assert len(seen) == 4 and way.pictures[1].value == way.pictures[2].value, "at the end is the second sample"
    assert way.pictures[0].value == png(ends, 1, SHOWN_PX), "at the start the first"
    way.ends[1].value = 3
    assert (shown(way.pictures[2]) == shown(way.pictures[0])).all(), "from a sample to itself"


def test_the_way_starts_and_ends_at_the_latents_and_keeps_the_norm():
    a, b = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert slerp(a, b, 0.0).equal(a) and slerp(a, b, 1.0).equal(b) and slerp(a, a, 0.3).allclose(a)
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    for t in torch.linspace(0, 1, 9).tolist():
        between = slerp(a, b, t)
        assert between.norm().item() == pytest.approx(((1 - t) * a.norm() + t * b.norm()).item(), rel=1e-6)
        cosine = (a * between).sum() / a.norm() / between.norm()
        assert torch.acos(cosine.clamp(-1, 1)).item() == pytest.approx(t * angle.item(), abs=1e-3)


def test_norms_of_standard_normal_latents_stay_those_of_standard_normal_latents():
    a, b = torch.randn(2, 2000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    halfway = torch.stack([slerp(x, y, 0.5).norm() for x, y in zip(a, b, strict=True)])
    straight = ((a + b) / 2).flatten(1).norm(dim=1)
    typical = a.flatten(1).norm(dim=1).mean()
    assert abs(halfway.mean() / typical - 1) < 0.02 and straight.mean() / typical < 0.75


def test_where_a_slider_can_be_moved_a_call_gives_it_and_saves_the_strip(tmp_path, live, pipeline, store):
    assert isinstance(browse_submodules(pipeline, store, "x0", tmp_path, "heads", 2), Submodules)
    assert isinstance(interpolate(pipeline, tmp_path, "way"), Interpolation)
    assert {file.name for file in tmp_path.iterdir()} == {"heads.png", "way.png"}
    assert not plt.get_fignums(), "the strip is not shown beside it"


def test_where_nobody_can_a_call_gives_the_strip_of_all_positions(tmp_path, pipeline, store, improved):
    heads = browse_submodules(pipeline, store, "x0", tmp_path, "heads", 2)
    way = interpolate(pipeline, tmp_path, "way", pairs=[(0, 1), (5, 5)])
    assert isinstance(heads, Figure) and isinstance(way, Figure) and not plt.get_fignums()
    assert len(heads.axes) == 2 * (improved.submodules + 1) and len(way.axes) == 2 * 11
    assert {file.name for file in tmp_path.iterdir()} == {"heads.png", "way.png"}
    first = [ax.images[0].get_array() for ax in way.axes[:11]]
    expected = pipeline(batch_size=2, seed=1, output_type="np").images
    for drawn, image in zip((first[0], first[-1]), expected, strict=True):
        assert np.allclose(drawn, image, atol=1e-5)
    assert not np.allclose(first[0], first[5], atol=1e-5)
    last = heads.axes[-1].images[0].get_array()
    noise = seeded_noise([2], improved.image_shape, improved.trajectory_seed)
    assert np.allclose(last, pipeline(noise=noise, output_type="np").images[0], atol=1e-5)


def test_what_cannot_be_shown_is_refused(tmp_path, pipeline, store, improved, teacher):
    refused = {
        "sample is 12, but must lie in 0..11": lambda: browse_submodules(pipeline, store, "x0", tmp_path, "a", 12),
        f"sample is -1, but must lie in 0..{SAMPLES - 1}": lambda: interpolate(pipeline, tmp_path, "a", [(0, -1)]),
        "target is 'x1', but the trajectories keep xt, x0": lambda: Submodules(pipeline, store, "x1"),
        "pairs is empty": lambda: interpolate(pipeline, tmp_path, "a", []),
        "the latents are opposite": lambda: slerp(torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4), 0.5),
    }
    other = StudentPipeline(Student.from_preset(improved.replace(submodules=4)))
    refused["the student has 4 submodules, the trajectories 3"] = lambda: Submodules(other, store, "x0")
    generator = StudentPipeline(pipeline.student.generator())
    refused["submodule 0 has no head"] = lambda: browse_submodules(generator, store, "x0", tmp_path, "a")
    preset = load_preset("digits", "regression", teacher=improved.teacher)
    few_steps = FewStepPipeline(Denoiser.from_teacher(teacher, preset))
    refused["this is a few-step student"] = lambda: interpolate(few_steps, tmp_path, "a")
    for message, call in refused.items():
        with pytest.raises(UserError, match=message):
            call()
    assert not list(tmp_path.iterdir()) and not plt.get_fignums()
