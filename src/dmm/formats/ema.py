"""The running average (EMA) of a UNet's weights that training scripts leave in single files.

Beside ``model.diffusion_model.out.0.weight`` such a file has ``model_ema.diffusion_modelout0weight``: the same name
without its dots. Models are published with both, with the trained weights alone, or with the average alone.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from dmm.errors import UserError

_EMA, _TRAINED = "model_ema.", "model."
_FIRST = "diffusion_model"
# what a UNet's names are made of in the original layout; the longer of two words with one beginning comes first
_WORDS = re.compile(
    r"input_blocks|output_blocks|middle_block|transformer_blocks|time_embed|label_emb|in_layers|out_layers|emb_layers|"
    r"skip_connection|proj_in|proj_out|proj|attn[12]|norm[123]?|to_out|to_[qkv]|ff|net|conv|out|op|weight|bias|\d+"
)
_PAIRS = ("input_blocks", "output_blocks", "label_emb")  # followed by two numbers, of which the second is below ten


def choose_weights(path: Path, names: Iterable[str], *, ema: bool = False) -> dict[str, str]:
    """Which of a single file's tensors are its model: the trained ones, or their average in their places.

    Args:
        path: of the file, for errors.
        names: of all its tensors.
        ema: take the average; it is taken, too, where there is nothing else.
    Returns: what each tensor of the model is called -> what the file calls the one that is read for it.
    Raises: UserError: the average is asked for, and there is none or not all of it.
    """
    names = list(names)
    averages = {plain: name for name in names if (plain := _trained_name(name)) is not None}
    kept = {name: name for name in names if not name.startswith(_EMA)}
    trained = [name for name in kept if name.startswith(f"{_TRAINED}{_FIRST}.")]
    if not ema and (trained or not averages):
        return kept
    if not averages:
        raise UserError(
            f"{path} has no EMA copy of its weights: none of its {len(names)} tensors is named '{_EMA}{_FIRST}...'. "
            "Take it as it is, without ema."
        )
    lacking = [name for name in trained if name not in averages]
    if lacking:
        raise UserError(
            f"{path}: its EMA copy lacks {len(lacking)} of the {len(trained)} tensors of its UNet, the first of them "
            f"'{lacking[0]}'. Take the file without ema, or get another copy."
        )
    return {**kept, **averages}


def has_average_beside(names: Iterable[str]) -> bool:
    """Whether a single file has an average of its weights, and the weights too."""
    names = list(names)
    return any(name.startswith(_EMA + _FIRST) for name in names) and any(
        name.startswith(f"{_TRAINED}{_FIRST}.") for name in names
    )


def _trained_name(name: str) -> str | None:
    """The name of the tensor that one is the average of; None for what is no average that we know."""
    if not name.startswith(_EMA + _FIRST):
        return None
    flat = name.removeprefix(_EMA + _FIRST).replace(".", "")
    words: list[str] = []
    at = 0
    while at < len(flat):
        found = _WORDS.match(flat, at)
        if found is None:
            return None
        word, at = found[0], found.end()
        if words and words[-1] in _PAIRS and len(word) > 1:
            words += [word[:-1], word[-1]]
        else:
            words.append(word)
    return ".".join([_TRAINED + _FIRST, *words])
