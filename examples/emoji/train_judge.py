"""Train the judge, and measure it on drawings that it never saw.

Each published concept exists in eight styles. A fold leaves one style of every published concept out
of training altogether, another one for each fold; five folds give 5 x 64 = 320 unseen pairs. The
judge that is shipped is then trained on everything.

In training the concept head has a class for each of the 1,636 concepts, since many concepts in many
hands teach the features what a hand does not change; what is shipped are the published ones' rows.

With ``--treated`` it is a judge of the thirty-two hands of ``treatments.py``, left as ``WORK/judge-treated``; it begins
as the embedded one.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmm.demo.judge import Judge, load_judge
from drawings import CONCEPTS, STYLES, Drawings, augment, nudge, read_drawings, shrink
from training import fit
from treatments import ALL_STYLES, TREATMENTS, treat

FOLDS = 5


def fold_mask(drawings: Drawings, fold: int) -> Tensor:
    """(N,) bool: the published drawings that ``fold`` holds out, one style for every concept."""
    turn = (drawings.concepts * 3 + fold) % len(STYLES)
    return (drawings.concepts >= 0) & (drawings.styles == turn)


def without_twins(drawings: Drawings) -> Drawings:
    """Drop drawings that two hands share to the pixel's shade: no style head can be right on both."""
    pixels = shrink(drawings.images).flatten(1)
    keep = torch.ones(len(drawings), dtype=torch.bool)
    by_text: dict[str, list[int]] = {}
    for i, text in enumerate(drawings.texts):
        by_text.setdefault(text, []).append(i)
    for group in by_text.values():
        distance = torch.cdist(pixels[group], pixels[group]) / pixels.shape[1] ** 0.5
        distance.fill_diagonal_(2)
        keep[torch.tensor(group)[distance.min(1).values < 0.04]] = False
    return drawings.select(keep)


def perturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """What sampling and a VAE do to pictures, so that the judge forgives it: noise, and some of them blurred."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = 0.5 * torch.rand((len(images), 1, 1, 1), generator=generator)
    amount = amount * (torch.rand(amount.shape, generator=generator) < 0.3)
    noise = torch.randn(images.shape, generator=generator) * 0.06
    noise = noise * torch.rand((len(images), 1, 1, 1), generator=generator)
    return (torch.lerp(images, blurred, amount) + noise).clamp(-1, 1)


def accuracy(judge: Judge, drawings: Drawings, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Whether the judge has the style right (N,), and the concept (N,), on ``view`` of the drawings' images."""
    style, concept = [], []
    with torch.no_grad():
        for images in drawings.images.split(512):
            verdict = judge(view(images).to(judge.device))
            style.append(verdict.style_logits.argmax(1).cpu())
            concept.append(verdict.concept_logits[:, : len(CONCEPTS)].argmax(1).cpu())
    return torch.cat(style) == drawings.styles, torch.cat(concept) == drawings.concepts


def confusion(judge: Judge, drawings: Drawings) -> dict[str, float]:
    """For each treated hand, the share of its drawings that the judge knows for that hand's."""
    shares = {}
    with torch.no_grad():
        for place, style in enumerate(ALL_STYLES):
            own = drawings.select(drawings.styles == place % len(STYLES))
            images = treat(shrink(own.images), torch.full((len(own),), place))
            shares[style] = (judge(images).style_logits.argmax(1) == place).float().mean().item()
    return shares


def train_judge(
    train: Drawings, test: Drawings | None, folder: Path, steps: int, seed: int, *, treated: bool = False
) -> Judge:
    """Train on all of ``train``; a third of every batch is published drawings; where ``treated``, in all treatments."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = sorted(set(train.texts) - set(CONCEPTS))
    class_of = {text: i for i, text in enumerate((*CONCEPTS, *others))}
    classes = torch.tensor([class_of[text] for text in train.texts])
    judge = Judge(styles=ALL_STYLES if treated else STYLES, concepts=CONCEPTS)
    if treated:
        judge.stages.load_state_dict(load_judge().stages.state_dict())
    judge.concept_head = nn.Linear(judge.concept_head.in_features, len(class_of))
    judge.to(device, memory_format=torch.channels_last)
    published = (train.concepts >= 0).nonzero().flatten()

    def step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        some = published[torch.randint(len(published), (32,), generator=generator)]
        rows = torch.cat([some, torch.randint(len(train), (64,), generator=generator)])
        turned = augment(train.images[rows[::2]], generator, zoom=0.15, turn=0.15, shift=0.06)
        crisp = nudge(train.images[rows[1::2]], generator, reach=4)  # turning softens what a hand may be known by
        images, styles = torch.stack([turned, crisp], 1).flatten(0, 1), train.styles[rows]
        if treated:
            styles = styles + len(STYLES) * torch.randint(1 + len(TREATMENTS), styles.shape, generator=generator)
            images = treat(images, styles)
        images = perturb(images, generator)
        flip = torch.rand((len(rows), 1, 1, 1), generator=generator) < 0.5
        images = torch.where(flip, images.flip(3), images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            verdict = judge(images.to(device))
        style = F.cross_entropy(verdict.style_logits.float(), styles.to(device), label_smoothing=0.05)
        concept = F.cross_entropy(verdict.concept_logits.float(), classes[rows].to(device), label_smoothing=0.05)
        return style + concept, {"style_loss": style.item(), "concept_loss": concept.item()}

    def evaluate() -> dict[str, float]:
        if test is None:
            return {}
        style, concept = accuracy(judge, test, shrink)
        return {"unseen_style": style.float().mean().item(), "unseen_concept": concept.float().mean().item()}

    fit(
        judge,
        step,
        folder,
        steps=steps,
        learning_rate=1e-3 if treated else 3e-3,
        weight_decay=0.05,
        seed=seed,
        evaluate=evaluate,
    )
    kept = nn.Linear(judge.concept_head.in_features, len(CONCEPTS))
    kept.load_state_dict({name: value[: len(CONCEPTS)] for name, value in judge.concept_head.state_dict().items()})
    judge.concept_head = kept
    return judge.to("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument(
        "--treated", action="store_true", help="of all treatments; no folds, it is measured as it stands"
    )
    args = parser.parse_args()

    everything = read_drawings(args.drawings)
    distinct = without_twins(everything)
    print(f"{len(everything) - len(distinct)} drawings that two hands share are left out of training", flush=True)
    if args.treated:
        judge = train_judge(distinct, None, args.work / "judge-treated-run", args.steps, args.folds, treated=True)
        judge.save_pretrained(args.work / "judge-treated")
        print(json.dumps(confusion(judge, everything.select(everything.concepts >= 0)), indent=2))
        return
    judge = train_judge(distinct, None, args.work / "judge-run", args.steps, seed=args.folds)
    judge.save_pretrained(args.work / "judge")
    fresh = torch.Generator().manual_seed(2**31)

    def view(images: Tensor) -> Tensor:
        return augment(images, fresh, zoom=0.1, turn=0.1, shift=0.05)

    published = everything.select(everything.concepts >= 0)
    seen_style, seen_concept = accuracy(judge, published, view)
    every_style, _ = accuracy(judge, distinct, view)

    style_right, concept_right = [], []
    for fold in range(args.folds):
        train, test = distinct.select(~fold_mask(distinct, fold)), everything.select(fold_mask(everything, fold))
        fold_judge = train_judge(train, test, args.work / f"judge-fold{fold}-run", args.steps, seed=fold)
        style, concept = accuracy(fold_judge, test, shrink)
        style_right.append(style)
        concept_right.append(concept)

    figures = {"seen_style": seen_style, "seen_concept": seen_concept, "seen_style_all_concepts": every_style}
    if style_right:
        figures |= {"unseen_style": torch.cat(style_right), "unseen_concept": torch.cat(concept_right)}
    report = {name: {"share": right.float().mean().item(), "of": len(right)} for name, right in figures.items()}
    (args.work / "judge.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
