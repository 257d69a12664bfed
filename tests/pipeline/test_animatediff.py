"""AnimateDiff, which builds a UNet of its own, animates in a style by the two lines that docs/plugins.md tells."""

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

from dmm.errors import UserError
from dmm.pipeline.styled import add_styles, set_style, stock_twin, style_names, style_prompts_of


def film_of(pipe):
    torch.manual_seed(5)
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return AnimateDiffPipeline.from_pipe(
        pipe, motion_adapter=adapter, scheduler=DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    )


def frames(film):
    film.set_progress_bar_config(disable=True)
    made = film(
        "a cat",
        num_frames=2,
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    return np.round(np.asarray(made) * 255).astype(int)


@pytest.mark.parametrize("style", ["ink", {"ink": 0.5, "clay": 0.5}], ids=str)
def test_styles_that_are_given_to_it_animate(styled, style):
    set_style(styled, style)
    film = film_of(styled)
    with pytest.raises(UserError, match="has no styles"):  # it left them behind
        style_names(film)
    plain = frames(film)
    add_styles(film, style_prompts_of(styled))
    set_style(film, style)
    animated = frames(film)
    assert abs(animated - frames(film_of(stock_twin(styled, style)))).max() <= 2
    assert abs(animated - plain).max() > 5
