"""Double a number."""


def twice(number: int) -> int:
    """Return two times ``number``."""
    return 2 * number
