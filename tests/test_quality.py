"""The judge's fields against their parts, seeds and means; the ablations' settings, rows and resumption."""

import json
import statistics
from functools import partial
from itertools import pairwise

import pytest
import torch

from advkd import ablations, quality
from advkd.ablations import SEEDS, WATERFALL, Job, ablate, ablation_protocol, jobs, keep
from advkd.data import load_images, reference_images
from advkd.evaluation import pull_to_train, sample_student
from advkd.presets import UserError, load_preset, resolution
from advkd.quality import SAMPLING_SEEDS, TRAINING_SEEDS, Judge, student_quality, summarise, teacher_quality
from advkd.run import PIPELINE, load_run, train_side_by_side
from advkd.student import match_parameters, parameters
from advkd.train_advkd import Plan


@pytest.fixture(scope="module")
def judge():
    return Judge(load_preset("digits"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_real_images_judge_well_and_their_copies_are_found(judge):
    train, heldout = (load_images(load_preset("digits"), split)[0] for split in ("train", "heldout"))
    copied, real = judge.measure(train), judge.measure(heldout)
    assert copied["fd_train"] == pytest.approx(0, abs=1e-3) and copied["fd_unseen"] == pytest.approx(0, abs=1e-3)
    assert copied["near_copies"] == copied["coverage"] == copied["recall"] == 1
    assert copied["pull_to_train"] == pull_to_train(train, train, heldout)
    assert real["pull_to_train"] == 0 and real["near_copies"] == pytest.approx(0.01, abs=0.004)
    assert real["fd_heldout"] == pytest.approx(0, abs=1e-3) and real["fd_train"] > 1
    assert real["coverage"] > 0.6 and real["rarest_digit"] > 0.6
    assert sum(real["shares_digit"]) == pytest.approx(1)


def test_a_missing_class_is_seen(judge):
    images, labels = load_images(load_preset("digits"), "train")
    assert judge.measure(images[labels != 3])["rarest_digit"] < 0.05


def test_letters_fonts_and_colours_are_counted(monkeypatch):
    monkeypatch.setattr(quality, "reference_images", partial(reference_images, count=600))
    preset = load_preset("glyphs")
    judge, (images, labels) = Judge(preset), reference_images(preset, "heldout", 1000)
    fonts = judge.measure(reference_images(preset, "unseen-fonts", 600)[0])
    assert fonts["fd_unseen_fonts"] == pytest.approx(0, abs=1e-3) and fonts["fd_train"] > 10
    assert fonts["rarest_letter"] > 0.4 and fonts["rarest_ground"] > 0.6
    bright_without_b = judge.measure(images[labels // 18 != 1].clamp(min=0.1))
    shares = bright_without_b["shares_letter"]
    assert shares.index(min(shares)) == 1 and bright_without_b["rarest_letter"] < 0.1
    assert bright_without_b["rarest_ground"] == 0


def test_means_and_deviations_are_those_of_the_statistics_module():
    row = summarise([{"fd": 1.0, "shares": [0.0, 1.0]}, {"fd": 4.0, "shares": [1.0, 0.0]}])
    assert row == {"fd": 2.5, "fd_sd": pytest.approx(statistics.stdev([1, 4])), "shares": [0.5, 0.5]}
    assert summarise([{"fd": 1.0}]) == {"fd": 1.0, "fd_sd": None}


def test_seeds_that_report_chose_nothing():
    assert not set(TRAINING_SEEDS) & set(SEEDS) and len(TRAINING_SEEDS) >= 3 and len(SAMPLING_SEEDS) >= 3
    assert not set(SAMPLING_SEEDS) & {0, 1, 2, ablations.SAMPLING_SEED}


def test_quality_rows_train_what_is_missing_and_average_over_all_seeds(judge, improved):
    presets = [improved.replace(seed=seed) for seed in (4, 3)]
    row = student_quality(judge, presets, workers=2, count=70)
    folders = {p.seed: folder for p, folder, error in train_side_by_side(presets) if error is None}
    each = [
        judge.measure(sample_student(load_run(folders[seed]), 70, s))["fd_train"]
        for seed in (3, 4)
        for s in SAMPLING_SEEDS
    ]
    assert row["fd_train"] == pytest.approx(statistics.mean(each))
    assert row["fd_train_sd"] == pytest.approx(statistics.stdev(each)) and row["seeds"] == 2
    assert row["train_seconds"] > 0 and (row["model"], row["recipe"], row["images"]) == ("student", "improved", 70)


def test_teacher_rows_average_over_sampling_seeds(judge, improved):
    row = teacher_quality(judge, improved, "ddim", 2, count=70)
    assert (row["model"], row["sampler"], row["steps"], row["seeds"]) == ("teacher", "ddim", 2, 0)
    assert row["fd_train_sd"] > 0 and row["images"] == 70


def test_the_table_has_a_row_for_each_recipe_and_sampler_and_for_real_images(improved, paper, monkeypatch):
    presets = {"improved": improved, "paper": paper}
    monkeypatch.setattr(
        quality, "load_preset", lambda name, recipe="improved", **given: presets[recipe].replace(**given)
    )
    monkeypatch.setattr(quality, "TRAINING_SEEDS", (3, 4))
    rows, details = quality.quality("digits", paper_epochs=0.5, samplers=[("ddim", 2)], count=70)
    assert [(r["model"], r["recipe"], r["sampler"]) for r in rows] == [
        ("student", "improved", "one-step"),
        ("student", "paper", "one-step"),
        ("teacher", None, "ddim"),
        ("real", None, "held-out images"),
    ]
    wanted = (
        "fd_train fd_heldout fd_unseen fd_unseen_heldout kid_train precision recall coverage pull_to_train near_copies"
    )
    for row in rows[:3]:
        assert all(row[field] is not None and row[f"{field}_sd"] is not None for field in wanted.split())
        assert row["images"] == 70 and row["ms_per_image"] > 0
    assert [row["seeds"] for row in rows[:3]] == [2, 2, 0] and details["images"] == 70
    assert rows[3]["fd_train"] == pytest.approx(1.28, abs=0.01), "the floor that README quotes"
    json.dumps([rows, details])


def test_a_failed_training_is_named(judge, improved):
    broken = improved.replace(learning_rate=1e30, steps=20)
    with pytest.raises(UserError, match="failed: a loss or gradient is not finite"):
        student_quality(judge, [broken], count=70)


def test_every_setting_has_three_seeds_and_the_same_budget():
    for name in ("digits", "glyphs"):
        chosen = jobs(name)
        assert len(chosen) == len({(j.group, j.setting, j.preset.seed) for j in chosen})
        assert {j.preset.seed for j in chosen} == set(SEEDS)
        for job in chosen:
            plan = Plan(job.preset, job.preset.trajectories)
            times = 10 if "10 times" in job.setting else 3.5 if "3.5 times" in job.group else 1
            assert plan.images_seen(plan.steps - 1) == pytest.approx(times * ablations.IMAGES_SEEN, rel=0.02)


def test_the_waterfall_leads_from_the_papers_recipe_to_ours():
    steps = [j.preset for j in jobs("digits") if j.group == "waterfall" and j.preset.seed == 0]
    paper, base = load_preset("digits", "paper"), load_preset("digits")
    assert steps[1] == paper.replace(epochs=steps[1].epochs) and steps[-1] == base.replace(steps=steps[-1].steps)
    assert len(steps) == len(WATERFALL) + 2
    for before, after in pairwise(steps[1:]):
        assert before != after


def test_settings_change_what_they_say():
    by_name = {(j.group, j.setting): j.preset for j in jobs("digits") if j.preset.seed == 0}
    assert by_name["unsupervised head", "5"].unsupervised == (5,)
    assert by_name["losses", "adversarial alone"].reconstruction_weight == 0
    assert by_name["losses", "reconstruction alone"].adversarial_weight == 0
    assert by_name["share of the trajectories", "10%"].trajectories == 500
    assert by_name["trade-off (3.5 times the budget)", "the recipe"] == load_preset("digits")
    assert by_name["submodules", "K = 1"].resolutions == (16,)
    assert by_name["submodules", "K = 3"].resolutions == (8, 8, 16)
    wanted = parameters(load_preset("digits"))
    for k in (1, 3, 5, 7):
        assert parameters(by_name["submodules, equal parameters", f"K = {k}"]) == pytest.approx(wanted, rel=0.1)


def test_widths_are_matched_to_a_number_of_parameters():
    p = load_preset("digits")
    assert match_parameters(p, parameters(p)).widths == p.widths
    assert parameters(match_parameters(p, 60_000)) == pytest.approx(60_000, rel=0.1)


def test_fewer_submodules_than_sizes_still_end_at_the_images_size():
    assert [resolution(k, 1, 256) for k in range(1)] == [256]
    assert [resolution(k, 2, 32) for k in range(2)] == [16, 32]
    assert [resolution(k, 3, 256) for k in range(3)] == [16, 64, 256]


def test_a_study_is_resumed_and_its_rows_are_kept(judge, improved, monkeypatch, tmp_path):
    chosen = [Job("ema", str(ema), improved.replace(ema=ema)) for ema in (0.0, 0.9)]
    chosen.append(Job("again", "the same training", improved))
    monkeypatch.setattr(ablations, "jobs", lambda name: chosen)
    monkeypatch.setattr(ablations, "IMAGES", 70)
    details = ablation_protocol(judge)
    first = next(ablate(judge, chosen[:1]))
    path = keep("digits", first, details)
    rows = list(ablate(judge, chosen))
    assert [row for row in rows if row["group"] == "ema" and row["setting"] == "0.0"] == [first]
    for row in reversed(rows):
        keep("digits", row, details)
    table = json.loads(path.read_text())
    assert [(r["group"], r["setting"]) for r in table["rows"]] == [(j.group, j.setting) for j in chosen]
    assert table["rows"][1]["fd_train"] == table["rows"][2]["fd_train"] and table["protocol"]["training_seeds"] == [
        0,
        1,
        2,
    ]
    assert {"group", "setting", "seed", "train_seconds", "fd_train", "fd_heldout"} <= table["rows"][0].keys()
    monkeypatch.setattr(ablations, "jobs", lambda name: chosen[1:])
    keep("digits", rows[-1], details)
    assert len(json.loads(path.read_text())["rows"]) == 2, "rows of settings that no longer exist go"


def test_a_failed_training_leaves_the_others_alone(judge, improved, monkeypatch):
    monkeypatch.setattr(ablations, "IMAGES", 70)
    broken = Job("lr", "broken", improved.replace(learning_rate=1e30, steps=20))
    rows = {row["setting"]: row for row in ablate(judge, [broken, Job("lr", "good", improved)])}
    assert "not finite" in rows["broken"]["error"] and rows["good"]["fd_train"] > 0


def test_students_side_by_side_are_those_trained_alone(improved):
    presets = [improved.replace(seed=seed) for seed in (0, 1)]
    beside = {p.seed: load_run(folder).student for p, folder, _ in train_side_by_side(presets, workers=2)}
    (folder,) = (folder for _, folder, _ in train_side_by_side(presets[:1]))
    (folder / PIPELINE / "model_index.json").unlink()  # as if it had been stopped before its end
    for name in ("checkpoint.safetensors", "curves.csv"):
        (folder / name).unlink()
    ((_, again, _),) = train_side_by_side(presets[:1])
    for a, b in zip(load_run(again).student.parameters(), beside[0].parameters(), strict=True):
        assert torch.equal(a, b)
