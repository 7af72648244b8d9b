"""The class of a mirrored clip, derived from the class names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MIRRORED_WORDS = (
    ("left", "right"),
    ("leftward", "rightward"),
    ("leftwards", "rightwards"),
    ("leftmost", "rightmost"),
    ("lefthand", "righthand"),
    ("lefthanded", "righthanded"),
    ("clockwise", "counterclockwise"),
)
"""Words that mirroring exchanges, in every data set."""

# Spellings of `counterclockwise` and `clockwise`. A name is split into words first, so "anti-clockwise" is two of them.
_SPELLINGS = {
    "anticlockwise": "counterclockwise",
    "ccw": "counterclockwise",
    "acw": "counterclockwise",
    "cw": "clockwise",
}
_PREFIXES = ("counter", "anti")

# SwipeLeft and LEFTSwipe are two words each.
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD_OR_NUMBER = re.compile(r"[^\W\d_]+|\d+")


@dataclass(frozen=True)
class Mirror:
    """What mirroring does to the classes of a data set, as far as their names say."""

    label_K: list[int]
    """The class of the mirrored clip: another class for each of a pair, else the class itself."""
    alone: list[str]
    """Classes whose name has a mirrored word, although no class has the mirrored name ("turn left" without "turn right")."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The labels that mirroring exchanges, the lower one first."""
        return [(label, other) for label, other in enumerate(self.label_K) if label < other]


def find_mirror(classes: Sequence[str], words: Sequence[Sequence[str]] = ()) -> Mirror:
    """Find the classes that mirroring exchanges, by `MIRRORED_WORDS` and by the pairs in `words`.

    Case, separators and the spelling of counterclockwise do not matter: SwipeLeft and swipe_right are a pair.
    """
    partner = _partners([*MIRRORED_WORDS, *([" ".join(_normalised(word)) for word in pair] for pair in words)])
    names = [_normalised(name) for name in classes]
    label_of = {name: label for label, name in enumerate(names)}
    label_K, alone = [], []
    for label, name in enumerate(names):
        mirrored = tuple(partner.get(word, word) for word in name)
        label_K.append(label_of.get(mirrored, label))
        if mirrored != name and mirrored not in label_of:
            alone.append(classes[label])
    return Mirror(label_K, alone)


def mirrored_labels(classes: Sequence[str], words: Sequence[Sequence[str]]) -> list[int]:
    """Map each label to the label of the mirrored clip, for most classes itself; `words`: pairs to exchange.

    "Swiping Left" becomes "Swiping Right", and SwipeLeft SwipeRight. Exchanges whole words, in both directions at once, and
    keeps their case. Raises ValueError, naming the class, if the resulting name is not a class.
    """
    partner = _partners(words)
    # Letters must not touch a word, except at a capital (SwipeLeft). An underscore is no letter: move_left has the word left.
    begin = r"(?:(?<![^\W\d_])|(?-i:(?<=[a-z])(?=[A-Z])))"
    end = r"(?:(?![^\W\d_])|(?-i:(?<=[a-z])(?=[A-Z])))"
    pattern = re.compile(f"{begin}({'|'.join(map(re.escape, partner))}){end}", re.IGNORECASE)
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


def check_flip(flip: str, classes: Sequence[str], words: Sequence[Sequence[str]]) -> None:
    """Raise ValueError, naming two classes, if mirrored training clips would get a wrong label.

    `flip`: on or relabel, as in Augmentation. `words`: data.mirrored_words.
    """
    unchanged = list(range(len(classes)))
    labels = mirrored_labels(classes, words) if flip == "relabel" else unchanged
    for label, other in find_mirror(classes, words).pairs:
        if labels[label] != other:
            raise ValueError(
                f"class {classes[label]!r} mirrored is class {classes[other]!r}, but mirrored clips would keep their label. "
                f"Fix: {_remedy(classes)}pipeline.flip=off"
            )
    if flip == "relabel" and labels == unchanged:
        raise ValueError(
            f"no class name has one of the words in data.mirrored_words={_shown(words)}. Fix: correct the words, or "
            "pipeline.flip=on data.mirrored_words=[] if a mirrored clip keeps its class"
        )


def _remedy(classes: Sequence[str]) -> str:
    """Return the overrides under which every clip gets the right label, if there are any."""
    mirror = find_mirror(classes)
    clocks = ("counterclockwise", "anticlockwise", "counter-clockwise", "anti-clockwise")
    for clock in clocks:
        pairs = [*MIRRORED_WORDS[:-1], ("clockwise", clock)]
        used = [pair for pair in pairs if all(any(word in name.lower() for name in classes) for word in pair)]
        try:
            if used and mirrored_labels(classes, used) == mirror.label_K:
                return f"pipeline.flip=relabel data.mirrored_words={_shown(used)}, or "
        except ValueError:
            continue
    return ""


def _shown(words: Sequence[Sequence[str]]) -> str:
    return f"[{','.join(f'[{one},{other}]' for one, other in words)}]"


def _partners(words: Sequence[Sequence[str]]) -> dict[str, str]:
    return {word.lower(): other.lower() for pair in words for word, other in (pair, reversed(pair))}


def _normalised(name: str) -> tuple[str, ...]:
    """Split a class name into lower-case words and numbers, with one spelling of clockwise and counterclockwise."""
    words: list[str] = []
    for word in _WORD_OR_NUMBER.findall(_CAMEL.sub(" ", name)):
        word = word.lower()
        if word == "clockwise" and words and words[-1] in _PREFIXES:
            words[-1] = "counterclockwise"
        else:
            words.append(_SPELLINGS.get(word, word))
    return tuple(words)


def _in_case_of(example: str, word: str) -> str:
    """Write `word` in the case of `example`: LIKE, Like or like."""
    if example.isupper():
        return word.upper()
    return word.capitalize() if example[0].isupper() else word
