import pytest
import torch
from conftest import tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from helpers import same_weights
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.original_layout import original_names
from dmm.formats.single_file import save_single_file


def open_stock(path, folder):
    return StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)


def test_folder_to_single_file_and_back_is_bit_exact(sd1_folder, sd1_file, pipeline):
    assert same_weights(open_stock(sd1_file, sd1_folder), pipeline)


def test_every_original_name_is_one_that_the_original_code_has(sd1_file):
    names = load_file(sd1_file).keys()
    for known in (
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "first_stage_model.quant_conv.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.output_blocks.1.2.conv.weight",
        "model.diffusion_model.out.2.bias",
    ):
        assert known in names
    prefixes = tuple(component.original_prefix for component in SD1.components)
    assert all(name.startswith(prefixes) for name in names)


def test_the_original_vae_has_convolutions_where_ours_is_linear(sd1_file):
    tensors = load_file(sd1_file)
    assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert tensors["first_stage_model.decoder.mid.attn_1.norm.weight"].shape == (8,)


@pytest.mark.parametrize(
    ("down", "up", "layers"),
    [
        (("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"), 2),
        (
            ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            1,
        ),
    ],
)
def test_other_depths_round_trip_too(pipeline, tmp_path, down, up, layers):
    widths = (8, 16, 16)[: len(down)]
    pipeline.register_modules(
        unet=tiny_unet(widths, down_block_types=down, up_block_types=up, layers_per_block=layers),
        vae=tiny_vae(widths, layers_per_block=layers),
    )
    pipeline.save_pretrained(tmp_path / "folder")
    save_single_file(pipeline, tmp_path / "model.safetensors")
    assert same_weights(open_stock(tmp_path / "model.safetensors", tmp_path / "folder"), pipeline)


def test_the_real_sd15_maps_wholly():
    # diffusers' defaults for the UNet are SD 1.5's, but for the width of the text
    with torch.device("meta"):
        widths = (128, 256, 512, 512)
        models = {
            "unet": UNet2DConditionModel(cross_attention_dim=768),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=widths,
                layers_per_block=2,
            ),
            "text_encoder": tiny_text_encoder(tiny_tokenizer()),
        }
    names = original_names(models, SD1)
    for component, model in models.items():
        assert names[component].keys() == model.state_dict().keys()
        assert len(set(names[component].values())) == len(names[component])
    prefix = "model.diffusion_model.output_blocks"
    assert names["unet"]["up_blocks.0.upsamplers.0.conv.weight"] == f"{prefix}.2.1.conv.weight"
    assert names["unet"]["up_blocks.1.upsamplers.0.conv.weight"] == f"{prefix}.5.2.conv.weight"
    assert names["unet"]["up_blocks.3.resnets.2.conv_shortcut.weight"] == f"{prefix}.11.0.skip_connection.weight"
    assert names["vae"]["decoder.up_blocks.0.resnets.0.conv1.weight"] == (
        "first_stage_model.decoder.up.3.block.0.conv1.weight"
    )


def test_dtype_and_metadata_are_written(pipeline, tmp_path):
    path = tmp_path / "model.safetensors"
    save_single_file(pipeline, path, dtype=torch.float16, metadata={"modelspec.title": "tiny"})
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "tiny"
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_adapters_are_not_written_quietly(pipeline, tmp_path):
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="the unet has an adapter on it"):
        save_single_file(pipeline, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_tensors_without_a_name_are_not_dropped_quietly(pipeline, tmp_path):
    pipeline.unet.extra = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"no name for the unet's tensor 'extra\.weight'"):
        save_single_file(pipeline, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
