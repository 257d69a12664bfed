"""Diffusion Soup on the drawings: experts of shards, their soups, and a paragon of the same number of steps.

    python soups.py subjects --drawings DRAWINGS --work WORK   one hand, shards by what is drawn
    python soups.py styles   --drawings DRAWINGS --work WORK   one shard for each of four hands
    python soups.py memory   --drawings DRAWINGS --work WORK   four drawings a shard, learnt by heart
    python soups.py mixing   --model MERGED --work WORK        soups of two experts beside a merged model's mixes

The first three fine-tune an expert for each shard from the embedded base and the paragon on all shards, make the soup
of the experts and, by its ledger, the soups without one shard, and print what the judge says of their pictures. What
is trained is kept in WORK; stopped in any way, the same command goes on.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from denoising import encode_views
from dmm.demo.assembly import expert_forms, experts
from dmm.demo.judge import Verdict, judge_images, load_judge
from dmm.evaluation.distances import fid
from dmm.files.pictures import grid, save_png
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import load_pipeline
from dmm.soup.cook import cook
from dmm.soup.ledger import read_ledger, without
from dmm.soup.recipe import SoupRecipe, SoupTeacher
from drawings import CONCEPTS, STYLES, Drawings, nudge, read_drawings, shrink
from fine_tuning import fine_tune

HAND = "twemoji"
SUBJECTS = {"animals": ("Animals & Nature",), "food": ("Food & Drink",)}  # all else is things
HANDS = ("noto", "twemoji", "openmoji", "fluent")
BY_HEART = 4  # drawings of a shard
PAIRS = (("noto", "twemoji"), ("twemoji", "openmoji-black"), ("fluent", "openmoji"), ("noto-blob", "fluent-contrast"))
SHOWN = ("fox", "red apple", "octopus", "rocket", "palm tree", "robot")


@dataclass(frozen=True)
class Experiment:
    """Shards, how their experts learn them, and what is looked at.

    Attributes:
        shards: by name.
        views: of every drawing, slightly moved; 1 is the drawing as it is.
        prompts: of the pictures that are judged.
        table: prints what the judge says of each model's pictures.
    """

    shards: Mapping[str, Drawings]
    union: Drawings
    views: int
    prompts: list[str]
    table: Callable[["Experiment", Mapping[str, list[Image.Image]]], None]


def subjects(drawings: Drawings) -> Experiment:
    own = drawings.select((drawings.concepts >= 0) & (drawings.styles == STYLES.index(HAND)))
    subject = [subject_of(group) for group in own.groups]
    shards = {
        name: own.select(torch.tensor([one == name for one in subject])) for name in dict.fromkeys(sorted(subject))
    }
    return Experiment(shards, own, 16, own.texts, print_subjects)


def styles(drawings: Drawings) -> Experiment:
    published = drawings.select(drawings.concepts >= 0)
    shards = {name: published.select(published.styles == STYLES.index(name)) for name in HANDS}
    union = published.select(torch.isin(published.styles, torch.tensor([STYLES.index(name) for name in HANDS])))
    return Experiment(shards, union, 16, list(CONCEPTS), print_styles)


def memory(drawings: Drawings) -> Experiment:
    strange = (drawings.concepts < 0) & (drawings.styles == STYLES.index(HAND))  # the base has never seen them
    things = torch.tensor([group in ("Animals & Nature", "Food & Drink", "Objects") for group in drawings.groups])
    own = drawings.select(strange & things)
    chosen = own.select(torch.arange(len(own)) % (len(own) // (4 * BY_HEART)) == 0)
    chosen = chosen.select(torch.arange(len(chosen)) < 4 * BY_HEART)
    shards = {f"shard {i + 1}": chosen.select(torch.arange(len(chosen)) // BY_HEART == i) for i in range(4)}
    return Experiment(shards, chosen, 1, chosen.texts, print_memory)


EXPERIMENTS: dict[str, Callable[[Drawings], Experiment]] = {"subjects": subjects, "styles": styles, "memory": memory}


def subject_of(group: str) -> str:
    return next((name for name, groups in SUBJECTS.items() if group in groups), "things")


def train(drawings: Drawings, views: int, folder: Path, steps: int, options: argparse.Namespace) -> Path:
    """Fine-tune the base on drawings; returns the model, which is only found where it was finished before."""
    model = folder / "model"
    if not model.exists():
        pipeline = StableDiffusionPipeline.from_pretrained(experts()["base"], dtype=torch.float32)
        pipeline.text_encoder.requires_grad_(False)
        latents = encode_views(pipeline.vae, drawings.images, views, reach=0 if views == 1 else 2)
        settings = {"batch_size": options.batch_size, "learning_rate": options.learning_rate}
        torch.manual_seed(0)
        fine_tune(pipeline, latents, drawings.texts, folder / "run", steps=steps, **settings)
        pipeline.save_pretrained(model)
    return model


def make_models(experiment: Experiment, work: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The base, the shards' experts, their soup, the soups without one, and the paragon, by name."""
    steps, shards = options.steps, experiment.shards
    of_shards = {name: train(shard, experiment.views, work / name, steps, options) for name, shard in shards.items()}
    soup = work / "soup.safetensors"
    teachers = [SoupTeacher(name=name, model=str(model)) for name, model in of_shards.items()]
    made_of = {name: f"{len(shard)} drawings" for name, shard in shards.items()}
    cook(SoupRecipe(method="soup", teachers=tuple(teachers), shards=made_of), soup, overwrite=True)
    ledger = read_ledger(soup)
    models = {"base": experts()["base"], **{f"expert of {name}": model for name, model in of_shards.items()}}
    models["soup"] = soup
    for name in shards:
        models[f"soup without {name}"] = cook(
            without(ledger, name), work / f"without {name}.safetensors", ledger=ledger, overwrite=True
        ).path
    union = train(experiment.union, experiment.views, work / "paragon", steps * len(shards), options)
    return {**models, "paragon": union}


def paint(model: Path, prompts: Sequence[str], count: int, options: argparse.Namespace) -> list[Image.Image]:
    """``count`` pictures of every prompt, prompt by prompt; the same noise for every model."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    pipeline = open_pipeline(ModelSource(model, config=experts()["base"]) if model.is_file() else ModelSource(model))
    with tqdm(total=len(texts), desc=model.parent.name + "/" + model.name, unit=" pictures", leave=False) as bar:
        settings = {"steps": options.denoising_steps, "guidance_scale": options.guidance, "progress": bar.update}
        return list(sample(pipeline, texts, range(len(texts)), **settings))


def print_subjects(experiment: Experiment, pictures: Mapping[str, list[Image.Image]]) -> None:
    """Right hands by subject, right things, and the distance to the drawings."""
    real = real_features(experiment.union)
    kinds = [subject_of(group) for group in experiment.union.groups]
    print("| | right hand, % | " + " | ".join(experiment.shards) + " | right thing, % | FID to the drawings |")
    print("|---" * (len(experiment.shards) + 4) + "|")
    for name, images in pictures.items():
        verdict, count = judge_images(load_judge(), images), len(images) // len(kinds)
        right = verdict.style_logits.argmax(1) == STYLES.index(HAND)
        by_kind = [
            right[torch.tensor([kind == shard for kind in kinds for _ in range(count)])] for shard in experiment.shards
        ]
        cells = [percent(right), *map(percent, by_kind), percent(right_things(verdict, experiment.prompts))]
        print(f"| {name} | {' | '.join(cells)} | {fid(verdict.features, real):.2f} |")


def print_styles(experiment: Experiment, pictures: Mapping[str, list[Image.Image]]) -> None:
    """Whose hand the pictures are taken for, right things, and the distance to the union of the drawings."""
    real = real_features(experiment.union)
    print("| | " + " | ".join(f"{hand}, %" for hand in HANDS) + " | others, % | right thing, % | FID to the drawings |")
    print("|---" * (len(HANDS) + 4) + "|")
    for name, images in pictures.items():
        verdict = judge_images(load_judge(), images)
        hands = verdict.style_logits.argmax(1)
        shares = [hands == STYLES.index(hand) for hand in HANDS]
        cells = [*map(percent, shares), percent(~torch.stack(shares).any(0))]
        cells.append(percent(right_things(verdict, experiment.prompts)))
        print(f"| {name} | {' | '.join(cells)} | {fid(verdict.features, real):.2f} |")


def print_memory(experiment: Experiment, pictures: Mapping[str, list[Image.Image]]) -> None:
    """How near the pictures come to the drawings that were learnt by heart: their own shard's, and the others'."""
    own = shrink(experiment.union.images).flatten(1)
    shard_of = torch.tensor([i // BY_HEART for i in range(len(own))])
    # how near a perfect copy would come: the VAE's own loss
    vae = StableDiffusionPipeline.from_pretrained(experts()["base"], dtype=torch.float32).vae
    with torch.no_grad():
        again = vae.decode(vae.encode(shrink(experiment.union.images)).latent_dist.mode()).sample.clamp(-1, 1)
    floor = levels(again.flatten(1) - own)
    print(
        f"Through the VAE alone drawings come back {floor.mean():.1f} levels of 255 away, at most {floor.max():.1f}.\n"
    )
    copied = 2 * floor.max()
    print("| | nearest drawing, levels of 255 | copies, % | asked for what its shard has | asked for what it has not |")
    print("|---|---|---|---|---|")
    for name, images in pictures.items():
        count = len(images) // len(own)
        painted = torch.stack([as_tensor(image) for image in images]).flatten(1)
        nearest = levels(painted[:, None] - own[None]).min(1).values
        is_copy = nearest < copied
        asked = shard_of.repeat_interleave(count)
        shard = list(experiment.shards).index(name.removeprefix("expert of ")) if name.startswith("expert") else None
        split = ["-", "-"] if shard is None else [percent(is_copy[asked == shard]), percent(is_copy[asked != shard])]
        print(f"| {name} | {nearest.mean():.1f} | {percent(is_copy)} | {' | '.join(split)} |")
    print(f"\nA copy is nearer than {copied:.1f} levels to a drawing, twice the VAE's own loss at most.")


def levels(difference: Tensor) -> Tensor:
    """Root mean square over the last dimension of differences in [-2, 2], in levels of 255."""
    return difference.square().mean(-1).sqrt() * 127.5


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def real_features(drawings: Drawings) -> Tensor:
    """The judge's features of the drawings, in 16 slightly moved views each."""
    generator = torch.Generator().manual_seed(1)
    judge = load_judge()
    with torch.no_grad():
        return torch.cat([judge(nudge(drawings.images, generator, reach=2)).features for _ in range(16)])


def right_things(verdict: Verdict, prompts: Sequence[str]) -> Tensor:
    asked = torch.tensor([CONCEPTS.index(prompt) for prompt in prompts])
    return verdict.concept_logits.argmax(1) == asked.repeat_interleave(len(verdict.concept_logits) // len(prompts))


def percent(right: Tensor) -> str:
    return f"{100 * right.float().mean().item():.1f}"


def run_experiment(name: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    work = options.work / name
    work.mkdir(parents=True, exist_ok=True)
    experiment = EXPERIMENTS[name](read_drawings(options.drawings))
    models = make_models(experiment, work, options)
    pictures = {label: paint(model, experiment.prompts, options.count, options) for label, model in models.items()}
    print(f"{options.count} pictures of each of {len(experiment.prompts)} prompts, {options.steps} steps a shard.\n")
    experiment.table(experiment, pictures)
    shown = [prompt for prompt in SHOWN if prompt in experiment.prompts] or experiment.prompts[:6]
    cells = [
        images[experiment.prompts.index(prompt) * options.count] for images in pictures.values() for prompt in shown
    ]
    save_png(grid(cells, len(shown), row_labels=list(pictures), column_labels=shown), work / "grid.png", overwrite=True)


def run_mixing(options: argparse.Namespace) -> None:
    """Half and half of two styles: the soup of two experts, and the merged model's mix."""
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    merged, sources, forms = load_pipeline(options.model), experts(), expert_forms()
    judge, known = load_judge(), list(CONCEPTS)
    settings = {"steps": options.denoising_steps, "guidance_scale": options.guidance}
    seeds = range(len(known))
    rows: list[list[Image.Image]] = []
    print("| | the one's hand, % | the other's, % | right thing, % |\n|---|---|---|---|")
    for pair in PAIRS:
        teachers = [
            SoupTeacher(name=name, lora=sources[name])
            if forms[name] == "lora"
            else SoupTeacher(name=name, model=str(sources[name]))
            for name in pair
        ]
        soup = options.work / f"{pair[0]} and {pair[1]}"
        cook(SoupRecipe(method="soup", base=str(sources["base"]), teachers=tuple(teachers)), soup, overwrite=True)
        painted = {"soup": list(sample(open_pipeline(ModelSource(soup)), known, seeds, **settings))}
        for label, mix in (
            ("mix", dict.fromkeys(pair, 0.5)), (pair[0], {pair[0]: 1.0}), (pair[1], {pair[1]: 1.0}),
        ):  # fmt: skip
            painted[label] = list(sample(merged, known, seeds, styles=[mix] * len(known), **settings))
        for label in ("soup", "mix"):
            verdict = judge_images(judge, painted[label])
            shares = [percent(verdict.style_logits.argmax(1) == STYLES.index(name)) for name in pair]
            things = percent(right_things(verdict, known))
            print(f"| {pair[0]} and {pair[1]}, {label} | {' | '.join(shares)} | {things} |", flush=True)
        rows += [
            [painted[label][known.index(prompt)] for prompt in SHOWN] for label in (pair[0], "soup", "mix", pair[1])
        ]
    labels = [label for pair in PAIRS for label in (pair[0], "soup of both", "merged model's mix", pair[1])]
    cells = [cell for row in rows for cell in row]
    save_png(
        grid(cells, len(SHOWN), row_labels=labels, column_labels=SHOWN), options.work / "mixing.png", overwrite=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "mixing"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--drawings", type=Path)
    parser.add_argument("--model", type=Path, help="a merged model of all eight styles, for mixing")
    parser.add_argument("--steps", type=int, default=300, help="of each shard's expert")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=8, help="pictures of each prompt")
    parser.add_argument("--denoising-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    if options.experiment == "mixing":
        if options.model is None:
            parser.error("mixing needs --model")
        run_mixing(options)
    else:
        if options.drawings is None:
            parser.error(f"{options.experiment} needs --drawings")
        run_experiment(options.experiment, options)


if __name__ == "__main__":
    main()
