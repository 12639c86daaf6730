"""The comparison of methods: every contestant trains, rows carry their protocol, a study is resumed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from advkd import head_to_head
from advkd.__main__ import cli
from advkd.data import from_uint8, sample_generators, seeded_noise
from advkd.evaluation import sample_student
from advkd.figures import keep_row
from advkd.head_to_head import (
    BUDGETS,
    CONTESTANTS,
    KEPT,
    SHOWN,
    STEPS,
    SUMMARY,
    TEACHER_STEPS,
    TEACHERS,
    TIMED_STEPS,
    WARM_UP,
    Job,
    at_a_glance,
    compare,
    compare_teacher,
    comparison_place,
    comparison_protocol,
    image_key,
    jobs,
    keep_images,
    relative_compute,
    teacher_evaluations,
    trajectories_compute,
)
from advkd.presets import UserError, load_preset
from advkd.quality import SAMPLING_SEEDS, TRAINING_SEEDS, Judge, means
from advkd.run import new_pipeline
from advkd.trajectories import denoise, make_scheduler, sample_teacher

TABLE1 = {
    *("model", "recipe", "sampler", "steps", "parameters", "deployable_parameters", "size_mb", "images"),
    *("fd_train", "fd_heldout", "kid_train", "precision", "recall", "fd_train_subset", "pull_to_train", "ms_per_image"),
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def judge():
    return Judge(load_preset("digits"))


@pytest.fixture
def tiny_job(tiny):
    """A factory of tiny trainings of a contestant, by the shipped teacher."""

    def make(method, **fields):
        preset = next(job.preset for job in jobs("digits") if job.method == method)
        warm_up = {"warm_up_steps": 2} if preset.warm_up_steps else {}
        grid = {"student_grid": 4} if preset.student_grid else {}
        return Job(method, 1, preset.replace(**tiny | {"steps": 4} | warm_up | grid | fields))

    return make


@pytest.mark.parametrize("name", STEPS)
def test_every_method_has_its_seeds_and_budgets(name):
    assert STEPS[name].keys() == CONTESTANTS.keys() - {"Adv-KD"}
    assert len(jobs(name)) == len(CONTESTANTS) * len(BUDGETS[name]) * len(TRAINING_SEEDS)
    for method in CONTESTANTS:
        steps = {job.budget: job.preset.steps for job in jobs(name) if job.method == method}
        short, long = sorted(steps)
        assert long == 4 * short
        assert abs(steps[long] - 4 * steps[short]) <= 2, "but for the rounding of a quarter"
        assert steps[1] == (load_preset(name).steps if method == "Adv-KD" else STEPS[name][method])
    assert len({job.preset for job in jobs(name)}) == len(jobs(name)), "no two rows are one training"


def test_contestants_are_what_they_are_called():
    of = {job.method: job.preset for job in jobs("digits") if job.budget == 1}
    assert of["Adv-KD"].replace(seed=0) == load_preset("digits")
    assert of["ADD, adversarial alone"].distillation_weight == of["ADD, distillation alone"].adversarial_weight == 0
    assert of["ADD, random start"].start == "random" and of["ADD"].start == "teacher"
    ours, warmed = load_preset("digits"), of["ADD, submodules"]
    assert (warmed.architecture, warmed.latent, warmed.widths) == ("submodules", ours.latent, ours.widths)
    assert 0 < warmed.warm_up_steps < warmed.steps and of["ADD"].warm_up_steps == 0
    with pytest.raises(UserError, match="no study for the preset 'celebahq'"):
        jobs("celebahq")


def test_what_the_teacher_is_asked_before_a_training():
    of = {job.method: teacher_evaluations(job.preset) for job in jobs("digits")}
    pairs = 5000 * 50
    assert of["Adv-KD"] == of["regression"] == of["DMD"] == of["ADD, submodules"] == pairs
    assert of["ADD"] == of["progressive distillation"] == of["consistency distillation"] == 0


@pytest.mark.parametrize("method", CONTESTANTS)
def test_every_method_has_rows_with_the_fields_of_table1(judge, tiny_job, monkeypatch, method):
    monkeypatch.setattr(head_to_head, "IMAGES", 70)
    if method != "Adv-KD":  # the others are measured in the same way
        fields = ("fd_train", "fd_heldout", "kid_train", "precision", "recall", "fd_train_subset", "pull_to_train")
        monkeypatch.setattr(judge, "measure", lambda samples: dict.fromkeys(fields, float(samples.mean())))
        monkeypatch.setattr(head_to_head, "sampling_cost", lambda *_: {"ms_per_step": 1.0, "peak_memory_mb": 1.0})
        monkeypatch.setattr(head_to_head, "_kept_seconds", lambda measure, preset: 1.0)
    job = tiny_job(method)
    rows, images = zip(*compare(judge, [job]), strict=True)
    assert [row["steps"] for row in rows] == list(CONTESTANTS[method][2])
    for row in rows:
        assert row.keys() >= TABLE1 | {"method", "budget", "seed", "train_seconds", "peak_memory_mb", "preset_hash"}
        assert row["method"] == method and row["images"] == 70
        assert 0 < row["compute"] < 1, "a tiny one"
        assert (row["trajectories_compute"] > 0) == (row["teacher_evaluations"] > 0)
    assert all(x.shape == (KEPT, 1, 16, 16) for x in images), "those of the first seed"
    if method == "Adv-KD":
        assert means(rows, ("method", "budget", "steps"))[0].keys() >= SUMMARY.keys(), "no column of the table is empty"
    assert list(rows) == [row for row, _ in compare(judge, [job])], "what was measured is only read"


def test_compute_is_that_of_a_whole_training(monkeypatch):
    timed = []
    steps = head_to_head._measure_step

    def seconds(measure, preset):
        assert measure is steps
        timed.append(preset)
        return float(len(timed))

    monkeypatch.setattr(head_to_head, "_kept_seconds", seconds)
    job = next(job for job in jobs("digits") if job.method == "ADD, submodules")
    assert relative_compute(job.preset) == job.preset.steps / (2 * load_preset("digits").steps)
    assert timed[0].warm_up_steps - 8 == round(WARM_UP * TIMED_STEPS) and timed[1].warm_up_steps == 0
    assert {p.train_dtype for p in timed} == {"float32"}


def test_compute_of_trajectories_is_in_the_same_unit(monkeypatch):
    seconds, timed = {head_to_head._measure_evaluation: 0.01, head_to_head._measure_step: 0.2}, []
    monkeypatch.setattr(head_to_head, "_kept_seconds", lambda measure, p: timed.append(p) or seconds[measure])
    of = {job.method: job.preset for job in jobs("digits")}
    for method in ("Adv-KD", "regression"):
        expected = 5000 * 50 * 0.01 / (3500 * 0.2)
        assert trajectories_compute(of[method]) == pytest.approx(expected)
    assert timed[0] == timed[2] and timed[0].teacher_dtype == "float32", "all take theirs from one store"
    assert timed[0].trajectories == max(load_preset("digits").batch_sizes)
    assert trajectories_compute(of["ADD"]) == 0


def test_the_time_of_an_evaluation_is_that_of_one_image_once(monkeypatch):
    preset, now = load_preset("digits", trajectories=20, sampler_steps=10), [0.0]

    def takes(seconds, **wanted):
        return lambda *_, **given: now.append(now.pop() + seconds) if given.items() >= wanted.items() else 1 / 0

    monkeypatch.setattr(head_to_head, "load_teacher", takes(100.0))
    monkeypatch.setattr(head_to_head, "generate_trajectories", takes(3.0, device="cpu"))
    monkeypatch.setattr(head_to_head.time, "process_time", lambda: now[0])
    assert head_to_head._measure_evaluation(preset) == pytest.approx(3.0 / 200)


def test_a_failed_training_leaves_the_others_alone(judge, tiny_job, monkeypatch):
    monkeypatch.setattr(head_to_head, "IMAGES", 70)
    monkeypatch.setattr(head_to_head, "sampling_cost", lambda *_: {"ms_per_step": 1.0, "peak_memory_mb": 1.0})
    monkeypatch.setattr(head_to_head, "_kept_seconds", lambda measure, preset: 1.0)
    rows = list(compare(judge, [tiny_job("regression", learning_rate=1e30, steps=20), tiny_job("DMD")]))
    assert {row["method"]: "error" in row for row, _ in rows} == {"regression": True, "DMD": False}


def test_the_teacher_has_rows_for_every_sampler_steps_and_seed(judge, improved, monkeypatch):
    monkeypatch.setattr(head_to_head, "IMAGES", 70)
    monkeypatch.setattr(head_to_head, "sampling_cost", lambda *_: {"ms_per_step": 1.0, "peak_memory_mb": 1.0})
    monkeypatch.setattr(head_to_head, "SAMPLING_SEEDS", SAMPLING_SEEDS[:1])
    monkeypatch.setattr(head_to_head, "TEACHER_STEPS", (1, 16))  # 16 is no divisor of 1000
    rows = [row for row, _ in compare_teacher(judge, load_preset("digits", teacher_dtype="float32"))]
    assert len(rows) == len(TEACHERS) * 2 and rows[3]["ms_per_image"] == 16
    assert rows[0].keys() >= TABLE1
    ddim = {row["steps"]: row["fd_train"] for row in rows if row["sampler"] == "ddim"}
    assert ddim[16] < ddim[1] / 5


def test_rows_have_places_by_method_budget_steps_and_seed(judge):
    def row(job, steps):
        about = {"method": job.method, "budget": job.budget, "steps": steps}
        return about | {"seed": job.preset.seed, "preset_hash": job.preset.config_hash}

    students = [row(job, steps) for job in jobs("digits") for steps in CONTESTANTS[job.method][2]]
    teachers = [{"method": m, "steps": n, "seed": s} for m in TEACHERS for n in TEACHER_STEPS for s in SAMPLING_SEEDS]
    places = [comparison_place("digits", r) for r in students + teachers]
    assert len(set(places)) == len(places)
    assert comparison_place("digits", students[0] | {"preset_hash": "of another recipe"}) is None
    assert comparison_place("digits", teachers[0] | {"steps": 25}) is None
    protocol = comparison_protocol(judge)
    for r in (teachers[0], students[0]):
        path = keep_row(
            r | {"parameters": 1},
            lambda x: comparison_place("digits", x),
            protocol,
            "figures/digits",
            "head_to_head",
            SHOWN,
        )
    assert [r["method"] for r in json.loads(path.read_text())["rows"]] == ["Adv-KD", "teacher, DDIM"]


@pytest.mark.parametrize("name", STEPS)
def test_the_committed_rows_are_of_todays_jobs(name):
    path = Path(__file__).resolve().parents[1] / f"figures/{name}/head_to_head.json"
    rows = json.loads(path.read_text())["rows"]
    assert rows and all(comparison_place(name, row) for row in rows)
    kept = load_file(path.with_suffix(".safetensors"))
    assert kept.keys() == {image_key(row) for row in rows}, "images of every row, and of no other"
    assert {len(images) for images in kept.values()} == {KEPT}
    students = [row for row in rows if row["method"] not in TEACHERS]
    assert all(row["compute"] > 0 for row in students)
    assert all((row["trajectories_compute"] > 0) == (row["teacher_evaluations"] > 0) for row in students)


def test_a_glance_is_at_whole_methods_with_no_more_training_than_advkd_and_at_the_teacher():
    every = [
        {"method": method, "budget": budget, "steps": steps}
        for method, (_, _, sampled) in CONTESTANTS.items()
        for budget in (4, 1, 0.25)
        for steps in sampled
    ]
    teachers = [{"method": method, "steps": steps} for method in TEACHERS for steps in TEACHER_STEPS]
    shown = at_a_glance("glyphs", every + teachers)
    assert [(row["method"], row.get("budget"), row["steps"]) for row in shown] == [
        *(
            (method, budget, steps)
            for budget in (0.25, 1)
            for method, most in (
                ("Adv-KD", 1),
                ("ADD", 4),
                ("regression", 1),
                ("progressive distillation", 1),
                ("consistency distillation", 4),
                ("DMD", 1),
            )
            for steps in (1, 2, 4)
            if steps <= most
        ),
        *((method, None, steps) for method in TEACHERS for steps in (4, 50)),
    ]
    assert {row["data"] for row in shown} == {"glyphs"}


def test_the_short_table_is_that_of_the_committed_rows():
    figures = Path(__file__).resolve().parents[1] / "figures"
    shown = []
    for name in STEPS:
        rows = json.loads((figures / name / "head_to_head.json").read_text())["rows"]
        shown += at_a_glance(name, means(rows, ("method", "budget", "steps")))
    committed = json.loads((figures / "digits" / "head_to_head_summary.json").read_text())["rows"]
    assert committed == json.loads(json.dumps(shown))


def test_a_rows_images_are_kept():
    rows = [{"method": m, "steps": 4, "budget": 1} for m in ("ADD", "DMD")] + [{"method": "teacher, DDIM", "steps": 4}]
    for shade, row in enumerate(rows):
        keep_images("figures/digits", row, torch.full((KEPT, 1, 8, 8), shade / 10))
    kept = load_file("figures/digits/head_to_head.safetensors")
    assert list(kept) == ["ADD, 4 steps, budget 1", "DMD, 4 steps, budget 1", "teacher, DDIM, 4 steps"]
    torch.testing.assert_close(
        from_uint8(kept[image_key(rows[1])]), torch.full((KEPT, 1, 8, 8), 0.1), atol=0.005, rtol=0
    )


def test_all_start_from_the_same_noise(judge, monkeypatch):
    noise = seeded_noise(range(3), (1, 16, 16), SAMPLING_SEEDS[0])
    seen = []
    for recipe in ("improved", "add"):
        pipeline = new_pipeline(load_preset("digits", recipe), judge.teacher)
        first = sample_student(pipeline, 3, SAMPLING_SEEDS[0], progress=False)
        seen.append(torch.equal(first, sample_student(pipeline, 3, 0, progress=False, noise=noise)))
    preset = load_preset("digits", teacher_dtype="float32", submodules=1, widths=(4,), shard_size=3)
    image = sample_teacher(judge.teacher, preset, "ddim", 1, range(3), SAMPLING_SEEDS[0], progress=False)
    scheduler = make_scheduler(judge.teacher, "ddim", 1)
    *_, (_, expected, _) = denoise(judge.teacher, noise, scheduler, sample_generators(range(3), 0))
    torch.testing.assert_close(image, expected.clamp(-1, 1))
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        (["--method", "GAN"], "DMD"),
        (["--budget", "3"], "1, 4"),
        (["--preset", "glyphs", "--budget", "4"], "0.25, 1"),
        (["--seed", "6"], "3, 4, 5"),
    ],
)
def test_the_command_line_names_what_there_is(options, known):
    result = CliRunner().invoke(cli, ["compare", *options])
    assert result.exit_code == 2 and options[-1] in result.output and known in result.output


def measured_step(preset):
    return 1.5


def measured_evaluation(preset):
    return 0.5


def test_what_takes_time_is_measured_once_on_a_machine(tiny_job):
    preset = tiny_job("regression", steps=TIMED_STEPS + 9).preset
    assert head_to_head._kept_seconds(measured_step, preset) == 1.5
    assert head_to_head._kept_seconds(measured_evaluation, preset) == 0.5
    head_to_head._kept_seconds.cache_clear()
    (kept,) = Path("runs").rglob("step-*.json")
    kept.write_text('{"cpu_seconds": 2.5}')
    assert head_to_head._kept_seconds(measured_step, preset) == 2.5, "read, not measured again"


def test_the_time_of_a_step_leaves_out_the_first_and_the_last(tiny_job, monkeypatch):
    preset, now = tiny_job("regression", steps=TIMED_STEPS + 9).preset, [0.0]

    def training(p, *_, **__):
        for step in range(1, p.steps + 1):
            now[0] += 0.25 if 8 < step < p.steps else 100.0
            yield SimpleNamespace(step=step)

    monkeypatch.setattr(head_to_head, "train_run", training)
    monkeypatch.setattr(head_to_head.time, "process_time", lambda: now[0])
    assert head_to_head._measure_step(preset) == 0.25


def test_a_method_without_steps_is_named(monkeypatch):
    monkeypatch.setitem(head_to_head.CONTESTANTS, "mine", ("regression", {}, (1,)))
    with pytest.raises(UserError, match=r"how many steps of 'mine' are budget 1; add them to STEPS\['digits'\]"):
        head_to_head.jobs.__wrapped__("digits")
