"""What a merge will take of memory, disk and time, told before it begins by configs and headers alone."""
