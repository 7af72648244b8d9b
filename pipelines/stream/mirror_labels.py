"""Which class a clip belongs to once it is mirrored, read from the names of the classes."""

import re
from collections.abc import Sequence


def mirrored_labels(classes: Sequence[str], words: Sequence[Sequence[str]]) -> list[int]:
    """For each label the label of the mirrored clip, itself for most; `words` are pairs that a mirror exchanges.

    "Swiping Left" becomes "Swiping Right": words are exchanged whole, both ways at once, and keep their case. Raises
    ValueError, which names the class, when the name that comes out is no class.
    """
    partner = {word: other for pair in words for word, other in (pair, reversed(pair))}
    # A word's neighbours must not be letters; an underscore is no letter, so that move_left has the word left.
    pattern = re.compile(rf"(?<![^\W\d_])({'|'.join(map(re.escape, partner))})(?![^\W\d_])", re.IGNORECASE)
    label_of = {name: label for label, name in enumerate(classes)}
    labels = []
    for name in classes:
        mirrored = pattern.sub(lambda found: _in_case_of(found[0], partner[found[0].lower()]), name) if words else name
        if mirrored not in label_of:
            raise ValueError(
                f"the mirror image of class {name!r} would be {mirrored!r}, by data.mirrored_words, and there is no such class. "
                "Fix: pipeline.flip=off, or change data.mirrored_words"
            )
        labels.append(label_of[mirrored])
    return labels


def _in_case_of(example: str, word: str) -> str:
    """`word` written as `example` is: LIKE, Like or like."""
    if example.isupper():
        return word.upper()
    return word.capitalize() if example[0].isupper() else word
