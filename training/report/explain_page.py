"""Write a page that shows clips, what a network answers, and how its logits change with the order of the frames."""

import base64
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import encode_jpeg

from runtime.atomic_write import write_text

_TEMPLATE = Path(__file__).with_name("explain.html")
_QUALITY = 90
_CLASSES_SHOWN = 4


@dataclass(frozen=True)
class ShownClip:
    """A clip on the page. Logits by class, on the CPU; shuffled_SK has a row per shuffle, perhaps none."""

    name: str
    true_class: str | None
    frame_TCHW: Tensor
    as_is_K: Tensor
    reversed_K: Tensor
    shuffled_SK: Tensor


def write_explain_page(path: Path, title: str, subtitle: str, clips: Sequence[ShownClip], classes: list[str]) -> None:
    """Write the page to `path`; it needs no other file."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text())
    fields = {
        "title": title,
        "subtitle": subtitle,
        "cards": _cards(clips),
        "clips": [_clip_fields(clip, classes) for clip in clips],
    }
    write_text(path, template.render(fields))


def _cards(clips: Sequence[ShownClip]) -> list[tuple[str, str]]:
    """Return (label, value) of each card: how much the answers depend on the order of the frames."""
    known = [clip for clip in clips if clip.true_class is not None]
    flipped = sum(_answer(clip.reversed_K) != _answer(clip.as_is_K) for clip in clips)
    shuffled = [int(label) != _answer(clip.as_is_K) for clip in clips for label in clip.shuffled_SK.argmax(1)]
    change = [float((clip.reversed_K - clip.as_is_K).abs().max()) for clip in clips]
    cards = [
        ("clips shown" + (": surest mistakes, then right answers" if known else ""), str(len(clips))),
        ("answers that change when the frames are reversed", f"{flipped} of {len(clips)}"),
        ("answers that change when they are shuffled", f"{sum(shuffled)} of {len(shuffled)}"),
        ("largest change of a logit by reversing, mean over clips", f"{sum(change) / max(1, len(change)):.2f}"),
    ]
    return cards


def _clip_fields(clip: ShownClip, classes: list[str]) -> dict[str, Any]:
    answer = _answer(clip.as_is_K)
    score = float(clip.as_is_K.softmax(0)[answer])
    return {
        "name": clip.name,
        "answer": classes[answer],
        "score": f"{score:.1%}",
        "true_class": clip.true_class,
        "right": None if clip.true_class is None else clip.true_class == classes[answer],
        "reversed": f"{classes[_answer(clip.reversed_K)]} ({float(clip.reversed_K.softmax(0).max()):.1%})",
        "shuffled": _shuffled_answers(clip, classes),
        "frames": [_data_url(frame_CHW) for frame_CHW in clip.frame_TCHW],
        **_plot(clip, classes),
    }


def _answer(logit_K: Tensor) -> int:
    return int(logit_K.argmax())


def _shuffled_answers(clip: ShownClip, classes: list[str]) -> str:
    """Count the answers to the shuffled clip, the most frequent first."""
    if not len(clip.shuffled_SK):
        return "–"
    labels, counts = clip.shuffled_SK.argmax(1).unique(return_counts=True)
    most = sorted(zip(counts.tolist(), labels.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{classes[label]} ({count} of {len(clip.shuffled_SK)})" for count, label in most[:3])


def _plot(clip: ShownClip, classes: list[str]) -> dict[str, Any]:
    """Return the rows of the drawing: a class each, with the place of each logit in percent of the width."""
    shown = _shown_labels(clip)
    logits = torch.cat([clip.as_is_K[None], clip.reversed_K[None], clip.shuffled_SK]).double()[:, shown]
    low, high = float(logits.min()), float(logits.max())

    def place(value: Tensor) -> float:
        return round(100 * (float(value) - low) / (high - low or 1.0), 1)

    rows = []
    for label in shown:
        shuffled_S = clip.shuffled_SK[:, label]
        rows.append(
            {
                "class_name": classes[label],
                "as_is": place(clip.as_is_K[label]),
                "reversed": place(clip.reversed_K[label]),
                "shuffled": [place(value) for value in (shuffled_S.min(), shuffled_S.mean(), shuffled_S.max())]
                if len(shuffled_S)
                else None,
                "text": f"{float(clip.as_is_K[label]):.2f} as is, {float(clip.reversed_K[label]):.2f} reversed"
                + (f", {float(shuffled_S.mean()):.2f} shuffled" if len(shuffled_S) else ""),
            }
        )
    return {"rows": rows, "low": f"{low:.1f}", "high": f"{high:.1f}"}


def _shown_labels(clip: ShownClip) -> list[int]:
    """Choose classes: the best of the clip as it is, and the answers when it is reversed and shuffled."""
    orders = [clip.as_is_K, clip.reversed_K, *([clip.shuffled_SK.mean(0)] if len(clip.shuffled_SK) else [])]
    best = clip.as_is_K.argsort(descending=True, stable=True)[:_CLASSES_SHOWN].tolist()
    return list(dict.fromkeys([*best, *map(_answer, orders)]))


def _data_url(image_CHW: Tensor) -> str:
    with warnings.catch_warnings():
        # torchvision 0.29 warns that torchcodec will replace it.
        warnings.simplefilter("ignore", DeprecationWarning)
        encoded = encode_jpeg(image_CHW.cpu().contiguous(), _QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.numpy().tobytes()).decode()}"
