"""LoRAs and their relatives: ``forms`` is their maths, ``names`` knows the layouts."""

from dmm.files.lora_names import is_lora
from dmm.formats.lora.forms import LoraChange, LowRank
from dmm.formats.lora.names import in_files, kohya_name, kohya_name_of
from dmm.formats.lora.reading import lora_file, read_lora, read_lora_file
from dmm.formats.lora.writing import fuse_lora, save_kohya_lora

__all__ = [
    "LoraChange",
    "LowRank",
    "fuse_lora",
    "in_files",
    "is_lora",
    "kohya_name",
    "kohya_name_of",
    "lora_file",
    "read_lora",
    "read_lora_file",
    "save_kohya_lora",
]
