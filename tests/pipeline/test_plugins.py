"""What people use with Stable Diffusion works on a styled pipeline as on the model baked in that style.

Each of diffusers' plugins runs on two pipelines: a merged one with a mix set, and a stock one with the mix baked.
"""

import copy
import inspect
import json

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import tiny_pipeline, tiny_styled, tiny_unet
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from helpers import paint
from PIL import Image
from plugin_helpers import save_ip_adapter, save_lora, tiny_controlnet, tiny_t2i_adapter

from dmm.errors import UserError
from dmm.models.styles import styled_port
from dmm.pipeline.plugins import Control, IPAdapter, Start, add_plugins
from dmm.pipeline.samplers import SAMPLERS
from dmm.pipeline.sampling import build_scheduler, sample
from dmm.pipeline.styled import set_style, share, stock_twin

MIX = {"ink": 0.7, "photo": 0.3}


def picture(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask():
    half = Image.new("L", (16, 16), 0)
    half.paste(255, (8, 0, 16, 16))
    return half


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A LoRA, another, an IP-Adapter and a ControlNet on disk."""
    folder = tmp_path_factory.mktemp("plugins")
    save_lora(folder / "lora.safetensors")
    save_lora(folder / "other.safetensors", seed=70)
    save_ip_adapter(folder / "ip")
    tiny_controlnet().save_pretrained(folder / "controlnet")
    tiny_controlnet(50).save_pretrained(folder / "controlnet-2")
    for name in ("edges", "cat", "mask"):
        (mask() if name == "mask" else picture(len(name))).save(folder / f"{name}.png")
    return folder


def into(kind, pipe, **parts):
    components = {name: part for name, part in pipe.components.items() if name in inspect.signature(kind).parameters}
    return kind(**(components | parts), requires_safety_checker=False)


def controlnet(pipe, files):
    guided = into(StableDiffusionControlNetPipeline, pipe, controlnet=tiny_controlnet())
    return paint(guided, image=picture())


def two_controlnets(pipe, files):
    nets = [tiny_controlnet(), tiny_controlnet(50)]
    guided = into(StableDiffusionControlNetPipeline, pipe, controlnet=nets)
    return paint(guided, image=[picture(), picture(1)], controlnet_conditioning_scale=[0.7, 0.4])


def controlnet_on_an_image(pipe, files):
    guided = into(StableDiffusionControlNetImg2ImgPipeline, pipe, controlnet=tiny_controlnet())
    return paint(guided, image=picture(1), control_image=picture(), strength=0.7, steps=5)


def lora(pipe, files):
    pipe.load_lora_weights(files / "lora.safetensors", adapter_name="pencil")
    return paint(pipe)


def two_loras_with_weights(pipe, files):
    pipe.load_lora_weights(files / "lora.safetensors", adapter_name="pencil")
    pipe.load_lora_weights(files / "other.safetensors", adapter_name="brush")
    pipe.set_adapters(["pencil", "brush"], [0.8, 0.4])
    return paint(pipe)


def lora_fused(pipe, files):
    pipe.load_lora_weights(files / "lora.safetensors")
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    return paint(pipe)


def ip_adapter(pipe, files):
    parts = into(StableDiffusionPipeline, pipe)
    parts.load_ip_adapter(
        str(files / "ip"), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder="image_encoder"
    )
    parts.set_ip_adapter_scale(0.6)
    return paint(parts, ip_adapter_image=picture(size=32))


def t2i_adapter(pipe, files):
    return paint(into(StableDiffusionAdapterPipeline, pipe, adapter=tiny_t2i_adapter()), image=picture())


def image_to_image(pipe, files):
    return paint(into(StableDiffusionImg2ImgPipeline, pipe), image=picture(), strength=0.7, steps=5)


def inpainting(pipe, files):
    inputs = {"image": picture(), "mask_image": mask(), "width": 16, "height": 16}
    return paint(into(StableDiffusionInpaintPipeline, pipe), **inputs)


def hires_second_pass(pipe, files):
    first = Image.fromarray(paint(pipe)[0].astype("uint8")).resize((32, 32), Image.Resampling.LANCZOS)
    return paint(StableDiffusionImg2ImgPipeline.from_pipe(pipe), image=first, strength=0.5, steps=6)


def there_and_back_by_from_pipe(pipe, files):
    return paint(StableDiffusionPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(pipe)))


def compiled(pipe, files):
    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return paint(pipe)


def model_offload_hooks(pipe, files):
    # what enable_model_cpu_offload puts on each model, which insists on an accelerator
    hook = None
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        _, hook = cpu_offload_with_hook(model, "cpu", prev_module_hook=hook)
    return paint(pipe)


def sequential_offload_hooks(pipe, files):
    # what enable_sequential_cpu_offload does: parameters are on no device but while their module computes
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert next(pipe.unet.parameters()).is_meta
    return paint(pipe)


def attention_slicing(pipe, files):
    pipe.enable_attention_slicing(1)
    return paint(pipe)


def attention_processors(pipe, files):
    pipe.unet.set_attn_processor(AttnProcessor())
    return paint(pipe)


def fused_projections(pipe, files):
    pipe.fuse_qkv_projections()
    return paint(pipe)


def free_u(pipe, files):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return paint(pipe)


def vae_tiling_and_slicing(pipe, files):
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    return paint(pipe, ["a cat", "a house"], width=32, height=32)


def channels_last(pipe, files):
    pipe.unet.to(memory_format=torch.channels_last)
    return paint(pipe)


def double_precision_and_back(pipe, files):
    pipe.to(torch.float64)
    pipe.to(torch.float32)
    return paint(pipe)


def several_images_a_prompt(pipe, files):
    return paint(pipe, ["a cat", "a house"], num_images=2)


def prompt_embeddings(pipe, files):
    embeds = pipe.encode_prompt("a cat", "cpu", 1, True, "a dog")
    return paint(pipe, None, prompt_embeds=5 * embeds[0], negative_prompt_embeds=embeds[1])


def given_latents(pipe, files):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return paint(pipe, latents=latents, guidance_rescale=0.7)


def callbacks(pipe, files):
    def shrink(_pipe, step, _timestep, tensors):
        return {"latents": tensors["latents"] * (0.3 if step == 1 else 1)}

    return paint(pipe, callback_on_step_end=shrink)


PLUGINS = [
    *(controlnet, two_controlnets, controlnet_on_an_image, lora, two_loras_with_weights, lora_fused, ip_adapter),
    *(t2i_adapter, image_to_image, inpainting, hires_second_pass, there_and_back_by_from_pipe, compiled),
    *(model_offload_hooks, sequential_offload_hooks, attention_slicing, attention_processors, fused_projections),
    *(free_u, vae_tiling_and_slicing, channels_last, double_precision_and_back, several_images_a_prompt),
    *(prompt_embeddings, given_latents, callbacks),
]
# whose effect is not on the pictures
INVISIBLE = {
    *(compiled, model_offload_hooks, sequential_offload_hooks, attention_slicing, attention_processors),
    *(fused_projections, there_and_back_by_from_pipe, channels_last, double_precision_and_back),
}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.__name__)
def test_a_styled_pipeline_does_what_the_baked_one_does(styled, files, plugin):
    set_style(styled, MIX)
    without = paint(styled)
    baked = stock_twin(tiny_styled(), MIX)
    average = tiny_pipeline()
    for pipe in (styled, baked, average):
        pipe.set_progress_bar_config(disable=True)
    with_style = plugin(styled, files)
    assert abs(with_style - plugin(baked, files)).max() <= 2
    assert abs(with_style - plugin(average, files)).max() > 2  # the style acts
    if plugin in INVISIBLE:
        assert abs(with_style - without).max() <= 2
    else:
        assert with_style.shape != without.shape or abs(with_style - without).max() > 2


SCHEDULERS = {"DDPM": DDPMScheduler, "Heun": HeunDiscreteScheduler, "LCM": LCMScheduler}


@pytest.mark.parametrize("name", [*SAMPLERS, *SCHEDULERS])
def test_any_scheduler(styled, name):
    set_style(styled, MIX)
    painted = []
    for pipe in (styled, stock_twin(tiny_styled(), MIX)):
        config = pipe.scheduler.config
        pipe.scheduler = SCHEDULERS[name].from_config(config) if name in SCHEDULERS else build_scheduler(config, name)
        painted.append(paint(pipe))
    assert abs(painted[0] - painted[1]).max() <= 2


def test_a_plugin_stays_while_styles_change(styled, files):
    styled.load_lora_weights(files / "lora.safetensors")
    for style in ("ink", MIX, "clay"):
        set_style(styled, style)
        baked = stock_twin(tiny_styled(), style)
        baked.load_lora_weights(files / "lora.safetensors")
        assert abs(paint(styled) - paint(baked)).max() <= 2


def test_every_image_of_a_batch_keeps_its_style_under_a_controlnet(styled):
    guided = into(StableDiffusionControlNetPipeline, styled, controlnet=tiny_controlnet())
    styles = ["ink", MIX, "clay"]
    set_style(guided, styles)
    together = paint(guided, ["a cat"] * 3, image=[picture()] * 3)
    for i, style in enumerate(styles):
        set_style(guided, style)
        alone = paint(guided, ["a cat"] * 3, image=[picture()] * 3)[i]
        assert abs(together[i] - alone).max() <= 1


def test_changing_styles_does_not_compile_anew(styled):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    styled.unet = torch.compile(styled.unet, backend=counter)
    set_style(styled, "ink")
    ink = paint(styled, steps=2)
    frames = counter.frame_count
    assert frames > 0
    for style in ("photo", MIX, "clay"):
        set_style(styled, style)
        assert (paint(styled, steps=2) != ink).any()
    assert counter.frame_count == frames


def test_an_error_in_the_middle_of_a_run_leaves_the_style_as_it_was_set(styled):
    set_style(styled, MIX)
    before, term = paint(styled), styled_port(styled.unet).term

    def fail(_pipe, step, _timestep, tensors):
        if step == 1:
            raise KeyError
        return tensors

    with pytest.raises(KeyError):
        paint(styled, callback_on_step_end=fail)
    assert styled_port(styled.unet).term is term
    assert (paint(styled) == before).all()


def test_a_shared_pipeline_takes_plugins_with_a_style_of_its_own(styled, files):
    styled.load_lora_weights(files / "lora.safetensors")  # on the weights, and so on both
    second = share(styled)
    set_style(styled, "ink")
    set_style(second, "photo")
    painted = {"ink": controlnet(styled, files), "photo": controlnet(second, files)}
    for style, expected in painted.items():
        set_style(styled, style)
        assert (controlnet(styled, files) == expected).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_a_gpu_and_back(styled, offload):
    painted = []
    for pipe in (styled, stock_twin(tiny_styled(), MIX)):
        if pipe is styled:
            set_style(pipe, MIX)
        getattr(pipe, offload)()
        painted.append(paint(pipe))
    assert abs(painted[0] - painted[1]).max() <= 2


# dmm.pipeline.plugins: the same from files


@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("controlled", [False, True])
def test_a_mask_on_latents_of_other_channels_is_refused(pipeline, files, channels, controlled):
    pipeline.unet = tiny_unet(in_channels=channels, out_channels=channels)
    controls = [Control(files / "controlnet", files / "edges.png")] if controlled else []
    with pytest.raises(UserError, match=f"latents have 4 channels; this one's have {channels}"):
        add_plugins(pipeline, controls=controls, start=Start(files / "cat.png", 0.8, files / "mask.png"))


@pytest.mark.parametrize(
    ("names", "pipeline_class"),
    [
        ("control", "StableDiffusionControlNetPipeline"),
        ("control control-2", "StableDiffusionControlNetPipeline"),
        ("start", "StableDiffusionImg2ImgPipeline"),
        ("start mask", "StableDiffusionInpaintPipeline"),
        ("control start", "StableDiffusionControlNetImg2ImgPipeline"),
        ("control start mask", "StableDiffusionControlNetInpaintPipeline"),
        ("ip", "StableDiffusionPipeline"),
        ("control ip", "StableDiffusionControlNetPipeline"),
    ],
)
def test_plugins_from_files_act_and_a_picture_does_not_depend_on_its_batch(styled, files, names, pipeline_class):
    names = names.split()
    controls = [
        Control(files / folder, files / "edges.png", 0.8)
        for name, folder in (("control", "controlnet"), ("control-2", "controlnet-2"))
        if name in names
    ]
    start = Start(files / "cat.png", 0.8, files / "mask.png" if "mask" in names else None) if "start" in names else None
    adapter = IPAdapter(files / "ip/ip-adapter.safetensors", files / "cat.png", 0.7) if "ip" in names else None
    (plain,) = sample(styled, ["a cat"], [1], styles=["ink"], steps=4)
    guided, inputs = add_plugins(styled, controls=controls, start=start, ip_adapter=adapter)
    assert type(guided).__name__ == pipeline_class
    settings = {"steps": 4, "inputs": lambda count: inputs(count, (16, 16))}
    styles = ["photo", "ink", MIX]
    together = list(sample(guided, ["a cat"] * 3, [0, 1, 2], styles=styles, **settings))
    (alone,) = sample(guided, ["a cat"], [1], styles=["ink"], **settings)
    difference = torch.tensor(list(alone.tobytes())) - torch.tensor(list(together[1].tobytes()))
    assert difference.abs().max() <= 1
    assert alone.tobytes() != plain.tobytes()


def test_a_controlnet_of_another_family_is_told(styled, files, tmp_path):
    net = ControlNetModel.from_config(tiny_controlnet().config, cross_attention_dim=32)
    net.save_pretrained(tmp_path / "net")
    with pytest.raises(UserError, match=r"has text of width 32, the model 16\. It was made for"):
        add_plugins(styled, controls=[Control(tmp_path / "net", files / "edges.png")])


def test_what_is_no_controlnet_is_told(styled, files, tmp_path):
    styled.vae.save_pretrained(tmp_path / "vae")
    for folder, message in (
        (tmp_path / "vae", "holds a AutoencoderKL, not a ControlNet"),
        (tmp_path, "holds no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            add_plugins(styled, controls=[Control(folder, files / "edges.png")])


def test_a_controlnet_without_weights_is_told(styled, files, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((files / "controlnet/config.json").read_text())))
    with pytest.raises(UserError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        add_plugins(styled, controls=[Control(tmp_path, files / "edges.png")])


def test_an_ip_adapter_of_another_family_is_told(styled, files, tmp_path):
    file = save_ip_adapter(tmp_path, cross_attention_dim=24)
    with pytest.raises(UserError, match="It was made for a model of another family"):
        add_plugins(styled, ip_adapter=IPAdapter(file, files / "cat.png"))
    with pytest.raises(UserError, match="is no IP-Adapter"):
        add_plugins(styled, ip_adapter=IPAdapter(files / "lora.safetensors", files / "cat.png"))


def test_an_ip_adapter_without_its_image_encoder_is_told(styled, files, tmp_path):
    file = copy.copy(tmp_path / "alone.safetensors")
    file.write_bytes((files / "ip/ip-adapter.safetensors").read_bytes())
    with pytest.raises(UserError, match="no CLIP image encoder there"):
        add_plugins(styled, ip_adapter=IPAdapter(file, files / "cat.png"))


def test_a_file_that_is_no_picture_is_told(styled, files):
    with pytest.raises(UserError, match="could not be read as a picture"):
        add_plugins(styled, start=Start(files / "lora.safetensors", 0.5))
