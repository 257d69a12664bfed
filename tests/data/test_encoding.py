from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MAX_TOKENS, tiny_pipeline, tiny_text_encoder
from data_helpers import count_calls, noise, write_folder
from PIL import Image

from dmm.data.encoding import decode_latents, encode_images, encode_latents, encode_texts
from dmm.data.images import ImageFolder
from dmm.data.rows import SHARD_ROWS
from dmm.errors import UserError

CAPTIONS = ["", "a cat", "a dog"]


@pytest.fixture
def folder(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    return write_folder(tmp_path / "images", ["a", "b", "c"], lambda index: Image.fromarray(images[index]))


@pytest.fixture
def encode(folder, tmp_path):
    """Latents of the folder, and the numbers of images that the VAE was asked for."""

    def run(vae, size=16):
        shares = []
        calls = count_calls(vae.encoder)
        rows = encode_latents(vae, ImageFolder(folder), (size, size), tmp_path / "cache", shares.append)
        return SimpleNamespace(rows=rows, calls=calls, latents=rows.read(torch.arange(3))["latents"], progress=shares)

    return run


def test_latents_are_the_modes_of_the_posterior_scaled(pipeline, encode, folder):
    answer = encode(pipeline.vae)
    pixels = [np.asarray(Image.open(folder / f"{index}.png").resize((16, 16), 1)) for index in range(3)]
    inputs = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(inputs).latent_dist.mode() * 0.18215
    assert answer.latents.shape == (3, 4, 8, 8)
    assert answer.latents.allclose(expected, atol=1e-6, rtol=2**-11)  # float16
    assert sum(answer.progress) == 3


def test_a_vae_that_shifts_is_followed(pipeline):
    images = [noise(16, 16, 3)]
    plain = encode_images(pipeline.vae, images)
    pipeline.vae.register_to_config(shift_factor=0.5)
    assert encode_images(pipeline.vae, images).allclose(plain - 0.5 * 0.18215, atol=1e-6)


def test_a_vae_that_overflows_in_float16_never_computes_in_it(pipeline):
    vae, images = pipeline.vae, [noise(16, 16, 3)]
    vae.to(torch.float16).to(torch.float32)  # what float16 holds, and nothing else
    exact = encode_images(vae, images)
    stored = {name: tensor.clone() for name, tensor in vae.to(torch.float16).state_dict().items()}
    assert vae.config.force_upcast
    assert encode_images(vae, images).equal(exact)
    (decoded,) = decode_latents(vae, exact)
    assert vae.dtype == torch.float16
    assert all(tensor.equal(stored[name]) for name, tensor in vae.state_dict().items())
    assert np.array_equal(np.asarray(decoded), np.asarray(decode_latents(vae.to(torch.float32), exact)[0]))


def test_cached_latents_need_no_vae(pipeline, encode):
    first = encode(pipeline.vae)
    second = encode(tiny_pipeline().vae)
    assert (first.calls, second.calls) == ([3], [])
    assert second.latents.equal(first.latents)
    assert sum(second.progress) == 3


def test_another_vae_scale_size_or_image_is_encoded_anew(pipeline, encode, folder):
    encode(pipeline.vae)
    assert encode(tiny_pipeline(seed=1).vae).calls == [3]
    assert encode(pipeline.vae, size=8).latents.shape == (3, 4, 4, 4)
    scaled = tiny_pipeline().vae
    scaled.register_to_config(scaling_factor=1.0)
    assert encode(scaled).calls == [3]
    noise(20, 20, 3).transpose(Image.Transpose.ROTATE_90).save(folder / "1.png")
    assert encode(tiny_pipeline().vae).calls == [3]


def test_what_a_vae_is_called_does_not_matter(pipeline, encode):
    encode(pipeline.vae)
    renamed = tiny_pipeline().vae
    renamed.register_to_config(sample_size=512, _name_or_path="elsewhere")
    assert encode(renamed).calls == []


def test_a_size_that_the_vae_cannot_shrink(pipeline, encode):
    with pytest.raises(UserError, match="The size must be a multiple of 2 pixels, not 15; 14 and 16 are the nearest"):
        encode(pipeline.vae, size=15)


def test_overflow_is_told_and_not_cached(pipeline, encode, tmp_path):
    with torch.no_grad():
        pipeline.vae.quant_conv.bias[0] = 1e9  # no float16
    with pytest.raises(UserError, match=r"0\.png: the latents came out as NaN or infinite, computed in float32"):
        encode(pipeline.vae)
    assert not list(tmp_path.glob("cache/latents/*"))


def test_latents_in_bfloat16_are_near(pipeline, encode):
    full = encode(pipeline.vae).latents
    half = encode(pipeline.vae.to(torch.bfloat16)).latents
    assert not half.equal(full)
    assert (half - full).abs().max() < 0.05 * full.abs().max()


def encode_captions(pipeline, cache, captions=CAPTIONS, **options):
    calls = count_calls(pipeline.text_encoder)
    rows = encode_texts(pipeline, captions, cache, lambda _: None, **options)
    return rows.read(torch.arange(len(captions)))["encoder_hidden_states"], calls


def test_captions_are_embedded_as_the_pipeline_embeds_them(pipeline, tmp_path):
    embeddings, _ = encode_captions(pipeline, tmp_path)
    expected, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=False)
    assert embeddings.shape == (3, MAX_TOKENS, 16)
    assert embeddings.allclose(expected, atol=1e-6, rtol=2**-11)


def test_equal_text_encoders_share_what_is_cached(pipeline, tmp_path):
    twin, other = tiny_pipeline(), tiny_pipeline()
    other.text_encoder = tiny_text_encoder(other.tokenizer)
    encode_captions(pipeline, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert encode_captions(twin, tmp_path)[1] == []
    assert sorted(tmp_path.rglob("*.safetensors")) == files
    assert encode_captions(other, tmp_path)[1] == [3]


def test_another_caption_tokenizer_or_layer_is_embedded_anew(pipeline, tmp_path):
    plain, _ = encode_captions(pipeline, tmp_path)
    assert encode_captions(tiny_pipeline(), tmp_path, ["", "a cat", "two dogs"])[1] == [3]
    padded = tiny_pipeline()
    padded.tokenizer.pad_token = "!"
    assert encode_captions(padded, tmp_path)[1] == [3]
    skipped, calls = encode_captions(tiny_pipeline(), tmp_path, clip_skip=1)
    assert calls == [3]
    assert not skipped.allclose(plain, atol=1e-3)


def test_only_the_changed_part_of_many_captions_is_embedded_anew(pipeline, tmp_path):
    captions = ["", *(f"picture {index}" for index in range(2 * SHARD_ROWS))]
    encode_captions(pipeline, tmp_path, captions)
    assert encode_captions(tiny_pipeline(), tmp_path, [*captions[:-1], "another"])[1] == [1]
