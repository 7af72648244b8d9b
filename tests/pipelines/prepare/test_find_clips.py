"""Clips are found below a folder by their names."""

from pathlib import Path

from pipelines.prepare.scan.find_clips import find_clips


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_clips(root)]


def test_videos_and_folders_of_frames_at_any_depth(tmp_path: Path) -> None:
    make(tmp_path, "b.mp4", "a/c.WEBM", "a/frames/00001.jpg", "a/frames/00002.jpg", "a/deep/er/x.mkv", "notes.txt")
    # Frames beside optical flow; a folder of flow only; hidden files and folders.
    make(tmp_path, "tv/img_1.JPEG", "tv/flow_x_1.jpg", "flow/flow_x_1.jpg", ".git/x.mp4", "._b.mp4")
    assert found(tmp_path) == ["a/c.WEBM", "a/deep/er/x.mkv", "a/frames", "b.mp4", "tv"]


def test_a_folder_with_videos_is_no_folder_of_frames(tmp_path: Path) -> None:
    make(tmp_path, "one.mp4", "cover1.jpg", "below/two.mp4")
    assert found(tmp_path) == ["below/two.mp4", "one.mp4"]


def test_a_path_that_is_a_clip_itself(tmp_path: Path) -> None:
    make(tmp_path, "frames/1.jpg", "odd.name")
    assert find_clips(tmp_path / "frames") == [tmp_path / "frames"]
    # Named by the user, so whatever it is; the scan judges it.
    assert find_clips(tmp_path / "odd.name") == [tmp_path / "odd.name"]
    assert find_clips(tmp_path / "none") == [tmp_path / "none"]
    (tmp_path / "empty").mkdir()
    assert find_clips(tmp_path / "empty") == []


def test_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path, "real/a.mp4")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    assert len(find_clips(tmp_path)) == 1
    assert [path.name for path in find_clips(tmp_path / "link")] == ["a.mp4"]
