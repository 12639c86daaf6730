import copy
import dataclasses
import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest

from advkd.presets import (
    PINNED,
    PUBLISHED_FID,
    Preset,
    UserError,
    asdict,
    config_hash,
    load_preset,
    own_preset,
    resolution,
    stage_times,
)
from advkd.student import Student, count_parameters, gflop_per_image


def test_unknown_preset_lists_the_presets():
    with pytest.raises(
        UserError, match="no preset 'mnist'; presets: digits, glyphs, celebahq, cifar10, lsun-church, lsun-bedroom"
    ):
        load_preset("mnist")


def test_unknown_recipe_lists_the_recipes():
    with pytest.raises(UserError, match="no recipe 'best'; recipes: paper, improved"):
        load_preset("digits", "best")


@pytest.mark.parametrize("change", [lambda **k: load_preset("digits", **k), load_preset("digits").replace])
def test_unknown_field_lists_the_fields(change):
    with pytest.raises(UserError, match="no field 'batch'") as error:
        change(batch=3)
    listed = str(error.value).split("fields: ")[1].split(", ")
    assert listed == [field.name for field in dataclasses.fields(Preset)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size_px", 24, "image_size_px is 24, but must be a power of two, 8 or more"),
        ("image_size_px", 4, "image_size_px is 4, but must be a power of two, 8 or more"),
        ("submodules", 0, "submodules is 0, but must be 1 or more"),
        ("submodules", 1, "widths has 2 entries .* the submodules' images have .16. px"),
        ("unsupervised", (0, 11), "unsupervised names submodule 11, but there are 0 to 10"),
        ("adversarial_weight", -1.0, "adversarial_weight is -1.0, but must not be negative"),
        ("widths", (8,), "widths has 1 entries .* images have .8, 16. px"),
        ("sampler_steps", 30, "sampler_steps is 30, but must divide 1000"),
        ("sampler", "euler", "sampler is 'euler', but must be one of 'ddpm', 'ddim'"),
        ("block", "dense", "block is 'dense', but must be one of 'plain', 'residual'"),
        ("learning_rate", math.nan, "learning_rate is nan, but must be a finite number"),
        ("epochs", math.inf, "epochs is inf, but must be a finite number"),
        ("widths", 44, "widths is 44, but must be a tuple of whole numbers"),
        ("betas", ("a", "b"), "betas is .* but must be a tuple of finite numbers"),
        ("steps", 10.5, "steps is 10.5, but must be a whole number"),
        ("channels", 3, "channels is 3, but the digits are grey: channels=1"),
        ("train_dtype", "float16", "train_dtype is 'float16', but must be one of 'float32', 'bfloat16'"),
        ("real_share", 1.5, "real_share is 1.5, but must lie in"),
        ("ema", -0.1, "ema is -0.1, but must lie in"),
        ("trajectories", 0, "trajectories is 0, but must be positive"),
        ("learning_rate", -1e-4, "learning_rate is -0.0001, but must be positive"),
        ("penalty_every", 0, "penalty_every is 0, but must be positive"),
        ("sampler_steps", 0, "sampler_steps is 0, but must divide 1000"),
        ("batch_sizes", (), "batch_sizes is .*, but needs at least one size"),
        ("batch_sizes", (1,), "batch_sizes is .*, and 2 or more images"),
        ("betas", (0.5,), "betas is .*, but must be two numbers"),
        ("penalty_weight", -1, "penalty_weight is -1, but must not be negative"),
        ("critic_width", 0, "critic_width is 0, but must be positive"),
        ("critic", "conditional", "critic is 'conditional', which needs a trajectory for every image"),
        ("schedule", "staged", "fresh_share is .*, but staged training has only paired latents"),
        (
            "fresh_share",
            1.0,
            "fresh_share is 1.0 of .64,. images, which leaves no pair to compare: reconstruction_weight",
        ),
        ("fresh_share", 0.999, "fresh_share is 0.999 of .64,. images, which leaves no pair"),
        ("unsupervised", tuple(range(11)), "which leaves stage 10 no head to reconstruct"),
        ("feature_weight", -0.1, "feature_weight is -0.1, but must not be negative"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(UserError, match=message):
        load_preset("digits", **{field: value})


def test_a_preset_is_frozen_and_replace_leaves_it_alone():
    preset = load_preset("digits")
    other = preset.replace(seed=7)
    assert (preset.seed, other.seed) == (0, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.seed = 7


def test_hash_of_a_plain_dict_is_the_same_everywhere():
    assert config_hash({"name": "digits", "seed": 0, "betas": [0.5, 0.999]}) == "dde39943942f"
    assert config_hash({"seed": 0, "betas": [0.5, 0.999], "name": "digits"}) == "dde39943942f"


@pytest.mark.parametrize("seed", ["1", "2"])
def test_hash_is_the_same_in_another_process(seed):
    code = "from advkd.presets import load_preset; print(load_preset('digits', 'paper').config_hash)"
    environment = os.environ | {"PYTHONHASHSEED": seed}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == load_preset("digits", "paper").config_hash


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Preset)])
def test_hash_changes_with_every_field(field):
    preset = load_preset("digits")
    other = copy.copy(preset)
    object.__setattr__(other, field, "another value")
    assert other.config_hash != preset.config_hash
    assert field in asdict(other)


def test_a_field_with_a_default_counts_in_no_hash_while_it_has_it():
    late = {field.name for field in dataclasses.fields(Preset) if field.default is not dataclasses.MISSING}
    assert late and not late & asdict(load_preset("digits")).keys()
    # Runs, stores and committed rows are found by this hash: it may change with the recipe alone.
    assert load_preset("digits").config_hash == "4e062880a74f"


def test_resolution_is_the_papers_at_its_size():
    assert [resolution(k, 11, 256) for k in range(11)] == [2 ** (k // 2 + 3) for k in range(11)]
    assert load_preset("celebahq").resolutions == (8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256)


@pytest.mark.parametrize(("submodules", "size_px"), [(1, 8), (2, 16), (3, 16), (11, 16), (5, 64), (11, 64), (6, 256)])
def test_resolutions_double_from_8_px_to_the_image(submodules, size_px):
    sizes = [resolution(k, submodules, size_px) for k in range(submodules)]
    assert sizes[0] == 8 and sizes[-1] == size_px
    assert all(after in (before, 2 * before) for before, after in pairwise(sizes))


def test_stage_times_are_the_papers_for_11_submodules():
    assert stage_times(11) == tuple(1099 - 100 * j for j in range(1, 11))
    assert stage_times(3) == (999, 499)
    assert stage_times(1) == ()


def test_the_papers_recipe_at_its_size():
    p = load_preset("celebahq", "paper")
    assert (p.teacher, p.image_size_px, p.channels) == ("google/ddpm-celebahq-256", 256, 3)
    assert (p.trajectories, p.sampler, p.sampler_steps) == (20_000, "ddpm", 1000)
    assert (p.submodules, p.widths, p.block, p.head) == (11, (16, 32, 64, 128, 128, 128), "plain", "terminal")
    assert (p.latent, p.target, p.critic) == ("shrink8bit", "xt", "conditional")
    assert (p.schedule, p.epochs) == ("staged", 10)
    assert [p.batch_size(k) for k in range(11)] == [64] * 8 + [32, 16, 16]
    assert (p.learning_rate, p.betas, p.decay_share) == (1e-4, (0.5, 0.999), 0)
    assert (p.penalty, p.penalty_weight, p.penalty_every) == ("gp+clip", 10, 1)
    assert (p.reconstruction_weight, p.real_share, p.fresh_share, p.ema) == (0, 0, 0, 0)
    assert p.train_dtype == "float32"


def test_the_digits_paper_recipe_differs_only_in_scale():
    scale = (
        "name data image_size_px channels teacher teacher_revision trajectories sampler_steps shard_size widths stored"
    )
    large, small = load_preset("celebahq", "paper"), load_preset("digits", "paper")
    different = {f.name for f in dataclasses.fields(Preset) if getattr(large, f.name) != getattr(small, f.name)}
    assert different == set(scale.split())


@pytest.mark.parametrize("name", ["celebahq", "cifar10", "lsun-church", "lsun-bedroom"])
def test_presets_of_hub_teachers_have_a_published_fid_with_its_source(name):
    fid, source = PUBLISHED_FID[name]
    assert 3 < fid < 61 and "arXiv" in source
    p = load_preset(name)
    assert p.teacher.startswith("google/ddpm-") and p.teacher_revision == PINNED.get(p.teacher)
    assert p.trajectories == load_preset(name, "paper").trajectories == 20_000


def test_the_improved_student_at_the_papers_size_is_smaller_and_ten_times_cheaper():
    paper, ours = (Student.from_preset(load_preset("celebahq", recipe)) for recipe in ("paper", "improved"))
    assert count_parameters(paper) == 2_429_937 and count_parameters(ours) == 2_338_089
    assert gflop_per_image(paper) == pytest.approx(44.6, abs=0.05)
    assert gflop_per_image(ours) <= 5


def test_an_experiment_of_ones_own_follows_from_the_teachers_shape():
    grey, coloured = own_preset("x", 32, 1), own_preset("x", 32, 3)
    assert coloured.widths == load_preset("glyphs").widths and grey.penalty_weight < coloured.penalty_weight
    assert own_preset("x", 64, 3).resolutions == (8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64)
    assert own_preset("x", 256, 3).replace(name="celebahq", teacher="google/ddpm-celebahq-256") == load_preset(
        "celebahq"
    )
    assert (own_preset("x", 64, 3).real_share, own_preset("x", 64, 3, images="photos").real_share) == (0, 0.5)
    for size in (4, 48):
        with pytest.raises(UserError, match=f"images of {size} px; it must be a power of two, 8 or more"):
            own_preset("x", size, 3)


def test_a_preset_stores_its_target_and_takes_images_only_where_it_has_none():
    assert load_preset("celebahq").stored == ("x0",) and load_preset("celebahq", "paper").stored == ("xt",)
    with pytest.raises(UserError, match="must hold the target 'xt'"):
        load_preset("celebahq", target="xt")
    with pytest.raises(UserError, match="preset 'digits' has images of its own"):
        load_preset("digits", images="photos")
    with pytest.raises(UserError, match="must be a tuple of names"):
        load_preset("digits", stored=(1,))
