"""Frames of files of many kinds are those that the ffmpeg program shows. tests/soak/frame_corpus.py tries many more."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.frame_corpus import check, write_corpus
from tests.soak.frame_corpus import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program: apt-get install ffmpeg"),
]


def test_training_gets_the_frames_that_ffmpeg_shows(tmp_path: Path) -> None:
    results = [check(made, seed=3) for made in write_corpus(tmp_path, seed=3, count=40)]
    assert not [f"{result.how}: {result.wrong}" for result in results if result.wrong]
    assert report(results) == 0
    kinds = Counter("left out" if result.left_out else "fast" if result.fast else "slow" for result in results)
    # The corpus is of both kinds, and the scan refuses few files.
    assert kinds["left out"] <= 4 and kinds["fast"] >= 10 and kinds["slow"] >= 10, kinds
