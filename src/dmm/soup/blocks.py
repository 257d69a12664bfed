"""Blocks of a UNet as people who merge by blocks (MBW) count them, and rules that give blocks weights of their own.

A UNet of four levels has 26 of them: BASE (all that is no UNet), IN00 to IN11, M00, OUT00 to OUT11; one of three has
20, with IN00 to IN08 and OUT00 to OUT08. As in the first tool that had them, the time embedding counts as IN00 and the
last layers as the last OUT.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dmm.errors import UserError
from dmm.families import denoiser_names

_IN_FILES = "model.diffusion_model."
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)(?:\.(\d+))?\.")
_DIFFUSERS = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
_LAST = ("out.", "conv_norm_out.", "conv_out.")


@dataclass(frozen=True)
class Blocks:
    """The blocks of one architecture.

    Attributes:
        names: all of them, as the lists of weights that people share have them; none of a model without a UNet.
        layers: ResNets in each level of the UNet's way down.
    """

    names: tuple[str, ...]
    layers: int

    @classmethod
    def of(cls, tensors: Iterable[str]) -> "Blocks":
        """Read them off the names of a model's tensors, in the original layout or as ``component/...`` of a folder."""
        inputs = outputs = layers = 0
        for tensor in tensors:
            name = _path(tensor)
            if name is None:
                continue
            if found := _ORIGINAL.match(name):
                number = int(found[2] or 0) + 1
                inputs = max(inputs, number) if found[1] == "input_blocks" else inputs
                outputs = max(outputs, number) if found[1] == "output_blocks" else outputs
            elif (found := _DIFFUSERS.match(name)) and found[3] == "resnets":
                level, layer = int(found[2]), int(found[4])
                if found[1] == "down":
                    layers = max(layers, layer + 1)
                else:
                    outputs = max(outputs, level * (layer + 1) + layer + 1)
        inputs = inputs or outputs
        if not inputs:
            return cls((), 0)
        names = ["BASE", *(f"IN{i:02}" for i in range(inputs)), "M00", *(f"OUT{i:02}" for i in range(outputs))]
        return cls(tuple(names), layers)

    def block_of(self, tensor: str) -> str:
        """The block that a tensor belongs to."""
        name = _path(tensor)
        if name is None:
            return "BASE"
        if name.startswith(_LAST):
            return self.names[-1]
        if found := _ORIGINAL.match(name):
            if found[1] == "middle_block":
                return "M00"
            return f"{'IN' if found[1] == 'input_blocks' else 'OUT'}{int(found[2]):02}"
        if found := _DIFFUSERS.match(name):
            level, kind, layer = int(found[2]), found[3], int(found[4])
            if found[1] == "down":
                place = 1 + layer if kind != "downsamplers" else self.layers + 1
                return f"IN{level * (self.layers + 1) + place:02}"
            place = layer if kind != "upsamplers" else self.layers
            return f"OUT{level * (self.layers + 1) + place:02}"
        return "M00" if name.startswith("mid_block.") else "IN00"

    def select(self, pattern: str, tensors: Sequence[str]) -> list[str]:
        """The tensors that a rule is for.

        Args:
            pattern: a block (``IN04``), blocks (``IN00-IN05``, in the order of ``names``), or ``/a regular
                expression/`` that is searched for in the tensors' names.
        Raises: UserError: it is none of these, or is for no tensor at all.
        """
        if len(pattern) > 1 and pattern.startswith("/") and pattern.endswith("/"):
            try:
                expression = re.compile(pattern[1:-1])
            except re.error as error:
                raise UserError(f"blocks: '{pattern}' is no regular expression: {error}.") from error
            chosen = [name for name in tensors if expression.search(name)]
        else:
            first, _, last = (part.strip() for part in pattern.partition("-"))
            if not self.names:
                raise UserError(
                    f"blocks: '{pattern}' is a block of a UNet, which these models have none of. Give a /regular "
                    "expression/ for tensors' names, between slashes."
                )
            for name in (first, last or first):
                if name not in self.names:
                    raise UserError(
                        f"blocks: there is no block '{name}'; these models have {self.names[0]}, {self.names[1]} to "
                        f"{self.names[-1]} with M00 between, and a /regular expression/ stands between slashes."
                    )
            span = range(self.names.index(first), self.names.index(last or first) + 1)
            chosen = [name for name in tensors if self.names.index(self.block_of(name)) in span]
        if not chosen:
            raise UserError(f"blocks: '{pattern}' is for none of the {len(tensors)} tensors. Check the pattern.")
        return chosen


def _path(tensor: str) -> str | None:
    """A tensor's name within the UNet; None of one of another part."""
    prefixes = (_IN_FILES, *(f"{name}/" for name in denoiser_names()))
    return next((tensor.removeprefix(prefix) for prefix in prefixes if tensor.startswith(prefix)), None)
