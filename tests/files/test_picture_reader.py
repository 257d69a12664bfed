import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from dmm import errors
from dmm.errors import UserError
from dmm.files.picture_reader import open_picture


def stored(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    file.seek(0)
    return file


def read(image, image_format="PNG", **options):
    return np.asarray(open_picture(stored(image, image_format, **options), "it")).astype(int)


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(errors, "_NOTED", set())


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_portrait_is_upright(image_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(Image.new("RGB", (64, 48)), image_format, exif=exif).shape == (64, 48, 3)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_by_its_range(image_format):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert read(Image.fromarray(values), image_format)[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_grey_of_16_bits_in_32_is_too():
    values = np.array([[0, 65535]], dtype=np.int32)
    assert read(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("values", [np.array([[0.0, 0.5]], np.float32), np.array([[-1, 70000]], np.int32)])
def test_pixels_without_a_known_range_are_refused(values):
    with pytest.raises(UserError, match=r"it has pixels of mode [FI], whose range is not known: 8 or 16 bits"):
        read(Image.fromarray(values), "TIFF")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_see_through_parts_are_laid_on_white_and_told_once(mode, capsys):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    for _ in range(2):
        assert (read(clear, "TIFF" if mode == "PA" else "PNG") == 255).all()
    assert capsys.readouterr().err == "dmm: note: it: it has see-through parts; such pictures are laid on white\n"


def test_one_see_through_grey_and_colour():
    deep = Image.fromarray(np.array([[0, 500]], dtype=np.uint16))
    assert read(deep, transparency=500)[0, :, 0].tolist() == [0, 255]
    assert read(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)).min() == 255


def test_an_opaque_alpha_is_not_told(capsys):
    assert (read(Image.new("RGBA", (2, 2), (9, 8, 7, 255))) == [9, 8, 7]).all()
    assert capsys.readouterr().err == ""


def icc(space):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_colours_of_a_profile_become_srgb(mode):
    # sRGB with red and blue exchanged: what it calls red is blue
    swapped = exchange_primaries(icc("sRGB"))
    colour = Image.new("RGB", (4, 4), "red" if mode != "L" else "white").convert(mode)
    expected = [255, 255, 255] if mode == "L" else [0, 0, 255]
    assert abs(read(colour, icc_profile=swapped) - expected).max() <= 2


def exchange_primaries(profile):
    return profile.replace(b"rXYZ", b"temp").replace(b"bXYZ", b"rXYZ").replace(b"temp", b"bXYZ")


def test_srgb_stays_to_the_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert abs(read(Image.fromarray(pixels), icc_profile=icc("sRGB")) - pixels).max() <= 1


@pytest.mark.parametrize("profile", [b"no profile", icc("LAB")])
def test_a_profile_that_says_nothing_is_told_once(profile, capsys):
    for _ in range(2):
        assert (read(Image.new("RGB", (2, 2), "red"), icc_profile=profile) == [255, 0, 0]).all()
    assert capsys.readouterr().err.count("its colour profile cannot be read or does not fit") == 1


def test_the_limit_of_pixels_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read(Image.new("RGB", (30, 40))).shape == (40, 30, 3)  # twice the limit is what Pillow refuses
    with pytest.raises(UserError, match=r"it has more pixels than the 2,000 that Pillow opens"):
        read(Image.new("RGB", (50, 50)))


@pytest.mark.parametrize("data", [b"", b"<html>", stored(Image.new("RGB", (99, 99))).getvalue()[:60]])
def test_what_is_no_picture_is_named(data):
    with pytest.raises(UserError, match=r"it could not be read as a picture: it is damaged"):
        open_picture(io.BytesIO(data), "it")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"'.*gone\.png' could not be read as a picture: there is no such file"):
        open_picture(tmp_path / "gone.png")
