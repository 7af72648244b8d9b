"""`shards.json`: what the shards of a folder are, written when all of them and their manifests are there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.prepare.errors import DataSetError
from runtime.atomic_write import atomic_write

INDEX_NAME = "shards.json"
VERSION = 1


@dataclass(frozen=True)
class ShardFacts:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    manifests: dict[str, str]
    """The digest of each manifest, by its file's name."""
    shards: dict[str, ShardFacts]
    """By their files' names, in order."""


def write_shard_index(folder: Path, index: ShardIndex) -> None:
    with atomic_write(folder / INDEX_NAME) as file:
        file.write((json.dumps({"version": VERSION, **asdict(index)}, indent=1) + "\n").encode())


def read_shard_index(folder: Path) -> ShardIndex | None:
    """None where there is none: the folder holds no shards, or not all of them yet."""
    path = folder / INDEX_NAME
    try:
        said = json.loads(path.read_text())
        if said["version"] != VERSION:
            raise DataSetError(f"{path} is of version {said['version']}, and only {VERSION} is known")
        shards = {name: ShardFacts(**facts) for name, facts in said["shards"].items()}
        return ShardIndex(said["manifests"], shards)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataSetError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataSetError(
            f"{path} is no index of shards ({error}); remove it and run prepare.py shard again"
        ) from None
