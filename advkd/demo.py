"""A student as a static page that generates in the browser, and a server for it on this computer alone."""

import base64
import errno
import hashlib
import json
import shutil
import socketserver
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from advkd.data import make_latent, seeded_noise
from advkd.export import export_onnx
from advkd.files import write_atomic, write_json
from advkd.pipeline import FewStepPipeline, StudentPipeline
from advkd.presets import UserError, resolution, stage_times
from advkd.run import load_run, read_run
from advkd.student import Student, count_parameters

WEB = Path(__file__).parent / "web"
RUNTIME = json.loads((WEB / "runtime.json").read_text(encoding="utf-8"))  # onnxruntime-web: version and checksums
FETCHED = Path("runs") / "web"  # where `make web` puts its files
SEED = 1  # as of `python -m advkd sample`
TOLERANCE = 1e-3  # from torch: an eighth of a step of the 8-bit images that a page shows
PAGE, ABOUT, LATENTS = ("index.html", "demo.js"), "student.json", "latents.bin"
MODEL, GENERATOR = "student.onnx", "generator.onnx"
SERVED = (*PAGE, ABOUT, LATENTS, MODEL, GENERATOR, *(f"ort/{name}" for name in RUNTIME["files"]))
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}


def build_demo(source: Path | str | StudentPipeline, folder: Path | str, runtime: Path | str | None = None) -> dict:
    """Write the static page of a student into `folder`, which any web server can publish; returns `student.json`.

    `source` is a run folder, a pipeline folder or a pipeline. With `runtime`, a folder that holds onnxruntime-web's files
    (`make web`), these are copied to `ort/` and the page needs no other host; without, it takes them from a CDN. Beside
    the page lie `student.onnx` (with all heads, where the student has them, and then `generator.onnx` without) and
    `latents.bin`: float32 `(count, *latent_shape)`, the latents of the first samples of seed 1.
    Raises UserError for few-step students, for folders without a student and for other files than the runtime's.
    """
    pipeline = source if isinstance(source, StudentPipeline | FewStepPipeline) else load_run(source)
    if isinstance(pipeline, FewStepPipeline):
        times = list(pipeline.student.config.timesteps)
        raise UserError(
            f"{source if pipeline is not source else 'this'} is a few-step student, the teacher's U-Net at the timesteps "
            f"{times}, which has no submodules to show; give one of recipe 'improved' or 'paper'"
        )
    folder, student = Path(folder), pipeline.student.eval()
    made = None if pipeline is source else read_run(source)
    about = describe_student(student, made["preset"] if made else {})
    if runtime is not None:
        check_runtime(Path(runtime))
    # First what can fail, so that there is no page without a student.
    export_onnx(student, folder / MODEL, heads=student.config.training_heads, tolerance=TOLERANCE)
    if about["generator"] != MODEL:
        export_onnx(student.generator(), folder / GENERATOR, tolerance=TOLERANCE)
    for name in RUNTIME["files"] if runtime is not None else ():
        _copy(Path(runtime) / name, folder / "ort" / name)
    about["runtime"] = {name: RUNTIME[name] for name in ("package", "version", "files")}
    about["runtime"]["base"] = "ort/" if runtime is not None else cdn()
    for name in PAGE:
        _copy(WEB / name, folder / name)
    latents = make_latent(seeded_noise(range(about["count"]), student.image_shape, SEED), student.sampled_from)
    write_atomic(folder / LATENTS, lambda file: file.write_bytes(latents.numpy().astype("<f4").tobytes()))
    write_json(folder / ABOUT, about)
    return about


def describe_student(student: Student, preset: dict) -> dict:
    """What the page needs to know of a student: shapes, its heads (output, side in pixels, what it imitates), sizes.

    `preset` are the fields of what it was trained for, or nothing where that is unknown.
    """
    config, submodules = student.config, len(student.stages)
    times = [*stage_times(submodules), None]  # None: the final image
    heads = [
        {
            "submodule": k,
            "output": "image" if k == submodules - 1 else f"head_{k}",
            "resolution_px": resolution(k, submodules, config.image_size_px),
            "time": times[k],
        }
        for k in range(submodules)
    ]
    return {
        "name": preset.get("name"),
        "recipe": preset.get("recipe"),
        "target": preset.get("target"),
        "parameters": count_parameters(student),
        "generator_parameters": count_parameters(student.generator()),
        "submodules": submodules,
        "latent": student.sampled_from,
        "latent_shape": list(student.latent_shape),
        "image_shape": list(student.image_shape),
        "heads": heads if config.training_heads else heads[-1:],
        "model": MODEL,
        "generator": GENERATOR if config.training_heads else MODEL,
        "seed": SEED,
        "count": 64 if config.image_size_px <= 64 else 16,  # a browser's one thread takes a while for larger images
    }


def cdn() -> str:
    """Where the page finds onnxruntime-web, of the one version, when it has no files of its own."""
    return f"{RUNTIME['cdn']}{RUNTIME['package']}@{RUNTIME['version']}/dist/"


def fetched_runtime(folder: Path = FETCHED) -> Path | None:
    """The folder that `make web` filled, or None where it did not."""
    return folder if all((folder / name).is_file() for name in RUNTIME["files"]) else None


def check_runtime(folder: Path) -> None:
    """Raise UserError unless `folder` holds the files of the one version of onnxruntime-web, byte for byte."""
    release = f"{RUNTIME['package']} {RUNTIME['version']}"
    for name, wanted in RUNTIME["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name} of {release}; fetch it: make web")
        digest = hashlib.sha384((folder / name).read_bytes()).digest()
        if f"sha384-{base64.b64encode(digest).decode()}" != wanted:
            raise UserError(f"{folder / name} is not the file of {release}; remove {folder} and fetch it: make web")


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, partial(shutil.copyfile, source))


class _Server(ThreadingHTTPServer):
    def __init__(self, folder: Path, port: int):
        self.folder = folder
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the network for the computer's name
        self.server_name, self.server_port = self.server_address

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a browser that goes away is no error
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, body: bool = True) -> None:
        # A site elsewhere whose name points here is not to read what is served (DNS rebinding).
        if self.headers.get("Host", "").split(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)
            return
        name = self.path.split("?")[0].removeprefix("/") or "index.html"
        path = self.server.folder / name
        # Nothing else of the folder is served, nothing that a link in it points to elsewhere, and no folder is listed.
        if name not in SERVED or not path.is_file() or not path.resolve().is_relative_to(self.server.folder.resolve()):
            self.send_error(404)
            return
        with path.open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(path.stat().st_size))
            self.send_header("Cache-Control", "no-store")  # the next student has the same names
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if body:
                shutil.copyfileobj(file, self.wfile)

    def log_message(self, *_):
        pass


def demo_server(folder: Path | str, port: int = 0) -> ThreadingHTTPServer:
    """A server of a demo's folder on 127.0.0.1, bound to `port` (0: a free one, see `server_port`) and not yet serving.

    It knows the files that `build_demo` writes and no others. Raises UserError when there is no demo, or the port cannot be had.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise UserError(f"{folder} holds no demo; build one with: python -m advkd demo STUDENT --out {folder}")
    return _bound(folder, port)


def check_port(port: int) -> None:
    """Raise UserError when the port cannot be had, before a page is made for it."""
    _bound(Path(), port).server_close()


def _bound(folder: Path, port: int) -> _Server:
    try:
        return _Server(folder, port)
    except OSError as error:
        what = "taken" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
        raise UserError(f"port {port} is {what}; choose another, or leave --port out for a free one") from error


def serve_demo(folder: Path | str, port: int = 0) -> None:
    """Serve a demo's folder on 127.0.0.1 until Ctrl-C; prints the address. Raises UserError as `demo_server` does."""
    with demo_server(folder, port) as server:
        print(f"demo: http://127.0.0.1:{server.server_port}/ (on this computer alone; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("demo: ended", flush=True)
