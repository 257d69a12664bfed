import pytest
from data_helpers import write_folder
from PIL import Image

from dmm import errors
from dmm.data.captions import read_captions
from dmm.errors import UserError


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(errors, "_NOTED", set())


def put(path, caption=None, suffix=".txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    if caption is not None:
        path.with_suffix(suffix).write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def told(folder):
    return [(str(path.relative_to(folder)), caption) for path, caption in read_captions(folder)]


def test_a_text_file_beside_each_image(tmp_path):
    put(tmp_path / "1.png", "a cat, sitting\n")
    put(tmp_path / "2.JPG", "\ufeffa dog\r\n")
    put(tmp_path / "more" / "3.webp", "", ".caption")
    put(tmp_path / ".thumbnails" / "4.png")
    (tmp_path / "readme.txt").write_text("not a caption")
    assert told(tmp_path) == [("1.png", "a cat, sitting"), ("2.JPG", "a dog"), ("more/3.webp", "")]


def test_kohyas_folders_weigh_each_other(tmp_path):
    put(tmp_path / "10_sks_cat" / "1.png")
    put(tmp_path / "10_sks_cat" / "2.png", "sks cat on a mat")
    put(tmp_path / "20_dog" / "1.png")
    put(tmp_path / "0_left out" / "1.png")
    cats = [("10_sks_cat/1.png", "sks_cat"), ("10_sks_cat/2.png", "sks cat on a mat")]
    assert told(tmp_path) == [*cats, ("20_dog/1.png", "dog"), ("20_dog/1.png", "dog")]
    # alone, its repeats are those of nothing
    assert told(tmp_path / "20_dog") == [("1.png", "dog")]


def test_metadata_and_text_files_in_one_tree(tmp_path):
    write_folder(tmp_path, ["a cat"])
    put(tmp_path / "not-listed.png", "of a folder with metadata.jsonl")
    put(tmp_path / "3_dog" / "1.png", "a dog")
    put(tmp_path / "other" / "1.png")  # which a line might have named
    assert told(tmp_path) == [("0.png", "a cat"), *[("3_dog/1.png", "a dog")] * 3]


def test_what_a_line_names_counts_once(tmp_path):
    put(tmp_path / "2_dog" / "1.png", "beside")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2_dog/1.png", "text": "listed"}')
    assert told(tmp_path) == [("2_dog/1.png", "listed")]


def test_of_several_lines_the_first_is_read_and_that_is_told(tmp_path, capsys):
    put(tmp_path / "1.png", "first\nsecond\n")
    put(tmp_path / "2.png", "one\ntwo")
    assert told(tmp_path) == [("1.png", "first"), ("2.png", "one")]
    assert capsys.readouterr().err.count("of such captions the first line is read") == 1


def test_an_image_without_a_caption_is_named(tmp_path):
    put(tmp_path / "1.png", "a cat")
    put(tmp_path / "2.png")
    with pytest.raises(UserError, match=r"2\.png' has no caption: there is no 2\.txt beside it"):
        read_captions(tmp_path)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "1.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"there are no images in it. Put images there with captions: 1.txt beside"):
        read_captions(tmp_path)


def test_a_caption_that_is_no_text(tmp_path):
    put(tmp_path / "1.png", b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"1\.txt is not UTF-8 text"):
        read_captions(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"0\.png' has no caption: there is no 0\.txt beside it, and no metadata.jsonl with a line such as"),
        ("\n", "the metadata.jsonl in it is empty"),
        ('{"file_name": "0.png"}', "metadata.jsonl, line 1 has no string 'text'; a line such as"),
        ('{"file_name": "0.png", "text": null}', "line 1 has no string 'text'"),
        ('\n{"text": "a cat"}', "line 2 has no string 'file_name'"),
        ("[]", "line 1 has no string 'file_name'"),
        ('{"file_name": "0.png", "text": "a', "line 1 is not valid JSON"),
        ('{"file_name": "gone.png", "text": "a cat"}', "line 1: there is no file '.*gone.png'. Put the image there"),
        (b"\xff", "is not UTF-8 text"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(tmp_path, metadata, message):
    write_folder(tmp_path, ["a cat"])
    file = tmp_path / "metadata.jsonl"
    if metadata is None:
        file.unlink()
    else:
        file.write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_captions(tmp_path)
    assert "\n" not in str(caught.value)
