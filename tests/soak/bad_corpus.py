"""Scan a corpus of broken files as prepare.py does, then train and evaluate on it with PyAV, torchcodec and DALI.

    python tests/soak/bad_corpus.py --files 1000 --decodes 20000 --json FILE      part of `make faults`

The manifest's rows are from a scan before the damage. For every second file the row's size is then set to that of the
broken file, so that the decoder itself meets the damage. Some files are replaced while workers read them. For each row
of the corpus there are two rows of whole clips, because training replaces clips that do not decode. DALI decodes in the
training process itself.

Checks: no process dies, no batch takes longer than LIMIT_S, every file that must fail is named with a reason, whole
files are never named, replacements follow the rule, an evaluation reports missing clips, and memory, open files and
threads of the workers do not grow.
"""

import argparse
import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from pipelines.loading.clips import ClipBatch, ClipSource, EvaluationClips, TrainingClips
from pipelines.loading.dali_loader import DaliLoader
from pipelines.loading.worker_loader import ClipLoader, start_worker_server
from pipelines.manifest import Manifest, ManifestRow, write_manifest
from pipelines.prepare.annotations.base import Annotations, Clip
from pipelines.prepare.scan.write_manifests import BAD_FILES_NAME, write_manifests
from pipelines.stream.augmentation import Augmentation, replacement_row
from pipelines.stream.eval_views import EvalProtocol
from pipelines.stream.order import StreamOrder, evaluation_rows
from tests.helpers.broken_files import (
    DAMAGE,
    FORMS,
    Corpus,
    Form,
    damage,
    put_copy,
    put_folder,
    put_other_of_same_size,
    put_picture,
    put_pipe,
    remove,
)
from training.build.data import Loader

# Per batch of 4 clips on a busy machine, including the start of workers.
LIMIT_S = 60.0
BATCH, WORKERS, SEED = 4, 2, 7
# Per row of the corpus.
WHOLE_ROWS = 2
# Limit on a worker's memory growth from the second third of a run to its last third: for 20,000 decodes, 8 KiB per
# decode of a worker.
# Below this number of decodes per decoder, workers are still warming up.
RSS_MIB, RSS_FROM = 12.0, 5000
# Limit on the growth of a scanning process's peak memory by the damage, which includes images of 96 MB.
RSS_GROWTH_MIB = 200.0
# Limits for workers and for DALI: data that workers read ahead is in shared memory, one file each.
FILES_GROWTH, THREADS_GROWTH = (2, 40), 0
DALI = "dali"

WHOLE, BROKEN, EITHER = "whole", "broken", "either"


@dataclass(frozen=True)
class Kind:
    """A way to damage a clip, and the expected results."""

    scan: str
    """Expected result: WHOLE, BROKEN, or EITHER if it depends on the place of the damage."""
    decode: str
    """Expected result if the row has the size from before the damage."""
    same_size: str | None = None
    """Expected result if the row has the current size; None: the same as `decode`."""
    running: bool = False
    """The file is swapped while workers read it."""


KINDS = {
    "cut short": Kind(EITHER, BROKEN, EITHER),
    "zeroed end": Kind(EITHER, EITHER),
    "flipped bits": Kind(EITHER, EITHER),
    "overwritten": Kind(EITHER, EITHER),
    "zero length": Kind(BROKEN, BROKEN),
    "audio only": Kind(BROKEN, BROKEN, BROKEN),
    "huge": Kind(BROKEN, BROKEN, BROKEN),
    "missing": Kind(BROKEN, BROKEN),
    "a folder": Kind(BROKEN, BROKEN, BROKEN),
    "a pipe": Kind(BROKEN, BROKEN),
    "wrong ending": Kind(WHOLE, WHOLE),
    "one frame": Kind(WHOLE, WHOLE),
    "variable rate": Kind(WHOLE, WHOLE),
    "rotated": Kind(WHOLE, WHOLE),
    "odd size": Kind(WHOLE, WHOLE),
    "10 bits": Kind(WHOLE, WHOLE),
    "swapped, same size": Kind(WHOLE, EITHER, running=True),
    "swapped, shorter": Kind(WHOLE, BROKEN, running=True),
    "swapped, a folder": Kind(WHOLE, BROKEN, running=True),
}


@dataclass(frozen=True)
class BrokenFile:
    path: Path
    form: Form
    kind: str
    scene: int
    follow: bool
    """Set the row's size to that of the current file."""

    @property
    def scan_says(self) -> str:
        if self.kind == "wrong ending" and self.form.codec is None:
            # A PNG is no JPEG, but a video's type is detected from its content.
            return BROKEN
        return KINDS[self.kind].scan

    @property
    def decode_says(self) -> str:
        kind = KINDS[self.kind]
        if self.form.codec is None:
            if self.kind in DAMAGE:
                # The sampled frames may be undamaged.
                return EITHER
            return BROKEN if self.kind == "wrong ending" else kind.decode
        return kind.same_size if self.follow and kind.same_size else kind.decode


def possible(form: Form, kind: str) -> bool:
    return {
        "rotated": form.ending == ".mp4",
        "10 bits": form.deep is not None,
        "odd size": form.odd is not None,
        "variable rate": form.ending in (".mp4", ".mkv", ".webm"),
    }.get(kind, True)


# ---------------------------------------------------------------------------------------------------------------- the files


def make_files(folder: Path, corpus: Corpus, count: int, dice: random.Random) -> list[BrokenFile]:
    """Make whole clips; each form is combined with each possible kind in turn."""
    pairs = [(form, kind) for kind in KINDS for form in FORMS if possible(form, kind)]
    files = []
    for number in range(count):
        form, kind = pairs[number % len(pairs)]
        ending = form.ending
        if kind == "wrong ending" and form.codec is not None:
            ending = dice.choice([".mp4", ".mkv", ".webm", ".avi", ".txt"])
        path = folder / f"{number:04d} {kind} {form.name}{ending}".replace(" ", "-").replace(",", "")
        file = BrokenFile(path, form, kind, dice.randrange(3), follow=dice.random() < 0.5)
        put_whole(corpus, file)
        files.append(file)
    return files


def put_whole(corpus: Corpus, file: BrokenFile) -> None:
    """Write the clip as it is before any damage; unusual valid clips are unusual from the start."""
    kind = file.kind if file.kind in ("one frame", "variable rate", "rotated", "odd size", "10 bits") else "plain"
    if kind != "plain" and file.form.codec is None and kind != "one frame" and kind != "odd size":
        kind = "plain"
    put_copy(file.path, corpus.model(file.form, kind, file.scene))


def harm(corpus: Corpus, file: BrokenFile, dice: random.Random) -> None:
    """Damage the clip before the run; leave unusual valid clips and those that are swapped later."""
    path = file.path
    if file.kind in DAMAGE:
        damage(path, file.kind, dice)
    elif file.kind == "missing":
        remove(path)
    elif file.kind == "a folder":
        put_folder(path)
    elif file.kind == "a pipe":
        put_pipe(path)
    elif file.kind == "wrong ending" and file.form.codec is None:
        put_picture(path)
    elif file.kind in ("audio only", "huge"):
        model = corpus.model(file.form, file.kind)
        if path.is_dir() != model.is_dir():
            remove(path)
        put_copy(path, model)


def swap(corpus: Corpus, file: BrokenFile) -> None:
    """Replace a clip while workers read it."""
    if file.kind == "swapped, same size":
        put_other_of_same_size(file.path, corpus.model(file.form, "plain", (file.scene + 1) % 3))
    elif file.kind == "swapped, shorter":
        put_copy(file.path, corpus.model(file.form, "one frame"))
    elif file.kind == "swapped, a folder":
        put_folder(file.path)


# --- Monitoring -------------------------------------------------------------------------------------------------------


Sample = tuple[int, dict[int, tuple[float, int, int]]]
"""(decodes so far, and for each worker: MiB of memory, open files, threads)."""


@dataclass
class Watch:
    """Memory, open files and threads over the decodes of a run: of the workers, or with DALI of this process."""

    decoder: str
    samples: list[Sample] = field(default_factory=list)

    def sample(self, decodes: int) -> None:
        workers = {}
        watched = [os.getpid()] if self.decoder == DALI else [child.pid for child in multiprocessing.active_children()]
        for pid in watched:
            assert pid is not None
            open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            threads = int(status_of(pid)["Threads"])
            workers[pid] = (status_mib(pid, "VmRSS"), open_files, threads)
        self.samples.append((decodes, workers))

    def growth(self) -> dict[str, float]:
        """Return the growth of the worker that grew most, from the run's second third to its last.

        A worker's memory varies with the clips in hand, but a leak raises its minimum.
        """
        third = len(self.samples) // 3
        before, behind = self.samples[third : 2 * third], self.samples[2 * third :]
        grown = [
            [least(behind, pid, what) - least(before, pid, what) for what in range(3)] for pid in self.samples[-1][1]
        ]
        between = behind[len(behind) // 2][0] - before[len(before) // 2][0]
        rss_mib = max(row[0] for row in grown)
        return {
            "rss_growth_mib": round(rss_mib, 1),
            "rss_mib_per_1000": round(1000 * rss_mib / between, 3),
            "open_files": max(row[1] for row in grown),
            "threads": max(row[2] for row in grown),
            "rss_mib": round(max(worker[0] for _, workers in self.samples for worker in workers.values()), 1),
        }


def least(samples: list[Sample], pid: int, what: int) -> float:
    return min(workers[pid][what] for _, workers in samples)


@contextmanager
def time_limit(what: str) -> Iterator[Callable[[], None]]:
    """Yield a function that restarts the timer; raise TimeoutError after LIMIT_S without a call."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"{what}: nothing for {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        yield lambda: (signal.setitimer(signal.ITIMER_REAL, LIMIT_S), None)[1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# ------------------------------------------------------------------------------------------------------------------- the run


@dataclass
class Outcome:
    """The observations of a run; `wrong` is empty if all checks passed."""

    files: int
    of_kind: Counter[str] = field(default_factory=Counter)
    decodes: int = 0
    named_by_scan: Counter[str] = field(default_factory=Counter)
    """Number of files by kind."""
    missing: dict[str, Counter[str]] = field(default_factory=dict)
    """Missing clips in the evaluation, by decoder and kind."""
    replaced: dict[str, Counter[str]] = field(default_factory=dict)
    """Number of replacements in training, by decoder and kind."""
    growth: dict[str, dict[str, float]] = field(default_factory=dict)
    scan_peak_mib: tuple[float, float] = (0.0, 0.0)
    """Peak memory of a scanning process before and after the damage."""
    wrong: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)


def scan(root: Path, files: list[BrokenFile]) -> tuple[Manifest, dict[str, str], float]:
    """Scan as prepare.py does; return the manifest, the reason for each excluded file, and the peak memory in MiB."""
    clips = [Clip(file.path, number % 5, f"line {number}") for number, file in enumerate(files)]
    peak = PeakOfChildren()
    peak.start()
    with time_limit("the scan"):
        write_manifests(root, Annotations(list("abcde"), {"train": clips}), WORKERS, max_bad=0.99, max_missing=0.99)
    with (root / BAD_FILES_NAME).open(newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    return Manifest.open(root / "train.arrow"), reasons, peak.stop()


class PeakOfChildren(threading.Thread):
    """The peak memory of any child process, sampled ten times per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib, self._done = 0.0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.1):
            for child in multiprocessing.active_children():
                # The process has just ended.
                with suppress(OSError, KeyError):
                    self.mib = max(self.mib, status_mib(child.pid, "VmHWM"))

    def stop(self) -> float:
        self._done.set()
        self.join()
        return round(self.mib, 1)


def status_of(pid: int | None) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def status_mib(pid: int | None, name: str) -> float:
    return int(status_of(pid)[name].split()[0]) / 1024


def run(root: Path, num_files: int, decodes: int, seed: int, decoders: tuple[str, ...]) -> Outcome:
    """Run all checks; `decodes` counts training clips and evaluation views over all decoders."""
    dice, outcome = random.Random(seed), Outcome(num_files)
    scratch, folder = root / "models", root / "clips"
    scratch.mkdir()
    folder.mkdir()
    corpus = Corpus(scratch)
    files = make_files(folder, corpus, num_files, dice)
    outcome.of_kind.update(file.kind for file in files)
    whole, reasons, before_mib = scan(root, files)
    outcome.check(not reasons, f"named before any damage: {reasons}")
    for file in files:
        harm(corpus, file, dice)
    _, reasons, after_mib = scan(root, files)
    outcome.scan_peak_mib = (before_mib, after_mib)
    check_scan(outcome, root, files, reasons)

    rows = [row_now(root, file, whole.row(number)) for number, file in enumerate(files)]
    good = [number for number, file in enumerate(files) if file.decode_says == WHOLE]
    beside = [whole.row(dice.choice(good)) for _ in range(WHOLE_ROWS * num_files)]
    write_manifest(root / "damaged.arrow", [*rows, *beside], whole.classes)
    for decoder in decoders:
        for file in files:
            if KINDS[file.kind].running:
                if file.path.exists():
                    remove(file.path)
                put_whole(corpus, file)
        outcome.missing[decoder], outcome.replaced[decoder] = Counter(), Counter()
        source = ClipSource(root / "damaged.arrow", "pyav" if decoder == DALI else decoder)
        watch = Watch(decoder)
        with time_limit(decoder) as alive:
            train(outcome, source, files, corpus, decodes // len(decoders) - num_files, watch, alive)
            evaluate(outcome, decoder, source, files, alive)
        outcome.growth[decoder] = watch.growth()
        check_growth(outcome, decoder, decodes // len(decoders))
    return outcome


def row_now(root: Path, file: BrokenFile, row: ManifestRow) -> ManifestRow:
    path = root / row.path
    follows = file.follow and KINDS[file.kind].same_size is not None and file.form.codec is not None
    return replace(row, length=path.stat().st_size) if follows else row


def check_scan(outcome: Outcome, root: Path, files: list[BrokenFile], reasons: dict[str, str]) -> None:
    for file in files:
        reason = reasons.get(str(file.path.relative_to(root)))
        if reason is None:
            outcome.check(file.scan_says != BROKEN, f"the scan takes {file.path.name} for whole")
            continue
        outcome.named_by_scan[file.kind] += 1
        outcome.check(file.scan_says != WHOLE, f"the scan refuses {file.path.name}: {reason}")
        outcome.check(file.path.name in reason, f"the scan's reason does not name {file.path.name}: {reason}")
        outcome.check("died" not in reason, f"a scanning process died: {reason}")
    growth_mib = outcome.scan_peak_mib[1] - outcome.scan_peak_mib[0]
    outcome.check(growth_mib < RSS_GROWTH_MIB, f"a scanning process grew by {growth_mib:.0f} MiB")


def make_loader(decoder: str, clips: TrainingClips | EvaluationClips) -> Loader:
    if decoder == DALI:
        return DaliLoader(clips, WORKERS, 2, torch.device("cpu"), 1)
    return ClipLoader(clips, WORKERS, 2)


def train(
    outcome: Outcome,
    source: ClipSource,
    files: list[BrokenFile],
    corpus: Corpus,
    decodes: int,
    watch: Watch,
    alive: Callable[[], None],
) -> None:
    """Train on one stream of clips with one set of workers, and swap files after a third of it."""
    decoder = watch.decoder
    num_rows = len(source.manifest)
    batch_indices = [np.arange(first, first + BATCH) for first in range(0, decodes, BATCH)]
    clips = TrainingClips(source, Augmentation(num_frames=4, size=64), SEED)
    order = StreamOrder(num_rows, SEED)
    seen: set[int] = set()
    for number, batch in enumerate(make_loader(decoder, clips).batches(batch_indices)):
        alive()
        if number == len(batch_indices) // 3:
            for file in files:
                swap(corpus, file)
        epoch_N, row_N = order.at(batch_indices[number])
        check_rule(outcome, batch, epoch_N.tolist(), row_N.tolist(), num_rows)
        for record in batch.bad_clips:
            broken = files[record.row] if record.row < len(files) else None
            check_record(outcome, decoder, broken, record.row, record.reason)
            if broken is not None:
                outcome.replaced[decoder][broken.kind] += 1
        seen.update(batch.row_N.tolist())
        if number % 20 == 0 or number == len(batch_indices) - 1:
            watch.sample(number * BATCH)
    outcome.decodes += decodes
    if decodes > 2 * num_rows:
        for row, file in enumerate(files):
            wanted = file.decode_says == BROKEN and not KINDS[file.kind].running
            outcome.check(not (wanted and row in seen), f"{decoder} trained on {file.path.name}")


def check_record(outcome: Outcome, decoder: str, file: BrokenFile | None, row: int, reason: str) -> None:
    if file is None:
        outcome.wrong.append(f"{decoder}: row {row}, a whole clip, failed: {reason}")
        return
    outcome.check(file.decode_says != WHOLE, f"{decoder} refuses {file.path.name}: {reason}")
    named = file.path.name in reason and len(reason) > len(file.path.name) + 5
    outcome.check(named, f"{decoder}: the reason does not name {file.path.name}: {reason}")


def check_rule(outcome: Outcome, batch: ClipBatch, epochs: list[int], rows: list[int], num_rows: int) -> None:
    """Check that every clip is its own row or its replacement by the rule, after each failed candidate."""
    records = iter(batch.bad_clips)
    for epoch, row, got in zip(epochs, rows, batch.row_N.tolist(), strict=True):
        candidate, attempt = row, 0
        while candidate != got:
            record = next(records, None)
            substitute = replacement_row(num_rows, SEED, epoch, row, attempt)
            found = None if record is None else (record.row, record.epoch, record.replaced_by)
            if found != (candidate, epoch, substitute):
                outcome.wrong.append(f"row {row} of epoch {epoch} became {got}, by {record}")
                return
            candidate, attempt = substitute, attempt + 1
    outcome.check(next(records, None) is None, "a record of a clip that was not replaced")


def evaluate(
    outcome: Outcome, decoder: str, source: ClipSource, files: list[BrokenFile], alive: Callable[[], None]
) -> None:
    clips = EvaluationClips(source, EvalProtocol(num_frames=4, size=64))
    for batch in make_loader(decoder, clips).batches(evaluation_rows(len(files), BATCH, 0, 1)):
        alive()
        failed = {record.row: record.reason for record in batch.bad_clips}
        for slot, (row, real) in enumerate(zip(batch.row_N.tolist(), batch.real_N.tolist(), strict=True)):
            padding = not real and row not in failed
            if padding and (row != 0 or slot == 0):
                outcome.wrong.append(f"row {row} is missing, and no reason is given")
            if real:
                says = files[row].decode_says
                outcome.check(says != BROKEN, f"{decoder} evaluated {files[row].path.name}")
            elif row in failed:
                outcome.check(not batch.video_NTCHW[slot].any(), f"row {row} is missing, and has pixels")
                check_record(outcome, decoder, files[row], row, failed[row])
                outcome.missing[decoder][files[row].kind] += 1
    outcome.decodes += len(files)


def check_growth(outcome: Outcome, decoder: str, decodes: int) -> None:
    growth = outcome.growth[decoder]
    outcome.check(growth["open_files"] <= FILES_GROWTH[decoder == DALI], f"{decoder}: open files grew: {growth}")
    outcome.check(growth["threads"] <= THREADS_GROWTH, f"{decoder}: threads grew: {growth}")
    if decodes >= RSS_FROM:
        outcome.check(growth["rss_growth_mib"] <= RSS_MIB, f"{decoder}: memory grew: {growth}")


def show(outcome: Outcome) -> None:
    decoders = list(outcome.missing)
    print(f"{'kind':20s} files  scan  " + "  ".join(f"missing, replaced ({decoder})" for decoder in decoders))
    for kind in KINDS:
        cells = [f"{outcome.missing[decoder][kind]:7d} {outcome.replaced[decoder][kind]:9d}" for decoder in decoders]
        print(f"{kind:20s} {outcome.of_kind[kind]:5d} {outcome.named_by_scan[kind]:5d}  " + "  ".join(cells))
    print(f"a scanning process at its peak: {outcome.scan_peak_mib} MiB, before and after the damage")
    for decoder, growth in outcome.growth.items():
        print(f"{decoder}: {growth}")
    print(f"{outcome.decodes} decodes of {outcome.files} files; WRONG: {len(outcome.wrong)}")
    for line in outcome.wrong[:50]:
        print(f"  {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--decodes", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen to FILE")
    options = parser.parse_args()
    start_worker_server()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bad-corpus-") as name:
        outcome = run(Path(name), options.files, options.decodes, options.seed, ("pyav", "torchcodec", DALI))
    show(outcome)
    print(f"{time.monotonic() - started_s:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(vars(outcome), indent=1) + "\n")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
