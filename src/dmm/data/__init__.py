"""Images and captions, or prompts and teachers, to what the training loop reads.

``images`` reads captioned images, ``synthesis`` lets the teachers paint some; ``encoding`` makes latents and
embeddings; ``rows`` caches both, by the ``keys`` of what they were made from; ``training`` puts it together.
"""

from dmm.data.images import CaptionedImages, ImageDataset, ImageFolder
from dmm.data.synthesis import Synthesis
from dmm.data.training import TrainingData, prepare_data

__all__ = ["CaptionedImages", "ImageDataset", "ImageFolder", "Synthesis", "TrainingData", "prepare_data"]
