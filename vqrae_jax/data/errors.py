"""What this room raises."""


class DataError(ValueError):
    """Data that cannot be used; names the config field, what was given, what is accepted and the remedy."""


class SettingError(DataError):
    """Settings that no data would suit, or that name none: seen before anything is read, and there at every attempt."""


class ImageError(DataError):
    """One image that is damaged or missing. Pipelines skip it, a single read raises it.

    What a disk or bucket refuses, perhaps only now, is an OSError instead: nothing is known of the image then.
    """
