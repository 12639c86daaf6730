"""The student as a file for devices without torch: ONNX in float32, or with 8 bits a number."""

import io
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from advkd.data import sample_generators, sample_noise
from advkd.files import write_atomic
from advkd.presets import UserError
from advkd.student import Student

TOLERANCE = 1e-4  # the largest difference from torch that is accepted, of values in [-1, 1]
INPUT, OUTPUT = "latent", "image"
CALIBRATION_SEED = 31  # of the latents that an 8-bit file is calibrated on: none that anything is sampled or judged by
CALIBRATION = 256  # of them, fewer where images are large
PERCENTILE = 99.99  # of an activation that its 8 bits reach to: with all, a few outliers make every step coarser
OPSET = 18


class _Heads(nn.Module):
    """All heads of a student as one module: a latent to K images."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.student.images(latent))


def output_names(student: Student, heads: bool = False) -> list[str]:
    """The outputs of a file, coarse to fine: `head_0` ... `head_<K-2>`, where it has them, and `image`."""
    return [f"head_{k}" for k in range(len(student.stages) - 1) if heads] + [OUTPUT]


def export_onnx(student: Student, file: Path, *, heads: bool = False, tolerance: float = TOLERANCE) -> dict:
    """Write the deployable generator (or, with `heads`, all submodules' images) as ONNX; compare it with torch.

    The input `latent` is float32 `(b, *student.latent_shape)`, standard normal, of any batch size b; the outputs are images in
    [-1, 1], see `output_names`. Batch normalisation is folded into the convolutions. Returns `max_difference` from torch over
    all outputs of four latents, and `file_mb` (10^6 bytes). Raises UserError, and writes nothing, where the difference exceeds `tolerance`, where
    `heads` are asked of a student that has the last one alone, and without the packages of the extra "onnx".
    """
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise UserError(f"tolerance is {tolerance}, but must be a positive, finite number")
    onnx = _packages()
    device, training = student.device, student.training
    model = _Heads(student) if heads else student.generator()
    try:
        proto = _bare(_exported(model.eval().cpu(), student.latent_shape, output_names(student, heads)))
        about = {"latent_shape": student.latent_shape, "image_shape": student.image_shape}
        onnx.helper.set_model_props(proto, {"advkd": json.dumps(about | {"submodules": len(student.stages)})})
        difference = _difference(proto.SerializeToString(), model, student.latent_shape)
    finally:
        student.to(device).train(training)
    if not difference <= tolerance:
        raise UserError(
            f"the exported student differs from torch by {difference:.3g}, more than {tolerance:g}; not written (--tolerance)"
        )
    write_atomic(Path(file), lambda temporary: temporary.write_bytes(proto.SerializeToString()))
    return {"max_difference": difference, "file_mb": Path(file).stat().st_size / 1e6}


def _exported(model: nn.Module, latent_shape: tuple[int, int, int], names: list[str]):
    latent = torch.randn(2, *latent_shape, generator=torch.Generator().manual_seed(0))
    model(latent)  # a student that has no other heads refuses here
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):  # they tell every pass
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return torch.onnx.export(
        model,
        (latent,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=names,
        opset_version=OPSET,
        verbose=False,
    ).model_proto


def quantize_onnx(source: Path, file: Path, latents: Tensor | None = None) -> dict:
    """Write the float32 file `source` with 8 bits a number: static quantisation, each output channel with its own scale.

    `latents` `(n, *latent_shape)` calibrate the ranges of the activations (default: `calibration_latents`). Weights have 7
    of their 8 bits: without VNNI, products of 8 and 8 bits overflow the 16 bits that two of them are summed in. Returns
    `max_difference` and `mean_difference` of the images from the float32 file's on the first calibration latents, and
    `file_mb`. Raises UserError for a file that `export_onnx` did not write.
    """
    onnx = _packages()
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    about = read_about(source)
    latents = calibration_latents(about) if latents is None else latents
    size = max(1, min(32, len(latents), 2**20 // math.prod(about["image_shape"])))
    whole = latents[: len(latents) // size * size]  # batches of one size, which the calibration wants

    class Latents(CalibrationDataReader):
        def __init__(self):
            self.batches: Iterator[Tensor] = iter(whole.split(size))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    def write(temporary: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepared, made = Path(folder) / "prepared.onnx", Path(folder) / "made.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            with redirect_stdout(io.StringIO()):  # its calibration tells every step
                quantize_static(
                    str(prepared),
                    str(made),
                    Latents(),
                    calibrate_method=CalibrationMethod.Percentile,
                    extra_options={"CalibPercentile": PERCENTILE},
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
            proto = _bare(onnx.load(str(made)))
            onnx.helper.set_model_props(proto, {"advkd": json.dumps(about | {"bits": 8})})
            temporary.write_bytes(proto.SerializeToString())

    root = logging.getLogger()
    root.addFilter(_no_advice)
    try:
        write_atomic(Path(file), write)
    finally:
        root.removeFilter(_no_advice)
    shown = latents[:size].numpy()
    exact, rounded = (open_session(f).run([OUTPUT], {INPUT: shown})[0] for f in (source, file))
    apart = abs(exact - rounded)
    found = {"max_difference": float(apart.max()), "mean_difference": float(apart.mean())}
    return found | {"file_mb": Path(file).stat().st_size / 1e6}


def calibration_latents(about: dict) -> Tensor:
    """Latents of a seed of their own: 256, or as many as make four million numbers of images, but at least 4: the calibration
    keeps every activation of all of them."""
    count = max(4, min(CALIBRATION, 2**22 // math.prod(about["image_shape"])))
    return sample_noise(sample_generators(range(count), CALIBRATION_SEED), about["latent_shape"])


def read_about(file: Path) -> dict:
    """What `export_onnx` wrote about a file: `latent_shape`, `image_shape`, `submodules`; `bits`, of an 8-bit one."""
    onnx = _packages()
    try:
        kept = {prop.key: prop.value for prop in onnx.load(str(file), load_external_data=False).metadata_props}
        return json.loads(kept["advkd"])
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; write it with: python -m advkd export STUDENT --out {file}") from error
    except Exception as error:  # of protobuf many kinds, for whatever is no ONNX file
        raise UserError(f"{file} was not written by python -m advkd export ({type(error).__name__})") from error


def open_session(file: Path | bytes, threads: int = 0):
    """The file in ONNX Runtime on the CPU, an `onnxruntime.InferenceSession`; `threads` 0 leaves their number to it."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return runtime.InferenceSession(file if isinstance(file, bytes) else str(file), options, ["CPUExecutionProvider"])


def sample_onnx(file: Path, latents: Tensor, batch_size: int = 250) -> Tensor:
    """Images `(n, c, s, s)` in [-1, 1] of an exported file for latents `(n, *latent_shape)`."""
    session = open_session(file)
    size = max(1, min(batch_size, 2**22 // math.prod(read_about(file)["image_shape"])))
    return torch.cat([torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0]) for x in latents.split(size)])


def _difference(model: bytes, module: nn.Module, latent_shape: tuple[int, int, int]) -> float:
    """The largest difference between the file and torch over all outputs, of one latent and of a batch."""
    session, found = open_session(model), [0.0]
    for count in (1, 3):
        latents = torch.randn(count, *latent_shape, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            wanted = module(latents)
        made = session.run(None, {INPUT: latents.numpy()})
        for ours, theirs in zip(wanted if isinstance(wanted, tuple) else (wanted,), made, strict=True):
            found.append((ours - torch.from_numpy(theirs)).abs().max().item())
    return max(found)


def _bare(proto):
    """The model without what only its exporter reads: a tenth of a small student's file."""
    del proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for entry in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del entry.metadata_props[:]
    return proto


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()  # was done


def _packages():
    try:
        import onnx
        import onnxruntime  # noqa: F401, what is exported is run
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ImportError as error:
        raise UserError(
            f"an export needs the package {error.name!r}: pip install -U onnx onnxruntime onnxscript"
        ) from error
    return onnx


def _runtime():
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("an ONNX file runs in the package 'onnxruntime': pip install -U onnxruntime") from error
    return onnxruntime
