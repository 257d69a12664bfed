from conftest import tiny_pipeline

from dmm.families import SD1, title_of_folder, title_of_keys
from dmm.formats.single_file import original_names


def test_a_narrow_model_is_sd1_by_its_keys():
    pipeline = tiny_pipeline()
    models = {component.name: getattr(pipeline, component.name) for component in SD1.components}
    keys = [key for names in original_names(models, SD1).values() for key in names.values()]
    assert title_of_keys(keys)[0] == "SD 1.x"


def test_the_others_are_told_apart_by_their_keys():
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    for key, title in {
        "conditioner.embedders.1.model.ln_final.weight": "SDXL",
        "model.diffusion_model.label_emb.0.0.weight": "SDXL",
        "cond_stage_model.model.ln_final.weight": "SD 2.x",
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "SD 3",
        "double_blocks.0.img_attn.qkv.weight": "FLUX",
        "control_model.input_blocks.0.0.weight": "a ControlNet",
    }.items():
        assert title_of_keys([unet, key]) == (title, key)
    assert title_of_keys(["something.else"]) is None


def test_sd2_folders_have_the_class_of_sd1_but_linear_projections():
    assert title_of_folder("StableDiffusionPipeline", {}) == "SD 1.x"
    assert title_of_folder("StableDiffusionPipeline", {"use_linear_projection": True}) == "SD 2.x"
    assert title_of_folder("StableDiffusionXLPipeline", {"use_linear_projection": True}) == "SDXL"
    assert title_of_folder("StableDiffusionUpscalePipeline", {}) == "StableDiffusionUpscalePipeline"


def test_the_module_that_embeds_time_is_there():
    assert hasattr(tiny_pipeline().unet, SD1.time_embedding)
