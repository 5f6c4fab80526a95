"""The one error of this package."""


class PretrainedError(ValueError):
    """Weights or their description cannot be used; the message names the file and what to do."""
