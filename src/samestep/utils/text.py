"""Text from outside (data, paths, error messages of libraries) made safe for a terminal."""

KEPT = "\n\t"


def printable(text: str) -> str:
    r"""The text with control characters spelled out, so that none of them reaches a terminal.

    Escape sequences in a row could otherwise clear the screen, retitle the window or hide what is
    printed. New lines and tabs stay.

    Args:
        text: Anything.

    Returns:
        The text, with ESC as ``\x1b`` and so on.
    """
    return "".join(
        letter if letter in KEPT or letter.isprintable() else repr(letter)[1:-1] for letter in text
    )
