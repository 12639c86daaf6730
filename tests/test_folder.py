import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from advkd import folder as module
from advkd.data import load_images, reference_images
from advkd.folder import load_folder, open_cache
from advkd.presets import UserError, load_preset


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def photograph(number, size):
    """A smooth colour image that is told from any other by its red level."""
    x, y = np.meshgrid(np.linspace(0, 100, size[0]), np.linspace(0, 100, size[1]))
    return Image.fromarray(np.stack([np.full_like(x, 10 * number), x, y], axis=-1).astype(np.uint8))


@pytest.fixture
def photographs(tmp_path):
    """Twelve images in three formats, at two depths."""
    root = tmp_path / "photographs"
    (root / "deep" / "er").mkdir(parents=True)
    for number in range(12):
        name = f"{number:02d}.{('png', 'jpg', 'webp')[number % 3]}"
        photograph(number, (40, 40)).save((root, root / "deep" / "er")[number % 2] / name, quality=100)
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_is_read_at_any_depth_and_split(photographs):
    train, heldout = (load_folder(str(photographs), 16, 3, split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (11, 1)
    images = train[torch.arange(11)]
    assert images.shape == (11, 3, 16, 16) and images.dtype == torch.float32
    reds = torch.cat([images, heldout[:1]])[:, 0].mean((1, 2)).add(1).mul(127.5)
    assert sorted(round(x / 10) for x in reds.tolist()) == list(range(12))
    assert torch.equal(train[:3], images[:3]) and torch.equal(train[torch.tensor([4, 1])], images[[4, 1]])


def test_images_are_cropped_to_their_middle_and_resized_with_antialiasing(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 200
    pixels[::2, 32:64, 1] = 0  # lines that only an average shows as grey
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / "wide.png")
    (image,) = open_cache("one", 8, 3)
    assert image[0].min() > 180 and np.abs(image[0, :, 2:-2].astype(int) - 200).max() <= 1  # nothing of the dark sides
    assert np.abs(image[1, 1:-1, 2:-2].astype(int) - 100).max() <= 12
    (grey,) = open_cache("one", 8, 1)
    assert grey.shape == (1, 8, 8)


def test_grey_images_become_colour_images(tmp_path):
    (tmp_path / "grey").mkdir()
    Image.fromarray(np.full((20, 20), 77, np.uint8)).save(tmp_path / "grey" / "a.png")
    (image,) = open_cache("grey", 8, 3)
    assert image.shape == (3, 8, 8) and (image == 77).all()


def test_images_are_decoded_once(photographs, monkeypatch):
    first = np.array(open_cache(str(photographs), 8, 3))
    monkeypatch.setattr(module, "_pixels", None)
    assert np.array_equal(open_cache(str(photographs), 8, 3), first)
    (photographs / "new.png").write_bytes((photographs / "00.png").read_bytes())
    with pytest.raises(UserError, match="13 of 13 images"):  # another folder now: decoded anew
        open_cache(str(photographs), 8, 3)


def test_an_interrupted_decoding_goes_on(photographs, monkeypatch, tmp_path):
    whole = np.array(open_cache(str(photographs), 8, 3))
    for file in (tmp_path / "runs" / "images").rglob("*.*"):
        file.unlink()
    calls, pixels, interrupted_at = [], module._pixels, 7

    def counted(*args):
        calls.append(args)
        if len(calls) == interrupted_at:
            raise KeyboardInterrupt
        return pixels(*args)

    monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(module, "_pixels", counted)
    with pytest.raises(KeyboardInterrupt):
        open_cache(str(photographs), 8, 3)
    calls.clear()
    interrupted_at = 0
    assert np.array_equal(open_cache(str(photographs), 8, 3), whole)
    assert len(calls) == 8


def test_a_few_unreadable_files_are_listed_and_many_are_an_error(photographs, tmp_path):
    (photographs / "13.png").write_bytes(b"no image")
    (photographs / "14.jpg").write_bytes((photographs / "04.jpg").read_bytes()[:200])
    with pytest.raises(UserError, match=r"2 of 14 images .* cannot be read, more than 1 %: 13\.png, 14\.jpg; mend"):
        open_cache(str(photographs), 8, 3)
    module_share = pytest.MonkeyPatch()
    module_share.setattr(module, "UNREADABLE_SHARE", 0.2)
    with pytest.warns(UserWarning, match=r"2 of 14 images cannot be read; they are listed in .*index\.json"):
        assert len(open_cache(str(photographs), 8, 3)) == 12
    module_share.undo()
    (index,) = (tmp_path / "runs" / "images").rglob("index.json")
    assert json.loads(index.read_text())["unreadable"] == ["13.png", "14.jpg"]


def test_sixteen_bits_of_grey_keep_their_level(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((20, 20), 100 * 257, np.uint16)).save(tmp_path / "deep" / "a.png")
    (image,) = open_cache("deep", 8, 1)
    assert (image == 100).all()


def test_a_source_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="images 'nowhere' is not a folder"):
        open_cache("nowhere", 8, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in 'empty' \(looked for .png, .jpg, .jpeg, .webp, at any depth\)"):
        open_cache("empty", 8, 3)


def test_a_data_set_of_the_hub_is_read_by_its_column_of_images(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number in (3, 5):
        (tmp_path / "data" / "train").mkdir(parents=True, exist_ok=True)
        photograph(number, (20, 20)).save(tmp_path / "data" / "train" / f"{number}.png")
    images = open_cache(f"hf:{tmp_path / 'data'}", 8, 3)
    assert sorted(int(image[0].mean()) for image in images) == [30, 50]
    with pytest.raises(UserError, match="images 'hf:no/where' cannot be loaded"):
        open_cache("hf:no/where", 8, 3)


def test_a_data_set_of_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"need the package datasets: pip install -U datasets"):
        open_cache("hf:owner/name", 8, 3)


def test_a_preset_takes_images_from_a_folder(photographs):
    preset = load_preset("cifar10", images=str(photographs))
    assert preset.real_share == 0.5
    images, labels = load_images(preset, "train")
    assert images[:2].shape == (2, 3, 32, 32) and labels is None
    assert reference_images(preset, "heldout")[0].shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=r"'cifar10' are not embedded; give a folder of them \(images=..., --images\)"):
        load_images(load_preset("cifar10"), "train")


def test_a_lost_cache_is_decoded_again_and_a_damaged_one_is_named(photographs, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    whole = open_cache(str(photographs), 16, 3).copy()
    (cache,) = (photographs.parent / "runs" / "images").iterdir()
    (cache / "index.json").rename(cache / "progress.json")  # as if it had been interrupted after eight ...
    state = {"done": 8, "bytes": 8 * 3 * 256, "images": 8, "unreadable": []}
    (cache / "progress.json").write_text(json.dumps(state))
    (cache / "images.u8").unlink()  # ... and what was decoded were lost
    assert np.array_equal(open_cache(str(photographs), 16, 3), whole)
    with open(cache / "images.u8", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"images.u8 is damaged or missing; remove"):
        open_cache(str(photographs), 16, 3)
