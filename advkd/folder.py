"""A folder of images, decoded once into a memory-mapped cache."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from advkd.devices import processes
from advkd.files import check_disk, first_line, quiet, read_object, sha256, write_json, writing
from advkd.presets import UserError, config_hash

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE_SHARE = 0.01  # of the files; more of them are an error
HELDOUT_SHARE, HELDOUT_MOST = 0.1, 10_000
CHUNK = 1024  # images between two states that an interrupted decoding goes on from
HUB = "hf:"  # what a data set of the hub begins with


class CachedImages:
    """Some images of a cache: `(n, c, h, w)` in [-1, 1] once indexed by a slice or a 1-D integer tensor."""

    def __init__(self, pixels: np.memmap, chosen: np.ndarray):
        self.pixels, self.chosen = pixels, chosen
        self.identity = Path(pixels.filename).parent.name  # changes with the files that they were decoded from

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, indices: slice | Tensor) -> Tensor:
        return torch.div(self.stored(indices), 127.5).sub_(1)

    def stored(self, indices: slice | Tensor) -> Tensor:
        """The same with 8 bits, a quarter of what has to travel to a GPU."""
        return torch.from_numpy(self.pixels[self.chosen[indices if isinstance(indices, slice) else indices.numpy()]])


def load_folder(source: str, size_px: int, channels: int, split: str) -> CachedImages:
    """The train or held-out images of a folder (any depth; png, jpg, webp) or of a data set of the hub ("hf:owner/name").

    Each is cropped to its central square and resized to `size_px`, in grey where `channels` is 1. A tenth is held out
    (at most 10,000), by a permutation that the number of images alone determines. Decoded once, into
    `runs/images/`; what cannot be read is listed there and left out. Raises UserError for a source without images, and where
    more than 1 % of the files cannot be read.
    """
    pixels = open_cache(source, size_px, channels)
    order = np.random.RandomState(0).permutation(len(pixels))
    held = min(HELDOUT_MOST, int(len(pixels) * HELDOUT_SHARE))
    return CachedImages(pixels, np.sort(order[:held] if split == "heldout" else order[held:]))


def open_cache(source: str, size_px: int, channels: int) -> np.memmap:
    """All readable images of a source, uint8 `(n, c, h, w)`, as a memory map; decodes them if that was not done yet."""
    names, identity, read = _hub_images(source) if source.startswith(HUB) else _files(source)
    made_from = {"source": identity, "size_px": size_px, "channels": channels}
    folder = Path("runs") / "images" / config_hash(made_from)
    index, file = folder / "index.json", folder / "images.u8"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # of several processes, on any machine, one decodes and the others wait for it
            if not index.exists():
                missing = (len(names) - _progress(folder)["done"]) * channels * size_px**2
                check_disk(folder, missing, "the decoded images")
                _decode(names, lambda name: _pixels(read(name), size_px, channels), folder, source)
    found, again = _read_counts(index, "images"), f"remove {folder} and the images are decoded again"
    if unreadable := found["unreadable"]:
        warnings.warn(
            f"{len(unreadable)} of {len(names)} images cannot be read; they are listed in {index}", stacklevel=3
        )
    shape = found["images"], channels, size_px, size_px
    right = file.exists() and file.stat().st_size == math.prod(shape)
    if right and "sha256" in found and processes()[0] == 0:  # an earlier version wrote none
        right = _digest(file) == found["sha256"]
    if not right:
        raise UserError(f"{file} is damaged or missing; {again}")
    return np.memmap(file, np.uint8, "r", shape=shape)


def _digest(file: Path) -> str:
    """The checksum of a cache; of a file that did not change since, what it was (half a second a gigabyte)."""
    stat = file.stat()
    return _digest_of(file.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _digest_of(file: Path, size: int, changed: int) -> str:
    return sha256(file)


def _files(source: str) -> tuple[list[str], object, Callable[[str], Image.Image]]:
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"images {source!r} is not a folder; give one with png, jpg or webp files, or hf:OWNER/NAME")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"there are no images in {source!r} (looked for {', '.join(SUFFIXES)}, at any depth)")
    names = [p.relative_to(root).as_posix() for p in paths]
    stats = [p.stat() for p in paths]
    identity = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    return names, identity, lambda name: Image.open(root / name)


def _hub_images(source: str) -> tuple[list[str], object, Callable[[str], Image.Image]]:
    try:
        from datasets import Image as ImageFeature
        from datasets import __version__, load_dataset
    except ImportError as error:
        raise UserError(f"images {source!r} need the package datasets: pip install -U datasets") from error
    if int(__version__.split(".")[0]) < 4:
        raise UserError(
            f"images {source!r} need datasets 4 or newer, which runs no scripts of others; here is {__version__}: "
            "pip install -U datasets"
        )
    try:
        data = load_dataset(source.removeprefix(HUB), split="train")
    except (OSError, ValueError) as error:
        raise UserError(f"images {source!r} cannot be loaded: {first_line(error)}") from error
    columns = [name for name, feature in data.features.items() if isinstance(feature, ImageFeature)]
    if not columns:
        raise UserError(f"images {source!r} have no column of images; columns: {', '.join(data.features)}")
    return [str(i) for i in range(len(data))], data._fingerprint, lambda name: data[int(name)][columns[0]]


def _pixels(image: Image.Image, size_px: int, channels: int) -> np.ndarray:
    """The central square of an image as uint8 `(c, size_px, size_px)`."""
    with image:
        image.draft(None, (2 * size_px, 2 * size_px))  # large jpegs are decoded at a fraction of their size
        if image.mode.startswith("I"):  # 16 bits of grey
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
        square = ImageOps.fit(upright, (size_px, size_px), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size_px, size_px, channels).transpose(2, 0, 1)


def _decode(names: Sequence[str], read: Callable[[str], np.ndarray], folder: Path, source: str) -> None:
    """Write all images one after the other; goes on where an earlier call stopped."""
    file, progress, state = folder / "images.u8", folder / "progress.json", _progress(folder)
    with writing(file), open(file, "ab") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        out.truncate(state["bytes"])
        bar = tqdm(total=len(names), initial=state["done"], desc="decode", unit="image", disable=quiet(True))
        for start in range(state["done"], len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            for name, pixels in zip(chunk, pool.map(lambda name: _or_none(read, name), chunk), strict=True):
                if pixels is None:
                    state["unreadable"].append(name)
                    continue
                state["bytes"] += out.write(pixels.tobytes())
                state["images"] += 1
            out.flush()
            os.fsync(out.fileno())
            write_json(progress, state | {"done": start + len(chunk)})
            bar.update(len(chunk))
        bar.close()
    if len(state["unreadable"]) > UNREADABLE_SHARE * len(names):
        shown = ", ".join(state["unreadable"][:5])
        for made in (progress, file):  # the files are mended and read again, under another name
            made.unlink()
        raise UserError(
            f"{len(state['unreadable'])} of {len(names)} images in {source!r} cannot be read, more than 1 %: {shown}"
            f"{', ...' if len(state['unreadable']) > 5 else ''}; mend or remove them"
        )
    found = {name: state[name] for name in ("images", "unreadable")}
    write_json(folder / "index.json", {"source": source, "sha256": sha256(file)} | found)
    progress.unlink()


def _progress(folder: Path) -> dict:
    """How far an earlier call came, as far as its images are still there."""
    progress, file = folder / "progress.json", folder / "images.u8"
    if progress.exists():
        state = _read_counts(progress, "done", "bytes", "images")
        if file.exists() and file.stat().st_size >= state["bytes"]:
            return state
    return {"done": 0, "bytes": 0, "images": 0, "unreadable": []}


def _read_counts(path: Path, *counts: str) -> dict:
    """The JSON of a cache, which says how much of it there is and names no file to be opened."""
    mend = f"remove {path.parent} and the images are decoded again"
    state = read_object(path, mend)
    for name in counts:
        if type(state.get(name)) is not int or state[name] < 0:
            raise UserError(f"{path} is damaged ({name} is {state.get(name)!r}); {mend}")
    if not isinstance(state.get("unreadable"), list):
        raise UserError(f"{path} is damaged (unreadable is {state.get('unreadable')!r}); {mend}")
    return state


def _or_none(read: Callable[[str], np.ndarray], name: str) -> np.ndarray | None:
    try:
        return read(name)
    except Exception:  # decoders raise nearly every kind for a damaged file; it is listed
        return None
