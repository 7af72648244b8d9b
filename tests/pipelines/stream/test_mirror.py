"""Derive labels of mirrored clips: the class names give the published maps."""

import re

import pytest

from pipelines.stream.mirror_labels import check_flip, find_mirror, mirrored_labels

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


def test_a_capital_begins_a_word() -> None:
    classes = ["SwipeLeft", "SwipeRight", "TurnLeftHand", "TurnRightHand", "Leftovers", "MoveUpright"]
    assert swaps(classes, LEFT_RIGHT) == {0: 1, 1: 0, 2: 3, 3: 2}


# --- Pairs found without data.mirrored_words --------------------------------------------------------------------------

PAIRS = [
    ("Swiping Left", "Swiping Right"),
    ("SwipeLeft", "SwipeRight"),
    ("swipe_left", "SWIPE-RIGHT"),
    ("LEFTSwipe", "RIGHTSwipe"),
    ("left2", "right2"),
    ("drift leftwards", "drift rightwards"),
    ("the leftmost cup", "the rightmost cup"),
    ("Turning Hand Clockwise", "Turning Hand Counterclockwise"),
    ("TurnClockwise", "TurnCounterClockwise"),
    ("turn clockwise", "turn anti-clockwise"),
    ("turn_clockwise", "turn_anticlockwise"),
    ("turn cw", "turn ccw"),
    ("move something from left to right", "move something from right to left"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_pairs_are_found_by_name_alone(one: str, other: str) -> None:
    mirror = find_mirror(["stop", other, *OTHERS, one])
    assert mirror.pairs == [(1, len(OTHERS) + 2)]
    assert mirror.alone == []
    assert [mirror.label_K[label] for label in mirror.label_K] == list(range(len(OTHERS) + 3))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_flip_that_keeps_their_labels_is_refused(one: str, other: str) -> None:
    """Follow the advice in the message: each set of overrides in it passes the same check."""
    classes = ["stop", one, other]
    with pytest.raises(ValueError, match=f"class {re.escape(repr(one))} mirrored is class") as caught:
        check_flip("on", classes, [])
    assert repr(other) in str(caught.value)
    advice = str(caught.value).split("Fix: ")[1]
    assert advice.endswith("pipeline.flip=off")
    if advice.startswith("pipeline.flip=relabel"):
        words = re.findall(r"\[([^\[\],]+),([^\[\],]+)\]", advice)
        check_flip("relabel", classes, words)
        assert mirrored_labels(classes, words) == [0, 2, 1]


def test_the_usual_names_get_the_advice_to_relabel() -> None:
    with pytest.raises(ValueError, match=r"Fix: pipeline\.flip=relabel data\.mirrored_words=\[\[left,right\]\], or "):
        check_flip("on", ["Swiping Left", "Swiping Right"], [])
    both = r"data\.mirrored_words=\[\[left,right\],\[clockwise,counterclockwise\]\], or "
    with pytest.raises(ValueError, match=both):
        check_flip("relabel", JESTER, LEFT_RIGHT)
    check_flip("relabel", JESTER, LEFT_RIGHT + CLOCK)


def test_a_direction_without_a_partner_is_alone() -> None:
    classes = ["turn left", "answer right", "look left and right", *OTHERS]
    mirror = find_mirror(classes)
    assert (mirror.pairs, mirror.alone) == ([], classes[:3])
    check_flip("on", classes, [])
    check_flip("on", OTHERS, [])


def test_words_of_the_data_set_count_too() -> None:
    assert find_mirror(["wisch links", "WischRechts"], [("Links", "rechts")]).pairs == [(0, 1)]
    assert find_mirror(["wisch links", "WischRechts"]).pairs == []


def test_words_that_match_no_class_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no class name has one of the words in data\.mirrored_words=\[\[lfet,right\]\]"
    ):
        check_flip("relabel", ["wave", "stop"], [("lfet", "right")])
    with pytest.raises(ValueError, match="class 'wave left' mirrored is class 'wave right'"):
        check_flip("relabel", ["wave left", "wave right", "lfet", "links"], [("lfet", "links")])
