import json
import re
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from advkd import run
from advkd.__main__ import cli
from advkd.data import load_images
from advkd.evaluation import Metric, sample_student
from advkd.pipeline import StudentPipeline
from advkd.presets import ASSETS, load_preset
from advkd.student import Student

COMMANDS = [
    "ablate",
    "benchmark",
    "compare",
    "demo",
    "deploy",
    "evaluate",
    "export",
    "extractor",
    "quality",
    "reproduce",
    "sample",
    "teacher",
    "train",
    "trajectories",
]


@pytest.fixture(scope="module")
def student(tmp_path_factory, improved):
    folder = tmp_path_factory.mktemp("student")
    StudentPipeline(Student.from_preset(improved)).save_pretrained(folder)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def assert_user_error(result, message):
    """Exit status 2, one line that says what is wrong on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(f"advkd: error: [^\n]*{message}[^\n]*\n", result.stderr)
    assert isinstance(result.exception, SystemExit)


def test_the_commands_are_listed():
    result = invoke("--help")
    assert result.exit_code == 0
    assert sorted(cli.commands) == COMMANDS
    assert all(re.search(rf"^  {name} +\w", result.stdout, re.MULTILINE) for name in COMMANDS)
    assert invoke("-h").stdout == result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_with_its_meaning(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert " ".join(cli.commands[name].help.split()) in " ".join(result.stdout.split())
    text = " ".join(result.stdout.split())
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            assert option.help and all(flag in text for flag in option.opts)
            assert " ".join(option.help.split()) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trajectories", "--preset", "mnist", "--out", "x"],
            "no preset 'mnist'; presets: digits, glyphs, celebahq, cifar10, lsun-church, lsun-bedroom",
        ),
        (["train", "--recipe", "best", "--out", "x"], "no recipe 'best'; recipes: paper, improved"),
        (["train", "--recipe", "paper", "--epochs", "0", "--out", "x"], "epochs is 0.0, but must be positive"),
        (["train", "--epochs", "5", "--out", "x"], "--epochs has no effect on recipe 'improved'"),
        (["train", "--recipe", "paper", "--steps", "5", "--out", "x"], "--steps has no effect on recipe 'paper'"),
        (["train", "--teacher", "t", "--trajectories", "y", "--out", "x"], "--teacher has made the --trajectories"),
        (["trajectories", "--teacher", "nowhere/else/t", "--out", "x"], "'nowhere/else/t'"),
        (["evaluate", str(ASSETS / "digits-teacher"), "--out", "x.json"], "holds no readable student"),
        (["reproduce", "-p", "preset", "celebahq"], "the preset is named by --preset celebahq"),
        (["train", "--trajectories", "nowhere", "--out", "x"], "nowhere holds no trajectories"),
        (["sample", "nowhere", "--out", "x.png"], "nowhere holds no student"),
        (["evaluate", "nowhere", "--out", "x.json"], "nowhere holds no student"),
        (["demo", "nowhere"], "nowhere holds no student"),
        (["demo", "nowhere", "--no-serve"], "--no-serve without --out leaves nothing behind"),
        (["ablate", "--group", "colour"], "no group 'colour'; groups: 'waterfall', 'submodules'"),
        (["quality", "--sampler", "ddim-51"], "no sampler 'ddim-51'; samplers: ddim-1, ddim-2"),
        (
            ["quality", "--preset", "celebahq"],
            "'celebahq' has no embedded images to compare with; presets: digits, glyphs",
        ),
        (["teacher", "--preset", "celebahq", "--out", "x"], "'celebahq' are not embedded"),
        (["extractor", "--preset", "celebahq", "--out", "x"], "'celebahq' are not embedded"),
    ],
)
def test_user_errors_are_one_line_and_status_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_user_error(invoke(*arguments), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "file"), [("teacher", "model_index.json"), ("extractor", "config.json")])
def test_what_is_finished_is_not_overwritten(tmp_path, command, file):
    (tmp_path / file).write_text("finished")
    assert_user_error(invoke(command, "--steps", 1, "--out", tmp_path), f"holds a finished {command}; choose")
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_student_of_another_size_is_not_evaluated(tmp_path, improved):
    other = improved.replace(image_size_px=8, widths=(4,))
    StudentPipeline(Student.from_preset(other)).save_pretrained(tmp_path / "s")
    result = invoke("evaluate", tmp_path / "s", "--out", tmp_path / "x.json")
    assert_user_error(result, "makes 1 channels at 8 px, but preset 'digits' has 1 at 16")


def test_an_unwritable_place_is_one_line(tmp_path, student):
    (tmp_path / "file").touch()
    assert_user_error(invoke("sample", student, "--out", tmp_path / "file" / "x.png"), "file")


def test_training_takes_over_what_a_given_store_was_made_with(tmp_path, monkeypatch, store):
    trained = []
    record = SimpleNamespace(step=1, images_seen=1)
    monkeypatch.setattr("advkd.run.train_run", lambda preset, *_, **__: trained.append(preset) or [record])
    assert invoke("train", "--trajectories", store.folder, "--out", tmp_path).exit_code == 0
    assert (trained[0].sampler_steps, trained[0].trajectories) == (10, 12)  # the preset itself has 50 and 5000


@pytest.mark.parametrize(
    ("method", "fields", "count"),
    [("add", [], 64), ("add", ["--set", "trajectories=99"], 99), ("regression", [], 5000), ("advkd", [], 5000)],
)
def test_a_method_that_learns_from_no_trajectories_waits_for_none(tmp_path, monkeypatch, method, fields, count):
    made = []
    record = SimpleNamespace(step=1, images_seen=1)
    monkeypatch.setattr("advkd.trajectories.generate_trajectories", lambda _, preset, *__, **___: made.append(preset))
    monkeypatch.setattr("advkd.run.train_run", lambda *_, **__: [record])
    assert invoke("train", "--method", method, *fields, "--out", tmp_path).exit_code == 0
    assert made[0].trajectories == count


def test_an_interrupted_teacher_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    assert_user_error(invoke("teacher", "--out", tmp_path), "holds an interrupted run; go on with --resume")


@pytest.mark.parametrize("arguments", [["train"], ["sample"], ["train", "--out", "x", "--steps", "0"], ["paint"]])
def test_usage_errors_are_status_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr and "Traceback" not in result.output


def test_an_interrupt_is_status_130(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("advkd.run.load_run", interrupted)
    assert invoke("sample", "student", "--out", "x.png").exit_code == 130


def test_sample_writes_a_grid_that_follows_from_the_seed(tmp_path, student):
    written = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        result = invoke("sample", student, "--count", 4, "--seed", seed, "--out", tmp_path / name / "grid.png")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"4 images: {tmp_path / name / 'grid.png'}\n"
        written.append((tmp_path / name / "grid.png").read_bytes())
    assert written[0] == written[1] != written[2]
    image = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert image.shape == (2 * 18 + 2, 2 * 18 + 2, 3)  # 16 px and a frame of 2 px each
    expected = sample_student(StudentPipeline.from_pretrained(student), 1, 5)[0, 0].numpy() / 2 + 0.5
    np.testing.assert_allclose(image[2:18, 2:18, 0] / 255, expected, atol=1 / 255)


def test_evaluate_writes_a_row_with_its_protocol(tmp_path, student):
    out = tmp_path / "result.json"
    result = invoke("evaluate", student, "--count", 64, "--seed", 3, "--out", out)
    assert result.exit_code == 0, result.output
    table = json.loads(out.read_text())
    assert table.keys() == {"protocol", "rows"} and len(table["rows"]) == 1
    row, protocol = table["rows"][0], table["protocol"]
    assert (protocol["metric"], protocol["images"], protocol["sampling_seed"]) == ("FD-digits", 64, 3)
    assert protocol["reference_train"] == "train split, 1197 images"
    samples = sample_student(StudentPipeline.from_pretrained(student), 64, 3)
    heldout = load_images(load_preset("digits"), "heldout")[0]
    assert row["recipe"] is None  # a pipeline alone does not say what made it
    assert row["fd_heldout"] == pytest.approx(Metric().compare(samples, heldout)["fd"], rel=1e-6)
    assert result.stdout.startswith(f"FD-digits {row['fd_train']:.3f} (train), {row['fd_heldout']:.3f} (held out)")


def test_evaluate_refuses_too_few_images(tmp_path, student):
    result = invoke("evaluate", student, "--count", 63, "--out", tmp_path / "result.json")
    assert_user_error(result, "63 images are too few for 64 features")
    assert list(tmp_path.iterdir()) == []


def test_any_field_can_be_set_and_a_student_is_judged_by_what_it_was_trained_for(tmp_path, teacher_folder):
    fields = [
        "--set",
        "submodules=3",
        "--set",
        "widths=[4, 6]",
        "--set",
        "shard_size=4",
        "--set",
        "teacher_dtype=float32",
    ]
    own = ["--teacher", teacher_folder, "--count", 8, "--sampler-steps", 10]
    made = invoke("trajectories", *own, *fields, "--out", tmp_path / "store")
    assert made.exit_code == 0 and "submodule 2" in made.output and "submodule 3" not in made.output
    few = ["--set", "submodules=3", "--set", "widths=[4, 6]", "--set", "batch_sizes=[4]", "--steps", 2]
    assert invoke("train", "--trajectories", tmp_path / "store", *few, "--out", tmp_path / "run").exit_code == 0
    judged = invoke("evaluate", tmp_path / "run", "--count", 8, "--out", tmp_path / "row.json")
    assert judged.exit_code == 2 and "no classifier of one's own images" in judged.output
    refused = invoke("trajectories", *own, "--set", "submodules", "--out", tmp_path / "other")
    assert refused.exit_code == 2 and "write --set submodules=VALUE" in refused.output
    unknown = invoke("trajectories", *own, "--set", "depth=3", "--out", tmp_path / "other")
    assert unknown.exit_code == 2 and "a preset has no field 'depth'" in unknown.output


def test_an_interrupted_training_says_how_to_go_on(tmp_path, monkeypatch, store, improved):
    monkeypatch.setattr("advkd.checkpoints.CHECKPOINT_EVERY", 2)
    started = run.train_run(improved.replace(real_share=0.0), store, tmp_path, device="cpu")
    for record in started:
        if record.step == 3:
            break
    started.close()
    refused = invoke("sample", tmp_path, "--out", tmp_path / "x.png")
    assert refused.exit_code == 2 and "the same command and --resume" in refused.output
