"""Files that are either whole or not there: atomic writes, locks, checksums."""

import csv
import getpass
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from advkd.presets import UserError


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


def make_folder(folder: Path) -> None:
    """Make a folder that results will go to, before hours are spent on them. Raises UserError where that is not possible."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block something is written to `path`: a full disk, or a place that cannot be written to, is a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{path} cannot be written ({reason}); make room for it or choose another place, then run the command again"
        ) from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary path)` make a file and move it to `path` in one step: readers see the old or the new one.

    Raises UserError, and leaves the old one, where that is not possible.
    """
    with writing(path):
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


def remove_halves(folder: Path, *names: str) -> None:
    """Remove what `write_atomic` left of the files `names` in a folder when it was killed."""
    for name in names:
        half = rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}{re.escape(Path(name).suffix)}"  # as mkstemp names them
        for left in Path(folder).glob(f".{name}.*"):
            if re.fullmatch(half, left.name):
                left.unlink(missing_ok=True)


def move_whole(half: Path, folder: Path, last: str) -> None:
    """Move what lies in `half` to `folder`, in place of what is there; `last` comes last and says that it is whole."""
    for item in sorted(half.iterdir(), key=lambda item: item.name == last):
        if (there := folder / item.name).is_dir():
            shutil.rmtree(there)
        item.replace(there)


def locked(path: Path) -> FileLock:
    """A lock for whoever reads a file, changes it and writes it again: among the processes of one user on one machine.

    It lies in the system's temporary folder, ends with its process, and a process that has it already gets it again.
    """
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"advkd-{getpass.getuser()}-{name}.lock", is_singleton=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block this process alone makes what is in `folder`: another one that wants to waits, and says so."""
    lock = locked(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"advkd: another process works in {folder}; waiting for it to end", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
    """The dataclass records of type `kind` (numbers, or None) that `write_csv` wrote. Raises UserError for a damaged file."""
    parse = {f.name: int if f.type is int else float for f in fields(kind)}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [kind(**{name: parse[name](value) if value else None for name, value in row.items()}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); remove {path.parent} to start afresh") from error


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
    # As JSON, which has no tuples.
    pairs = [(name, _as_json(made_with.get(name)), _as_json(wanted.get(name))) for name in fields]
    return [f"{n}: made with {a!r}, wanted {b!r}" for n, a, b in pairs if a != b]


def _as_json(value: object) -> object:
    return json.loads(json.dumps(value))
