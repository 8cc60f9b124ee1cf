"""What a GPU must show: checks in order of worth, each in its own process."""
