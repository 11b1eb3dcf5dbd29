"""Words for people: numbers with the right form of their noun.

counted(1, "block")     # 1 block
"""


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 block`, `2 blocks`, `1,000 examples`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
