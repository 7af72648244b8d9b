"""The names of clips, by which results on different manifests of the same clips are joined."""

import re
from itertools import takewhile
from pathlib import PurePosixPath

from .manifest import Manifest, ManifestRow, in_shard

# The place of a transcoded clip, by its row number. Older versions did not keep its name.
_BY_ROW_NUMBER = re.compile(r"[^/]+/\d{6}/\d{9}")


def clip_name(row: ManifestRow) -> str:
    """Return a clip's name: the path without the suffix of a video, or without the file names of images. Empty: unknown.

    A clip in a shard, and a transcoded one, has the name that it had before (`ManifestRow.name`).
    """
    if row.name or in_shard(row):
        return row.name
    path = PurePosixPath(row.path)
    name = str(path.parent if row.is_images else path.with_suffix(""))
    return "" if _BY_ROW_NUMBER.fullmatch(name) else name


def clip_names(manifest: Manifest) -> list[str] | None:
    """Return the names of all clips, relative to the deepest folder that holds them all; None if one is unknown.

    So a clip has the same name as a video (`videos/7.webm`), as frames (`v1/7/%05d.jpg`) and as flow (`v1-flow/7/...`). Numbers
    lose their leading zeros, as the official code's flow of Something-Something v1 is in `000007`, unless two clips would
    then have the same name.
    """
    names = [clip_name(manifest.row(row)) for row in range(len(manifest))]
    if "" in names:
        return None
    paths = [name.split("/") for name in names]
    folders = [path[:-1] for path in paths]
    # What the first and the last in order share, all share.
    shared = zip(min(folders), max(folders), strict=False)
    above = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], shared))
    plain = ["/".join(path[above:]) for path in paths]
    numbered = ["/".join([*path[above:-1], _without_zeros(path[-1])]) for path in paths]
    return numbered if len(set(numbered)) == len(set(plain)) else plain


def _without_zeros(name: str) -> str:
    return str(int(name)) if name.isascii() and name.isdecimal() else name
