"""Files in and out: what a path is, whether it holds what it must, and how it is read and written."""
