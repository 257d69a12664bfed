import hashlib
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dmm.errors import UserError
from dmm.files.parameters import Parameters, UsedLora, lora_hash, model_hash, read_parameters
from dmm.files.pictures import save_png

PLAIN = Parameters("a red cat, sitting", "", 25, "DPM++ 2M", 7.0, "1", 512, 512, "v1-5", "6ce0161689")


def test_the_text_is_the_one_that_image_tools_read():
    with_negative = Parameters("a red cat, sitting", "blurry", 25, "DPM++ 2M", 7.0, "1", 512, 768, "v1-5", "6ce0161689")
    assert str(with_negative) == (
        "a red cat, sitting\n"
        "Negative prompt: blurry\n"
        "Steps: 25, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689, Model: v1-5"
    )
    assert len(str(PLAIN).splitlines()) == 2


@pytest.mark.parametrize(
    "prompt",
    ["a red cat, sitting", "", "two\nlines", "Seed: 3, Size: 1x1", "ein Käfer, 猫 🐈"],
)
@pytest.mark.parametrize("negative", ["", "blurry, Steps: 3", "zwei\nZeilen"])
def test_what_is_written_is_read(tmp_path, prompt, negative):
    parameters = Parameters(
        prompt, negative, 30, "Euler a", 7.25, "0-3,8", 64, 32, 'odd, "name": x', plugins={"Mask": "a, b.png"}
    )
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", parameters)
    expected = {
        "Prompt": prompt,
        "Steps": "30",
        "Sampler": "Euler a",
        "CFG scale": "7.25",
        "Seed": "0-3,8",
        "Size": "64x32",
        "Model": 'odd, "name": x',
        "Mask": "a, b.png",
    }
    assert read_parameters(tmp_path / "a.png") == expected | ({"Negative prompt": negative} if negative else {})


def test_loras_are_told_as_a1111_does():
    loras = [UsedLora("ink", 0.8, "0af5c2f8f4d1"), UsedLora("line", -1.0, "6ce016168900")]
    prompt, last = str(replace(PLAIN, loras=loras)).splitlines()
    assert prompt == "a red cat, sitting <lora:ink:0.8> <lora:line:-1>"
    assert last.endswith(', Lora hashes: "ink: 0af5c2f8f4d1, line: 6ce016168900"')
    assert str(replace(PLAIN, prompt="", loras=loras[:1])).startswith("<lora:ink:0.8>\n")


def test_a_loras_hash_is_of_its_weights_or_what_kohyas_scripts_wrote(tmp_path):
    weights = {"a.lora_down.weight": torch.ones(2, 3)}
    plain, told, pickle = (tmp_path / name for name in ("plain.safetensors", "told.safetensors", "pickle.pt"))
    save_file(weights, plain, {"ss_comment": "whatever"})
    save_file(weights, told, {"sshs_model_hash": "0123456789abcdef"})
    pickle.write_bytes(b"PK")
    assert lora_hash(plain) == hashlib.sha256(torch.ones(6).numpy().tobytes()).hexdigest()[:12]
    assert lora_hash(told) == "0123456789ab"
    assert lora_hash(pickle) == hashlib.sha256(b"PK").hexdigest()[:12]


def test_a_picture_without_parameters_and_a_file_that_is_none_are_refused(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("plain.png", "carries no"), ("text.png", "could not be read"), ("none.png", "No such")):
        with pytest.raises(UserError, match=message):
            read_parameters(tmp_path / name)


def test_the_model_hash_is_that_of_the_file_or_of_the_unets_weights(sd1_file, sd1_folder):
    weights = sd1_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert model_hash(sd1_file, "unet") == hashlib.sha256(sd1_file.read_bytes()).hexdigest()[:10]
    assert model_hash(sd1_folder, "unet") == hashlib.sha256(weights.read_bytes()).hexdigest()[:10]


def test_every_shard_counts_in_the_model_hash(tmp_path):
    (tmp_path / "unet").mkdir()
    shards = [tmp_path / "unet" / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        shard.write_bytes(shard.name.encode())
    before = model_hash(tmp_path, "unet")
    shards[1].write_bytes(b"changed")
    assert before != model_hash(tmp_path, "unet")


def test_a_model_that_is_not_on_disk_has_no_hash(tmp_path):
    assert model_hash(tmp_path / "owner" / "name", "unet") is None
