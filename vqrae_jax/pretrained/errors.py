"""The one error of this package."""


class PretrainedError(ValueError):
    """Weights or their description cannot be used; the message names the file and what to do."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
