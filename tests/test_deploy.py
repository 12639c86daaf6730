import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from advkd import deploy as module
from advkd.__main__ import cli
from advkd.deploy import Case, LiveBytes, activations_mb, cases, deploy, in_strips, submodule_costs, targets
from advkd.pipeline import StudentPipeline
from advkd.presets import UserError, load_preset
from advkd.student import Student, count_parameters, gflop_per_image


@pytest.mark.parametrize(
    ("name", "recipe", "fields"),
    [
        ("digits", "improved", {"submodules": 3, "widths": (6, 4)}),
        ("digits", "paper", {}),
        ("glyphs", "improved", {"submodules": 4, "widths": (8, 6, 4), "latent": "full"}),
        ("glyphs", "improved", {"submodules": 1, "widths": (4,)}),
    ],
)
def test_an_image_in_strips_is_the_same_image(name, recipe, fields):
    student = Student.from_preset(load_preset(name, recipe, **fields)).eval()
    latent = torch.randn(2, *student.latent_shape)
    with torch.no_grad():
        whole = student(latent)
    for strips in (1, 2, 3, 5, student.image_shape[-1]):
        torch.testing.assert_close(in_strips(student, latent, strips), whole, atol=2e-6, rtol=0)
        torch.testing.assert_close(in_strips(student.generator(), latent, strips), whole, atol=2e-6, rtol=0)
    for strips in (0, student.image_shape[-1] + 1):
        with pytest.raises(UserError, match=f"strips is {strips}, but must be 1 to {student.image_shape[-1]}"):
            in_strips(student, latent, strips)


def test_live_bytes_are_the_most_that_was_alive_at_once():
    with LiveBytes() as memory:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        a.mul_(2)  # in place
        view = b[:10]
        del a
        c = b * 2
        del b, c, view
    assert memory.peak == 8000 and memory.live == 0


def test_strips_need_less_memory_at_the_papers_size():
    student = Student.from_preset(load_preset("celebahq")).generator().eval()
    whole, strips = activations_mb(student), activations_mb(student, 8)
    assert 16 < whole < 30, "24 maps of 256 px are given, 16 made by the first convolution: 10.5 MB at the least"
    assert strips < 0.5 * whole


def test_costs_of_submodules_add_up(tmp_path):
    preset = load_preset("digits", submodules=3, widths=(6, 4))
    rows = submodule_costs(preset, repeats=1)
    assert [row["image_px"] for row in rows] == list(preset.resolutions)
    assert sum(row["gflop"] for row in rows) == pytest.approx(gflop_per_image(Student.from_preset(preset)))
    assert all(row["ms"] > 0 for row in rows)
    # submodule 0: 1 x 8 x 8 after upsampling, then three maps of 6 x 8 x 8: x, what the body made of it, and its normalised copy
    assert rows[0]["activations_mb"] * 1e6 >= 4 * (16 + 3 * 6 * 64)


@pytest.fixture(scope="module")
def trained():
    return StudentPipeline(Student.from_preset(load_preset("digits", submodules=3, widths=(6, 4))).eval())


def test_rows_of_a_trained_student_have_its_distance_and_its_file(trained, monkeypatch):
    monkeypatch.setattr(module, "FD_IMAGES", 100)
    chosen = [case for case in cases(min_seconds=0.01) if case.kind == "trained"]
    monkeypatch.setattr(module, "benchmark", in_this_process)
    torch_row, exact, small = deploy(chosen, trained)
    assert [row["variant"] for row in (torch_row, exact, small)] == ["torch float32", "onnx float32", "onnx int8"]
    assert exact["fd_train"] == pytest.approx(torch_row["fd_train"], rel=1e-3) and math.isfinite(small["fd_train"])
    assert small["fd_train"] != exact["fd_train"]
    assert 0 < small["file_mb"] != exact["file_mb"]
    generator = trained.student.generator()
    for row in (torch_row, exact, small):
        assert row["parameters"] == count_parameters(generator)
        assert row["gflop_per_image"] == pytest.approx(gflop_per_image(generator))
    buffers = sum(b.numel() for b in generator.buffers() if b.is_floating_point())
    assert 0 < torch_row["file_mb"] - 4e-6 * (row["parameters"] + buffers) < 0.01  # a header
    for row in (torch_row, exact, small):
        assert row["threads"] == 1 and row["calls"] >= 20
        assert 0 < row["ms_per_image"] <= row["p95_ms"] and row["cpu_seconds_per_image"] > 0


def in_this_process(chosen, kinds):
    for case in chosen:
        found = kinds[case.kind](case, torch.device("cpu"))
        yield {
            "kind": case.kind,
            "name": case.name,
            "variant": case.variant,
            "batch": case.batch,
            "threads": case.threads,
        } | found


def test_a_row_comes_from_a_process_of_its_own_and_its_error_stays_in_it():
    case = {"preset": "cifar10", "min_seconds": 0.01}
    chosen = [
        Case("student", "improved student", "onnx float32", 2, **case),
        Case("student", "improved student", "x", 1, **case),
    ]
    good, bad = deploy(chosen)
    assert good["file_mb"] > 1 and good["images_per_s"] > 0 and good["p95_ms"] is None  # of fewer than 20 calls
    if Path("/proc/self/status").exists():
        assert good["peak_memory_mb"] > 0
    assert "error" in bad and "ms_per_image" not in bad


def test_a_cpu_without_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(module, "benchmark", in_this_process)
    case = Case("student", "improved student", "torch bfloat16", 1, preset="digits", min_seconds=0.01)
    with pytest.raises(UserError, match="no instructions for bfloat16"):
        list(deploy([case]))


def test_all_that_was_asked_is_a_case(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    chosen, threads = cases(), 4
    for name in ("paper student", "improved student"):
        of = {(case.variant, case.batch, case.threads) for case in chosen if case.name == name}
        for variant in ("torch float32", "torch bfloat16", "torch compiled", "onnx float32", "onnx int8"):
            assert {(variant, 1, 1), (variant, 1, 2), (variant, 1, threads), (variant, 64, threads)} <= of
    assert {case.preset for case in chosen} == {"celebahq", "digits"}


def test_targets_are_ratios_of_the_rows():
    def row(name, variant, ms, file_mb=1.0, threads=2, **more):
        about = {"name": name, "variant": variant, "batch": 1, "threads": threads}
        return about | {"ms_per_image": ms, "file_mb": file_mb} | more

    rows = [
        row("paper student", "torch float32", 200.0),
        row("teacher, 1000 steps", "torch float32", 2e6),
        row("improved student", "torch float32", 50.0),
        row("improved student", "onnx int8", 20.0),
        row("improved student", "onnx float32", 60.0, 10.0, threads=1),
        row("improved student", "onnx int8", 30.0, 3.0, threads=1),
        {"name": "improved student", "variant": "torch compiled", "batch": 1, "threads": 2, "error": "no compiler"},
    ]
    found = {row["target"]: (row["measured"], row["holds"]) for row in targets(rows)}
    assert found == {
        "256 px: onnx int8, times as fast as the paper's student": (10.0, "yes"),
        "256 px: onnx int8, times as fast as 1000 teacher steps": (100_000.0, "yes"),
        "256 px: file of int8, to float32's": (0.3, "yes"),
        "256 px: time of int8, to ONNX Runtime's float32, one thread": (0.5, "yes"),
    }
    digits = "improved student, digits"
    rows += [
        row(digits, v, ms, mb, 1, fd_train=fd)
        for v, ms, mb, fd in (
            ("torch float32", 3.0, 1.0, 0.4),
            ("onnx float32", 1.0, 1.0, 0.4),
            ("onnx int8", 0.8, 0.36, 0.5),
        )
    ]
    found = {row["target"]: row["holds"] for row in targets(rows)}
    assert [found[name] for name in found if name.startswith("digits")] == ["no", "no", "no"]


def test_the_command_writes_a_table(tmp_path, monkeypatch, trained):
    monkeypatch.setenv("ADVKD_FIGURES", str(tmp_path))
    trained.save_pretrained(tmp_path / "student")
    monkeypatch.setattr(module, "benchmark", in_this_process)
    monkeypatch.setattr(module, "FD_IMAGES", 100)
    monkeypatch.setattr(module, "CALLS", (2, 2))
    monkeypatch.setattr(module, "ONE_BY_ONE", 2)
    run = CliRunner().invoke(cli, ["deploy", str(tmp_path / "student"), "--only", "trained"])
    assert run.exit_code == 0, run.output
    made = json.loads((tmp_path / "figures" / "deploy.json").read_text())
    assert [row["variant"] for row in made["rows"]] == list(module.TRAINED)
    assert "7-bit weights" in made["protocol"]["onnx int8"]
    run = CliRunner().invoke(cli, ["deploy", "--only", "phone"])
    assert run.exit_code == 2 and "there is no kind 'phone'; kinds: teacher, student, trained" in run.output
