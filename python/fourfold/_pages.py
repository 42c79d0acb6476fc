"""The end of a message that a page of docs/ explains."""


def see(place: str) -> str:
    """Of "jpeg.md#broken-files" makes " (see docs/jpeg.md#broken-files)"; a test looks for the page and the heading."""
    return f" (see docs/{place})"
