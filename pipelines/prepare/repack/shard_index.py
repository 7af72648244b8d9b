"""`shards.json`: the size and digest of each shard in a folder, written last, when shards and manifests are complete."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.prepare.errors import DataSetError
from runtime.atomic_write import write_text

INDEX_NAME = "shards.json"
VERSION = 1


@dataclass(frozen=True)
class ShardFacts:
    """Size and digest of a shard."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The shards and manifests of a complete data set."""

    manifests: dict[str, str]
    """Digest of each manifest, by file name."""
    shards: dict[str, ShardFacts]
    """By file name, in order."""


def write_shard_index(folder: Path, index: ShardIndex) -> None:
    """Write `shards.json`."""
    write_text(folder / INDEX_NAME, json.dumps({"version": VERSION, **asdict(index)}, indent=1) + "\n")


def read_shard_index(folder: Path) -> ShardIndex | None:
    """Read `shards.json`. Returns None if there is none: no shards, or not all of them yet."""
    path = folder / INDEX_NAME
    try:
        fields = json.loads(path.read_text())
        if fields["version"] != VERSION:
            raise DataSetError(
                f"{path} has version {fields['version']}, but this code reads version {VERSION}. "
                "Fix: use the checkout that wrote it"
            )
        shards = {name: ShardFacts(**facts) for name, facts in fields["shards"].items()}
        return ShardIndex(fields["manifests"], shards)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataSetError(f"{path}: {error.strerror}. Fix: make it readable") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataSetError(
            f"{path} is no index of shards ({error}). Fix: remove it and run prepare.py shard again"
        ) from None
