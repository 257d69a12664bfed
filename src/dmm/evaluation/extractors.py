"""What turns pictures into the features that they are compared in, by name.

``judge`` is the classifier of the embedded experts, ``inception`` the network that FID was defined with, ``clip`` and
``dino`` are read through transformers.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dmm.data.keys import digest_tensors, key_of
from dmm.data.rows import Place, Rows, cached_rows
from dmm.errors import UserError
from dmm.evaluation.extractor_names import read_extractor

FEATURES = "features"


class Extractor(Protocol):
    """What pictures are compared in."""

    name: str
    """As it was asked for."""
    identity: str
    """Digest of the weights and of how they are used."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Look at pictures.

        Args:
            images: (B, 3, H, W), 8 bits, on the CPU.
        Returns: ``features``, (B, D), and whatever else this one tells of each picture; float32, on the CPU.
        """


class JudgeExtractor:
    """The judge of the embedded experts, or one like it: features, and its heads' logits, ``style``, ``concept``."""

    name = "judge"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        from dmm.demo.judge import Judge, load_judge

        if weights is not None and not (Path(weights) / "config.json").is_file():
            raise UserError(
                f"'{weights}' is not a judge's folder, which holds config.json and weights: name one that "
                "examples/emoji/train_judge.py left, or ask for 'judge', which comes with the package."
            )
        self._judge: Any = (Judge.from_pretrained(weights).eval() if weights else load_judge()).to(device)
        self.styles: list[str] = list(self._judge.config.styles)
        self.concepts: list[str] = list(self._judge.config.concepts)
        self.identity = digest_tensors(self._judge.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See :class:`Extractor`.

        Raises: UserError: pictures of another size than the judge knows.
        """
        size = self._judge.config.sample_size
        if images.shape[-2:] != (size, size):
            height, width = images.shape[-2:]
            raise UserError(
                f"The judge looks at pictures of {size} x {size} pixels, these are {width} x {height}: it belongs to "
                "the embedded experts. Choose another extractor."
            )
        verdict = self._judge(images.to(self._judge.device).float() / 127.5 - 1)
        found = {FEATURES: verdict.features, "style": verdict.style_logits, "concept": verdict.concept_logits}
        return {name: tensor.float().cpu() for name, tensor in found.items()}


class InceptionExtractor:
    """The network of FID's definition, as torch-fidelity has it: 2,048 features of its last pooling."""

    name = "inception"
    _variant = "inception-v3-compat"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise UserError(
                "The extractor 'inception' needs torch-fidelity and torchvision: pip install torch-fidelity. Or choose "
                "another extractor."
            ) from error
        if weights is not None and not Path(weights).expanduser().is_file():
            raise UserError(f"--extractor inception={weights}: no such file. It is to be a copy of {URL_INCEPTION_V3}.")
        path = None if weights is None else str(Path(weights).expanduser())
        try:
            if path is not None:
                torch.load(path, weights_only=True, map_location="meta")  # torch-fidelity would run what a pickle says
            network = FeatureExtractorInceptionV3(self._variant, ["2048"], feature_extractor_weights_path=path)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"Inception's weights could not be {'read' if path else 'downloaded'} ({str(error).splitlines()[0]}); "
                f"get {URL_INCEPTION_V3} and name the file: --extractor inception=FILE."
            ) from error
        self._network: Any = network.to(device).eval()
        self._device = device
        self.identity = digest_tensors(network.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See :class:`Extractor`."""
        (features,) = self._network(images.to(self._device))
        return {FEATURES: features.float().cpu()}


class TransformersExtractor:
    """A vision model of transformers, read as the pictures' embedding.

    Args:
        name: what it is asked for as.
        weights: a folder or a hub id.
        class_name: of the model, in transformers.
        embed: from what the model returns to (B, D).
    """

    def __init__(
        self, name: str, weights: str, class_name: str, embed: Callable[[Any], Tensor], device: torch.device
    ) -> None:
        import transformers

        self.name = name
        model_class: Any = getattr(transformers, class_name)
        try:
            self._model: Any = model_class.from_pretrained(weights).to(device).eval()
            self._processor: Any = transformers.AutoImageProcessor.from_pretrained(weights, backend="pil")
        except (OSError, ValueError) as error:
            raise UserError(
                f"The extractor '{name}' could not be opened from '{weights}': {str(error).splitlines()[0]} Name a "
                f"folder with config.json, model.safetensors and preprocessor_config.json: --extractor {name}=FOLDER."
            ) from error
        self._embed, self._device = embed, device
        self.identity = key_of(
            tensors=digest_tensors(self._model.state_dict()), processor=json.loads(self._processor.to_json_string())
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """See :class:`Extractor`."""
        pixels = self._processor(list(images), return_tensors="pt", input_data_format="channels_first").pixel_values
        return {FEATURES: self._embed(self._model(pixels.to(self._device))).float().cpu()}


def _clip(weights: str | None, device: torch.device) -> Extractor:
    weights = weights or "openai/clip-vit-large-patch14"
    return TransformersExtractor(
        "clip", weights, "CLIPVisionModelWithProjection", lambda output: output.image_embeds, device
    )


def _dino(weights: str | None, device: torch.device) -> Extractor:
    # the class token, which DINO and DINOv2 both have, and in which pictures are compared (Stein et al. 2023)
    weights = weights or "facebook/dinov2-large"
    return TransformersExtractor("dino", weights, "AutoModel", lambda output: output.last_hidden_state[:, 0], device)


EXTRACTORS: Mapping[str, Callable[[str | None, torch.device], Extractor]] = {
    "inception": InceptionExtractor,
    "clip": _clip,
    "dino": _dino,
    "judge": JudgeExtractor,
}


def open_extractor(text: str, device: torch.device) -> Extractor:
    """An extractor as people ask for it: ``judge``, ``inception``, or with weights, ``inception=path.pth``.

    Raises: UserError: there is none of that name, it needs weights or a package that are not there, or they are no
        weights of its.
    """
    name, weights = read_extractor(text)
    return EXTRACTORS[name](weights, device)


def extract(
    extractor: Extractor,
    images: Rows,
    cache: Path,
    progress: Callable[[float], object],
    place: Place,
    batch_size: int = 64,
) -> Rows:
    """What an extractor finds in pictures, as far as the cache does not tell.

    Args:
        images: of :func:`dmm.evaluation.painting.paint`; this process's must be there.
        progress: called with numbers of pictures, which add up to those that this process sees to.
        batch_size: pictures at a time.
    Returns: rows of what the extractor returns, whole once all processes are done.
    """
    painted = iter(images.shards)

    def key(_rows: range) -> str:
        # a shard is named by what its pictures were made from
        return key_of(extractor=extractor.identity, pictures=next(painted).path.stem)

    def make(rows: range) -> dict[str, Tensor]:
        found: list[dict[str, Tensor]] = []
        for start in range(rows.start, rows.stop, batch_size):
            batch = torch.arange(start, min(start + batch_size, rows.stop))
            found.append(extractor(images.read(batch)["images"].to(torch.uint8)))
            progress(len(batch))
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    return cached_rows(cache / "features", len(images), key, make, progress, place)
