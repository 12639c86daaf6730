import json
import re

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from advkd import benchmark as module
from advkd.__main__ import cli
from advkd.benchmark import Case, cases, measure, presented
from advkd.presets import load_preset
from advkd.student import Student, gflop_per_image

FIELDS = {"name", "variant", "batch", "ms_per_image", "gflop_per_image", "peak_memory_mb", "device", "threads"}


@pytest.fixture
def small(monkeypatch):
    """Matrices, a store and repetitions that take no time."""
    for name, value in {"PEAK_SIDE": 64, "STORED": 16}.items():
        monkeypatch.setattr(module, name, value)
    return {"preset": "cifar10", "min_seconds": 0.01}


@pytest.mark.parametrize(
    ("kind", "name", "variant"),
    [
        ("matrix", "matrix product", "bfloat16"),
        ("student", "paper student", "float32"),
        ("student", "improved student", "channels_last"),
        ("student", "improved student", "bfloat16"),
        ("training", "improved training step", "bfloat16"),
        ("training", "paper training step", "float32"),
        ("reading", "reading 8 px", "store"),
        ("reading", "reading 32 px", "png"),
    ],
)
def test_every_kind_of_row_has_its_fields(small, kind, name, variant):
    row = measure(Case(kind, name, variant, 4, **small))
    assert "error" not in row
    uncounted = {"gflop_per_image"} if kind in ("training", "reading") else set()
    assert row.keys() >= FIELDS - uncounted and row["ms_per_image"] > 0
    assert row["images_per_s"] == pytest.approx(1e3 / row["ms_per_image"])


def test_operations_are_counted_for_one_image(small):
    (student,) = (Student.from_preset(load_preset("cifar10", recipe)) for recipe in ["improved"])
    for batch in (1, 4):
        row = measure(Case("student", "improved student", "float32", batch, **small))
        assert row["gflop_per_image"] == pytest.approx(gflop_per_image(student))
    assert measure(Case("matrix", "matrix product", "float32", 1, **small))["gflop_per_image"] == 2 * 64**3 / 1e9


def test_what_cannot_be_measured_leaves_its_error(small, monkeypatch):
    monkeypatch.setitem(module.KINDS, "matrix", lambda *_: 1 / 0)
    assert measure(Case("matrix", "matrix product", "float32", 1, **small))["error"] == "division by zero"


def test_cases_cover_both_students_at_all_batches_and_every_stage():
    rows = [(c.name, c.variant, c.batch) for c in cases("celebahq", "cpu")]
    for recipe in ("paper", "improved"):
        for variant in ("float32", "channels_last", "bfloat16", "compiled"):
            assert {(f"{recipe} student", variant, b) for b in (1, 64)} <= set(rows)
    for px in (8, 16, 32, 64, 128, 256):
        assert {(f"reading {px} px", how, 64) for how in ("store", "png")} <= set(rows)
    assert ("teacher step", "float32", 1) in rows and ("teacher step", "float32", 64) not in rows
    assert ("teacher step", "bfloat16", 64) in {(c.name, c.variant, c.batch) for c in cases("celebahq", "cuda:0")}


def test_the_command_writes_json_table_and_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVKD_FIGURES", str(tmp_path))
    monkeypatch.setattr(module, "cases", lambda *a: [Case("matrix", "matrix product", "float32", 1, min_seconds=0.01)])
    monkeypatch.setattr(module, "benchmark", lambda chosen: map(module.measure, chosen))
    monkeypatch.setattr(module, "PEAK_SIDE", 64)
    result = CliRunner().invoke(cli, ["benchmark", "--preset", "cifar10"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "figures" / "benchmark.json").read_text())
    assert written["rows"][0].keys() >= FIELDS
    assert ("not measured" in written["protocol"]["gpu"]) == (not torch.cuda.is_available())
    assert len(pd.read_csv(tmp_path / "figures" / "benchmark.csv")) == 1
    assert {f.suffix for f in (tmp_path / "figures").iterdir()} == {".json", ".csv", ".md", ".png"}


def test_only_one_kind_replaces_its_rows_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVKD_FIGURES", str(tmp_path))
    made = iter(range(9))
    chosen = [Case(kind, kind, "", 1) for kind in ("matrix", "student", "reading")]
    monkeypatch.setattr(module, "cases", lambda *a: chosen)
    about = {"variant": "", "batch": 1, "ms_per_image": 1.0, "device": "here", "threads": 1}
    row = lambda c: about | {"kind": c.kind, "name": c.name, "run": next(made)}  # noqa: E731
    monkeypatch.setattr(module, "benchmark", lambda chosen: map(row, chosen))
    for arguments in ([], ["--only", "reading"]):
        assert CliRunner().invoke(cli, ["benchmark", *arguments], catch_exceptions=False).exit_code == 0
    rows = json.loads((tmp_path / "figures" / "benchmark.json").read_text())["rows"]
    assert {r["kind"]: r["run"] for r in rows} == {"student": 1, "matrix": 3, "reading": 4}
    assert CliRunner().invoke(cli, ["benchmark", "--only", "speed"]).exit_code == 2


def test_many_steps_of_the_teacher_are_so_many_times_one_and_follow_it():
    step = {
        "kind": "teacher",
        "name": "teacher step",
        "ms_per_image": 2.0,
        "gflop_per_image": 3.0,
        "images_per_s": 500.0,
    }
    rows = presented([{"kind": "student", "name": "s"}, step, {"kind": "matrix", "name": "m"}])
    assert [row["name"] for row in rows] == ["m", "teacher step", "teacher, 50 steps", "teacher, 1000 steps", "s"]
    assert (rows[3]["ms_per_image"], rows[3]["gflop_per_image"], rows[3]["images_per_s"]) == (2000, 3000, 0.5)
    assert presented(rows) == rows
    peak = {"kind": "matrix", "name": "m", "dtype": "float32", "ms_per_image": 1.0, "gflop_per_image": 6.0}
    half = presented([peak, step | {"dtype": "float32"}])
    assert [row["share_of_peak"] for row in half] == [1, 0.25, 0.25, 0.25]
    failed = {"kind": "teacher", "name": "teacher step", "error": "out of memory"}
    assert presented([failed]) == [failed]


def test_rows_come_from_processes_of_their_own_with_their_share_of_the_peak():
    about = {"preset": "cifar10", "min_seconds": 0.01}
    chosen = [
        Case("matrix", "matrix product", "float32", 1, **about),
        Case("teacher", "teacher step", "float32", 1, **about),
        Case("matrix", "matrix product", "float33", 1, **about),
    ]
    rows = [row for row in presented(list(module.benchmark(chosen))) if "times" not in row]
    matrix, broken, teacher = rows
    assert matrix["share_of_peak"] == 1 and 0 < teacher["share_of_peak"] < 5
    assert teacher["peak_memory_mb"] > 4 * 113 and teacher["gflop_per_image"] == pytest.approx(497.0 / 64, rel=0.02)
    assert "float33" in broken["error"] and broken["variant"] == "float33"


def test_a_trajectory_costs_its_steps_of_the_teacher(small, make_unet, monkeypatch):
    monkeypatch.setattr(module, "untrained_unet", make_unet)
    step, trajectory = (
        measure(Case(kind, kind, variant, 1, **small))
        for kind, variant in (("teacher", "float32"), ("trajectory", "10 steps"))
    )
    assert trajectory["gflop_per_image"] == pytest.approx(10 * step["gflop_per_image"], rel=1e-3)
    assert trajectory["mb_per_sample"] < 0.02


def test_a_compiled_student_is_measured(small, improved, monkeypatch):
    monkeypatch.setattr(module, "load_preset", lambda *_: improved)
    row = measure(Case("student", "improved student", "compiled", 2, **small))
    if "error" in row:  # where there is no compiler
        assert re.search("compiler|inductor|triton", row["error"], re.IGNORECASE), row["error"]
    else:
        assert row["gflop_per_image"] == pytest.approx(gflop_per_image(Student.from_preset(improved)))
