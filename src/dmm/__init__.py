"""Merge many fine-tuned Stable Diffusion models into one style-promptable model by distillation."""

__version__ = "0.1.0"
