"""Derive labels of mirrored clips: the class names give the published maps."""

import pytest

from pipelines.stream.mirror_labels import mirrored_labels

LEFT_RIGHT = [["left", "right"]]
CLOCK = [["clockwise", "counterclockwise"]]

# The classes of Something-Something that mention a side, by label in mmaction2's order (tools/data/sthv1 and sthv2).
# The other classes get names without a side.
SOMETHING_V1 = {
    2: "Turning the camera left while filming something",
    4: "Turning the camera right while filming something",
    30: "Pushing something from left to right",
    41: "Pushing something from right to left",
    52: "Pulling something from right to left",
    66: "Pulling something from left to right",
}
SOMETHING_V2 = {
    86: "Pulling something from left to right",
    87: "Pulling something from right to left",
    93: "Pushing something from left to right",
    94: "Pushing something from right to left",
    166: "Turning the camera left while filming something",
    167: "Turning the camera right while filming something",
}
# Class names that contain such a word as a part of another ("leftovers", "upright"); whole words must match.
OTHERS = ["Putting something upright on the table", "Eating leftovers", "Copyrighting something", "Turning brightly"]

JESTER = [
    "Swiping Left", "Swiping Right", "Swiping Down", "Swiping Up", "Pushing Hand Away", "Pulling Hand In",
    "Sliding Two Fingers Left", "Sliding Two Fingers Right", "Sliding Two Fingers Down", "Sliding Two Fingers Up",
    "Pushing Two Fingers Away", "Pulling Two Fingers In", "Rolling Hand Forward", "Rolling Hand Backward",
    "Turning Hand Clockwise", "Turning Hand Counterclockwise", "Zooming In With Full Hand", "Thumb Up",
]  # fmt: skip


def swaps(classes: list[str], words: list[list[str]]) -> dict[int, int]:
    """Return the labels that change."""
    return {label: other for label, other in enumerate(mirrored_labels(classes, words)) if label != other}


@pytest.mark.parametrize(
    ("named", "published"),
    [
        (SOMETHING_V1, {2: 4, 4: 2, 30: 41, 41: 30, 52: 66, 66: 52}),
        (SOMETHING_V2, {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}),
    ],
)
def test_the_published_maps_of_something_something(named: dict[int, str], published: dict[int, int]) -> None:
    classes = [named.get(label, f"{OTHERS[label % len(OTHERS)]} {label}") for label in range(174)]
    assert swaps(classes, LEFT_RIGHT) == published


def test_the_published_map_of_jester() -> None:
    assert swaps(JESTER, LEFT_RIGHT) == {0: 1, 1: 0, 6: 7, 7: 6}


def test_turning_hands_too() -> None:
    assert swaps(JESTER, LEFT_RIGHT + CLOCK) == {0: 1, 1: 0, 6: 7, 7: 6, 14: 15, 15: 14}


def test_words_keep_their_case_and_need_no_spaces() -> None:
    classes = ["move_left", "move_right", "GO LEFT!", "GO RIGHT!", "Left-hand", "Right-hand", "left2", "right2"]
    assert swaps(classes, LEFT_RIGHT) == {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4, 6: 7, 7: 6}


def test_a_second_mirror_gives_the_first_label() -> None:
    labels = mirrored_labels(JESTER, LEFT_RIGHT + CLOCK)
    assert [labels[label] for label in labels] == list(range(len(JESTER)))


def test_a_class_without_a_partner_is_named() -> None:
    with pytest.raises(ValueError, match=r"class 'Turn left' mirrored would be 'Turn right'.*data\.mirrored_words"):
        mirrored_labels(["Turn left", "Stop"], LEFT_RIGHT)


def test_no_words_change_nothing() -> None:
    assert mirrored_labels(JESTER, []) == list(range(len(JESTER)))
