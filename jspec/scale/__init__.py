"""What a step needs of chips that are not here, from a configuration alone."""
