import inspect
import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers.pipelines import pipeline_utils
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from PIL import Image

from advkd import card, pipeline, run
from advkd.__main__ import cli
from advkd.denoiser import Denoiser
from advkd.pipeline import FewStepPipeline, StudentPipeline
from advkd.presets import Preset, UserError, asdict, load_preset
from advkd.student import Student, count_parameters

ROOT = Path(__file__).parent.parent
SHARED = {"README.md", "model_index.json", "samples.png"} | {
    f"student/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")
}
ROW = {"steps": 1, "fd_train": 1.23456, "fd_heldout": 2.5, "recall": 0.65, "unknown": None}
PROTOCOL = {"metric": "FD-digits", "images": 64, "sampling_seed": 3, "versions": {"torch": "2.15", "python": "3.11"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory, paper, store):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    run.finish(run.train_run(paper, store, folder, device="cpu"))
    return folder


@pytest.fixture
def by_hand(improved):
    return StudentPipeline(Student.from_preset(improved))


@pytest.fixture
def few_step(teacher, teacher_folder, tiny):
    preset = load_preset("digits", "add", teacher=str(teacher_folder), **tiny)
    return FewStepPipeline(Denoiser.from_teacher(teacher, preset), {"preset": asdict(preset)})


@pytest.fixture
def hub(monkeypatch):
    """What would be sent: the calls of the hub's functions, with the files that they were given."""
    calls = SimpleNamespace(created=[], sent=[])
    asked = {name: inspect.signature(getattr(pipeline, name)) for name in ("create_repo", "upload_folder")}

    def create_repo(repo_id, **options):
        asked["create_repo"].bind(repo_id, **options)
        calls.created.append((repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(*, folder_path, **options):
        asked["upload_folder"].bind(folder_path=folder_path, **options)
        calls.sent.append((options, contents(Path(folder_path))))
        return SimpleNamespace(oid="a commit")

    def unwanted(*_, **__):
        raise AssertionError("diffusers' own card or upload")

    monkeypatch.setattr(pipeline, "create_repo", create_repo)
    monkeypatch.setattr(pipeline, "upload_folder", upload_folder)
    for module in (hub_utils, pipeline_utils):
        for name in ("create_repo", "upload_folder", "load_or_create_model_card", "populate_model_card"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, unwanted)
    return calls


@pytest.fixture
def offline(monkeypatch):
    def refused(*_):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def text_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_snippet(folder, monkeypatch) -> list[Image.Image]:
    """The images that the card's lines of Python make in its folder."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", text_of(folder), re.DOTALL)
    names = {}
    exec(code, names)
    return names["images"]


def test_front_matter_is_what_the_hub_reads(tmp_path, by_hand):
    by_hand.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert data.license == "unknown" and data.base_model is None and "advkd" in data.tags
    written = yaml.safe_load(text_of(tmp_path).split("---\n")[1])
    assert written["tags"] == data.tags


@pytest.mark.parametrize(
    ("teacher", "revision", "images", "licence"),
    [
        ("assets/digits-teacher", None, "", "apache-2.0"),
        ("/home/me/teacher", None, "", "other"),
        ("google/ddpm-cifar10-32", "c0ffee", "hf:me/pictures", "other"),
    ],
)
def test_weights_are_ours_to_license_only_where_all_they_learnt_from_is(improved, teacher, revision, images, licence):
    data = "folder" if images else "digits"
    preset = asdict(improved) | {"teacher": teacher, "data": data} | ({"images": images} if images else {})
    facts = {"preset": preset, "teacher_revision": revision}
    made = card.make_card("StudentPipeline", Student.from_preset(improved), facts)
    assert made.data.license == licence and made.data.base_model == (teacher if revision else None)
    assert made.data.datasets == (["me/pictures"] if images else None)
    assert ("revision `c0ffee`" in made.text) == bool(revision)
    assert ("Weights and package: Apache-2.0" in made.text) == (licence == "apache-2.0")
    assert ("CC BY 4.0" in made.text) == (licence == "apache-2.0")


@pytest.mark.parametrize("kind", ["by_hand", "few_step"])
def test_the_cards_lines_of_python_make_its_grid(request, tmp_path, monkeypatch, kind):
    saved = request.getfixturevalue(kind)
    saved.save_pretrained(tmp_path)
    images = run_snippet(tmp_path, monkeypatch)
    steps = {"steps": 4} if kind == "few_step" else {}
    expected = saved(64, seed=0, output_type="np", **steps).images
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert len(images) == 64 and grid.shape == (8 * 18 + 2, 8 * 18 + 2, 3)
    for i, image in enumerate(images):
        row, column = 2 + 18 * (i // 8), 2 + 18 * (i % 8)
        shown = grid[row : row + 16, column : column + 16, 0] / 255
        np.testing.assert_allclose(np.asarray(image) / 255, expected[i, ..., 0], atol=1 / 255)
        np.testing.assert_allclose(shown, expected[i, ..., 0], atol=1 / 255)


def test_a_large_grid_has_fewer_images_and_small_batches(tmp_path, monkeypatch):
    student = Student(image_size_px=256, channels=3, submodules=6, widths=(2, 2, 2, 2, 2, 2))
    batches, forward = [], Student.forward
    monkeypatch.setattr(Student, "forward", lambda self, x, *given: batches.append(len(x)) or forward(self, x, *given))
    StudentPipeline(student).save_pretrained(tmp_path)
    assert sum(batches) == 16 and max(batches) <= 5
    assert Image.open(tmp_path / "samples.png").size == (4 * 258 + 2, 4 * 258 + 2)
    assert "pipeline(batch_size=16, seed=0)" in text_of(tmp_path)


def test_what_nobody_knows_is_not_recorded(tmp_path, by_hand):
    by_hand.save_pretrained(tmp_path)
    text = text_of(tmp_path)
    for line in ("Real images", "Teacher", "Trajectories", "Training ran on", "Training took", "Metrics"):
        assert f"- {line}: not recorded\n" in text
    assert "The recipe was not recorded." in text and "Of the weights: not recorded" in text
    assert "3500" not in text and "fingerprint" not in text


def test_a_runs_card_says_what_it_was_made_from(made, paper, store):
    text, student = text_of(made / "student"), run.load_run(made).student
    all_of_it, deployed = count_parameters(student), count_parameters(student.generator())
    assert all_of_it > deployed and f"| {all_of_it:,}, of which sampling needs {deployed:,} |" in text
    assert "| images | 1 x 16 x 16, unconditional |" in text and "a chain of 3 submodules" in text
    assert f"`{store.config['teacher_fingerprint']}`" in text
    assert "12 of the teacher's, ddpm with 10 of 1000 steps in float32, noise of seed 0" in text
    assert "| `learning_rate` | 0.0001 |" in text and "| `epochs` | 1 |" in text and "| `widths` | 4, 6 |" in text
    assert "`student_timesteps`" not in text and "| `steps` |" not in text  # of other students and schedules
    assert "- Training ran on: cpu, float32, 1 threads\n- Training took: not recorded" in text


def test_a_shared_student_does_not_say_where_it_lay(tmp_path, made, teacher_folder, monkeypatch, hub):
    run.load_run(made).push_to_hub("me/student")
    ((_, files),) = hub.sent
    for name, content in files.items():
        if not name.endswith((".png", ".safetensors")):
            assert not re.search(r"/(tmp|home|root)/|_name_or_path", content.decode()), name
            assert str(teacher_folder.parent) not in content.decode()
    assert f"`{teacher_folder.name}`, a folder" in files["README.md"].decode()


def test_who_loads_and_saves_a_student_keeps_its_card_and_facts(tmp_path, made):
    StudentPipeline.from_pretrained(made / "student").save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made / "student")
    facts = StudentPipeline.from_pretrained(tmp_path / "again").facts
    assert facts["preset"]["recipe"] == "paper" and "seconds" not in facts["training"]
    facts["preset"].clear()  # a copy
    loaded = StudentPipeline.from_pretrained(made / "student")
    deployable = StudentPipeline(loaded.student.generator(), loaded.facts)
    deployable.save_pretrained(tmp_path / "deployable")
    before, after = loaded.facts, deployable.facts
    assert before.pop("weights") != after.pop("weights")
    assert after == before != {} and "recipe paper" in text_of(tmp_path / "deployable")


def test_facts_come_along_from_the_hub(tmp_path, made, offline):
    """As the hub's client keeps a pipeline: of files beside the models, it fetches the index alone."""
    kept = tmp_path / "models--me--student"
    shutil.copytree(made / "student", kept / "snapshots" / "c0ffee")
    (kept / "snapshots" / "c0ffee" / "README.md").unlink()
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("c0ffee")
    loaded = StudentPipeline.from_pretrained("me/student", cache_dir=tmp_path, local_files_only=True)
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made / "student")


def test_saving_twice_writes_the_same_and_leaves_the_random_state_and_mode_alone(tmp_path, by_hand):
    by_hand.student.train()
    state = torch.get_rng_state()
    for name in ("a", "b"):
        by_hand.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state) and by_hand.student.training


def test_a_folder_counts_as_whole_only_with_its_card(tmp_path, by_hand, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        by_hand.save_pretrained(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_a_loaded_run_knows_how_long_it_took(tmp_path, made):
    loaded, spent = run.load_run(made), run.read_run(made)
    assert loaded.facts["training"]["seconds"] == spent["seconds"] > 0
    loaded.save_pretrained(tmp_path)
    assert f"- Training took: {spent['seconds']:,.0f} s, {spent['cpu_seconds']:,.0f} s of the CPU\n" in text_of(
        tmp_path
    )


def test_a_student_of_before_the_cards_gets_one(tmp_path, made):
    shutil.copytree(made, tmp_path / "run")
    index = tmp_path / "run" / "student" / "model_index.json"
    index.write_text(json.dumps({k: x for k, x in json.loads(index.read_text()).items() if k != "facts"}))
    for file in ("README.md", "samples.png"):
        (index.parent / file).unlink()
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about.pop("teacher")
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    assert StudentPipeline.from_pretrained(index.parent).facts == {}
    run.load_run(tmp_path / "run").add_measurement(ROW, PROTOCOL, index.parent)
    assert "recipe paper" in text_of(index.parent) and "1.235" in text_of(index.parent)
    assert (index.parent / "samples.png").read_bytes() == (made / "student" / "samples.png").read_bytes()


def test_a_preset_of_another_version_is_shown_as_far_as_it_goes(by_hand):
    facts = {"preset": {"name": "digits", "recipe": "new", "data": "digits", "a_later_field": 1}}
    text = str(card.make_card("StudentPipeline", by_hand.student, facts))
    assert "recipe new" in text and "not recorded of the teacher's, not recorded with" in text


def test_a_measurement_takes_the_place_of_an_earlier_one(tmp_path, by_hand):
    by_hand.save_pretrained(tmp_path)
    by_hand.add_measurement(ROW, PROTOCOL, tmp_path)
    by_hand.add_measurement(ROW | {"steps": 2, "fd_train": 77.0}, PROTOCOL, tmp_path)
    by_hand.add_measurement(ROW | {"fd_train": 0.5, "near_copies": 0.01}, PROTOCOL | {"images": 128}, tmp_path)
    text = text_of(tmp_path)
    header = "| FD-digits, train split | held-out split | recall | near copies |"
    assert f"### FD-digits, 1 step\n\n{header}\n| --- | --- | --- | --- |\n| 0.5 | 2.5 | 0.65 | 0.01 |" in text
    assert "1.235" not in text and "- images: 128" in text and "- versions: python 3.11, torch 2.15" in text
    assert "### FD-digits, 2 steps" in text and "| 77 | 2.5 | 0.65 |" in text
    assert "Metrics: not recorded" not in text and text.count("## Measurements") == 1
    assert text.count("Not measured: an FID, to which") == 1
    loaded = StudentPipeline.from_pretrained(tmp_path)
    assert [m["row"]["fd_train"] for m in loaded.facts["measurements"]] == [0.5, 77.0]
    loaded.save_pretrained(tmp_path / "again")
    assert text_of(tmp_path / "again") == text


def test_what_the_owner_wrote_into_the_card_stays(tmp_path, by_hand):
    by_hand.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"Mine.\n{text_of(tmp_path)}\nMine too.\n", encoding="utf-8")
    by_hand.add_measurement(ROW, PROTOCOL, tmp_path)
    text = text_of(tmp_path)
    assert text.startswith("Mine.\n") and text.endswith("\nMine too.\n") and "1.235" in text
    (tmp_path / "README.md").write_text("All of it mine.", encoding="utf-8")
    by_hand.add_measurement(ROW, PROTOCOL, tmp_path)
    assert text_of(tmp_path) == "All of it mine."


def test_errors_say_what_to_give(tmp_path, by_hand):
    with pytest.raises(UserError, match=r"holds no pipeline \(no model_index\.json\); save it there first"):
        by_hand.add_measurement(ROW, PROTOCOL, tmp_path)
    with pytest.raises(UserError, match=r"protocol is {'images': 1}, but must name its metric"):
        by_hand.add_measurement(ROW, {"images": 1})
    for facts in ("a text", {"teacher": Path("x")}, [1]):
        with pytest.raises(UserError, match=r"facts is .*, but must be a dictionary that JSON can write"):
            StudentPipeline(by_hand.student, facts)


def test_evaluate_puts_its_row_into_the_card(tmp_path, made, monkeypatch):
    shutil.copytree(made, tmp_path / "run")
    arguments = ["evaluate", tmp_path / "run", "--count", 64, "--out", tmp_path / "row.json"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    row, text = json.loads((tmp_path / "row.json").read_text())["rows"][0], text_of(tmp_path / "run" / "student")
    assert f"| {row['fd_train']:.4g} | {row['fd_heldout']:.4g} | {row['kid_train']:.4g} |" in text
    assert "- images: 64" in text and "- sampling_seed: 1" in text and "Training took: not recorded" not in text

    def read_only(*_):
        raise PermissionError("a lent folder")

    monkeypatch.setattr(StudentPipeline, "add_measurement", read_only)
    (tmp_path / "row.json").unlink()
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and (tmp_path / "row.json").exists()
    assert re.fullmatch(r"advkd: the model card of .* stays as it is \(a lent folder\)\n", result.stderr)


def test_saving_sends_nothing(tmp_path, by_hand, hub, offline):
    by_hand.save_pretrained(tmp_path, repo_id="me/student", token="secret")
    assert hub.created == hub.sent == []
    assert contents(tmp_path).keys() == SHARED


@pytest.mark.parametrize("kind", ["by_hand", "few_step"])
def test_push_to_hub_sends_weights_index_card_and_grid(request, tmp_path, kind, hub, offline):
    shared = request.getfixturevalue(kind)
    options = {"private": True, "token": "secret", "create_pr": True, "commit_message": "The first"}
    assert shared.push_to_hub("me/student", **options).oid == "a commit"
    assert hub.created == [("me/student", {"private": True, "token": "secret", "exist_ok": True})]
    ((how, files),) = hub.sent
    common = {"repo_id": "me/student", "token": "secret", "create_pr": True, "commit_message": "The first"}
    assert how == common | {"path_in_repo": None}
    assert files.keys() == SHARED
    shared.save_pretrained(tmp_path)
    local = contents(tmp_path)
    name = type(shared).__name__
    assert files.pop("README.md").decode() == local.pop("README.md").decode().replace(
        f'in this folder:\n\n```python\nfrom advkd.pipeline import {name}\n\npipeline = {name}.from_pretrained(".")',
        f'in this folder:\n\n```python\nfrom advkd.pipeline import {name}\n\npipeline = {name}.from_pretrained("me/student")',
    ).replace("installed, in this folder:", "installed:")
    assert files == local


def test_save_pretrained_sends_only_what_it_saved(tmp_path, by_hand, hub, offline):
    folder = tmp_path / "my-student"
    folder.mkdir()
    (folder / "student").mkdir()
    for name in ("checkpoint.safetensors", "notes.txt", "logs.json", "student/of-another-time.safetensors"):
        (folder / name).write_text("private")
    assert by_hand.save_pretrained(folder, push_to_hub=True).oid == "a commit"
    ((how, files),) = hub.sent
    assert hub.created[0][0] == "my-student" and how["repo_id"] == "me/my-student"  # as the hub completes it
    assert how["commit_message"] == "Upload StudentPipeline"
    assert files.keys() == SHARED and 'from_pretrained("me/my-student")' in files["README.md"].decode()
    assert files == {name: content for name, content in contents(folder).items() if name in SHARED}
    by_hand.save_pretrained(str(folder), push_to_hub=True, repo_id="us/other", subfolder="of-today")
    assert hub.sent[1][0]["repo_id"] == "us/other" and hub.sent[1][0]["path_in_repo"] == "of-today"


@pytest.mark.parametrize("kind", ["by_hand", "few_step"])
def test_half_precision_and_shards_are_saved_and_read_as_the_card_says(request, tmp_path, monkeypatch, kind):
    saved = request.getfixturevalue(kind)
    saved.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16", max_shard_size="2KB")
    files = sorted(file.name for file in tmp_path.glob("student/*.safetensors"))
    assert len(files) > 1 and all("bf16" in name for name in files)
    assert '.from_pretrained(".", variant="bf16")' in text_of(tmp_path)
    assert len(run_snippet(tmp_path, monkeypatch)) == 64


def test_the_card_cites_what_the_citation_file_does():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = cited["references"]
    assert f"title = {{{cited['title']}}}" in card.CITATION and cited["authors"][0]["name"] in card.CITATION
    assert f"title = {{{paper['title']}}}" in card.CITATION and f"url = {{{paper['url']}}}" in card.CITATION
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author = {{{names}}}" in card.CITATION and f"year = {{{paper['year']}}}" in card.CITATION
    assert f"license = {{{cited['license']}}}" in card.CITATION


def test_the_card_of_another_method_names_its_paper_and_no_trajectories(few_step, by_hand, tmp_path):
    few_step.save_pretrained(tmp_path)
    assert "- Trajectories: none; the training asked the teacher itself" in text_of(tmp_path)
    assert "(arXiv 2311.17042); please cite it too." in text_of(tmp_path).split("## Citation")[1]
    by_hand.save_pretrained(tmp_path / "ours")
    assert "please cite it too" not in text_of(tmp_path / "ours")
    assert {"advkd", *card.METHODS} == set(Preset.__dataclass_fields__["method"].type.__args__)


def test_the_readme_says_how_to_share():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0
    assert 'pipeline.push_to_hub("me/my-student", private=True)' in text
    assert 'save_pretrained("my-student", push_to_hub=True, repo_id="me/my-student", private=True)' in text


def test_a_student_is_not_pickled(tmp_path):
    pipeline = StudentPipeline(Student.from_preset(load_preset("digits", submodules=3, widths=(4, 6))))
    with pytest.raises(UserError, match="safe_serialization is False, which would pickle the weights"):
        pipeline.save_pretrained(tmp_path / "student", safe_serialization=False)
    assert not (tmp_path / "student").exists()
