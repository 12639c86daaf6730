"""The page that generates in the browser: its folder, its server, and itself in a headless Chromium."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from playwright.sync_api import expect

from advkd import demo
from advkd.__main__ import cli
from advkd.data import make_latent, seeded_noise, to_uint8
from advkd.demo import RUNTIME, build_demo, demo_server, fetched_runtime
from advkd.denoiser import Denoiser
from advkd.evaluation import sample_student
from advkd.pipeline import FewStepPipeline, StudentPipeline
from advkd.presets import UserError, load_preset
from advkd.student import Student, count_parameters

ROOT = Path(__file__).parents[1]
FETCHED = ROOT / "runs" / "web"
STUDENTS = {
    "grey": dict(image_size_px=16, channels=1, submodules=5, widths=(4, 6), block="residual", head="light"),
    "rgb": dict(image_size_px=32, channels=3, submodules=4, widths=(4, 6, 4), block="plain", head="terminal"),
    "full": dict(image_size_px=32, channels=3, submodules=3, widths=(4, 6, 4), block="residual", latent="full"),
}


def make_student(name: str) -> Student:
    """A random student whose batch normalisation has seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Student(**STUDENTS[name])
        with torch.no_grad():
            for _ in range(30):
                student.images(torch.randn(16, *student.latent_shape))
    return student.eval()


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A factory of demos, each built once: student, folder, student.json. The page takes its runtime from the CDN."""
    built = {}

    def get(name: str) -> SimpleNamespace:
        if name not in built:
            student, folder = make_student(name), tmp_path_factory.mktemp(name)
            built[name] = SimpleNamespace(
                student=student, folder=folder, about=build_demo(StudentPipeline(student), folder)
            )
        return built[name]

    return get


@pytest.fixture
def serve():
    """A factory of addresses: a folder served on a free port of loopback until the test ends."""
    servers = []

    def start(folder: Path) -> str:
        servers.append(demo_server(folder))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(address: str, path: str, method: str = "GET", **headers) -> SimpleNamespace:
    """An answer to exactly this path, which no client tidied up."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read())


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDENTS)
def test_the_folder_says_what_the_student_is(demos, name):
    made = demos(name)
    student, about = made.student, made.about
    files = {"index.html", "demo.js", "student.json", "latents.bin", "student.onnx", "generator.onnx"}
    assert {str(path.relative_to(made.folder)) for path in made.folder.rglob("*")} == files
    assert json.loads((made.folder / "student.json").read_text()) == about
    images = student.images(torch.zeros(1, *student.latent_shape))
    assert [head["resolution_px"] for head in about["heads"]] == [image.shape[-1] for image in images]
    assert [head["output"] for head in about["heads"]] == [*(f"head_{k}" for k in range(len(images) - 1)), "image"]
    assert about["parameters"] == count_parameters(student)
    assert about["generator_parameters"] == count_parameters(student.generator()) < about["parameters"]
    latents = np.fromfile(made.folder / "latents.bin", "<f4").reshape(about["count"], *student.latent_shape)
    expected = StudentPipeline(student)(
        64, seed=1, output_type="pt"
    ).images  # `python -m advkd sample --seed 1 --count 64`
    assert torch.equal(student(torch.from_numpy(latents)), expected)


def test_stage_times_and_recipe_come_from_the_run(tmp_path, improved):
    StudentPipeline(Student.from_preset(improved)).save_pretrained(tmp_path / "run" / "student")
    made = {"preset": {"name": "digits", "recipe": "improved", "target": "x0"}, "trajectories": {}, "device": "cpu"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(made))
    about = build_demo(tmp_path / "run" / "student", tmp_path / "demo")
    assert (about["name"], about["recipe"], about["target"]) == ("digits", "improved", "x0")
    assert [head["time"] for head in about["heads"]] == [999, 499, None]


def test_large_images_have_a_smaller_grid():
    preset = load_preset("celebahq")
    with torch.device("meta"):
        assert demo.describe_student(Student.from_preset(preset), {})["count"] == 16


def test_few_step_students_are_refused(tmp_path, teacher, teacher_folder, tiny):
    denoiser = Denoiser.from_teacher(teacher, load_preset("digits", "add", teacher=str(teacher_folder), **tiny))
    FewStepPipeline(denoiser).save_pretrained(tmp_path / "add")
    with pytest.raises(UserError, match=r"add is a few-step student, the teacher's U-Net at the timesteps \[999, 749"):
        build_demo(tmp_path / "add", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_only_the_runtime_that_was_tested_is_taken(tmp_path, demos):
    pipeline = StudentPipeline(demos("grey").student)
    with pytest.raises(
        UserError, match=r"has no ort\.wasm\.bundle\.min\.mjs of onnxruntime-web .*; fetch it: make web"
    ):
        build_demo(pipeline, tmp_path / "demo", tmp_path)
    for name in RUNTIME["files"]:
        (tmp_path / name).write_text("another version")
    assert fetched_runtime(tmp_path) == tmp_path and fetched_runtime(tmp_path / "demo") is None
    with pytest.raises(UserError, match="is not the file of onnxruntime-web"):
        build_demo(pipeline, tmp_path / "demo", tmp_path)


def test_the_page_may_load_from_its_own_folder_and_the_cdn_alone():
    page = (demo.WEB / "index.html").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert set(re.findall(r"https?://[^\s;]+", policy)) == {"https://" + urlsplit(RUNTIME["cdn"]).netloc}
    assert not re.findall(r"https?://", (demo.WEB / "demo.js").read_text())
    assert demo.cdn().startswith(RUNTIME["cdn"]) and RUNTIME["version"] in demo.cdn()


# ---- the server ------------------------------------------------------------------------------------------------------


def test_the_server_gives_the_demo_and_nothing_else(demos, serve):
    folder = demos("grey").folder
    (folder / "notes.txt").write_text("private")
    try:
        address = serve(folder)
        for path, kind in (
            ("/", "text/html; charset=utf-8"),
            ("/index.html", "text/html; charset=utf-8"),
            ("/demo.js?again", "text/javascript; charset=utf-8"),
            ("/student.json", "application/json"),
            ("/student.onnx", "application/octet-stream"),
            ("/latents.bin", "application/octet-stream"),
        ):
            answer = ask(address, path)
            assert (answer.status, answer.headers["Content-Type"]) == (200, kind), path
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.body == (folder / (path.strip("/").split("?")[0] or "index.html")).read_bytes()
        up = (
            f"/../{folder.name}/student.json",
            "/ort/../student.json",
            "/%2e%2e/student.json",
            "/./demo.js",
        )
        for path in ("/notes.txt", "/nothing", "/ort/", "/ort", "/ort/ort.wasm.bundle.min.mjs", "//[", "/..", *up):
            answer = ask(address, path)
            assert answer.status == 404 and b"private" not in answer.body and b"student" not in answer.body, path
        head = ask(address, "/student.json", "HEAD")
        assert (head.status, head.body) == (200, b"") and int(head.headers["Content-Length"]) > 0
        assert ask(address, "/", "POST").status == 501
    finally:
        (folder / "notes.txt").unlink()


def test_modules_and_wasm_have_their_types(tmp_path, serve):
    (tmp_path / "ort").mkdir()
    (tmp_path / "student.json").touch()
    for name in RUNTIME["files"]:
        (tmp_path / "ort" / name).touch()
    address = serve(tmp_path)
    types = [ask(address, f"/ort/{name}").headers["Content-Type"] for name in RUNTIME["files"]]
    assert types == ["text/javascript; charset=utf-8", "application/wasm"]


def test_the_server_is_on_loopback_for_this_computer_alone(demos, serve):
    folder = demos("grey").folder
    with demo_server(folder) as server:
        assert server.socket.getsockname()[0] == server.server_address[0] == "127.0.0.1"
    address = serve(folder)
    port = urlsplit(address).port
    assert [ask(address, "/", Host=host).status for host in (f"localhost:{port}", "127.0.0.1", "evil.example", "")] == [
        200,
        200,
        403,
        403,
    ]


def test_a_taken_port_and_a_folder_without_a_demo_are_user_errors(tmp_path, demos):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=f"port {other.getsockname()[1]} is taken; choose another"):
            demo_server(demos("grey").folder, other.getsockname()[1])
    with pytest.raises(UserError, match="holds no demo; build one with: python -m advkd demo STUDENT --out"):
        demo_server(tmp_path)


def test_the_command_writes_a_folder_to_publish(tmp_path, monkeypatch, demos):
    monkeypatch.chdir(tmp_path)
    StudentPipeline(demos("grey").student).save_pretrained(tmp_path / "student")
    result = CliRunner().invoke(cli, ["demo", "student", "--out", "page", "--no-serve"])
    assert result.exit_code == 0, result.output
    assert "page: page, with onnxruntime-web" in result.stdout and "cdn.jsdelivr.net" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "student"]


def test_the_command_serves_until_ctrl_c_and_leaves_nothing(tmp_path, demos):
    StudentPipeline(demos("grey").student).save_pretrained(tmp_path / "student")
    (tmp_path / "temporary").mkdir()
    # A shell's background jobs ignore Ctrl-C, and what they start with them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "advkd", "demo", "student"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    try:
        lines = iter(process.stdout.readline, "")
        address = next(found[0] for line in lines if (found := re.findall(r"http://127\.0\.0\.1:\d+/", line)))
        assert ask(address, "/student.onnx").status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and "ended" in process.stdout.read()
    finally:
        process.kill()
    assert not list((tmp_path / "temporary").glob("advkd-demo-*"))


# ---- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture
def published(demos, tmp_path, lacking):
    """A factory of demos with onnxruntime-web's files beside the page, as `make web` fetches them."""
    if fetched_runtime(FETCHED) is None:
        lacking("onnxruntime-web in runs/web (make web)")

    def get(name: str) -> SimpleNamespace:
        made, folder = demos(name), tmp_path / name
        shutil.copytree(made.folder, folder)
        shutil.copytree(FETCHED, folder / "ort")
        about = made.about | {"runtime": made.about["runtime"] | {"base": "ort/"}}
        (folder / "student.json").write_text(json.dumps(about))
        return SimpleNamespace(student=made.student, folder=folder, about=about)

    return get


@pytest.fixture
def open_page(browser, serve):
    """A factory of pages; at the end none has complained, missed a file or asked another host than loopback."""
    problems = []

    def complain(what, at=None):
        problems.append(f"{what}{f' at {at}' if at else ''}")

    def watch_request(request):
        if urlsplit(request.url).hostname != "127.0.0.1" and urlsplit(request.url).scheme not in ("blob", "data"):
            complain("another host", request.url)

    def start(folder: Path, width: int = 1280, ready: bool = True, watch: bool = True, **options):
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.set_default_timeout(60_000)
        if watch:
            page.on("console", lambda message: complain(message.text) if message.type in ("error", "warning") else None)
            page.on("pageerror", complain)
            page.on("requestfailed", lambda request: complain("failed", request.url))
            page.on("response", lambda answer: complain(answer.status, answer.url) if answer.status >= 400 else None)
            page.on("request", watch_request)
        if ready:
            page.goto(serve(folder))
            page.evaluate("() => window.advkd.ready")
        return page

    yield start
    assert problems == []


# Playwright packs every number of a list by itself: text is a hundred times as fast.
TO_TEXT = """array => {
    let text = "";
    for (const byte of new Uint8Array(array.buffer)) text += String.fromCharCode(byte);
    return btoa(text);
}"""


def numbers(text: str, dtype: str = "<f4") -> np.ndarray:
    """The array that TO_TEXT wrote."""
    return np.frombuffer(base64.b64decode(text), dtype)


def pixels(page, selector: str) -> np.ndarray:
    """What the canvases that match show, `(n, s, s, 4)`."""
    read = """all => all.map(canvas => {
        const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
        const context = copy.getContext("2d", { willReadFrequently: true });  // or Chromium warns of slow reading
        context.drawImage(canvas, 0, 0);
        return (TO_TEXT)(context.getImageData(0, 0, copy.width, copy.height).data);
    })"""
    texts = page.locator(selector).evaluate_all(read.replace("TO_TEXT", TO_TEXT))
    data = np.stack([numbers(text, "u1") for text in texts]).astype(int)
    side = int((data.shape[1] // 4) ** 0.5)
    return data.reshape(len(data), side, side, 4)


def shown(images: torch.Tensor) -> np.ndarray:
    """Images `(b, c, s, s)` in [-1, 1] as a canvas has them."""
    colours = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy().astype(int)
    return np.concatenate([colours, np.full((*colours.shape[:3], 1), 255)], axis=-1)


def assert_shows(page, selector: str, images: torch.Tensor):
    """The canvases that match show these images, but for the rounding of a pixel's last bit."""
    assert np.abs(pixels(page, selector) - shown(images)).max() <= 1, selector


def latents_of(made: SimpleNamespace, seed: int, count: int) -> torch.Tensor:
    return make_latent(seeded_noise(range(count), made.student.image_shape, seed), made.about["latent"])


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_the_page_makes_pythons_images(published, open_page, name):
    made = published(name)
    page = open_page(made.folder)
    latents = torch.randn(70, *made.student.latent_shape, generator=torch.Generator().manual_seed(3))
    run = """async ([latents, batch]) => {
        const bytes = Uint8Array.from(atob(latents), (letter) => letter.charCodeAt(0));
        const images = await window.advkd.run(new Float32Array(bytes.buffer), batch);
        return Object.entries(images).map(([name, data]) => [name, (TO_TEXT)(data)]);
    }"""
    sent = [base64.b64encode(latents.numpy().tobytes()).decode(), len(latents)]
    images = dict(page.evaluate(run.replace("TO_TEXT", TO_TEXT), sent))
    expected = made.student.images(latents)
    assert list(images) == [head["output"] for head in made.about["heads"]]
    for data, image in zip(images.values(), expected, strict=True):
        assert image.std() > 0.05, "the images differ"
        assert np.abs(numbers(data) - image.flatten().numpy()).max() < 1e-4
    first = sample_student(StudentPipeline(made.student), 64, seed=1)
    assert_shows(page, "#grid canvas", first)
    page.locator("#new").click()
    page.locator("#command", has_text="--seed 2 --count 64").wait_for()
    noise = numbers(page.evaluate(f"() => ({TO_TEXT})(window.advkd.latents(2, 5))"))
    assert np.abs(noise - latents_of(made, 2, 5).flatten().numpy()).max() < 1e-5
    assert_shows(page, "#grid canvas", sample_student(StudentPipeline(made.student), 64, seed=2))


@torch.no_grad()
def test_the_slider_walks_through_the_submodules(published, open_page):
    made = published("grey")
    page = open_page(made.folder)
    heads = made.student.images(latents_of(made, 1, 64))
    for k in reversed(range(5)):
        assert_shows(page, "#grid canvas", heads[k])
        expect(page.locator("#strip .tile[aria-pressed=true]")).to_have_accessible_name(re.compile(f"Submodule {k}, "))
        page.locator("#stage").press("ArrowLeft")
    page.locator("#strip .tile").nth(3).click()
    expect(page.locator("#stage-text")).to_have_text("3 · 16 px · t = 249")
    assert_shows(page, "#grid canvas", heads[3])
    page.locator("#grid .tile").nth(9).click()
    for key, sample in (("ArrowDown", 17), ("ArrowRight", 18), ("ArrowUp", 10), ("End", 63), ("ArrowRight", 63)):
        page.keyboard.press(key)
        expect(page.locator("#strip-title")).to_have_text(f"Sample {sample} through the submodules")
        expect(page.locator("#grid .tile:focus")).to_have_accessible_name(f"Sample {sample}")
        for k, image in enumerate(heads):
            assert_shows(page, f"#strip .tile:nth-child({k + 1}) canvas", image[sample : sample + 1])


@torch.no_grad()
def test_interpolation_goes_from_one_noise_to_the_other(published, open_page):
    made = published("rgb")
    page = open_page(made.folder)
    latents = latents_of(made, 1, 64)
    page.locator("#to").fill("7")
    page.locator("#to").press("Enter")
    a, b = latents[0].double(), latents[7].double()
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    middle = (torch.sin(angle / 2) / torch.sin(angle) * (a + b)).float()
    expected = made.student(torch.stack([latents[0], middle, latents[7]]))
    page.locator("#film[aria-busy=false]").wait_for()
    assert_shows(page, "#from-image", expected[:1])
    assert_shows(page, "#to-image", expected[2:])
    for share, image in (("0", 0), ("16", 1), ("32", 2)):
        page.locator("#share").fill(share)
        assert_shows(page, "#between-image", expected[image : image + 1])
    film = pixels(page, "#film canvas")
    assert len(film) == 9 and np.abs(film[[0, 4, 8]] - shown(expected)).max() <= 1
    play = page.locator("#play")
    play.click()
    expect(play).to_have_text("Pause")
    expect(page.locator("#share-text")).not_to_have_text("100 %")
    play.click()
    expect(play).to_have_text("Play")


def test_images_per_second_are_measured(published, open_page):
    page = open_page(published("grey").folder)
    page.locator("#batch").select_option("8")
    page.locator("#measure").click()
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d,]+(\.\d)?$"))
    assert float(page.locator("#speed").inner_text().replace(",", "")) > 1
    told = r"ms for 8 images: the median of \d+ runs on this device, one thread of WebAssembly.*parameters"
    expect(page.locator("#speed-text")).to_have_text(re.compile(told))
    expect(page.locator("#measure")).to_be_enabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(published, open_page, scheme, tmp_path):
    page = open_page(published("full").folder, width=360, color_scheme=scheme, has_touch=True)
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 360
    for control in page.locator("button:visible, input:visible, select:visible").all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert control.evaluate("c => !!(c.ariaLabel || c.labels?.length || c.textContent.trim())"), "it has a name"
    for control in ("#new", "#play", "#measure", "#strip .tile >> nth=0", "#grid .tile >> nth=5"):
        page.locator(control).tap()
    expect(page.locator("#strip-title")).to_have_text("Sample 5 through the submodules")
    expect(page.locator("#stage")).to_have_value("0")
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    page.screenshot(path=tmp_path / f"phone-{scheme}.png", full_page=True)


def test_a_wrong_seed_is_refused(published, open_page):
    made = published("grey")
    page = open_page(made.folder)
    before = pixels(page, "#grid canvas")
    for seed in ("-1", "1.5", "4294967296", ""):
        page.locator("#seed").fill(seed)
        page.locator("#seed").press("Enter")
        assert page.locator("#seed:invalid").count() == 1
    assert (pixels(page, "#grid canvas") == before).all()
    page.locator("#seed").fill("4294967295")
    page.locator("#seed").press("Enter")
    page.locator("#command", has_text="--seed 4294967295").wait_for()
    assert_shows(page, "#grid canvas", sample_student(StudentPipeline(made.student), 64, seed=2**32 - 1))


def test_the_deployable_generator_has_no_slider(tmp_path, published, open_page):
    generator = published("grey").student.generator()
    assert build_demo(StudentPipeline(generator), tmp_path / "demo", FETCHED)["generator"] == "student.onnx"
    page = open_page(tmp_path / "demo")
    assert_shows(page, "#grid canvas", sample_student(StudentPipeline(generator), 64, seed=1))
    expect(page.locator("#stage")).to_be_hidden()
    expect(page.locator("#strip .tile")).to_have_count(1)


def test_without_files_of_its_own_the_page_takes_the_runtime_from_the_cdn(demos, published, open_page, serve):
    made = demos("grey")
    published("grey")  # its runtime stands in for the CDN's
    page = open_page(made.folder, ready=False, watch=False)
    page.route(demo.cdn() + "*", lambda route: route.abort())
    page.goto(serve(made.folder))
    expect(page.get_by_role("alert")).to_contain_text(
        re.compile(r"cdn\.jsdelivr\.net.* could not be loaded .*make web")
    )
    expect(page.locator("#demo")).to_be_hidden()

    def answer(route, _=None, extra=b""):
        body = (FETCHED / route.request.url.rsplit("/")[-1]).read_bytes() + extra
        route.fulfill(
            body=body, headers={"Access-Control-Allow-Origin": "*", "Content-Type": "application/octet-stream"}
        )

    page.route(demo.cdn() + "*", lambda route: answer(route, extra=b"\n"))  # altered on its way
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("could not be loaded")
    page.route(demo.cdn() + "*", answer)
    page.reload()
    expect(page.locator("#grid .tile")).to_have_count(64)
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#footer")).to_contain_text("from cdn.jsdelivr.net")


def test_a_folder_that_lacks_the_student_says_so(published, open_page, serve):
    made = published("grey")
    (made.folder / "student.onnx").unlink()
    page = open_page(made.folder, ready=False, watch=False)
    page.goto(serve(made.folder))
    expect(page.get_by_role("alert")).to_contain_text(
        "student.onnx could not be loaded (status 404). Build this folder again: python -m advkd demo STUDENT --out FOLDER"
    )
