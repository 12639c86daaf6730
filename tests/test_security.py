"""What others hand in executes nothing, and names no file outside of its folder: pickles, manifests, the server."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants

from advkd import evaluation, run
from advkd import teacher as teachers
from advkd.__main__ import cli
from advkd.demo import RUNTIME, SERVED, build_demo, demo_server
from advkd.evaluation import Metric
from advkd.extractor import Extractor, load_extractor
from advkd.features import DinoFeatures
from advkd.files import check_weights
from advkd.folder import open_cache
from advkd.pipeline import FewStepPipeline, StudentPipeline
from advkd.presets import PINNED, UserError, load_preset, own_preset
from advkd.reproduce import reproduce
from advkd.student import Student
from advkd.teacher import load_teacher, train_teacher
from advkd.trajectories import TrajectoryStore, generate_trajectories

ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model"
FORMS = ("pickle", "torch")  # a bare pickle, and one in the zip that torch.save makes
NAMES = (f"{WEIGHTS}.bin", f"{WEIGHTS}.safetensors")


class Bomb:
    """Whoever unpickles it makes the marker file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def plant(tmp_path):
    """A factory of files that execute code where they are unpickled; at the end none was."""
    marker = tmp_path / "executed"

    def make(path: Path, form: str) -> Path:
        for other in path.parent.glob(f"{path.name.split('.')[0]}.*"):
            other.unlink()  # the weights that it takes the place of
        if form == "pickle":
            path.write_bytes(pickle.dumps(Bomb(marker)))
        else:
            torch.save({"conv_in.weight": Bomb(marker)}, path)
        return path

    yield make
    assert not marker.exists(), "it was unpickled"


@pytest.mark.parametrize("form", FORMS)
def test_the_planted_files_would_execute(tmp_path, form):
    marker, path = tmp_path / "there", tmp_path / "bomb"
    torch.save(Bomb(marker), path) if form == "torch" else path.write_bytes(pickle.dumps(Bomb(marker)))
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())
    assert marker.exists()


# ---- pickles under the names of weights ------------------------------------------------------------------------------


@pytest.fixture
def student_folder(tmp_path, improved):
    """A student's pipeline on disk."""
    StudentPipeline(Student.from_preset(improved)).save_pretrained(tmp_path / "run" / "student")
    return tmp_path / "run" / "student"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_in_a_teachers_folder_is_refused(tmp_path, plant, teacher_folder, improved, name, form):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    plant(tmp_path / "teacher" / "unet" / name, form)
    with pytest.raises(
        UserError, match=re.escape(f"teacher '{tmp_path / 'teacher'}' has no UNet2DModel (safetensors)")
    ):
        load_teacher(improved, str(tmp_path / "teacher"))
    result = CliRunner().invoke(cli, ["trajectories", "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path)])
    assert result.exit_code == 2 and "has no UNet2DModel" in result.stderr


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_in_a_students_pipeline_is_refused(plant, student_folder, tmp_path, name, form):
    plant(student_folder / "student" / name, form)
    for folder in (student_folder, student_folder.parent):
        with pytest.raises(UserError, match=re.escape(f"{student_folder} holds no readable student")):
            run.load_run(folder)
    with pytest.raises(UserError, match=f"{WEIGHTS}.safetensors is damaged or missing"):
        StudentPipeline.from_pretrained(student_folder)
    with pytest.raises(UserError, match="holds no readable student"):
        build_demo(student_folder, tmp_path / "page")


def test_even_harmless_weights_are_not_read_from_a_pickle(student_folder):
    (weights,) = (student_folder / "student").glob("*.safetensors")
    torch.save(StudentPipeline.from_pretrained(student_folder).student.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"holds no readable student \(.*safetensors is damaged or missing"):
        run.load_run(student_folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_in_an_extractors_folder_is_refused(tmp_path, plant, name, form):
    Extractor().save_pretrained(tmp_path / "extractor")
    plant(tmp_path / "extractor" / name, form)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'extractor'} holds no feature extractor")):
        load_extractor(tmp_path / "extractor")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_in_the_folder_of_a_dino_is_refused(tmp_path, plant, name, form):
    transformers = pytest.importorskip("transformers")
    config = dict(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)
    transformers.Dinov2Model(transformers.Dinov2Config(**config)).save_pretrained(tmp_path / "dino")
    (tmp_path / "dino" / "model.safetensors").unlink()
    plant(tmp_path / "dino" / name, form)
    with pytest.raises(UserError, match=re.escape(f"features '{tmp_path / 'dino'}' are no DINOv2 that can be read")):
        DinoFeatures.from_pretrained(str(tmp_path / "dino"))


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_for_a_checkpoint_is_refused(tmp_path, plant, improved, store, form):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint = plant(folder / "checkpoint.safetensors", form)
    about = {"preset": run.preset_fields(improved), "trajectories": store.config, "device": "cpu"}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "curves.csv").write_text("step\n")
    images = torch.zeros(4, 1, 16, 16)
    with pytest.raises(UserError, match=re.escape(f"{checkpoint} is not a readable checkpoint")):
        run.finish(run.train_run(improved, store, folder, images=images, device="cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_for_the_checkpoint_of_a_teacher_is_refused(tmp_path, plant, make_unet, linear_schedule, form):
    checkpoint, images = plant(tmp_path / "checkpoint.safetensors", form), torch.zeros(4, 1, 16, 16)
    training = train_teacher(
        make_unet(), linear_schedule(), images, images, steps=1, checkpoint=checkpoint, resume=True
    )
    with pytest.raises(UserError, match=re.escape(f"{checkpoint} is not a readable checkpoint")):
        next(training)


@pytest.fixture
def shards(tmp_path, store):
    """A copy of the trajectories, to be spoilt."""
    shutil.copytree(store.folder, tmp_path / "trajectories")
    return tmp_path / "trajectories"


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_for_a_shard_is_refused(shards, plant, teacher, improved, form):
    shard = plant(shards / "shard-00001.safetensors", form)
    for read in (
        lambda store: store.images(),
        lambda store: store.latents("block-mean"),
        lambda store: store.targets(0, "x0"),
        lambda store: store.verify(),
    ):
        with pytest.raises(UserError, match=re.escape(f"{shard} is damaged or missing")):
            read(TrajectoryStore(shards))
    with pytest.raises(UserError, match=re.escape(f"{shard} is damaged or missing")):
        generate_trajectories(teacher, improved, shards)


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_for_inception_is_refused_even_where_it_was_downloaded(tmp_path, plant, monkeypatch, form):
    with pytest.raises(UserError, match="does not hold weights alone and is not opened"):
        Metric(inception=plant(tmp_path / "weights.pth", form))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    cached = plant(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth", form)
    with pytest.raises(UserError, match=re.escape(f"{cached} does not hold weights alone and is not opened")):
        Metric(inception="download").distance(torch.zeros(4, 1, 16, 16), torch.zeros(4, 1, 16, 16), few=True)


def test_inception_is_downloaded_with_its_checksum(tmp_path, monkeypatch):
    asked = []

    def fetch(url, file, prefix, progress):
        asked.append((url, prefix))
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(UserError, match=r"cannot be fetched from https://.* \(invalid hash value\); give their file"):
        Metric(inception="download").distance(torch.zeros(4, 1, 16, 16), torch.zeros(4, 1, 16, 16), few=True)
    assert asked == [(evaluation.URL_INCEPTION_V3, "6726825d")] and asked[0][0].startswith("https://")


# ---- files that name others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["../evil.safetensors", "/evil.safetensors", "evil.bin", "a\\b.safetensors", 3, None])
def test_an_index_of_weights_names_safetensors_beside_it_and_nothing_else(
    tmp_path, teacher_folder, improved, student_folder, part
):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    Extractor().save_pretrained(tmp_path / "extractor")
    weight_map = None if part is None else {"conv_in.weight": part}
    for folder, load in (
        (tmp_path / "teacher" / "unet", lambda: load_teacher(improved, str(tmp_path / "teacher"))),
        (student_folder / "student", lambda: StudentPipeline.from_pretrained(student_folder)),
        (tmp_path / "extractor", lambda: load_extractor(tmp_path / "extractor")),
    ):
        (folder / f"{WEIGHTS}.safetensors").unlink()
        index = folder / f"{WEIGHTS}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(UserError, match=re.escape(f"{index} names {part!r}, but its weights must be safetensors")):
            load()
    index.write_text("[")
    with pytest.raises(UserError, match=re.escape(f"{index} is damaged")):
        check_weights(index.parent)


def test_weights_in_several_files_are_still_read(tmp_path, improved):
    student = Student.from_preset(improved)
    StudentPipeline(student).save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list((tmp_path / "student").glob("*.safetensors"))) > 1
    loaded = StudentPipeline.from_pretrained(tmp_path).student
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in loaded.state_dict().items())


ESCAPES = ["../../evil.safetensors", "/etc/passwd", "shard-00000.safetensors/../x", "..", "shard-0.bin", "C:\\x"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_manifest_of_trajectories_names_no_file_elsewhere(shards, teacher, improved, name):
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][name] = manifest["shards"].pop("shard-00001.safetensors")
    (shards / "manifest.json").write_text(json.dumps(manifest))
    for use in (lambda: TrajectoryStore(shards), lambda: generate_trajectories(teacher, improved, shards)):
        with pytest.raises(UserError, match=re.escape(f"{shards / 'manifest.json'} names {name!r}, but a shard is a")):
            use()


@pytest.mark.parametrize(
    "change",
    [
        [],
        {"config": []},
        {"config": {}},
        {"shards": []},
        {"shards": {"shard-00000.safetensors": 3}},
        {"shards": {"shard-00000.safetensors": {"count": "5", "sha256": ""}}},
    ],
)
def test_a_manifest_of_another_shape_is_damaged(shards, change):
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | change if isinstance(change, dict) else change))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        TrajectoryStore(shards)


FOREIGN = {
    "student": [["os", "system"], ["evil", "Evil"], ["../evil", "Evil"], ["diffusers", "UNet2DModel"], [None, None]],
    "scheduler": [["evil", "Evil"], ["diffusers", "DDPMScheduler"]],
    "text_encoder": [["transformers", "AutoModel"]],
    "extra": ["../../etc/passwd"],
}


@pytest.mark.parametrize(("part", "value"), [(part, value) for part, values in FOREIGN.items() for value in values])
def test_a_pipelines_index_names_this_packages_student_and_nothing_else(tmp_path, student_folder, part, value):
    code = f"from pathlib import Path\n\nPath({str(tmp_path / 'executed')!r}).touch()\n\n\nclass Evil:\n    pass\n"
    for folder in (student_folder, student_folder / "student"):
        (folder / "evil.py").write_text(code)
    index = student_folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: value}))
    named = f"model_index.json names the student {value!r}" if part == "student" else f"names {part!r} as {value!r}"
    with pytest.raises(UserError, match=re.escape(named)):
        run.load_run(student_folder)
    for kind in (StudentPipeline, FewStepPipeline):
        with pytest.raises(UserError, match=re.escape(named)):
            kind.from_pretrained(student_folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["Evil", ["evil", "Evil"], "DiffusionPipeline", None])
def test_a_pipeline_of_another_class_is_refused(student_folder, name):
    index = student_folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    with pytest.raises(UserError, match=re.escape(f"model_index.json names the pipeline {name!r}, but must name one")):
        run.load_run(student_folder)


def test_a_pipeline_is_not_asked_to_execute_code(student_folder):
    for options in ({"trust_remote_code": True}, {"custom_pipeline": "evil"}, {"use_safetensors": False}):
        (name,) = options
        with pytest.raises(UserError, match=f"{name} is {options[name]!r}, which could execute code of others"):
            StudentPipeline.from_pretrained(student_folder, **options)
    assert StudentPipeline.from_pretrained(student_folder, use_safetensors=True, trust_remote_code=False).student


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in which `reproduce` starts, with what an earlier call left."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    monkeypatch.setattr("advkd.reproduce.NOTEBOOKS", ())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "digits" / "reproduce.json"


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "figures/digits/..", "figures/digits/a/../../b", ""]
)
def test_what_reproduce_recorded_names_figures_and_nothing_else(checkout, path):
    checkout.write_text(json.dumps({"01_teacher": {"hash": "", "wrote": {path: ""}}}))
    with pytest.raises(
        UserError, match=re.escape(f"reproduce.json names {path!r}, which is no file in figures/digits")
    ):
        reproduce("digits", {})


@pytest.mark.parametrize("text", ["{", "[]", '{"01_teacher": 3}', '{"01_teacher": {"hash": ""}}'])
def test_a_damaged_record_of_reproduce_is_named(checkout, text):
    checkout.write_text(text)
    with pytest.raises(UserError, match=r"reproduce\.json is damaged .*; remove it"):
        reproduce("digits", {})
    checkout.write_text('{"01_teacher": {"hash": "", "wrote": {"figures/digits/a.png": ""}}}')
    assert reproduce("digits", {}) == 0


@pytest.mark.parametrize("name", ["index.json", "progress.json"])
@pytest.mark.parametrize(
    "value", ["{", "[]", {"images": "../../x"}, {"images": -1}, {"images": 2.0}, {"unreadable": 3}]
)
def test_the_record_of_an_images_cache_is_counts_and_no_path(tmp_path, monkeypatch, name, value):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "one.png")
    open_cache("images", 8, 1)
    (index,) = tmp_path.glob("runs/images/*/index.json")
    state = json.loads(index.read_text()) | {"done": 1, "bytes": 64}
    index.unlink()
    text = value if isinstance(value, str) else json.dumps(state | value)
    (index.parent / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{index.parent.relative_to(tmp_path) / name} is damaged")):
        open_cache("images", 8, 1)


def test_the_pages_runtime_is_named_by_plain_names_with_checksums():
    for name, digest in RUNTIME["files"].items():
        assert re.fullmatch(r"[\w-][\w.-]*\.(mjs|wasm)", name) and re.fullmatch(r"sha384-[\w+/]{64}", digest)
    assert re.fullmatch(r"[\w-]+", RUNTIME["package"]) and re.fullmatch(r"[\d.]+", RUNTIME["version"])
    assert RUNTIME["cdn"].startswith("https://")


# ---- servers ---------------------------------------------------------------------------------------------------------


def test_the_demos_server_follows_no_link_out_of_its_folder(tmp_path):
    folder = tmp_path / "page"
    (folder / "ort").mkdir(parents=True)
    (tmp_path / "private").write_text("private")
    (folder / "student.json").write_text("{}")
    (folder / "latents.bin").symlink_to(tmp_path / "private")
    os.symlink("student.json", folder / "demo.js")  # within the folder
    (folder / "index.html").symlink_to(tmp_path)
    for name in SERVED[-2:]:
        (folder / name).symlink_to(tmp_path / "private")
    with demo_server(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

        def ask(path: str) -> tuple[int, bytes]:
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.putrequest("GET", path)  # as it is: no client tidies it up
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read()

        try:
            assert ask("/student.json") == ask("/demo.js") == (200, b"{}")
            out = ("/../private", "/%2e%2e/private", "/..%2fprivate", "/ort/../../private", "//private", "/ort/..")
            for path in ("/", "/latents.bin", "/index.html", *(f"/{name}" for name in SERVED[-2:]), *out):
                status, body = ask(path)
                assert status == 404 and b"private" not in body, path
        finally:
            server.shutdown()


def test_jupyterlab_keeps_its_token_and_stays_on_loopback():
    texts = {path: path.read_text() for path in (ROOT / "Makefile", ROOT / "README.md", ROOT / ".ci" / "run")}
    assert re.search(r"^lab: env\n\t\$\(BIN\)/jupyter lab$", texts[ROOT / "Makefile"], re.MULTILINE)
    weak = r"(token|password)=\s*['\"]?\s*(['\"]|$|\s)|--ip|0\.0\.0\.0|allow_origin|allow-root|disable_check_xsrf"
    for path, text in texts.items():
        assert not re.search(weak, text, re.MULTILINE), path.name
    configured = [p for p in ROOT.glob("*/*") if re.match(r"jupyter_\w*config|overrides\.json", p.name)]
    assert not configured and not list(ROOT.glob("jupyter*")), "the defaults hold: a token, and 127.0.0.1"
    from jupyter_server.serverapp import ServerApp

    app = ServerApp()
    assert (app.ip, app.allow_origin, app.allow_root, app.disable_check_xsrf) == ("localhost", "", False, False)
    assert len(app.identity_provider_class().token) >= 32


# ---- the lock's vulnerabilities --------------------------------------------------------------------------------------

SKIPPED = {"name": "a", "skip_reason": "Dependency not found on PyPI"}
CLEAN = {"name": "b", "version": "2.0", "vulns": []}
FOUND = {"name": "c", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": []}]}
ANSWERS = {  # what pip-audit prints, its status; ours, and what is said
    "none": ({"dependencies": [CLEAN]}, "", 0, 0, r"^audit: 0 known vulnerabilities in 1 packages$"),
    "some": (
        {"dependencies": [SKIPPED, CLEAN, FOUND]},
        "Found 1 known",
        1,
        1,
        r"^audit: c 1\.0 has PYSEC-1, fixed in: 1\.1\n",
    ),
    "part": ({"dependencies": [SKIPPED, CLEAN]}, "", 0, 0, r"in 1 packages; 1 could not be checked$"),
    "unknown": ({"dependencies": [SKIPPED]}, "", 0, 0, r"^audit: the .* knows none .* nothing was checked$"),
    "offline": (
        None,
        "Traceback\nrequests.exceptions.ConnectionError: x",
        1,
        0,
        r"^audit: .* cannot be reached.*ConnectionError: x\)$",
    ),
    "nothing": ({"dependencies": []}, "", 0, 1, r"^audit: .* found no packages in .* nothing was checked$"),
    "broken": (None, "ERROR: requirement is not hashed", 1, 1, r"^$"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_audit_fails_with_findings_and_tells_a_missing_network_from_none(tmp_path, answer):
    printed, complaint, status, expected, said = ANSWERS[answer]
    stub = tmp_path / "pip-audit"
    body = "" if printed is None else json.dumps(printed)
    stub.write_text(
        f"#!{sys.executable}\nimport sys\nprint({body!r})\nprint({complaint!r}, file=sys.stderr)\nsys.exit({status})\n"
    )
    stub.chmod(0o755)
    command = [sys.executable, str(ROOT / ".ci" / "audit.py")]
    audit = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": str(tmp_path)})
    assert audit.returncode == expected and re.search(said, audit.stdout.strip()), audit.stdout
    assert (complaint in audit.stderr) == (answer == "broken") or not complaint
    stub.unlink()
    audit = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": str(tmp_path)})
    assert audit.returncode == 1 and audit.stdout == "audit: there is no pip-audit; `make env` installs it\n"


def test_the_readme_names_the_security_policy():
    policy = (ROOT / "SECURITY.md").read_text()
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text() and "security advisory" in policy
    for command in re.findall(r"`make (\w+)`", policy):
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch, make_unet, linear_schedule):
    """A hub's cache on disk and no network: a factory of repositories with one commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(teachers, "_reachable", lambda url: False)

    def make(repository: str, commit: str) -> None:
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        make_unet(32, 3).save_pretrained(folder / "snapshots" / commit)
        linear_schedule().save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    return make


def test_a_pinned_teacher_is_of_its_commit_and_of_no_other(hub):
    preset = load_preset("cifar10")
    assert preset.teacher_revision == PINNED["google/ddpm-cifar10-32"]
    hub(preset.teacher, "0" * 40)
    with pytest.raises(UserError, match=f"hf download {preset.teacher} --revision {preset.teacher_revision}"):
        load_teacher(preset)
    hub(preset.teacher, preset.teacher_revision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_teacher(preset).revision == preset.teacher_revision
    assert teachers.find_preset("own", teacher=preset.teacher).teacher_revision == preset.teacher_revision


def test_a_teacher_that_is_not_pinned_tells_its_commit(hub):
    preset, commit = load_preset("cifar10", teacher="someone/teacher"), "f" * 40
    assert preset.teacher_revision is None
    hub("someone/teacher", commit)
    with pytest.warns(
        UserWarning, match=f"not pinned: the hub gave its commit {commit}.*--set teacher_revision={commit}"
    ):
        assert load_teacher(preset).revision == commit
    with pytest.warns(UserWarning, match="not pinned"):  # a branch moves
        load_teacher(preset.replace(teacher_revision="main"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_teacher(preset.replace(teacher_revision=commit)).revision == commit
    with pytest.warns(UserWarning, match="not pinned"):  # the preset's commit is not one of another repository's
        assert load_teacher(load_preset("cifar10"), "someone/teacher").revision == commit


def test_pins_are_commits_and_follow_the_teacher():
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in PINNED.values())
    preset = load_preset("celebahq")
    assert preset.teacher_revision == PINNED[preset.teacher]
    assert preset.replace(seed=3).teacher_revision == preset.teacher_revision
    assert preset.replace(teacher="google/ddpm-cifar10-32").teacher_revision == PINNED["google/ddpm-cifar10-32"]
    assert preset.replace(teacher="folder").teacher_revision is None
    assert preset.replace(teacher="folder", teacher_revision="v1").teacher_revision == "v1"
    assert own_preset("folder", 32, 3).teacher_revision is load_preset("digits").teacher_revision is None
    assert load_preset("digits").config_hash == "4e062880a74f", "what was made before is still found"
