"""The judge's fields against their parts, seeds and means; the ablations' settings, rows and resumption."""

import json
import statistics
from functools import partial
from itertools import pairwise

import pytest
import torch

from advkd import ablations, quality
from advkd.ablations import SEEDS, WATERFALL, Job, ablate, ablation_place, ablation_protocol, jobs
from advkd.data import load_images, reference_images
from advkd.discriminator import make_discriminator
from advkd.evaluation import pull_to_train, sample_student
from advkd.figures import keep_row
from advkd.presets import UserError, asdict, load_preset, resolution
from advkd.quality import (
    SAMPLING_SEEDS,
    TRAINING_SEEDS,
    Judge,
    means,
    quality_place,
    quality_protocol,
    student_quality,
    summarise,
    targets,
    teacher_quality,
)
from advkd.run import PIPELINE, load_run, train_side_by_side
from advkd.student import Student, match_parameters, parameters
from advkd.teacher import load_teacher
from advkd.train_advkd import train_advkd
from advkd.training import Plan
from advkd.trajectories import generate_trajectories, trajectory_dir


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
        statistics.mean(
            judge.measure(sample_student(load_run(folders[seed]), 70, s))["fd_train"] for s in SAMPLING_SEEDS
        )
        for seed in (3, 4)
    ]
    assert row["fd_train"] == pytest.approx(statistics.mean(each))
    assert row["fd_train_sd"] == pytest.approx(statistics.stdev(each)) and row["seeds"] == 2
    assert row["train_seconds"] > 0 and (row["model"], row["recipe"], row["images"]) == ("student", "improved", 70)


def test_teacher_rows_average_over_sampling_seeds(judge, improved):
    row = teacher_quality(judge, improved, "ddim", 2, count=70)
    assert (row["model"], row["sampler"], row["steps"], row["seeds"]) == ("teacher", "ddim", 2, 0)
    assert row["fd_train_sd"] > 0 and row["images"] == 70


def test_the_table_has_a_row_for_each_recipe_and_sampler_and_for_real_images(judge, improved, paper, monkeypatch):
    presets = {"improved": improved, "paper": paper}
    monkeypatch.setattr(
        quality, "load_preset", lambda name, recipe="improved", **given: presets[recipe].replace(**given)
    )
    monkeypatch.setattr(quality, "TRAINING_SEEDS", (3, 4))
    monkeypatch.setattr(quality, "SAMPLING_SEEDS", (11, 12))
    rows = list(quality.quality("digits", judge, paper_epochs=0.5, samplers=[("ddim", 2)], count=70))
    rows.sort(key=quality_place)
    details = quality_protocol(judge, 70)
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
    assert rows[3]["fd_train_subset"] == rows[3]["fd_train"] and "pull_to_train" not in rows[3]
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
            times = 10 if "10 times" in job.setting else 1
            if "whole budget" in job.group:
                times = load_preset(name).steps * 64 / ablations.IMAGES_SEEN
            elif "training length" in job.group:
                times = int(job.setting.removesuffix(" steps").replace(",", "")) * 64 / ablations.IMAGES_SEEN
            assert plan.images_seen(plan.steps - 1) == pytest.approx(times * ablations.IMAGES_SEEN, rel=0.02)


def test_the_waterfall_leads_from_the_papers_recipe_to_ours():
    steps = [j.preset for j in jobs("digits") if j.group == "waterfall" and j.preset.seed == 0]
    paper, base = load_preset("digits", "paper"), load_preset("digits")
    assert steps[1] == paper.replace(epochs=steps[1].epochs) and steps[-1] == base.replace(steps=steps[-1].steps)
    assert len(steps) == len(WATERFALL) + 2
    declared = [*list(WATERFALL.values())[1:], ("recipe", "decay_share", "ema", "train_dtype")]
    for (before, after), fields in zip(pairwise(steps[1:]), declared, strict=True):
        changed = {f for f, value in asdict(after).items() if asdict(before)[f] != value}
        assert changed and changed <= {*fields, "steps", "epochs"}


@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_every_setting_can_be_trained(name, tmp_path):
    few, chosen = {"trajectories": 8, "sampler": "ddim", "sampler_steps": 2}, [j.preset for j in jobs(name, seeds=(0,))]
    presets = {p.replace(batch_sizes=tuple(size // 8 for size in p.batch_sizes), **few): None for p in chosen}
    teacher, images, stores = load_teacher(load_preset(name)), load_images(load_preset(name), "train")[0], {}
    for p in presets:
        folder = tmp_path / trajectory_dir(teacher, p).name
        stores[folder] = stores.get(folder) or generate_trajectories(teacher, p, folder)
        record = next(
            train_advkd(Student.from_preset(p), partial(make_discriminator, p), stores[folder], p, images=images)
        )
        assert record.step == 1


def test_settings_change_what_they_say():
    by_name = {(j.group, j.setting): j.preset for j in jobs("digits") if j.preset.seed == 0}
    assert by_name["unsupervised head", "5"].unsupervised == (5,)
    assert by_name["losses", "adversarial alone"].reconstruction_weight == 0
    assert by_name["losses", "reconstruction alone"].adversarial_weight == 0
    assert by_name["share of the trajectories", "10%"].trajectories == 500
    assert by_name["trade-off (the recipe's whole budget)", "the recipe"] == load_preset("digits")
    assert by_name["latent (no fresh latents)", "shrink8bit"].fresh_share == 0
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


def test_a_study_is_resumed_and_its_rows_are_kept(judge, improved, monkeypatch):
    chosen = [Job("ema", str(ema), improved.replace(ema=ema)) for ema in (0.0, 0.9)]
    chosen.append(Job("again", "the same training", improved))
    places = {("ema", "0.0"): 0, ("ema", "0.9"): 1, ("again", "the same training"): 2}

    def keep(row):
        table = "figures/digits", "ablations", {field: field for field in ablations.SHOWN}
        return keep_row(row, lambda r: places.get((r["group"], r["setting"])), details, *table)

    monkeypatch.setattr(ablations, "IMAGES", 70)
    details = ablation_protocol(judge)
    first = next(ablate(judge, chosen[:1]))
    path = keep(first)
    rows = list(ablate(judge, chosen))
    assert [row for row in rows if row["group"] == "ema" and row["setting"] == "0.0"] == [first]
    for row in reversed(rows):
        keep(row)
    table = json.loads(path.read_text())
    assert [(r["group"], r["setting"]) for r in table["rows"]] == [(j.group, j.setting) for j in chosen]
    assert table["rows"][1]["fd_train"] == table["rows"][2]["fd_train"] and table["protocol"]["training_seeds"] == [
        0,
        1,
        2,
    ]
    assert {"group", "setting", "seed", "train_seconds", "fd_train", "fd_heldout"} <= table["rows"][0].keys()
    del places["ema", "0.0"]
    keep(rows[-1])
    assert len(json.loads(path.read_text())["rows"]) == 2, "rows of settings that no longer exist go"
    details["images"] = 71
    keep(rows[-1])
    assert len(json.loads(path.read_text())["rows"]) == 1, "rows that were judged otherwise go"
    monkeypatch.setenv("ADVKD_FIGURES", "elsewhere")
    keep(rows[-1])
    elsewhere = keep(rows[-2])
    assert elsewhere.parts[0] == "elsewhere" and len(json.loads(elsewhere.read_text())["rows"]) == 2


def test_a_row_of_today_has_a_place_and_another_has_none():
    job = jobs("digits")[4]
    row = {"group": job.group, "setting": job.setting, "seed": job.preset.seed, "preset_hash": job.preset.config_hash}
    assert ablation_place("digits", row) == 4 and ablation_place("digits", row | {"preset_hash": "0"}) is None


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


def test_targets_compare_with_the_right_teacher_and_keep_what_does_not_hold():
    values = {"fd_train": 1.0, "fd_heldout": 2.0, "fd_unseen": 4.0, "fd_unseen_heldout": 8.0, "recall": 0.8}
    values |= {"pull_to_train": 0.5, "parameters": 100, "rarest_letter": 0.3, "rarest_font": 0.5}

    def row(model: str, recipe: str | None, sampler: str, steps: int, times: float) -> dict:
        scaled = {field: value * times for field, value in values.items()}
        return {"model": model, "recipe": recipe, "sampler": sampler, "steps": steps} | scaled

    rows = [
        row("student", "improved", "one-step", 1, 1),
        row("student", "paper", "one-step", 1, 9),
        row("teacher", None, "ddim", 50, 2),
        row("teacher", None, "ddim", 1, 7),
        row("teacher", None, "ddpm", 1000, 0.9),
        row("teacher", None, "ddpm", 100, 5),
    ]
    digits = {t["target"]: (t["measured"], t["asked"], t["holds"]) for t in targets(rows, "digits")}
    assert digits["FD, train, to DDIM-50's"] == (0.5, "<= 0.7", "yes")
    assert digits["FD, train, to DDPM-1000's"] == (pytest.approx(1 / 0.9), "<= 1", "no")
    assert digits["unseen space, held out, to DDPM-1000's"] == (pytest.approx(1 / 0.9), "<= 1.15", "yes")
    assert digits["recall, to DDIM-50's"] == (0.5, ">= 0.9", "no")
    assert digits["nearer to train, less DDIM-50's"] == (-0.5, "<= 0.05", "yes")
    glyphs = {t["target"]: (t["measured"], t["holds"]) for t in targets(rows, "glyphs")}
    assert glyphs["FD, held out, to DDIM-50's"] == (0.5, "yes")
    assert glyphs["rarest letter, of its share"] == (0.3, "no") and glyphs["rarest font, of its share"] == (0.5, "yes")


def test_settings_are_summed_up_over_their_seeds_and_failures_left_out():
    fields = ablations.SHOWN[ablations.SHOWN.index("parameters") :]
    rows = [{"group": "g", "setting": "a", "seed": n} | dict.fromkeys(fields, float(n)) for n in (1, 3)]
    rows += [{"group": "g", "setting": "a", "seed": 4, "error": "not finite"}]
    rows += [{"group": "h", "setting": "a", "seed": 1} | dict.fromkeys(fields, 7.0)]
    first, second = means(rows, ("group", "setting"))
    assert (first["group"], first["setting"], first["seeds"]) == ("g", "a", 2)
    assert first["recall"] == 2 and first["recall_sd"] == pytest.approx(2**0.5)
    assert second["group"] == "h" and second["recall_sd"] is None
