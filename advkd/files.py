"""Files that are either whole or not there: atomic writes, checksums, checkpoints without pickle."""

import csv
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from advkd.presets import UserError

CHECKPOINT_EVERY = 500  # steps of a training


def project_root() -> Path:
    """The checkout that holds `notebooks/`, upwards from the working directory. Raises UserError outside of one."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").exists():
            return folder
    raise UserError(f"{here} is not inside a checkout of advkd: no folder above it has notebooks/ and pyproject.toml")


def quiet(progress: bool) -> bool:
    """Whether progress bars are off: by argument, or by ADVKD_PROGRESS=0 (tqdm's notebook bar has no such switch)."""
    return not progress or os.environ.get("ADVKD_PROGRESS") == "0"


def check_disk(folder: Path, wanted: int, what: str) -> None:
    """Raise UserError when less than `wanted` bytes are free where `folder` is or will be."""
    there = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    if (free := shutil.disk_usage(there).free) < wanted:
        raise UserError(
            f"{what} need {wanted / 1e9:.3g} GB, but {folder} has {free / 1e9:.3g} GB free; make room for them"
        )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary path)` make a file and move it to `path` in one step: readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide results from the reader's group
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def locked(path: Path) -> FileLock:
    """A lock for whoever reads a file, changes it and writes it again; it lies in the system's temporary folder."""
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"advkd-{name}.lock")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write `value` as an indented JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, records: Iterable) -> None:
    """Dataclass records as one CSV table, a column per field."""
    rows = [asdict(record) for record in records]
    if not rows:
        return

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomic(path, write)


def read_records(path: Path, kind: type) -> list:
    """The dataclass records of type `kind` (numbers, or None) that `write_csv` wrote."""
    parse = {f.name: int if f.type is int else float for f in fields(kind)}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [kind(**{name: parse[name](value) if value else None for name, value in row.items()}) for row in rows]


def read_object(path: Path, mend: str) -> dict:
    """The JSON object in a file. Raises UserError that names the file and says what to do, `mend`, when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object); {mend}")
    return value


def check_weights(folder: Path) -> None:
    """Raise UserError where an index of weights in a folder names anything but safetensors files beside it."""
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        parts = read_object(index, "get these weights again").get("weight_map")
        for part in parts.values() if isinstance(parts, dict) else [parts]:
            if not isinstance(part, str) or not re.fullmatch(r"[\w.-]+\.safetensors", part):
                raise UserError(f"{index} names {part!r}, but its weights must be safetensors files beside it")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


def fingerprint(*states: dict[str, torch.Tensor] | str) -> str:
    """12 hexadecimal digits that tell sets of weights (state dicts) and strings apart, whatever file they came from."""
    digest = hashlib.sha256()
    for state in states:
        if isinstance(state, str):
            digest.update(state.encode())
            continue
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def differences(made_with: dict, wanted: dict) -> list[str]:
    """The fields in which two configurations differ, as 'field: made with A, wanted B'."""
    fields = sorted(made_with.keys() | wanted.keys())
    pairs = [(name, made_with.get(name), wanted.get(name)) for name in fields]
    # Compare as JSON, which has no tuples.
    return [f"{n}: made with {a!r}, wanted {b!r}" for n, a, b in pairs if _as_json(a) != _as_json(b)]


def _as_json(value: object) -> object:
    return json.loads(json.dumps(value))


def save_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], state: dict
) -> None:
    """Write weights, optimizer moments and the JSON-able `state` to one safetensors file, atomically."""
    tensors, groups = {}, {}
    for name, module in modules.items():
        tensors |= {f"{name}/{key}": _packed(value) for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        saved = optimizer.state_dict()
        groups[name] = saved["param_groups"]
        for index, moments in saved["state"].items():
            tensors |= {f"{name}/{index}/{key}": _packed(torch.as_tensor(value)) for key, value in moments.items()}
    metadata = {"state": json.dumps(state), "groups": json.dumps(groups)}
    write_atomic(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own in row-major order, as safetensors wants it (channels_last and shared tensors are refused)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def read_checkpoint_state(path: Path) -> dict:
    """The JSON part of a checkpoint. Raises UserError when the file is not one."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint ({error}); remove it to start afresh") from error


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """Restore what `save_checkpoint` wrote into `modules` and `optimizers`; returns its `state`."""
    state = read_checkpoint_state(path)
    with safe_open(path, "pt") as file:
        groups = json.loads(file.metadata()["groups"])
        names = list(file.keys())
        for name, module in modules.items():
            prefix = f"{name}/"
            module.load_state_dict({n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)})
        for name, optimizer in optimizers.items():
            moments: dict[int, dict] = {}
            for full in names:
                if full.startswith(f"{name}/"):
                    _, index, key = full.split("/")
                    moments.setdefault(int(index), {})[key] = file.get_tensor(full)
            optimizer.load_state_dict({"state": moments, "param_groups": groups[name]})
            for parameter, restored in optimizer.state.items():
                for key, value in restored.items():
                    if value.shape == parameter.shape:  # fused optimizers need the parameter's memory layout
                        restored[key] = torch.empty_like(parameter).copy_(value)
    return state
