"""How well pictures follow a control: by its own ControlNet, by the merge of several, and by none.

    python examples/emoji/measure_controls.py --controls controls --model dmm-demo/merged

paints without a prompt, where only the control tells what a picture shows, in some styles of the merged model. The
condition images are of mirrored pictures by the embedded experts. Printed are, for each control: the share of edges
that agree (F1, a pixel off counts), the mean difference of blurred colours (of 255), or the overlap of silhouettes
(intersection over union); and how many pictures the judge finds of the right hand.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image, ImageFilter, ImageOps

import dmm.demo
from dmm.data.conditions import MAKERS
from dmm.demo.judge import judge_images, load_judge
from dmm.models.libraries import quiet_libraries
from dmm.models.teachers import open_pipeline
from dmm.pipeline.controls import load_controls, open_net, set_control
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import load_pipeline
from train_controlnet import GUIDANCE_SCALE

SEED = 1000  # of the pictures; those that conditions are made of have others
OWN, MERGED, NONE = "its own ControlNet", "the merged one", "no control"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controls", type=Path, required=True, help="a merge of the embedded ControlNets")
    parser.add_argument("--model", type=Path, required=True, help="a merge of the embedded experts")
    parser.add_argument("--styles", nargs="+", default=["noto", "openmoji", "fluent"])
    parser.add_argument("--count", type=int, default=32, help="pictures of each style and control")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=float, default=2.0, help="how strongly a control acts")
    args = parser.parse_args()
    quiet_libraries()
    judge = load_judge()
    pipe, merged = load_pipeline(args.model), load_controls(args.controls)
    kind: Any = StableDiffusionControlNetPipeline
    wanted = [shown for style in args.styles for shown in conditioned(style, args.count)]
    styles = [style for style in args.styles for _ in range(args.count)]
    for name, folder in dmm.demo.controls().items():
        set_control(merged, name)
        images = [MAKERS[name](picture) for picture in wanted]
        for told, net, scale in (
            (OWN, open_net(folder), args.scale),
            (MERGED, merged, args.scale),
            (NONE, merged, 0.0),
        ):
            guided = kind(**pipe.components, controlnet=net, requires_safety_checker=False)
            rest = iter(images)

            def inputs(count: int, rest: Any = rest, scale: float = scale) -> Mapping[str, Any]:
                return {"image": [next(rest) for _ in range(count)], "controlnet_conditioning_scale": scale}

            pictures = list(
                sample(
                    guided,
                    [""] * len(images),
                    list(range(SEED, SEED + len(images))),
                    styles=styles,
                    inputs=inputs,
                    steps=args.steps,
                    guidance_scale=1.0,
                )
            )
            agreements = [AGREEMENTS[name](image, picture) for image, picture in zip(images, pictures, strict=True)]
            hands = judge_images(judge, pictures).style_logits.argmax(1).tolist()
            right = np.mean([judge.config.styles[hand] == style for hand, style in zip(hands, styles, strict=True)])
            print(f"{name}, {told}: {np.mean(agreements):.3f}; right hand {right:.1%}", flush=True)


def conditioned(style: str, count: int) -> list[Image.Image]:
    """Mirrored pictures by an expert."""
    things = list(load_judge().config.concepts)
    prompts = [things[i % len(things)] for i in range(count)]
    expert = open_pipeline(dmm.demo.expert_sources()[style])
    painted = sample(expert, prompts, list(range(count)), guidance_scale=GUIDANCE_SCALE, steps=10)
    return [ImageOps.mirror(picture) for picture in painted]


def edges_agree(image: Image.Image, picture: Image.Image) -> float:
    """F1 of two pictures' edges, a pixel off counts as met."""
    wanted, found = (one.convert("L") for one in (image, MAKERS["edges"](picture)))
    near_wanted, near_found = (np.asarray(one.filter(ImageFilter.MaxFilter(3))) > 0 for one in (wanted, found))
    wanted_at, found_at = np.asarray(wanted) > 0, np.asarray(found) > 0
    precision = (found_at & near_wanted).sum() / max(found_at.sum(), 1)
    recall = (wanted_at & near_found).sum() / max(wanted_at.sum(), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def colours_differ(image: Image.Image, picture: Image.Image) -> float:
    """Mean difference, of 255."""
    return float(np.abs(np.asarray(image, dtype=int) - np.asarray(MAKERS["colours"](picture), dtype=int)).mean())


def silhouettes_overlap(image: Image.Image, picture: Image.Image) -> float:
    """Intersection over union."""
    wanted, found = (np.asarray(one.convert("L")) > 0 for one in (image, MAKERS["silhouette"](picture)))
    return float((wanted & found).sum() / max((wanted | found).sum(), 1))


AGREEMENTS: dict[str, Callable[[Image.Image, Image.Image], float]] = {
    "edges": edges_agree,
    "colours": colours_differ,
    "silhouette": silhouettes_overlap,
}

if __name__ == "__main__":
    main()
