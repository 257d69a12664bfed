"""The embedded experts, their ControlNets and their judge, and the story that ``dmm demo`` tells with them."""

from dmm.demo.assembly import expert_sources, experts
from dmm.demo.controls import controls

__all__ = ["controls", "expert_sources", "experts"]
