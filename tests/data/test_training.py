import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_text_encoder
from data_helpers import count_calls, noise, write_folder
from PIL import Image
from tiny_families import tiny_sdxl

from dmm.data import ImageFolder, Synthesis, prepare_data, rows
from dmm.data.encoding import encode_images
from dmm.data.images import load_image
from dmm.data.rows import Place
from dmm.data.training import STUDENT
from dmm.errors import UserError

CAPTIONS = ["a cat", "a dog", "a cat", ""]


def teacher_pipeline():
    """A teacher with a text encoder of its own."""
    pipeline = tiny_pipeline(seed=1)
    pipeline.text_encoder = tiny_text_encoder(pipeline.tokenizer)
    return pipeline


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", CAPTIONS, lambda index: noise(20 + index, 20, 3))


def prepare(source, base, tmp_path, teachers=None, size=16, **options):
    teachers = {"own": teacher_pipeline(), "same": tiny_pipeline()} if teachers is None else teachers
    openers = {name: lambda pipeline=pipeline: pipeline for name, pipeline in teachers.items()}
    return prepare_data(source, base, openers, size=size, cache=tmp_path / "cache", show_progress=False, **options)


def embedding(pipeline, captions):
    return pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)[0]


def near(one, other):
    return one.allclose(other, atol=1e-6, rtol=2**-11)  # float16


def test_rows_are_the_images_and_their_captions(folder, pipeline, tmp_path):
    own = teacher_pipeline()
    data = prepare(ImageFolder(folder), pipeline, tmp_path, {"own": own})
    rows = torch.tensor([3, 0, 1, 2, 0])
    captions = [CAPTIONS[row] for row in rows]
    kept = torch.zeros(5, dtype=torch.bool)
    assert (data.num_rows, data.latent_shape) == (4, (4, 8, 8))
    assert data.rows_of("own").tolist() == []  # no teacher has painted them
    assert data.latents(rows).dtype == torch.float32
    assert data.latents(rows).equal(torch.cat([data.latents(row[None]) for row in rows]))
    assert near(data.conditioning(STUDENT, rows, kept)["encoder_hidden_states"], embedding(pipeline, captions))
    assert near(data.conditioning("own", rows, kept)["encoder_hidden_states"], embedding(own, captions))


def test_pictures_of_several_shapes_are_sorted_and_none_is_stretched(tmp_path):
    def striped(width, height):
        return Image.fromarray(np.tile(np.arange(width) // 4 % 2 * 255, (height, 1)).astype(np.uint8)).convert("RGB")

    shapes = [(32, 16), (16, 16), (16, 30), (64, 32)]
    folder = write_folder(tmp_path / "images", CAPTIONS, lambda index: striped(*shapes[index]))
    base, buckets = tiny_sdxl(), [(16, 16), (32, 8), (24, 12), (8, 16)]
    images = ImageFolder(folder)
    data = prepare(images, base, tmp_path, {}, buckets=buckets)
    assert [sized.tolist() for sized in data.sizes] == [[2], [1], [0, 3]]
    kept = torch.zeros(2, dtype=torch.bool)
    for sized, (width, height) in zip(data.sizes, [(8, 16), (16, 16), (24, 12)], strict=True):
        expected = encode_images(base.vae, [load_image(images, row, (width, height)) for row in sized.tolist()])
        assert near(data.latents(sized), expected)
        assert data.latents(sized).shape[2:] == (height // 2, width // 2)
        read = data.conditioning(STUDENT, sized, kept[: len(sized)])["added_cond_kwargs.time_ids"]
        assert read.tolist() == [[height, width, 0, 0, height, width]] * len(sized)
    # what covers a size as it is stays whole; of what does not, the middle is left, and is not squeezed
    assert np.array_equal(np.asarray(load_image(images, 0, (32, 16))), np.asarray(striped(32, 16)))
    assert np.array_equal(np.asarray(load_image(images, 0, (16, 16))), np.asarray(striped(32, 16))[:, 8:24])
    with pytest.raises(ValueError, match="unpack"):
        data.latents(torch.tensor([0, 1]))  # of two sizes


def test_a_dropped_caption_is_the_empty_one_for_student_and_teacher(folder, pipeline, tmp_path):
    data = prepare(ImageFolder(folder), pipeline, tmp_path)
    rows, kept = torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.bool)
    dropped = torch.tensor([False, True, False])
    empty = torch.tensor([3])  # the row whose caption is empty
    for encoder in (STUDENT, "own", "same"):
        whole = data.conditioning(encoder, rows, kept)["encoder_hidden_states"]
        some = data.conditioning(encoder, rows, dropped)["encoder_hidden_states"]
        assert some[1].equal(data.conditioning(encoder, empty, torch.tensor([False]))["encoder_hidden_states"][0])
        assert not some[1].equal(whole[1])
        assert some[dropped.logical_not()].equal(whole[dropped.logical_not()])


def test_a_second_run_computes_nothing(folder, pipeline, tmp_path):
    first = prepare(ImageFolder(folder), pipeline, tmp_path)
    base, same = tiny_pipeline(), tiny_pipeline()
    calls = [count_calls(module) for module in (base.vae.encoder, base.text_encoder, same.text_encoder)]
    second = prepare(ImageFolder(folder), base, tmp_path, {"same": same})
    assert calls == [[], [], []]
    assert second.latents(torch.arange(4)).equal(first.latents(torch.arange(4)))


def test_equal_text_encoders_are_stored_once(folder, pipeline, tmp_path):
    prepare(ImageFolder(folder), pipeline, tmp_path, {"same": tiny_pipeline(), "too": tiny_pipeline()})
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 1
    prepare(ImageFolder(folder), pipeline, tmp_path, {"same": tiny_pipeline()}, clip_skips={"same": 1})
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 2


def test_each_style_learns_on_what_its_teacher_painted(pipeline, tmp_path):
    teachers = {"own": teacher_pipeline(), "same": tiny_pipeline()}
    source = Synthesis(["a cat", "a dog"], 5, steps=1, guidance_scale=1)
    data = prepare(source, pipeline, tmp_path, teachers)
    assert [data.rows_of(name).tolist() for name in teachers] == [[0, 1, 2], [3, 4]]
    for name in teachers:
        mine = data.rows_of(name)
        alone = prepare(source, pipeline, tmp_path / "again", teachers)
        assert data.latents(mine).equal(alone.latents(mine))
        assert data.conditioning(name, mine, torch.ones(len(mine), dtype=torch.bool))["encoder_hidden_states"].equal(
            data.conditioning(name, mine[:1], torch.tensor([True]))["encoder_hidden_states"].expand(len(mine), -1, -1)
        )


def test_processes_share_what_is_made(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SHARD_ROWS", 2)
    teachers = {"own": teacher_pipeline(), "same": tiny_pipeline()}
    source = Synthesis(["a cat", "a dog", "a cow"], 6, steps=1, guidance_scale=1)
    alone = prepare(source, pipeline, tmp_path / "alone", teachers)

    made = []
    for index in range(2):
        here = tmp_path / str(index)  # as if each knew nothing of the other
        shared = prepare(source, pipeline, here, teachers, place=Place(index, 2))
        made.append({path.relative_to(here) for path in here.rglob("*.safetensors")})
        shutil.copytree(here, tmp_path / "together", dirs_exist_ok=True)
    assert not made[0] & made[1]
    painted = [sum("synthesised" in str(path) for path in paths) for paths in made]
    assert painted == [2, 2]  # each teacher's two shards: one is the one's, one the other's
    for name in ("texts", "synthesised"):
        whole = {path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob(f"{name}/*")}
        assert {path.relative_to(tmp_path / "together") for path in (tmp_path / "together").rglob(f"{name}/*")} == whole
    again = prepare(source, pipeline, tmp_path / "together", teachers, place=Place(1, 2))
    everything = torch.arange(6)
    assert again.latents(everything).equal(alone.latents(everything))
    assert (shared.num_rows, again.latent_shape) == (6, alone.latent_shape)


def test_one_teacher_is_open_at_a_time(pipeline, tmp_path):
    opened = []

    def open_teacher():
        gc.collect()
        assert all(teacher() is None for teacher in opened)
        teacher = tiny_pipeline()
        opened.append(weakref.ref(teacher.unet))
        return teacher

    source = Synthesis(["a cat"], 3, steps=1, guidance_scale=1)
    teachers = dict.fromkeys(("a", "b", "c"), open_teacher)
    prepare_data(source, pipeline, teachers, size=16, cache=tmp_path, show_progress=False)
    assert len(opened) == 3


def test_progress_shows_a_rate_over_images(folder, pipeline, tmp_path, capsys):
    prepare_data(ImageFolder(folder), pipeline, {}, size=16, cache=tmp_path)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "images: 100%" in last
    assert "4/4" in last
    assert "images/s" in last


def test_captions_that_are_cut_are_told(pipeline, tmp_path, caplog):
    folder = write_folder(tmp_path / "images", ["longer than can be read " * 3, "a cat"])
    prepare(ImageFolder(folder), pipeline, tmp_path)
    assert caplog.messages == ["The text encoder does not read the end of 1 of the 3 captions."]


def test_a_size_that_does_not_suit_is_told_before_any_work(folder, pipeline, tmp_path):
    with pytest.raises(UserError, match="The size must be a multiple of 2 pixels, not 15"):
        prepare(ImageFolder(folder), pipeline, tmp_path, size=15)
    assert not (tmp_path / "cache").exists()


def test_mistakes_are_told_with_the_teachers_name(folder, pipeline, tmp_path):
    with pytest.raises(UserError, match="No teacher can be called 'student'"):
        prepare(ImageFolder(folder), pipeline, tmp_path, {"student": tiny_pipeline()})
    with pytest.raises(UserError, match="teacher 'same': clip_skip is 7, but the text encoder has 2 layers"):
        prepare(ImageFolder(folder), pipeline, tmp_path, clip_skips={"same": 7})
