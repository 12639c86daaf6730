import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from advkd import export as module
from advkd.__main__ import cli
from advkd.export import (
    calibration_latents,
    export_onnx,
    open_session,
    output_names,
    quantize_onnx,
    read_about,
    sample_onnx,
)
from advkd.pipeline import StudentPipeline
from advkd.presets import UserError, load_preset
from advkd.student import Student, count_parameters

ROOT = Path(__file__).parents[1]


def trained_alike(preset) -> Student:
    """A student with statistics of its own in every BatchNorm, as training leaves them."""
    student = Student.from_preset(preset)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
        for _ in range(3):
            student(torch.randn(16, *student.latent_shape))
    return student.eval()


@pytest.fixture(scope="module")
def student():
    return trained_alike(load_preset("digits", submodules=3, widths=(12, 8)))


@pytest.fixture(scope="module")
def whole():
    """A student of the digits' full size."""
    return trained_alike(load_preset("digits"))


@pytest.fixture(scope="module")
def files(whole, tmp_path_factory):
    """The whole student in float32 and with 8 bits."""
    folder, student = tmp_path_factory.mktemp("exported"), whole
    export_onnx(student, folder / "float32.onnx")
    quantize_onnx(folder / "float32.onnx", folder / "int8.onnx")
    return folder / "float32.onnx", folder / "int8.onnx"


@pytest.mark.parametrize(
    ("name", "recipe", "fields"),
    [
        ("digits", "paper", {}),
        ("digits", "improved", {"latent": "full", "submodules": 3, "widths": (12, 8)}),
        ("glyphs", "improved", {"submodules": 4, "widths": (12, 8, 8)}),
    ],
)
def test_a_file_gives_the_images_of_torch_for_any_batch(tmp_path, name, recipe, fields):
    student = trained_alike(load_preset(name, recipe, **fields))
    made = export_onnx(student, tmp_path / "student.onnx")
    assert made["max_difference"] < 1e-5
    assert made["file_mb"] * 1e6 == (tmp_path / "student.onnx").stat().st_size
    session = open_session(tmp_path / "student.onnx")
    for count in (1, 2, 7):
        latents = torch.randn(count, *student.latent_shape)
        (images,) = session.run(None, {"latent": latents.numpy()})
        assert images.shape == (count, *student.image_shape)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(images), student(latents), atol=1e-5, rtol=0)


def test_a_file_holds_the_generator_alone_with_its_normalisation_folded(files, whole):
    student, model = whole, onnx.load(files[0])
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    numbers = sum(np.prod(weights.dims) for weights in model.graph.initializer)
    normalised = sum(2 * m.num_features for m in student.generator().modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert numbers <= count_parameters(student.generator()) - normalised + 16  # and a few shapes
    assert read_about(files[0]) == {"latent_shape": [1, 4, 4], "image_shape": [1, 16, 16], "submodules": 11}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_heads_are_outputs_coarse_to_fine(tmp_path, student):
    export_onnx(student, tmp_path / "heads.onnx", heads=True)
    session = open_session(tmp_path / "heads.onnx")
    assert [output.name for output in session.get_outputs()] == ["head_0", "head_1", "image"]
    assert output_names(student, heads=True) == ["head_0", "head_1", "image"]
    latents = torch.randn(5, 1, 4, 4)
    with torch.no_grad():
        wanted = student.images(latents)
    for ours, theirs in zip(wanted, session.run(None, {"latent": latents.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="deployable generator"):
        export_onnx(student.generator(), tmp_path / "none.onnx", heads=True)
    assert not (tmp_path / "none.onnx").exists()


def test_export_leaves_the_student_as_it_was(tmp_path, student):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    export_onnx(student, tmp_path / "student.onnx", heads=True)
    assert student.training and all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    student.eval()


def test_a_file_that_differs_is_not_written(tmp_path, student, monkeypatch):
    (tmp_path / "earlier.onnx").write_bytes(b"earlier")
    monkeypatch.setattr(module, "_difference", lambda *args: float("nan"))
    with pytest.raises(UserError, match=r"differs from torch by nan, more than 0\.0001; not written \(--tolerance\)"):
        export_onnx(student, tmp_path / "earlier.onnx")
    assert (tmp_path / "earlier.onnx").read_bytes() == b"earlier"


def test_eight_bits_are_a_scale_for_each_channel_and_seven_bits_of_weight(files):
    model = onnx.load(files[1])
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    quantised = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and weights.get(n.input[0]) is not None]
    kernels = [weights[n.input[0]] for n in quantised if weights[n.input[0]].ndim == 4]
    scales = [weights[n.input[1]] for n in quantised if weights[n.input[0]].ndim == 4]
    assert len(kernels) == sum(node.op_type == "Conv" for node in model.graph.node) > 5
    for kernel, scale in zip(kernels, scales, strict=True):
        assert kernel.dtype == np.int8 and abs(kernel.astype(int)).max() <= 64, "products of 8 and 8 bits overflow"
        assert scale.shape == (len(kernel),)
    assert files[1].stat().st_size < 0.35 * files[0].stat().st_size
    assert read_about(files[1])["bits"] == 8


def test_images_of_eight_bits_are_near(files, whole):
    latents = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    exact, near = sample_onnx(files[0], latents), sample_onnx(files[1], latents, batch_size=64)
    with torch.no_grad():
        torch.testing.assert_close(exact, whole(latents), atol=1e-5, rtol=0)
    error, size = (exact - near).abs().mean(), (exact - exact.mean(0)).abs().mean()
    assert 0 < error < 0.15 * size  # of a network without training, whose images have little contrast


def test_calibration_has_latents_of_its_own(student):
    about = {"latent_shape": (1, 4, 4), "image_shape": (1, 16, 16)}
    assert calibration_latents(about).shape == (256, 1, 4, 4)
    assert len(calibration_latents(about | {"image_shape": (3, 256, 256)})) == 21
    assert len(calibration_latents(about | {"image_shape": (3, 1024, 1024)})) == 4
    torch.testing.assert_close(calibration_latents(about), calibration_latents(about), atol=0, rtol=0)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.onnx does not exist; write it with"):
        quantize_onnx(tmp_path / "gone.onnx", tmp_path / "out.onnx")
    (tmp_path / "foreign.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"foreign\.onnx was not written by python -m advkd export"):
        quantize_onnx(tmp_path / "foreign.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_the_command_exports_and_says_how_near(tmp_path, student):
    StudentPipeline(student).save_pretrained(tmp_path / "student")
    run = CliRunner().invoke(cli, ["export", str(tmp_path / "student"), "--out", str(tmp_path / "a.onnx")])
    assert run.exit_code == 0 and "differs from torch by" in run.output
    run = CliRunner().invoke(cli, ["export", str(tmp_path / "student"), "--int8", "--out", str(tmp_path / "b.onnx")])
    assert run.exit_code == 0 and "its images differ from float32's by" in run.output
    assert read_about(tmp_path / "b.onnx")["bits"] == 8
    run = CliRunner().invoke(cli, ["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "c.onnx")])
    assert run.exit_code == 2 and not (tmp_path / "c.onnx").exists()


def test_without_the_packages_an_export_says_what_to_install(tmp_path, student, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs the package 'onnxruntime': pip install -U onnx onnxruntime onnxscript"):
        export_onnx(student, tmp_path / "student.onnx")


def test_the_readme_example_samples_without_torch(tmp_path, files, student):
    """In an environment of its own, made from the lock: numpy and ONNX Runtime, nothing of this project."""
    example = (ROOT / "README.md").read_text(encoding="utf-8").split("import onnxruntime", 1)
    code = example[0].rsplit("```python\n", 1)[1] + "import onnxruntime" + example[1].split("```", 1)[0]
    assert len(code.strip().splitlines()) <= 10
    alone = tmp_path / "alone"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", alone], check=True)
    python = alone / "bin" / "python"
    install(python, "numpy", "onnxruntime")
    (tmp_path / "student.onnx").write_bytes(files[1].read_bytes())
    check = "\nimport importlib.util, json\nassert importlib.util.find_spec('torch') is None\nassert 'advkd' not in sys.modules\n"
    check += "print(json.dumps([images.shape, float(images.min()), float(images.max())]))"
    run = subprocess.run(
        [python, "-I", "-c", "import sys\n" + code + check], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    shape, least, most = json.loads(run.stdout.splitlines()[-1])
    assert shape == [16, 1, 16, 16] and 0 <= least < most <= 255


def install(python: Path, *names: str) -> None:
    """The packages in the versions that are installed here; from the cache of the environment's own installation, or, where
    there is a network, from its index."""
    from importlib.metadata import version

    wanted = [f"{name}=={version(name)}" for name in names]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), *wanted]
    if subprocess.run([*uv, "--offline"], capture_output=True).returncode:
        subprocess.run(uv, check=True)
