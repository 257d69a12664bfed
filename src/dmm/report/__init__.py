"""What an evaluation has found, as figures, pictures and a page."""
