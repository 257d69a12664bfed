import inspect

import pytest
import torch
from conftest import MAX_TOKENS
from tiny_families import TINY, tiny_sdxl

from dmm.errors import UserError
from dmm.families import FAMILIES, Frame, arguments, family_of, text_encoders_of
from dmm.models.conditioning import check_clip_skip, encode_captions, encode_tokens, num_cut, tokenize

PROMPTS = ["a cat", "", "longer than can be read " * 3]


def encode_prompt(pipe, prompts, **settings):
    """The pipeline's own, by the names of ours."""
    asked = inspect.signature(pipe.encode_prompt).parameters
    more = {
        name: None for name in ("prompt_2", "prompt_3") if name in asked and asked[name].default is asked[name].empty
    }
    if "do_classifier_free_guidance" not in asked:  # of what is guided by an embedding: no negative one
        with torch.no_grad():  # with gradients, other kernels compute
            embedded, pooled, _ = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, **more)
            both = pipe.encode_prompt(["", *prompts], device="cpu", num_images_per_prompt=1, **more)
        empty, of_empty = (one[:1] for one in both[:2])
        names = ("encoder_hidden_states", "pooled_projections")
        return dict(zip(names, (embedded, pooled), strict=True)), dict(zip(names, (empty, of_empty), strict=True))
    found = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, **more, **settings)
    names = list(family_of(pipe).prompt_arguments)
    positive, negative = found[::2], found[1::2]  # embedded, its negative, pooled, its negative
    return dict(zip(names, positive, strict=False)), dict(zip(names, negative, strict=False))


# families that read the words themselves; others read what a chat makes of them
OF_WORDS = [name for name, family in FAMILIES.items() if not any(one.template for one in family.text_encoders)]


@pytest.fixture(params=FAMILIES)
def pipe(request):
    return TINY[request.param](seed=0)


@pytest.mark.parametrize("pipe", OF_WORDS, indirect=True)
def test_prompts_are_read_as_the_pipeline_reads_them(pipe):
    theirs, _ = encode_prompt(pipe, PROMPTS, do_classifier_free_guidance=False)
    ours = encode_tokens(pipe, tokenize(pipe, PROMPTS))
    assert set(ours) == set(theirs)
    told = sum(one.num_tokens or 0 for one in family_of(pipe).text_encoders)  # beside the CLIPs'
    assert ours["encoder_hidden_states"].shape[:2] == (3, told + (MAX_TOKENS if family_of(pipe).reads_layers else 0))
    assert all(ours[name].equal(theirs[name]) for name in ours)


@torch.no_grad()
def test_a_chat_is_read_as_the_pipeline_reads_it():
    pipe = TINY["z_image"](seed=0)
    theirs, _ = pipe.encode_prompt(list(PROMPTS), device="cpu", do_classifier_free_guidance=False)
    ours = encode_tokens(pipe, tokenize(pipe, PROMPTS))
    assert ours["cap_feats"].shape[:2] == (3, 512)
    assert ours["lengths_ids"].tolist() == [len(one) for one in theirs]
    for padded, expected in zip(ours["cap_feats"], theirs, strict=True):
        assert padded[: len(expected)].equal(expected)
        assert not padded[len(expected) :].any()


@pytest.mark.parametrize("pipe", OF_WORDS, indirect=True)
def test_the_empty_caption_is_what_guidance_leads_away_from(pipe):
    _, theirs = encode_prompt(pipe, ["a cat"], do_classifier_free_guidance=True)
    ours = encode_captions(pipe, ["", "a cat"])
    for name in ours:  # of two at once, sums may round otherwise
        torch.testing.assert_close(ours[name][:1], theirs[name], rtol=0, atol=1e-6)
    assert all(ours[name][1].any() for name in ours)


def test_only_where_a_model_says_so_are_zeros_no_words():
    pipe = tiny_sdxl()
    assert not any(tensor.any() for tensor in encode_captions(pipe, [""]).values())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    ours, theirs = encode_captions(pipe, [""]), encode_tokens(pipe, tokenize(pipe, [""]))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_sdxl_skips_layers_as_diffusers_does():
    pipe = tiny_sdxl()
    theirs, _ = encode_prompt(pipe, PROMPTS, do_classifier_free_guidance=False, clip_skip=1)
    ours = encode_tokens(pipe, tokenize(pipe, PROMPTS), clip_skip=1)
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.reads_layers])
def test_a_skipped_layer_is_one_that_the_encoder_never_had(name):
    pipe = TINY[name](seed=0)
    tokens = tokenize(pipe, PROMPTS)
    skipped = encode_tokens(pipe, tokens, clip_skip=1)["encoder_hidden_states"]
    whole = encode_tokens(pipe, tokens)["encoder_hidden_states"]
    for encoder in text_encoders_of(pipe):
        del getattr(encoder, "text_model", encoder).encoder.layers[-1]
    assert skipped.equal(encode_tokens(pipe, tokens)["encoder_hidden_states"])
    assert not skipped.allclose(whole, atol=1e-3)


@pytest.mark.parametrize("clip_skip", [0, 2, -1])
def test_layers_that_there_are_not_cannot_be_skipped(pipe, clip_skip):
    why = "the text encoder has 2 layers: choose from 1" if family_of(pipe).reads_layers else "reads no layers of CLIP"
    with pytest.raises(UserError, match=rf"clip_skip is {clip_skip}, but .*{why}"):
        check_clip_skip(pipe, clip_skip)
    check_clip_skip(pipe, None)


def test_cut_prompts_are_counted(pipe):
    longest = max(one.num_tokens or MAX_TOKENS for one in family_of(pipe).text_encoders)
    cut = tokenize(pipe, ["cat " * longest, "cat " * longest + "and on"])
    assert num_cut(pipe, ["a cat", "", "cat " * longest]) == 1
    template = any(one.template for one in family_of(pipe).text_encoders)
    assert template or all(torch.equal(*ids) for ids in cut.values())


def test_a_picture_s_size_is_told_as_the_pipeline_tells_it():
    pipe = tiny_sdxl()
    frame = Frame(original=(640, 480), corner=(16, 8), target=(512, 384))
    # height before width, top before left
    theirs = pipe._get_add_time_ids((480, 640), (8, 16), (384, 512), torch.float32, 12)
    (ours,) = FAMILIES["sdxl"].read_size(frame).values()
    assert ours.equal(theirs[0])
    assert not FAMILIES["sd1"].read_size(frame)


def test_dotted_names_become_entries_and_numbers_keep_their_precision():
    flat = {"a": torch.ones(2), "b.x": torch.ones(2), "b.time_ids": torch.tensor([1023.0])}
    nested = arguments(flat, torch.bfloat16)
    assert nested["a"].dtype == nested["b"]["x"].dtype == torch.bfloat16
    assert nested["b"]["time_ids"].item() == 1023
    assert arguments(flat)["a"] is flat["a"]
