"""Scores of single pictures and their prompts, by name: how well they fit, how much people would like them.

``clip`` is torchmetrics' CLIP-Score, ``pickscore`` and ``aesthetic`` are models of transformers. ImageReward and TIFA
are plug-ins: their packages do not live beside ours, so that whoever has one registers it as an entry point of the
group ``dmm.scorers``: a callable that is given the weights, or None, and the device, and returns a :class:`Scorer`.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmm.data.keys import digest_tensors, key_of
from dmm.errors import UserError, nearest

GROUP = "dmm.scorers"


class Scorer(Protocol):
    """What judges pictures of prompts, one by one; more is better."""

    name: str
    """As it was asked for."""
    identity: str
    """Digest of the weights and of how they are used."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures.

        Args:
            images: (B, 3, H, W), 8 bits, on the CPU.
            prompts: B.
        Returns: (B,), float32, on the CPU.
        """


class ClipScore:
    """CLIP-Score by torchmetrics: 100 times the cosine of picture and prompt, at least 0 (Hessel et al. 2021)."""

    name = "clip"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        from torchmetrics.multimodal.clip_score import CLIPScore

        model, processor = _open_clip(self.name, weights or "openai/clip-vit-large-patch14", None)
        # each process scores its own pictures
        self._metric = CLIPScore(lambda: (_PlainFeatures(model), processor), sync_on_compute=False).to(device)
        self.identity = key_of(tensors=digest_tensors(model.state_dict()))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See :class:`Scorer`."""
        # it returns means; those of single pictures are their scores
        return torch.stack([self._metric(one, text) for one, text in zip(images, prompts, strict=True)]).float().cpu()


class PickScore:
    """What people prefer, as Pick-a-Pic's model predicts it: a scaled cosine (Kirstain et al. 2023)."""

    name = "pickscore"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        processor = None if weights else "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        model, self._processor = _open_clip(self.name, weights or "yuvalkirstain/PickScore_v1", processor)
        self._model = model.to(device)
        self._device = device
        self.identity = key_of(tensors=digest_tensors(model.state_dict()))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See :class:`Scorer`."""
        given = self._processor(
            text=list(prompts), images=list(images), padding=True, truncation=True, return_tensors="pt"
        ).to(self._device)
        output = self._model(**given)
        cosines = (output.image_embeds * output.text_embeds).sum(1)
        return (self._model.logit_scale.exp() * cosines).float().cpu()


class AestheticScore:
    """How a picture pleases, whatever it shows: an image classifier's probability of ``aesthetic``.

    A classifier of one output is a regression: its score is that output.
    """

    name = "aesthetic"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        import transformers

        weights = weights or "cafeai/cafe_aesthetic"
        try:
            model: Any = transformers.AutoModelForImageClassification.from_pretrained(weights)
            self._processor: Any = transformers.AutoImageProcessor.from_pretrained(weights, backend="pil")
        except (OSError, ValueError) as error:
            raise _unopened(self.name, weights, error) from error
        labels = {label.lower(): index for index, label in model.config.id2label.items()}
        if len(labels) > 1 and "aesthetic" not in labels:
            raise UserError(
                f"The score 'aesthetic' takes a classifier with the label 'aesthetic', or one of a single output; "
                f"{weights} has {', '.join(labels)}."
            )
        self._label = labels.get("aesthetic") if len(labels) > 1 else None
        self._model = model.to(device).eval()
        self._device = device
        self.identity = key_of(tensors=digest_tensors(model.state_dict()), label=self._label)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See :class:`Scorer`."""
        pixels = self._processor(list(images), return_tensors="pt").pixel_values
        logits = self._model(pixels.to(self._device)).logits.float().cpu()
        return logits[:, 0] if self._label is None else logits.softmax(1)[:, self._label]


SCORERS: Mapping[str, Callable[[str | None, torch.device], Scorer]] = {
    "clip": ClipScore,
    "pickscore": PickScore,
    "aesthetic": AestheticScore,
}
_PLUGINS = {
    "imagereward": "image-reward from PyPI, which asks for an older transformers than ours, and ImageReward's weights",
    "tifa": "tifascore, a question-answering model, and the questions of each prompt",
}


def open_scorer(text: str, device: torch.device) -> Scorer:
    """A scorer as people ask for it: ``clip``, or with weights, ``pickscore=models/pickscore``.

    Raises: UserError: there is none of that name, it is a plug-in that is not there, or its weights are not.
    """
    name, _, weights = text.partition("=")
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if name in SCORERS:
        return SCORERS[name](weights or None, device)
    if name in plugins:
        scorer: Scorer = plugins[name].load()(weights or None, device)
        return scorer
    if name in _PLUGINS:
        raise UserError(
            f"The score '{name}' is a plug-in that is not installed. It needs {_PLUGINS[name]}; a package that has "
            f"them registers it as the entry point '{name}' of the group '{GROUP}'."
        )
    known = [*SCORERS, *_PLUGINS, *plugins]
    raise UserError(f"There is no score '{name}'{nearest(name, known)}; choose from {', '.join(dict.fromkeys(known))}.")


def _open_clip(name: str, weights: str, processor: str | None) -> tuple[Any, Any]:
    """A CLIP of two towers and what prepares pictures and prompts for it."""
    import transformers

    try:
        model: Any = transformers.CLIPModel.from_pretrained(weights)
        prepare: Any = transformers.CLIPProcessor.from_pretrained(processor or weights)
    except (OSError, ValueError) as error:
        raise _unopened(name, weights, error) from error
    return model.eval(), prepare


class _PlainFeatures(nn.Module):
    """A CLIP as torchmetrics 1.9 takes it: what transformers 5 wraps in an output is a tensor, as it was before."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        features: Tensor = self.model.get_image_features(*args, **kwargs).pooler_output
        return features

    def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
        features: Tensor = self.model.get_text_features(*args, **kwargs).pooler_output
        return features


def _unopened(name: str, weights: str, error: Exception) -> UserError:
    return UserError(
        f"The score '{name}' could not be opened from '{weights}': {str(error).splitlines()[0]} Name a folder of "
        f"transformers: --score {name}=FOLDER."
    )
