import io
import sys

import numpy as np
import pytest
from data_helpers import noise, write_folder
from PIL import Image

from dmm.data.images import ImageDataset, ImageFolder, load_image
from dmm.errors import UserError


class OneImage:
    """An image as bytes of some format."""

    captions = ("",)

    def __init__(self, image, image_format="PNG", **options):
        file = io.BytesIO()
        image.save(file, image_format, **options)
        self.read = lambda index: file.getvalue()

    def name(self, index):
        return "the image"


def loaded(image, size=8, image_format="PNG", **options):
    return np.asarray(load_image(OneImage(image, image_format, **options), 0, (size, size))).astype(int)


def test_a_folder_and_its_subfolders(tmp_path):
    write_folder(tmp_path, ["a cat", "two\u2028lines", ""])
    write_folder(tmp_path / "more", ["a dog"])
    (tmp_path / "not-listed.png").write_bytes(b"")
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "more/0.png", "text": "once more", "artist": "me"}')
    images = ImageFolder(tmp_path)
    assert images.captions == ["a cat", "two\u2028lines", "", "once more", "a dog"]
    assert images.read(3) == images.read(4) == (tmp_path / "more" / "0.png").read_bytes()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder of images"):
        ImageFolder(tmp_path / "nowhere")


def test_images_are_resized_to_their_shorter_side_and_cut_to_the_middle():
    wide = noise(16, 48, 3)
    shrunk = wide.resize((24, 8), Image.Resampling.LANCZOS)
    assert (loaded(wide) == np.asarray(shrunk)[:, 8:16]).all()
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    # up to what some versions of Pillow round between the two directions
    assert abs(loaded(tall) - np.rot90(loaded(wide))).max() <= 8
    assert loaded(wide, 32).shape == (32, 32, 3)


def test_shrinking_is_antialiased():
    board = np.indices((64, 64)).sum(0) % 2 * 255
    assert abs(loaded(Image.fromarray(board.astype(np.uint8))) - 127.5).max() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (loaded(clear.convert(mode)) == 255).all()
    assert (loaded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))) - 127 <= 1).all()


def test_an_image_is_turned_as_its_exif_says():
    image = Image.new("RGB", (8, 8))
    image.paste("red", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = loaded(image, exif=exif)
    assert (turned[:4] == 0).all()
    assert (turned[4:, :, 0] == 255).all()


@pytest.mark.parametrize(("mode", "image_format"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG")])
def test_every_common_kind_of_image_becomes_rgb(mode, image_format):
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    assert abs(loaded(white, image_format=image_format) - 255).max() <= 1


@pytest.mark.parametrize("damage", [lambda data: data[:600], lambda data: b"", lambda data: b"<html>"])
def test_a_damaged_image_is_named(tmp_path, damage):
    write_folder(tmp_path, ["a cat"], lambda _: noise(20, 20, 3))
    path = tmp_path / "0.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"0\.png could not be read as a picture") as caught:
        load_image(ImageFolder(tmp_path), 0, (8, 8))
    assert "\n" not in str(caught.value)


def test_digests_are_of_content_and_remembered(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", ["a", "b"])
    cache = tmp_path / "cache"
    digests = ImageFolder(tmp_path / "images").digests(cache)
    read = []
    original = ImageFolder.read
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: read.append(index) or original(self, index))
    assert ImageFolder(tmp_path / "images").digests(cache) == digests
    assert read == []
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "images" / "1.png")
    changed = ImageFolder(tmp_path / "images").digests(cache)
    assert read == [1]
    assert changed[0] == digests[0]
    assert changed[1] != digests[1]


def test_a_dataset_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package 'datasets': install it with pip install 'dmm\[datasets\]'"):
        ImageDataset("someone/something")


def test_a_dataset_is_what_its_folder_is(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    folder = write_folder(tmp_path / "images", ["a cat", "a dog"])
    loaded_set = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    loaded_set.save_to_disk(tmp_path / "splits")
    loaded_set["train"].save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    by_folder = ImageFolder(folder)
    for path in (folder, tmp_path / "splits", tmp_path / "saved"):
        images = ImageDataset(path)
        assert images.captions == by_folder.captions
        assert [images.read(index) for index in range(2)] == [by_folder.read(index) for index in range(2)]
        assert images.digests(tmp_path) == by_folder.digests(tmp_path)
    loaded_set["train"].rename_column("text", "caption").save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="no column 'text'; it has image, caption"):
        ImageDataset(tmp_path / "other")
    with pytest.raises(UserError, match=r"The dataset '.*nowhere' could not be opened"):
        ImageDataset(tmp_path / "nowhere")
