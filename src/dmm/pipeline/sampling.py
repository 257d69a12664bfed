"""Pictures from a pipeline: a sampler on the model's own schedule, one seed a picture, batch by batch."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Family, denoiser_of, family_of
from dmm.formats.schedules import is_flow
from dmm.maths.mixes import Mix
from dmm.models.conditioning import check_clip_skip, encode_captions, encode_tokens, tokenize
from dmm.pipeline.samplers import DEFAULT_SAMPLER, SAMPLERS, check_multiple, check_settings
from dmm.pipeline.style_schedule import StyleSchedule, check_style
from dmm.pipeline.styled import style_names, style_over_time


def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    styles: Sequence[StyleSchedule | Mix | None] | None = None,
    inputs: Callable[[int], Mapping[str, Any]] | None = None,
    steps: int = 25,
    guidance_scale: float = 7.0,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
    sampler: str = DEFAULT_SAMPLER,
    clip_skip: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> Iterator[Image.Image]:
    """Pictures of ``prompts[i]`` from ``seeds[i]``, in order, each yielded as soon as its batch is done.

    A picture depends on its prompt, its seed and the settings alone: its noise is drawn on the CPU in
    float32 from a generator of its own, so that its place, the batch size, the device and the
    precision change only the rounding of the arithmetic. The pipeline is left as it was, its style,
    scheduler and progress bar included.

    Args:
        pipeline: a diffusers pipeline of the Stable Diffusion kind, on the device it shall run on.
        prompts, seeds: N each; a seed is in [0, 2**32).
        styles: N, of a merged model, None for a picture without; by default the one that is set on the pipeline.
        inputs: further arguments of the pipeline's call, for a batch of the size that it is given: a control image, an
            image to begin with. See :mod:`dmm.pipeline.plugins`.
        steps: denoising steps, from 1 to the number the model was trained with (1000).
        guidance_scale: classifier-free guidance; 1 is none.
        negative_prompt: what guidance leads away from; empty for none.
        width, height: pixels, by default the model's own; see :func:`picture_size`.
        sampler: a key of :data:`dmm.pipeline.samplers.SAMPLERS`.
        clip_skip: layers of the text encoder to leave out, see :func:`dmm.models.conditioning.encode_tokens`.
        batch_size: pictures at a time; by default as many as make up four of 512 x 512.
        progress: called after every step with the number of pictures that it was worth; they add up to N.
    Returns: N pictures, RGB, 8 bits a channel.
    Raises: UserError: a setting is out of range (told before any work), or the arithmetic overflowed.
    """
    batches = _sample_batches(
        pipeline,
        prompts,
        seeds,
        output_type="pt",
        styles=styles,
        inputs=inputs,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        sampler=sampler,
        clip_skip=clip_skip,
        batch_size=batch_size,
        progress=progress,
    )
    return (picture for images in batches for picture in _to_pictures(images))


def sample_latents(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    negative_prompt: str,
    width: int,
    height: int,
    sampler: str,
    clip_skip: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> Iterator[Tensor]:
    """The latents of which :func:`sample`, with the same arguments, would decode the pictures.

    Returns: N tensors, (C, height / f, width / f) for a VAE that shrinks by f, float32, on the CPU.
    """
    batches = _sample_batches(
        pipeline,
        prompts,
        seeds,
        output_type="latent",
        styles=None,
        inputs=None,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        sampler=sampler,
        clip_skip=clip_skip,
        batch_size=None,
        progress=progress,
    )
    return (latents for batch in batches for latents in batch.float().cpu())


def _sample_batches(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    output_type: str,
    styles: Sequence[StyleSchedule | Mix | None] | None,
    inputs: Callable[[int], Mapping[str, Any]] | None,
    steps: int,
    guidance_scale: float,
    negative_prompt: str,
    width: int | None,
    height: int | None,
    sampler: str,
    clip_skip: int | None,
    batch_size: int | None,
    progress: Callable[[float], object] | None,
) -> Iterator[Tensor]:
    if len(prompts) != len(seeds):
        raise ValueError(f"Every prompt needs one seed: {len(prompts)} prompts and {len(seeds)} seeds were given.")
    if styles is not None:
        if len(styles) != len(prompts):
            raise ValueError(
                f"Every prompt needs one style: {len(prompts)} prompts and {len(styles)} styles were given."
            )
        names = style_names(pipeline)
        for style in styles:
            check_style(names, style)
    width, height = picture_size(pipeline, width, height)
    sampler = usual_sampler(family_of(pipeline), sampler)
    scheduler = build_scheduler(pipeline.scheduler.config, sampler)
    _check_begins(pipeline, scheduler, sampler)
    check_settings(steps=steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    check_clip_skip(pipeline, clip_skip)
    trained_steps = scheduler.config.num_train_timesteps
    if steps > trained_steps:
        raise UserError(f"The model knows {trained_steps} steps; {steps} were asked for.")
    distilled_steps = scheduler.config.get("original_inference_steps", steps)
    if steps > distilled_steps:
        raise UserError(
            f"The sampler {sampler} takes at most {distilled_steps} steps; {steps} were asked for. It is for models "
            "that paint in 2 to 8."
        )
    if batch_size is None:
        batch_size = usual_batch_size(width, height)
    if styles is not None and not family_of(pipeline).keeps_rows:
        batch_size = 1

    # A shallow copy shares the weights, and what is set on it stays on it. (`from_pipe` would cast the
    # shared weights to float32.)
    ours = copy.copy(pipeline)
    ours.scheduler = scheduler
    ours.set_progress_bar_config(disable=True)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            # undone before the pictures are given out, so that nothing of ours is set while others have a turn
            changing = nullcontext(_leave) if styles is None else style_over_time(ours, styles[batch])
            with changing as on_step_end:
                images = _sample_batch(
                    ours,
                    list(prompts[batch]),
                    list(seeds[batch]),
                    progress,
                    on_step_end,
                    {} if inputs is None else inputs(len(prompts[batch])),
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    negative_prompt=negative_prompt,
                    width=width,
                    height=height,
                    clip_skip=clip_skip,
                    output_type=output_type,
                    **({} if is_flow(pipeline.scheduler.config) else {"eta": SAMPLERS[sampler].eta}),
                )
            yield images

    return batches()


def _sample_batch(
    pipeline: Any,
    prompts: list[str],
    seeds: list[int],
    progress: Callable[[float], object] | None,
    on_step_end: Callable[..., dict[str, Any]],
    inputs: Mapping[str, Any],
    *,
    negative_prompt: str,
    width: int,
    height: int,
    clip_skip: int | None,
    **settings: Any,
) -> Tensor:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    accepted = inspect.signature(type(pipeline).__call__).parameters
    sizes = {name: size for name, size in (("width", width), ("height", height)) if name in accepted}
    packing, config, factor = family_of(pipeline).packing, denoiser_of(pipeline).config, pipeline.vae_scale_factor
    if "strength" not in accepted:  # what begins with an image adds noise of its own to it
        channels = packing.channels(config) if packing else config.in_channels
        shape = (1, channels, height // factor, width // factor)
        # drawn here and in float32: left to itself, the pipeline draws other noise in half precision
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        noise = packing.pack(noise) if packing else noise
        inputs = {**inputs, "latents": noise.to(denoiser_of(pipeline).dtype)}

    def on_step(running: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(len(prompts) / running.num_timesteps)
        return on_step_end(running, step, timestep, tensors)

    images: Tensor = pipeline(
        **_read_prompts(pipeline, prompts, negative_prompt, clip_skip),
        **sizes,
        generator=generators,  # ancestral samplers draw on
        callback_on_step_end=on_step,
        **inputs,
        **settings,
    ).images
    if packing and settings["output_type"] == "latent":
        images = packing.unpack(images, height // factor, width // factor)
    if not images.isfinite().all():
        raise UserError(
            f"The pictures came out as NaN, computed in {str(denoiser_of(pipeline).dtype).removeprefix('torch.')}. "
            "Some models overflow in float16: use bf16 or fp32. If fp32 does the same, the checkpoint is damaged."
        )
    return images


def _leave(_running: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors


def _read_prompts(pipeline: Any, prompts: list[str], negative_prompt: str, clip_skip: int | None) -> dict[str, Any]:
    if clip_skip is None:
        # None is not "": a pipeline may take zeros for the empty prompt, where its config asks for them
        return {"prompt": prompts, "negative_prompt": [negative_prompt] * len(prompts) if negative_prompt else None}
    read = encode_tokens(pipeline, tokenize(pipeline, prompts), clip_skip)
    negative = encode_captions(pipeline, [negative_prompt] * len(prompts), clip_skip)
    names = family_of(pipeline).prompt_arguments
    given = {names[name]: tensor for name, tensor in read.items()}
    return given | {f"negative_{names[name]}": tensor for name, tensor in negative.items()}


def _to_pictures(images: Tensor) -> list[Image.Image]:
    pixels = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


def build_scheduler(config: Mapping[str, Any], sampler: str = DEFAULT_SAMPLER) -> Any:
    """The sampler on the noise schedule, and for the prediction type, that ``config`` tells of.

    How the steps are spread is the sampler's choice: a config's "leading" is most often only what some
    earlier scheduler wrote down as its default, and would start short of full noise. "trailing" is no
    scheduler's default, so a model that says it means it.

    Args:
        config: the model's own scheduler config.
        sampler: a key of :data:`dmm.pipeline.samplers.SAMPLERS`.
    Raises: UserError: there is no such sampler.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"There is no sampler '{sampler}'; choose from {', '.join(SAMPLERS)}.")
    chosen = SAMPLERS[sampler]
    if is_flow(config):
        if chosen.flow is None:
            known = [name for name, one in SAMPLERS.items() if one.flow]
            raise UserError(f"The sampler {sampler} is not for flow models; choose from {', '.join(known)}.")
        flow_class: Any = getattr(diffusers, chosen.flow)
        if chosen.flow.startswith("FlowMatch"):
            return flow_class.from_config(config)
        flow = {"use_flow_sigmas": True, "flow_shift": config.get("shift") or 1.0, "prediction_type": "flow_prediction"}
        return flow_class(num_train_timesteps=config.get("num_train_timesteps", 1000), **flow, **chosen.settings)
    spacing = "trailing" if config.get("timestep_spacing") == "trailing" else chosen.timestep_spacing
    scheduler_class: Any = getattr(diffusers, chosen.scheduler)
    return scheduler_class.from_config(config, timestep_spacing=spacing, **chosen.settings)


def usual_sampler(family: Family, sampler: str) -> str:
    """The sampler that a family's pipelines take: the one that is asked for, or the first of theirs for the default.

    Raises: UserError: they take others.
    """
    known = family.samplers
    if known is None or sampler in known or sampler not in SAMPLERS:
        return sampler
    if sampler == DEFAULT_SAMPLER:
        return known[0]
    raise UserError(f"{family.title} is not painted by {sampler}; choose from {', '.join(known)}.")


def _check_begins(pipeline: Any, scheduler: Any, sampler: str) -> None:
    """Refuse a sampler that cannot begin with a picture, where the pipeline of a flow model does."""
    begins = "strength" in inspect.signature(type(pipeline).__call__).parameters
    if begins and is_flow(pipeline.scheduler.config) and not hasattr(scheduler, "scale_noise"):
        raise UserError(f"The sampler {sampler} cannot begin with an image on a model of rectified flow; choose Euler.")


def picture_size(pipeline: Any, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels, the model's own where not given.

    Raises: UserError: one is not a multiple of the pipeline's step (8 pixels, more where VAE and denoiser shrink more).
    """
    family, config = family_of(pipeline), denoiser_of(pipeline).config
    own = family.sample_size_of(config)
    own_height, own_width = (own, own) if isinstance(own, int) else own
    factor = pipeline.vae_scale_factor
    # diffusers' pipelines insist on 8 whatever the VAE; transformers take several latents at a time
    step = math.lcm(8, factor * family.patch_of(config))
    sizes = (own_width * factor if width is None else width, own_height * factor if height is None else height)
    for name, size in zip(("width", "height"), sizes, strict=True):
        check_multiple(name, size, step)
    return sizes


def usual_batch_size(width: int, height: int) -> int:
    """Pictures at a time, of that size in pixels: as many as make up four of 512 x 512."""
    return max(1, min(64, 4 * 512 * 512 // (width * height)))


def unread(pipeline: Any, prompt: str) -> str:
    """The end of a prompt that is longer than the text encoder reads; empty if all of it is read."""
    tokenizer = getattr(pipeline, next(iter(family_of(pipeline).tokenizers)))
    tokens = tokenizer(prompt).input_ids[1:-1]
    return tokenizer.decode(tokens[tokenizer.model_max_length - 2 :]).strip()
