"""The class of a mirrored clip, derived from the class names."""

import re
from collections.abc import Sequence


def mirrored_labels(classes: Sequence[str], words: Sequence[Sequence[str]]) -> list[int]:
    """Map each label to the label of the mirrored clip, for most classes itself; `words`: pairs to exchange.

    "Swiping Left" becomes "Swiping Right". Exchanges whole words, in both directions at once, and keeps their case. Raises
    ValueError, naming the class, if the resulting name is not a class.
    """
    partner = {word: other for pair in words for word, other in (pair, reversed(pair))}
    # Letters must not touch a word. An underscore is not a letter: move_left contains the word left.
    pattern = re.compile(rf"(?<![^\W\d_])({'|'.join(map(re.escape, partner))})(?![^\W\d_])", re.IGNORECASE)
    label_of = {name: label for label, name in enumerate(classes)}
    labels = []
    for name in classes:
        mirrored = pattern.sub(lambda found: _in_case_of(found[0], partner[found[0].lower()]), name) if words else name
        if mirrored not in label_of:
            raise ValueError(
                f"class {name!r} mirrored would be {mirrored!r} (by data.mirrored_words), which is not a class. "
                "Fix: pipeline.flip=off, or change data.mirrored_words"
            )
        labels.append(label_of[mirrored])
    return labels


def _in_case_of(example: str, word: str) -> str:
    """Write `word` in the case of `example`: LIKE, Like or like."""
    if example.isupper():
        return word.upper()
    return word.capitalize() if example[0].isupper() else word
