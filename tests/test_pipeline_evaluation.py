import itertools
import json
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from scipy.linalg import eigvals

from advkd import figures
from advkd.data import from_uint8, load_images, make_latent, reference_images, seeded_noise, to_uint8
from advkd.evaluation import (
    Metric,
    density_coverage,
    milliseconds,
    near_copies,
    nearest,
    protocol,
    pull_to_train,
    sample_student,
    student_row,
    teacher_row,
)
from advkd.extractor import Extractor, accuracy, load_extractor, random_extractor, register, train_extractor
from advkd.files import sha256
from advkd.glyphs import FONTS
from advkd.pipeline import StudentPipeline
from advkd.presets import ASSETS, UserError, load_preset
from advkd.run import load_run
from advkd.student import Student, count_parameters
from advkd.training import TrainRecord


@pytest.fixture(scope="module")
def pipeline(improved):
    return StudentPipeline(Student.from_preset(improved))


@pytest.fixture(scope="module")
def digits():
    preset = load_preset("digits")
    return load_images(preset, "train")[0][:200], load_images(preset, "heldout")[0][:200]


@pytest.fixture(scope="module")
def metric():
    return Metric()


def features(images):
    with torch.no_grad():
        return load_extractor().features(from_uint8(to_uint8(images))).double().numpy()


def frechet(a, b):
    root = np.sqrt(np.clip(eigvals(np.cov(a.T) @ np.cov(b.T)).real, 0, None))  # of the product's matrix square root
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root.sum()


def kernel_distance(a, b):
    """Unbiased squared MMD with KID's kernel, over all samples."""
    n = len(a)
    kaa, kbb, kab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (kaa.sum() - np.trace(kaa) + kbb.sum() - np.trace(kbb)) / (n * (n - 1))
    return within - 2 * kab.mean()


def within_reach(a, b, neighbours=3):
    """Share of `a` that lies within the distance of some sample of `b` to its third neighbour."""
    radii = np.sort(np.linalg.norm(b[:, None] - b[None], axis=2), axis=1)[:, neighbours]
    return (np.linalg.norm(a[:, None] - b[None], axis=2) <= radii).any(1).mean()


def test_images_of_a_sample_do_not_depend_on_the_batch(pipeline):
    together = pipeline(5, seed=2, first_index=3, output_type="pt").images
    alone = [pipeline(1, seed=2, first_index=3 + i, output_type="pt").images for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sample_student(pipeline, 5, 2, 3, batch_size=2), together, atol=1e-6, rtol=1e-5)
    assert torch.equal(pipeline(5, seed=2, first_index=3, output_type="pt").images, together)
    assert (pipeline(5, seed=3, first_index=3, output_type="pt").images - together).abs().max() > 1e-3


def test_pipeline_is_the_student_of_the_block_mean_latent(pipeline):
    noise = seeded_noise(range(3), (1, 16, 16), 7)
    student = pipeline.student.eval()
    for stage in (None, 0, 1, 2):
        with torch.no_grad():
            expected = student(make_latent(noise, "block-mean"), stage)
        assert torch.equal(pipeline(3, 7, stage=stage, output_type="pt").images, expected)
        assert torch.equal(pipeline(noise=noise, stage=stage, output_type="pt").images, expected)


def test_output_types_show_the_same_images(pipeline):
    pt = pipeline(2, output_type="pt").images
    array = pipeline(2, output_type="np").images
    pil = pipeline(2).images
    assert pt.shape == (2, 1, 16, 16) and pt.abs().max() <= 1
    assert array.shape == (2, 16, 16, 1) and array.min() >= 0 and array.max() <= 1
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy() / 2 + 0.5, atol=1e-6)
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) and image.mode == "L" for image in pil)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in pil])[..., None], (array * 255).round())


def test_pipeline_refuses_what_does_not_exist(pipeline):
    with pytest.raises(UserError, match="no output_type 'jpg'; output types: pil, np, pt"):
        pipeline(1, output_type="jpg")
    with pytest.raises(UserError, match="batch_size is 0, but must be at least 1"):
        pipeline(0)
    with pytest.raises(UserError, match="stage is 3"):
        pipeline(1, stage=3)


def test_a_saved_pipeline_is_the_same(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    kinds = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert kinds == {".json", ".safetensors", ".md", ".png"}
    expected = pipeline(3, seed=4, output_type="pt").images
    for loaded in (StudentPipeline.from_pretrained(tmp_path), load_run(tmp_path)):
        assert torch.equal(loaded(3, seed=4, output_type="pt").images, expected)


def test_the_deployable_generator_is_a_pipeline_too(tmp_path, pipeline):
    StudentPipeline(pipeline.student.generator()).save_pretrained(tmp_path)
    images = load_run(tmp_path)(2, output_type="pt").images
    assert torch.equal(images, pipeline(2, output_type="pt").images)


def test_a_folder_without_a_student_is_named(tmp_path):
    with pytest.raises(
        UserError,
        match=r"holds no student; give the folder of a finished training .python -m advkd train --out FOLDER",
    ):
        load_run(tmp_path)


def test_distances_are_those_computed_by_hand(metric, digits):
    train, heldout = digits
    noisy = (heldout + 0.5 * seeded_noise(range(200), (1, 16, 16), 0)).clamp(-1, 1)
    a, b = features(noisy), features(train)
    values = metric.compare(noisy, train)
    assert values["fd"] == pytest.approx(frechet(a, b), rel=1e-3)
    assert values["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-3)
    assert values["precision"] == pytest.approx(within_reach(a, b), abs=0.011)
    assert values["recall"] == pytest.approx(within_reach(b, a), abs=0.011)
    assert values["fd"] > 2 * metric.compare(heldout, train)["fd"]


def test_images_are_at_no_distance_from_themselves(metric, digits):
    values = metric.compare(digits[0], digits[0])
    assert abs(values["fd"]) < 1e-3 and values["precision"] == values["recall"] == 1


def test_evaluate_compares_with_both_splits(metric, digits):
    train, heldout = digits
    samples = train.flip(3)
    row, on_train = metric.evaluate(samples, train, heldout), metric.compare(samples, train)
    assert row["fd_heldout"] == metric.compare(samples, heldout)["fd"]
    assert [row[name] for name in ("fd_train", "precision", "recall")] == [
        on_train[n] for n in ("fd", "precision", "recall")
    ]
    assert row["kid_train"] == on_train["kid"]


def test_too_few_images_are_refused_unless_wanted(metric, digits):
    train, heldout = digits
    for samples, reference in ((train[:63], heldout), (train, heldout[:63])):
        with pytest.raises(
            UserError, match="63 images are too few for 64 features; take more \\(--count\\), or allow few"
        ):
            metric.compare(samples, reference)
    assert metric.compare(train[:63], heldout, few=True)["fd"] > 0


def test_the_metric_is_named_for_what_it_is(metric, tmp_path, digits):
    p = protocol(metric, 10, 3, *digits)
    assert p["metric"] == metric.label == "FD-digits"
    assert p["extractor"] == metric.extractor and p["extractor"].startswith("digits-")
    assert (p["features"], p["images"], p["sampling_seed"]) == (64, 10, 3)
    assert p["reference_train"] == "train split, 200 images"
    assert p["versions"].keys() == {"python", "torch", "diffusers", "torch-fidelity", "scikit-learn"}
    assert p["versions"]["torch"] == version("torch")
    json.dumps(p)
    with pytest.raises(UserError, match="is no Inception weights file; give one, or 'download'"):
        Metric(inception=tmp_path / "weights.pth")
    with pytest.raises(
        UserError,
        match=r"no classifier of one's own images .* give torch-fidelity's Inception weights, .* inception=FILE",
    ):
        Metric("folder")


def test_inception_weights_are_part_of_the_protocol(tmp_path):
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold torch-fidelity's Inception"):
        Metric(inception=tmp_path / "other.pth")
    inception = Metric(inception=tmp_path / "weights.pth")
    assert (inception.label, inception.features) == ("FID", 2048)
    assert inception.protocol()["weights_sha256"] == sha256(tmp_path / "weights.pth")
    with pytest.raises(UserError, match="100 images are too few for 2048 features"):
        inception.compare(torch.zeros(100, 1, 16, 16), torch.zeros(100, 1, 16, 16))


def test_downloaded_inception_weights_are_part_of_the_protocol(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "weights_sha256" not in Metric(inception="download").protocol()
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"weights")
    assert Metric(inception="download").protocol()["weights_sha256"] == sha256(cached)


def test_an_inception_file_that_runs_code_is_not_opened(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for payload, name in ((Malicious(), "evil.pth"), ({"weight": Malicious()}, "nested.pth")):
        torch.save(payload, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} does not hold weights alone and is not opened"):
            Metric(inception=tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_extractors_are_registered_by_their_weights():
    torch.manual_seed(0)
    first, second = Extractor(), Extractor()
    names = [register(model, "test") for model in (first, second, first, load_extractor())]
    assert names[0] == names[2] and len(set(names)) == 3


def test_the_shipped_extractor_knows_the_held_out_digits():
    extractor = load_extractor()
    assert accuracy(extractor, *load_images(load_preset("digits"), "heldout")) >= 0.98
    assert extractor.features(torch.zeros(2, 1, 16, 16)).shape == (2, 64)


def test_the_shipped_classifier_of_the_glyphs_knows_letters_and_mostly_fonts():
    preset = load_preset("glyphs")
    images, labels = reference_images(preset, "heldout", 600)
    extractor = load_extractor(ASSETS / "glyphs-extractor")
    letters, fonts = extractor.verdicts(images)
    assert (letters == labels // len(FONTS)).float().mean() > 0.96
    assert (fonts == labels % len(FONTS)).float().mean() > 0.55
    both = ((letters == labels // len(FONTS)) & (fonts == labels % len(FONTS))).float().mean().item()
    assert accuracy(extractor, images, labels) == pytest.approx(both)


def test_a_classifier_of_several_factors_learns_each():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(
        6, (256,), generator=generator
    )  # 2 x 3: upper half bright or dark, lower half in three greys
    upper, lower = labels // 3, labels % 3
    images = torch.cat([(upper * 2 - 1.0)[:, None].expand(-1, 32), (lower - 1.0)[:, None].expand(-1, 32)], 1)
    images = images.view(-1, 1, 8, 8)
    torch.manual_seed(0)
    extractor = Extractor(8, 1, (2, 3))
    for _ in train_extractor(extractor, images, labels, steps=60):
        pass
    assert accuracy(extractor, images, labels) > 0.95
    found = extractor.verdicts(images)
    assert [f.shape for f in found] == [(256,), (256,)] and found[1].max() == 2


def test_nearest_finds_the_reference_a_sample_came_from(digits):
    train, _ = digits
    order = torch.tensor([17, 3, 99])
    assert torch.equal(nearest(train[order] + 0.01, train), order)


def test_milliseconds_is_the_median_after_a_warm_up(monkeypatch):
    calls, clock = [], iter(np.cumsum([0, 9, 0, 9, 0, 9, 0, 0.001, 0, 0.002, 0, 0.006]).tolist())
    monkeypatch.setattr("advkd.evaluation.time.perf_counter", lambda: next(clock))
    assert milliseconds(lambda: calls.append(1), repeats=3) == pytest.approx(2)
    assert len(calls) == 6


def test_rows_say_what_was_measured(pipeline, teacher):
    row = student_row(pipeline, "improved")
    assert row["parameters"] == count_parameters(pipeline.student)
    assert row["deployable_parameters"] == count_parameters(pipeline.student.generator()) < row["parameters"]
    assert (row["recipe"], row["steps"]) == ("improved", 1)
    other = teacher_row(teacher, "ddim", 50)
    assert other.keys() == row.keys()
    assert (other["parameters"], other["sampler"], other["steps"]) == (teacher.parameters, "ddim", 50)


def test_noise_of_another_size_is_refused(pipeline):
    for shape in ((2, 1, 8, 8), (2, 3, 16, 16), (1, 16, 16)):
        with pytest.raises(UserError, match=r"noise has the shape .* but must be \(b, 1, 16, 16\)"):
            pipeline(noise=torch.zeros(shape))


def test_sampling_leaves_the_student_in_its_mode(pipeline):
    for training in (True, False):
        pipeline.student.train(training)
        pipeline(batch_size=1)
        assert pipeline.student.training is training


def test_distances_of_subsets_are_of_disjoint_images_of_one_size(digits):
    train, heldout = digits
    metric = Metric()
    mean, sd, subsets = metric.fd_of_subsets(train[:150], heldout, 64)
    assert subsets == 2
    each = [metric.compare(train[i : i + 64], heldout)["fd"] for i in (0, 64)]
    assert mean == pytest.approx(sum(each) / 2) and sd == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    with pytest.raises(UserError, match="100 images do not make two subsets of 64"):
        metric.fd_of_subsets(train[:100], heldout, 64)
    with pytest.raises(UserError, match="63 images are too few for 64 features"):
        metric.fd_of_subsets(train, heldout, 63)


def test_pull_to_train_is_the_share_of_samples_nearer_to_train(digits):
    train, heldout = digits
    assert pull_to_train(torch.cat([train[:3], heldout[:1]]), train, heldout) == 0.75
    sample = heldout[:1] + 0.01
    assert pull_to_train(sample, torch.cat([sample, train]), heldout) == 1
    assert pull_to_train(sample, torch.cat([train, sample]), heldout) == 0  # only the first 200 count, as are held out


def test_near_copies_of_held_out_images_are_the_given_share(digits):
    train, heldout = digits
    assert near_copies(heldout, train, heldout, share=0.1) == pytest.approx(0.1, abs=0.006)
    assert near_copies(train[:20] + 0.001, train, heldout) == 1
    assert near_copies(torch.zeros_like(train[:20]), train, heldout) == 0


def test_density_and_coverage_by_hand():
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii for one neighbour: 1, 1, 1, 8
    samples = torch.tensor([[0.5], [0.9], [3.5]])  # in the balls of {0, 1}, {0, 1}, {10}
    assert density_coverage(samples, reference, 1) == pytest.approx((5 / 3, 3 / 4))
    assert density_coverage(samples + 100, reference, 1) == (0, 0)


def test_density_and_coverage_of_real_against_real_are_about_one():
    generator = torch.Generator().manual_seed(0)
    samples, reference = (torch.randn(1000, 8, generator=generator) for _ in range(2))
    density, coverage = density_coverage(samples, reference)
    assert density == pytest.approx(1, abs=0.1) and coverage == pytest.approx(1 - 0.5**5, abs=0.03)


def test_the_random_feature_space_is_fixed_and_measures(digits):
    train, heldout = digits
    first, second = random_extractor(train), random_extractor(train)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    normalised = first.features[1](first.features[0](train)).detach()
    assert normalised.mean().abs() < 1e-3 and normalised.std() == pytest.approx(1, abs=1e-2)
    metric = Metric("unseen", extractor=first)
    assert metric.label == "FD-unseen"
    near, far = (metric.compare(x, heldout)["fd"] for x in (train, train.flip(2)))
    assert 0 < near < far


def test_a_latent_of_its_own_goes_in_as_noise_of_4_by_4(pipeline):
    latent = torch.randn(3, 1, 4, 4) / 8
    images = pipeline(noise=latent, output_type="pt").images
    assert torch.equal(images, pipeline.student.eval()(latent).detach())


def test_a_table_has_its_protocol_and_rows(tmp_path):
    rows = [{"name": "teacher", "fd": 1.2345, "parameters": 1062497, "recipe": None}, {"name": "student", "fd": 250.4}]
    files = figures.save_table(
        rows, {"images": 64}, tmp_path, "table", {"name": "Model", "fd": "FD", "parameters": "P"}
    )
    assert [file.name for file in files] == ["table.json", "table.csv", "table.md"]
    table = json.loads(files[0].read_text())
    assert table.keys() == {"protocol", "rows"}
    assert table == {"protocol": {"images": 64}, "rows": rows}
    assert files[1].read_text().splitlines()[0] == "name,fd,parameters,recipe"
    assert files[2].read_text().splitlines() == [
        "| Model | FD | P |",
        "| --- | --- | --- |",
        "| teacher | 1.23 | 1,062,497 |",
        "| student | 250 |  |",
    ]


def test_a_figure_is_saved_and_the_same_bytes_twice(tmp_path):
    images = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    for folder in ("a", "b"):
        figure, ax = plt.subplots(figsize=(2, 2))
        figures.show_images(ax, images, 2, "four")
        assert figures.save_figure(figure, tmp_path / folder, "grid") == tmp_path / folder / "grid.png"
        plt.close(figure)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["grid.png"]
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()
    assert np.ptp(np.asarray(Image.open(tmp_path / "a" / "grid.png").convert("L"))) > 200


def test_strips_and_curves_have_a_panel_each():
    strip = figures.show_strip({"xt": [torch.zeros(1, 8, 8)] * 3, "x0": [torch.zeros(1, 16, 16)] * 3}, "abc", 16)
    assert len(strip.axes) == 6 and [ax.get_title() for ax in strip.axes[:3]] == list("abc")
    records = [TrainRecord(n, 0, 4000 * n, n, 2 * n, 0, None if n % 2 else 1.0, 1, 1) for n in range(1, 5)]
    curves = figures.plot_curves(records, {"student_loss": "student", "penalty": "penalty"}, window=1)
    student, penalty = (ax.lines[0].get_xydata().tolist() for ax in curves.axes)
    assert student == [[4, 2], [8, 4], [12, 6], [16, 8]]
    assert penalty == [[8, 1], [16, 1]]
    plt.close("all")


def test_a_panel_of_settings_has_every_seed_its_mean_and_its_range():
    made = [("g", "a", 1.0), ("g", "a", 3.0), ("g", "b", 10.0), ("g", "b", 30.0), ("h", "a", 2.0), ("h", "a", 8.0)]
    rows = [{"group": g, "setting": name, "fd": fd, "preset_hash": g + name} for g, name, fd in made]
    rows += [{"group": "h", "setting": "c", "error": "not finite", "preset_hash": "hc"}]
    figure = figures.plot_settings(rows, ["g", "h"], "fd", "distance", {"floor": 0.5}, {"gb"})
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == ["g", "h"] and panels["g"].get_xlabel() == "distance"
    dots = [xy for dots in panels["g"].collections for xy in dots.get_offsets().tolist()]
    assert dots == [[1, 0], [3, 0], [10, 1], [30, 1]]
    lines, others = ([list(line.get_xdata()) for line in panels[g].lines] for g in "gh")
    assert [0.5, 0.5] in lines and [2.0, 20.0] in lines  # the line through all panels; the means
    assert [1.0, 3.0] in lines and [10.0, 30.0] in lines  # the ranges
    assert any(line[0] == 5.0 for line in others), "in every panel means of the values, not of their logarithms"
    weights = {text.get_text(): text.get_fontweight() for text in panels["g"].get_yticklabels()}
    assert weights == {"a": "normal", "b": "bold"}
    (cross,) = (line for line in panels["h"].lines if line.get_marker() == "x")
    assert list(cross.get_ydata()) == ["c"]
    plt.close("all")


def test_points_of_a_plane_carry_names_and_deviations():
    rows = [{"recipe": "improved", "name": "ours", "fd": 1.0, "fd_sd": 0.1, "ms": 2.0}]
    rows += [{"recipe": None, "fd": 3.0, "ms": 4.0, "marker": "s"}]
    ax = figures.plot_against(rows, "ms", "fd", ("ms per image", "distance"))
    assert [text.get_text() for text in ax.texts] == ["ours"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale()) == (
        "ms per image",
        "distance",
        "log",
        "log",
    )
    points = [bars[0].get_xydata().tolist() for bars in ax.containers]
    assert points == [[[2, 1]], [[4, 3]]]
    crowd = [{"recipe": None, "name": f"DDIM-{n}", "fd": 3 + n / 1000, "ms": 4.0} for n in range(6)]
    ax = figures.plot_against([*rows, *crowd], "ms", "fd", ("", ""))
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the lines that lead to them
    assert len(boxes) == 7 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    inside = ax.get_window_extent()
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
    assert {text.get_text(): text.xy for text in ax.texts}["DDIM-5"] == (4, 3.005)
    plt.close("all")


def test_a_methods_steps_are_joined_and_named():
    rows = [{"method": "ADD", "steps": n, "ms": 10 * n, "fd": 4 / n, "fd_sd": 0.1} for n in (4, 1, 2)]
    rows.append({"method": "DMD", "steps": 1, "ms": 10, "fd": 3.0})
    figure = figures.plot_methods(rows, "ms", "fd", ("ms", "distance"), {"floor": 1.0})
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["1", "2", "4"], "a method of one step needs no number"
    assert ax.containers[0][0].get_xydata()[1:].tolist() == [[20, 2], [40, 1]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ADD", "DMD", "floor", "Pareto front"]
    rows = [{"method": "ADD", "steps": 1, "budget": n, "ms": 10 * n, "fd": 4 / n} for n in (4, 1)]
    (ax,) = figures.plot_methods(rows, "ms", "fd", ("ms", "distance"), {}, named="budget").axes
    assert [text.get_text() for text in ax.texts] == ["1", "4"]
    assert "Pareto front" not in [text.get_text() for text in ax.get_legend().get_texts()]
    ax = figures.plot_methods(rows, "ms", "fd", ("ms", "distance"), {}).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ADD", "ADD, budget 4", "Pareto front"]
    small, large = (bars[0] for bars in ax.containers)
    assert small.get_xydata().tolist() == [[10, 4]] and large.get_xydata().tolist() == [[40, 1]]
    assert small.get_markerfacecolor() == small.get_color() == large.get_color() != large.get_markerfacecolor()
    plt.close("all")


def test_methods_of_equal_time_stand_side_by_side():
    times = {"ADD": (10, 40), "ADD, random start": (10,), "DMD": (10, 20), "regression": (20, 30), "Adv-KD": (3,)}
    rows = [{"method": m, "steps": n, "ms": ms, "fd": 2.0} for m, at in times.items() for n, ms in enumerate(at, 1)]
    (ax,) = figures.plot_methods(rows, "ms", "fd", ("", ""), {}).axes
    drawn = {bars.get_label(): bars[0].get_xdata() for bars in ax.containers}
    half = (40 / 3) ** (figures.APART / 2)
    expected = {"ADD": (10 / half, 40), "ADD, random start": (10 / half,), "DMD": (10 * half, 20 / half)}
    expected |= {"regression": (20 * half, 30), "Adv-KD": (3,)}
    assert {name: pytest.approx(at) for name, at in expected.items()} == drawn, (
        "apart where they share a time, and there alone"
    )
    assert {text.xy[0] for text in ax.texts} == {at for name, x in drawn.items() for at in x if len(x) > 1}
    (front,) = (line for line in ax.lines if line.get_drawstyle() == "steps-post")
    assert front.get_xdata().tolist() == [3], "the front is at the true times"
    legend = ax.get_legend()
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    assert all(handles[bars.get_label()].get_marker() == bars[0].get_marker() for bars in ax.containers)
    (ax,) = figures.plot_methods([row for row in rows if row["ms"] == 20], "ms", "fd", ("", ""), {}).axes
    assert len({bars[0].get_xdata()[0] for bars in ax.containers}) == 2, "also where all of them share one time"
    plt.close("all")


def test_nothing_is_on_the_front_that_another_beats():
    points = [(2, 3), (1, 5), (2, 4), (3, 3), (4, 1), (1, 5), (5, 2)]
    assert figures.pareto_front(points) == [(1, 5), (2, 3), (4, 1)]


def test_a_method_looks_alike_with_and_without_its_variants():
    rows = [
        {"method": name, "steps": 1, "ms": 1, "fd": 1} for name in ("ADD", "ADD, random start", "DMD", "teacher, DDIM")
    ]
    looks = []
    for drawn in (rows, [row for row in rows if ", random" not in row["method"]]):
        (ax,) = figures.plot_methods(drawn, "ms", "fd", ("", ""), {}).axes
        looks.append({bars.get_label(): (bars[0].get_color(), bars[0].get_marker()) for bars in ax.containers})
    plt.close("all")
    every, few = looks
    assert few == {name: every[name] for name in ("ADD", "DMD", "teacher, DDIM")}
    (colour, marker), (other, another) = every["ADD"], every["ADD, random start"]
    assert colour == other and marker != another
    assert every["teacher, DDIM"][0] == figures.TEACHER != every["DMD"][0] != colour


def test_samples_stand_under_method_steps_and_budget():
    rows = [{"method": "ADD", "steps": n, "budget": b} for n, b in ((1, 1), (4, 0.25))] + [
        {"method": "DDIM", "steps": 50}
    ]
    images = [torch.full((2, 3, 4, 4), value) for value in (-1.0, 0.0, 1.0)]
    figure = figures.plot_samples(rows, images, columns=2)
    titles = [ax.get_title("left") for ax in figure.axes]
    assert titles == ["ADD\n1 step", "ADD\n4 steps, budget 0.25", "DDIM\n50 steps", ""]
    assert [ax.images[0].get_array()[2, 2].tolist() for ax in figure.axes[:3]] == [[0] * 3, [0.5] * 3, [1] * 3]
    assert figure.axes[0].images[0].get_array().shape == (6, 11, 3), "side by side"
    figure.canvas.draw()
    texts = [
        text.get_window_extent() for ax in figure.axes[:3] for text in ax.findobj(Text) if "step" in text.get_text()
    ]
    grids = [ax.images[0].get_window_extent() for ax in figure.axes[:3]]
    assert len(texts) == 3 and not any(text.overlaps(grid) for text in texts for grid in grids)
    plt.close("all")


def test_preferences_show_strengths_and_win_rates_with_their_intervals():
    ranking = [{"method": m, "strength": s, "low": s - 0.2, "high": s + 0.3} for m, s in (("ADD", 0.5), ("DMD", -0.5))]
    rates = [{"method": "ADD", "against": "DMD", "rate": 0.75, "low": 0.6, "high": 0.85}]
    left, right = figures.plot_preferences(ranking, rates).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["ADD", "DMD"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["ADD over DMD"]
    (bar,) = right.containers[0][2][0].get_segments()
    assert bar[:, 0].tolist() == pytest.approx([0.6, 0.85])
    plt.close("all")


def test_shares_of_classes_stand_beside_the_real_ones():
    rows = [{"recipe": "improved", "name": "ours", "shares_digit": [0.5, 0.5]}]
    figure = figures.plot_shares(rows, "digit", [0.25, 0.75], "AB")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["A", "B"]
    assert [bar.get_height() for bar in ax.patches] == [0.25, 0.75]
    assert list(ax.lines[0].get_ydata()) == [0.5, 0.5] and ax.get_xlabel() == "digit"
    plt.close("all")
