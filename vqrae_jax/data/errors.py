"""What this room raises."""


class DataError(ValueError):
    """Data that cannot be used; names the config field, what was given, what is accepted and the remedy."""


class ImageError(DataError):
    """One image that cannot be read; names the file. Pipelines skip it, a single read raises it."""
