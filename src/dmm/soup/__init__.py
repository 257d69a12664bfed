"""Soups: merges without training, streamed, with a ledger of what is in them."""
