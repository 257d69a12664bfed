"""The embedded experts, their judge, and the story that ``dmm demo`` tells with them."""

from dmm.demo.assembly import expert_sources, experts

__all__ = ["expert_sources", "experts"]
