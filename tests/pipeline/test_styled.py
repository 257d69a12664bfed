"""A merged pipeline is a stock one that paints in the style it is told."""

import copy
import json
import resource
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import PROVENANCE, tiny_pipeline
from conftest import STYLE_NAMES as NAMES
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from helpers import copy_folder, paint, same_weights
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

import dmm
import dmm.models.teachers
from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.models.styles import StylePrompts, bake, styled_port
from dmm.pipeline.style_schedule import StyleSchedule
from dmm.pipeline.styled import load_pipeline, save_pipeline, set_style, share, style_names, temporary_style

WEIGHTS = "styles/diffusion_pytorch_model.safetensors"


def test_with_no_style_a_merged_pipeline_paints_as_the_stock_one_bit_for_bit(styled, pipeline):
    plain = paint(pipeline)
    assert (paint(styled) == plain).all()
    set_style(styled, "ink")
    assert (paint(styled) != plain).any()
    set_style(styled, None)
    assert (paint(styled) == plain).all()


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_one_style_an_image_equals_each_style_alone(styled, guidance_scale):
    styles = ["ink", "photo", {"ink": 0.7, "clay": 0.3}, None]
    set_style(styled, styles)
    together = paint(styled, ["a cat"] * 4, guidance_scale=guidance_scale)
    for i, style in enumerate(styles):
        set_style(styled, style)
        alone = paint(styled, ["a cat"] * 4, guidance_scale=guidance_scale)[i]
        assert abs(together[i] - alone).max() <= 1
    assert abs(together[0] - together[1]).max() > 20


def test_a_list_is_in_the_order_of_the_pipeline_prompts_by_images(styled):
    prompts, styles = ["a cat", "a house"], ["ink", "photo", "clay", "ink"]
    set_style(styled, styles)
    together = paint(styled, prompts, num_images=2)
    for i, style in enumerate(styles):
        set_style(styled, style)
        assert abs(together[i] - paint(styled, prompts, num_images=2)[i]).max() <= 1


def test_a_list_that_does_not_fit_the_batch_is_refused(styled):
    set_style(styled, ["ink", "photo", "clay"])
    with pytest.raises(
        ValueError, match="3 styles were set, one for each image, and the images of a batch are 2 under gu"
    ):
        paint(styled, ["a cat"] * 2)


def test_two_styles_for_one_image_are_refused_under_guidance_whose_halves_they_would_pass_for(styled):
    set_style(styled, ["ink", "photo"])
    with pytest.raises(ValueError, match="2 styles were set, one for each image, and the images of a batch are 1, und"):
        paint(styled, ["a cat"])
    unguided = styled(["a cat"] * 2, guidance_scale=1, num_inference_steps=1, output_type="latent").images
    assert len(unguided) == 2


def test_a_baked_style_paints_as_the_prompted_one(styled):
    set_style(styled, {"ink": 0.7, "photo": 0.3})
    prompted = paint(styled)
    bake(styled.unet, styled_port(styled.unet).term, SD1.port)
    assert abs(paint(styled) - prompted).max() <= 2


def test_the_term_is_computed_in_float32_whatever_the_dtype(styled):
    set_style(styled, "ink")
    exact = styled_port(styled.unet).term.bfloat16()
    styled.unet.to(torch.bfloat16)
    prompts = styled_port(styled.unet).style_prompts
    set_style(styled, "ink")
    term = styled_port(styled.unet).term
    assert term.dtype == torch.bfloat16
    assert term.requires_grad is False
    assert torch.equal(term, StylePrompts.forward(copy.deepcopy(prompts).float(), torch.eye(3)[0]).bfloat16())
    torch.testing.assert_close(term, exact, rtol=0.02, atol=0.02)
    assert prompts.embeddings.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("fhoto", "no style 'fhoto'; did you mean 'photo'; the styles are ink, photo, clay"),
        (["ink", "inc"], "no style 'inc'"),
        ({"ink": 0.7, "photo": 0.7}, "sum to 1.4"),
        ([], "this one is empty"),
        (3, "A style is a name, or a mix such as .*; 3 is neither"),
        (["ink", 3], "; 3 is neither"),
        (StyleSchedule([(0, 1, "ink")]), "paint within dmm.style_over_time"),
    ],
)
def test_wrong_styles_are_told_and_change_nothing(styled, style, message):
    set_style(styled, "clay")
    before = styled_port(styled.unet).term
    with pytest.raises(UserError, match=message):
        set_style(styled, style)
    assert styled_port(styled.unet).term is before


def test_a_stock_pipeline_has_no_styles(pipeline, tmp_path):
    for use in (lambda: set_style(pipeline, "ink"), lambda: share(pipeline), lambda: style_names(pipeline)):
        with pytest.raises(UserError, match="no styles: it is a stock model"):
            use()
    with pytest.raises(UserError, match="no styles: it is a stock model"):
        save_pipeline(pipeline, tmp_path / "x")


def test_a_temporary_style_is_undone_even_by_an_error(styled):
    set_style(styled, "ink")
    before = styled_port(styled.unet).term
    with pytest.raises(KeyError), temporary_style(styled, "photo"):
        assert styled_port(styled.unet).term is not before
        raise KeyError
    assert styled_port(styled.unet).term is before


# other pipelines, copies, threads


def test_other_pipelines_made_of_it_keep_its_style(styled):
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    mask = Image.new("L", (16, 16), 255)
    for pipeline_class, inputs in (
        (StableDiffusionImg2ImgPipeline, {"image": image, "strength": 1.0}),
        (StableDiffusionInpaintPipeline, {"image": image, "mask_image": mask, "width": 16, "height": 16}),
    ):
        other = pipeline_class.from_pipe(styled)
        set_style(styled, "ink")
        ink = paint(other, **inputs)
        set_style(other, "photo")
        photo = paint(other, **inputs)
        set_style(styled, None)
        assert (paint(pipeline_class.from_pipe(tiny_pipeline()), **inputs) == paint(other, **inputs)).all()
        assert (ink != photo).any()


def test_a_deep_copy_has_styles_of_its_own(styled):
    set_style(styled, "ink")
    ink, twin = paint(styled), copy.deepcopy(styled)
    set_style(styled, "photo")
    assert (paint(twin) == ink).all()
    assert style_names(twin) == NAMES
    assert twin.unet.save_pretrained.__self__ is twin.unet


def test_threads_that_share_weights_paint_their_own_styles(styled):
    pipes = {style: share(styled) for style in (*NAMES, None)}
    alone, together, errors = {}, {}, []
    for style, pipe in pipes.items():
        set_style(pipe, style)
    for style, pipe in pipes.items():
        alone[style] = paint(pipe, ["a cat", "a red house by the sea"], steps=8)

    def work(style):
        try:
            for _ in range(3):
                set_style(pipes[style], style)
                together.setdefault(style, []).append(paint(pipes[style], ["a cat", "a red house by the sea"], steps=8))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(style,)) for style in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for style, paintings in together.items():
        assert all((painting == alone[style]).all() for painting in paintings)
    assert len({painting.tobytes() for painting in alone.values()}) == 4


def test_sharing_copies_no_parameter_and_leaves_the_first_pipeline_alone(styled):
    set_style(styled, "ink")
    ink = paint(styled)
    second = share(styled)
    for name in ("unet", "vae", "text_encoder"):
        first_ones = dict(getattr(styled, name).named_parameters())
        second_ones = dict(getattr(second, name).named_parameters())
        assert first_ones.keys() == second_ones.keys()
        assert all(first_ones[key].data_ptr() == second_ones[key].data_ptr() for key in first_ones)
    # both hold state; of one tokenizer, two threads would read each other's padding
    assert second.scheduler is not styled.scheduler
    assert second.tokenizer is not styled.tokenizer
    assert (paint(second) == ink).all()
    set_style(second, "photo")
    assert (paint(second) != ink).any()
    assert (paint(styled) == ink).all()


def test_an_offloaded_pipeline_is_not_shared(styled):
    add_hook_to_module(styled.unet, ModelHook())  # as enable_model_cpu_offload does
    with pytest.raises(UserError, match="share it first"):
        share(styled)


# on disk


def test_what_is_saved_is_what_is_loaded(styled, merged, tmp_path):
    loaded = load_pipeline(merged)
    assert same_weights(loaded, styled)
    assert style_names(loaded) == NAMES
    ours, theirs = (styled_port(pipe.unet).style_prompts for pipe in (styled, loaded))
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    set_style(styled, "ink")
    set_style(loaded, "ink")
    assert (paint(loaded) == paint(styled)).all()
    # saved once more it is the same to the byte, provenance and all, and the style that is set does not matter
    save_pipeline(loaded, tmp_path / "again")
    for file in ("unet/diffusion_pytorch_model.safetensors", WEIGHTS, "styles/styles.json"):
        assert (tmp_path / "again" / file).read_bytes() == (merged / file).read_bytes()
    assert (paint(loaded) == paint(styled)).all()


def test_stock_diffusers_opens_it_as_the_style_less_average(merged, pipeline):
    stock = StableDiffusionPipeline.from_pretrained(merged, safety_checker=None)
    assert same_weights(stock, pipeline)
    assert type(stock.unet.time_embedding).__name__ == "TimestepEmbedding"
    assert sorted(path.name for path in merged.iterdir()) == [
        *("model_index.json", "scheduler", "styles", "text_encoder", "tokenizer", "unet", "vae")
    ]


def test_the_text_encoder_is_written_under_the_names_that_other_tools_expect(merged, tmp_path):
    save_pipeline(load_pipeline(merged), tmp_path / "again")  # read from such names rather than built from a config
    for folder in (merged, tmp_path / "again"):
        names = load_file(folder / "text_encoder" / "model.safetensors").keys()
        assert all(name.startswith("text_model.") and name.count("text_model.") == 1 for name in names)


def test_older_transformers_find_the_vocabulary(merged):
    assert {file.name for file in (merged / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}


def test_styles_say_where_they_came_from(merged):
    told = json.loads((merged / "styles" / "styles.json").read_text())
    assert told["styles"][1] == {
        "name": "photo",
        "source": "models/photo.safetensors",
        "sha256": "0" * 64,
        "family": "sd1",
        "prediction_type": "epsilon",
    }
    prompts = styled_port(load_pipeline(merged).unet).style_prompts
    assert prompts.provenance == PROVENANCE
    assert copy.deepcopy(prompts).provenance == PROVENANCE


def test_the_provenance_of_other_styles_is_refused(styled, tmp_path):
    with pytest.raises(ValueError, match="the provenance is of"):
        save_pipeline(styled, tmp_path / "x", provenance=PROVENANCE[::-1])
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_is_left_alone_until_overwrite(styled, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        save_pipeline(styled, tmp_path)
    save_pipeline(styled, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert style_names(load_pipeline(tmp_path)) == NAMES


def test_a_full_disk_is_told_and_leaves_nothing(styled, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written"):
            save_pipeline(styled, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_save_pretrained_warns_of_what_it_leaves_out(styled, tmp_path):
    for i, pipe in enumerate((styled, share(styled), copy.deepcopy(styled))):
        with pytest.warns(UserWarning, match=r"style-less average.*dmm\.save_pipeline"):
            pipe.save_pretrained(tmp_path / str(i))
        with pytest.warns(UserWarning, match="style-less average"):
            pipe.unet.save_pretrained(tmp_path / f"{i}-unet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pipeline(styled, tmp_path / "whole")
        StableDiffusionPipeline.from_pretrained(tmp_path / "0").save_pretrained(tmp_path / "stock")


def test_weights_may_be_loaded_in_half_precision(merged):
    pipe = load_pipeline(merged, torch_dtype=torch.bfloat16, device="cpu")
    set_style(pipe, "ink")
    assert pipe.unet.dtype == styled_port(pipe.unet).term.dtype == torch.bfloat16
    assert styled_port(pipe.unet).style_prompts.embeddings.dtype == torch.float32
    paint(pipe)


def test_stock_models_are_not_loaded_as_merged_ones(sd1_folder, sd1_file):
    for path in (sd1_folder, sd1_file):
        with pytest.raises(UserError, match="it is a stock model without styles"):
            load_pipeline(path)


def spoil_json(folder, file, **changes):
    path = folder / "styles" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "is cut short"),
        (lambda folder: (folder / "styles/config.json").unlink(), "config.json: no such file"),
        (lambda folder: spoil_json(folder, "config.json", _class_name="Other"), "describes a Other"),
        (lambda folder: spoil_json(folder, "config.json", names="ink"), "list of the styles' names"),
        (lambda folder: spoil_json(folder, "config.json", names=["ink", "ink", "clay"]), "names a style twice"),
        (lambda folder: spoil_json(folder, "config.json", dim=None), "its dim is None"),
        (lambda folder: spoil_json(folder, "config.json", names=["ink"]), r"'embeddings' has shape \(3, 32\)"),
        (lambda folder: spoil_json(folder, "styles.json", styles=[{}]), "no 'styles' that is a list"),
        (lambda folder: spoil_json(folder, "styles.json", styles=[]), "belong to different models"),
        (lambda folder: spoil_weights(folder, lambda t: t["embeddings"].fill_(torch.nan)), "'embeddings' are NaN"),
        (lambda folder: spoil_weights(folder, lambda t: t.pop("linear_1.bias")), "lacks 1 of the 5 tensors"),
        (lambda folder: StylePrompts(NAMES, dim=16).save_pretrained(folder / "styles"), "16 wide"),
    ],
)
def test_damaged_styles_are_told(tmp_path, merged, spoil, message):
    folder = tmp_path / "merged"
    copy_folder(merged, folder)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_pipeline(folder)


def test_styles_are_fetched_from_the_hub_too(monkeypatch, merged):
    asked = {}

    def snapshot_download(hub_id, **options):
        asked.update(options, id=hub_id)

    monkeypatch.setattr(DiffusionPipeline, "download", lambda hub_id, **_: str(merged))
    monkeypatch.setattr(dmm.models.teachers, "snapshot_download", snapshot_download)
    assert style_names(load_pipeline("owner/name")) == NAMES
    assert asked == {"id": "owner/name", "revision": merged.name, "allow_patterns": "styles/*"}


def test_styles_that_the_hub_does_not_give_are_told(monkeypatch, merged):
    def offline(*_args, **_kwargs):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(DiffusionPipeline, "download", lambda hub_id, **_: str(merged))
    monkeypatch.setattr(dmm.models.teachers, "snapshot_download", offline)
    with pytest.raises(UserError, match="the hub did not give it: cannot reach"):
        load_pipeline("owner/name")


def test_importing_dmm_imports_nothing_heavy():
    script = (
        "import sys, dmm\n"
        "assert 'load_pipeline' in dir(dmm)\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert dmm.set_style is set_style
    with pytest.raises(AttributeError, match="no attribute 'set_styles'"):
        dmm.set_styles  # noqa: B018
