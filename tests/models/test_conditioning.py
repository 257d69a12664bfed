import pytest
import torch
from conftest import MAX_TOKENS

from dmm.errors import UserError
from dmm.models.conditioning import check_clip_skip, encode_tokens, num_cut, tokenize

PROMPTS = ["a cat", "", "longer than can be read " * 3]


def test_prompts_are_read_as_the_pipeline_reads_them(pipeline):
    theirs, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    ours = encode_tokens(pipeline, tokenize(pipeline, PROMPTS))
    assert list(ours) == ["encoder_hidden_states"]
    assert ours["encoder_hidden_states"].shape == (3, MAX_TOKENS, 16)
    assert ours["encoder_hidden_states"].equal(theirs)


def test_a_skipped_layer_is_one_that_the_encoder_never_had(pipeline):
    tokens = tokenize(pipeline, PROMPTS)
    skipped = encode_tokens(pipeline, tokens, clip_skip=1)["encoder_hidden_states"]
    whole = encode_tokens(pipeline, tokens)["encoder_hidden_states"]
    del pipeline.text_encoder.encoder.layers[-1]
    assert skipped.equal(encode_tokens(pipeline, tokens)["encoder_hidden_states"])
    assert not skipped.allclose(whole, atol=1e-3)


@pytest.mark.parametrize("clip_skip", [0, 2, -1])
def test_layers_that_there_are_not_cannot_be_skipped(pipeline, clip_skip):
    with pytest.raises(UserError, match=f"clip_skip is {clip_skip}, but the text encoder has 2 layers: choose from 1"):
        check_clip_skip(pipeline, clip_skip)
    check_clip_skip(pipeline, None)


def test_cut_prompts_are_counted(pipeline):
    assert num_cut(pipeline, PROMPTS) == 1
    assert torch.equal(tokenize(pipeline, PROMPTS[2:]), tokenize(pipeline, [PROMPTS[2] + "and on"]))
