"""How far a few-step student is from its target before it has learnt anything, at points of the teacher's path.

``python measure_few_step_starts.py merged --style fluent``: mean absolute differences of clean latents. LCM's student
is asked at the points, SPLAM's in the middle between two of them (gamma = 0.5): with the noise that its paper takes to
be there, with the noise that is there, and, as ``dmm accelerate`` asks, at the timestep that has as much.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import dmm
from dmm.demo.judge import load_judge
from dmm.maths.consistency import as_noised, clean_and_noise, guide, sub_path_noise, sub_path_point
from dmm.maths.diffusion import add_noise
from dmm.maths.schedules import timesteps_of_equal_power
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import load_pipeline

GUIDANCE = 2.0
SKIP = 20
COUNT = 32


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path)
    parser.add_argument("--style", default="fluent")
    args = parser.parse_args()

    pipe = load_pipeline(args.merged)
    dmm.set_style(pipe, args.style)
    prompts = list(load_judge().config.concepts)[:COUNT]
    pictures = sample(pipe, prompts, range(COUNT), guidance_scale=GUIDANCE, steps=8)
    pixels = torch.cat([pipe.image_processor.preprocess(picture) for picture in pictures])
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    text, empty = (pipe.encode_prompt(said, "cpu", 1, False)[0] for said in (prompts, [""] * COUNT))
    print("| timestep | LCM | SPLAM, noise as published | SPLAM, its own noise | at its noise's timestep |")
    print("|---|---|---|---|---|")
    for timestep in (519, 819, 999):
        errors = differences(pipe, latents, noise, text, empty, timestep)
        print(f"| {timestep} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")


def differences(
    pipe: Any, latents: torch.Tensor, noise: torch.Tensor, text: torch.Tensor, empty: torch.Tensor, timestep: int
) -> list[float]:
    """Of the students from the target, at a point of the path, in the table's order."""
    schedule = pipe.scheduler.alphas_cumprod
    alpha_bar_t, alpha_bar_s = (schedule[at].expand(COUNT) for at in (timestep, timestep - SKIP))

    def say(x: torch.Tensor, at: Any, words: torch.Tensor = text) -> torch.Tensor:
        output: torch.Tensor = pipe.unet(x, at, words).sample
        return output

    def clean(x: torch.Tensor, at: Any, level: torch.Tensor) -> torch.Tensor:
        return clean_and_noise(say(x, at), x, level, "epsilon")[0]

    x_t = add_noise(latents, noise, alpha_bar_t)
    guided = guide(say(x_t, timestep), say(x_t, timestep, empty), torch.full((COUNT,), GUIDANCE))
    x_s = add_noise(*clean_and_noise(guided, x_t, alpha_bar_t, "epsilon"), alpha_bar_s)
    target = clean(x_s, timestep - SKIP, alpha_bar_s)

    gamma = torch.full((COUNT,), 0.5)
    x_gamma = sub_path_point(x_t, x_s, gamma, alpha_bar_t, alpha_bar_s)
    noise_power = sub_path_noise(gamma, alpha_bar_t, alpha_bar_s)
    ratio = alpha_bar_t / alpha_bar_s
    published = (1 - alpha_bar_s) * ratio + gamma.square() * (1 - ratio)
    signal, *spreads = (power.sqrt().reshape(-1, 1, 1, 1) for power in (alpha_bar_t, published, noise_power))
    said = say(x_gamma, timestep)
    x, level = as_noised(x_gamma, alpha_bar_t, noise_power)
    found = (
        clean(x_t, timestep, alpha_bar_t),
        *((x_gamma - spread * said) / signal for spread in spreads),
        clean(x, timesteps_of_equal_power(level, schedule), level),
    )
    return [float((one - target).abs().mean()) for one in found]


if __name__ == "__main__":
    main()
