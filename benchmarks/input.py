"""Measure the cost of a training clip from file to pixels: our loader against others and against its decoding only.

Also measure the gain from prepared data in CPU time and storage, and the cores and bandwidth that a cluster needs for it.

python benchmarks/input.py                                         with the packages of the environment
pip install --target PEERS --no-deps decord opencv-python-headless
python benchmarks/input.py --peers PEERS                           with other libraries
python benchmarks/input.py --chart docs/input.svg --json FILE

One thread, four real clips of 10 s (340x256, H.264), 8 frames of 224x224. All loaders alternate on the same sampled frames and
crops. Ratios are of CPU time, which other programs on the machine affect least.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import torch

from benchmarks import common
from benchmarks.input_data import FORMS, HEIGHT, RAW, Form, decoded, footage, prepared, write_clips
from benchmarks.input_ways import AUGMENTATION, OURS, RAW_WAYS, Way, decode_alone, ours, pillow_frames
from pipelines.jpeg_clips import JPEG_FRAMES
from pipelines.manifest import ManifestRow, write_manifest
from pipelines.stream.augmentation import SampleParams, sample_training_params

GPUS_A_NODE, NODES = 6, 256
# Published run: 8 clips per GPU in a step of 0.437 s (conf/experiment/kinetics_1536.yaml).
CLIPS_PER_S_A_GPU = 8 / 0.437
TARGETS = (
    "targets: none of the others faster than ours on raw clips; ours at most 1.3 times its decoding alone; prepared clips 8 "
    "times as fast as raw ones or more"
)


_COLOURS = {
    RAW.name: "black",
    "h264": "tab:blue",
    "hevc": "tab:purple",
    "vp9": "tab:red",
    "mjpeg": "tab:orange",
    "jpeg": "tab:green",
}


@dataclass(frozen=True)
class Clips:
    """The clips, stored in one form."""

    root: Path
    rows: list[ManifestRow]

    def samples(self, epoch: int) -> list[SampleParams]:
        return [
            sample_training_params(AUGMENTATION, row.num_frames, *row.upright_size, 0, epoch, number)
            for number, row in enumerate(self.rows)
        ]

    @property
    def bytes_a_clip(self) -> float:
        return sum(row.length for row in self.rows) / len(self.rows)


@dataclass(frozen=True)
class Contest:
    """A loader on clips of one form, with its measurements per clip, one per round."""

    name: str
    way: Way
    clips: Clips
    cpu_s: list[float]
    wall_s: list[float]
    read_bytes: list[float]


def make_clips(folder: Path, forms: Iterable[Form]) -> dict[Form, Clips]:
    """Write the raw clips, and the prepared ones from the decoded raw clips."""
    made: dict[Form, Clips] = {}
    scenes = footage()
    for number, form in enumerate(forms):
        root = folder / str(number)
        rows = write_clips(root, form, scenes)
        write_manifest(root / "train.arrow", rows, ["a"])
        made[form] = Clips(root, rows)
        if form == RAW:
            scenes = [decoded(root / row.path) for row in rows]
        print(f"made: {form.name}", file=sys.stderr, flush=True)
    return made


def contests_of(made: dict[Form, Clips]) -> list[Contest]:
    """Return ours and its decoding on every form, the other loaders on raw clips, and Pillow on JPEG files.

    Print and skip the loaders that fail on this machine.
    """
    contests = [Contest(name, way, made[RAW], [], [], []) for name, way in RAW_WAYS.items()]
    for form, clips in made.items():
        if form == RAW:
            continue
        contests.append(Contest(f"{OURS}: {form.name}", ours("torchcodec"), clips, [], [], []))
        contests.append(Contest(f"its decoding alone: {form.name}", decode_alone("torchcodec"), clips, [], [], []))
        if form.encoder is not None and form.encoder.codec == JPEG_FRAMES:
            contests.append(Contest(f"Pillow: {form.name}", pillow_frames, clips, [], [], []))
    return [contest for contest in contests if _works(contest)]


def _works(contest: Contest) -> bool:
    try:
        contest.way(contest.clips.root, contest.clips.rows, contest.clips.samples(0))
    # A missing package, or one that conflicts with another.
    except Exception as error:
        print(f"LEFT OUT: {contest.name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return False
    return True


def take_turns(contests: list[Contest], rounds: int) -> None:
    for number in range(rounds):
        for contest in contests:
            clips = contest.clips
            samples = clips.samples(number)
            read, start = bytes_read(), common.Clock.now()
            contest.way(clips.root, clips.rows, samples)
            took = common.Clock.now().since(start, len(clips.rows))
            contest.cpu_s.append(took.cpu_s)
            contest.wall_s.append(took.wall_s)
            contest.read_bytes.append((bytes_read() - read) / len(clips.rows))


def bytes_read() -> int:
    """Return the bytes that this process has read so far, also those from the page cache."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no rchar")


def rows_of(contests: list[Contest], made: dict[Form, Clips]) -> list[dict[str, Any]]:
    """Return a row per loader: CPU time per clip, ratio to ours on raw clips, storage, bytes read, a cluster's needs."""
    by_name = {contest.name: contest for contest in contests}
    base = by_name[OURS]
    rows = []
    for contest in contests:
        cpu = common.median_interval(contest.cpu_s)
        # Repeated reads come from the page cache.
        read = min(common.median_interval(contest.read_bytes).median, contest.clips.bytes_a_clip)
        row: dict[str, Any] = {
            "name": contest.name,
            "cpu_s": cpu,
            "wall_s": common.median_interval(contest.wall_s),
            "to_ours_on_raw": common.ratio_interval(contest.cpu_s, base.cpu_s),
            "speedup_over_raw": common.ratio_interval(base.cpu_s, contest.cpu_s),
            "stored_bytes_a_clip": contest.clips.bytes_a_clip,
            "storage_to_raw": contest.clips.bytes_a_clip / made[RAW].bytes_a_clip,
            "read_bytes_a_clip": read,
            "cores_a_gpu": cpu.median * CLIPS_PER_S_A_GPU,
            "read_gb_per_s": read * CLIPS_PER_S_A_GPU * GPUS_A_NODE * NODES / 1e9,
        }
        bound = by_name.get(contest.name.replace(OURS, "its decoding alone"))
        if contest.name.startswith(OURS) and bound is not None:
            row["to_its_decoding"] = common.ratio_interval(contest.cpu_s, bound.cpu_s)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    raw = [row for row in rows if ":" not in row["name"]]
    print(f"\nRaw clips ({raw[0]['stored_bytes_a_clip'] / 1e3:.0f} kB each), CPU time of one thread")
    common.print_table(
        ("way", "ms a clip", "clips/s a core", "to ours", "to its decoding"),
        [
            (
                row["name"],
                row["cpu_s"].show(1e3),
                f"{1 / row['cpu_s'].median:.0f}",
                row["to_ours_on_raw"].show(digits=2),
                row["to_its_decoding"].show(digits=2) if "to_its_decoding" in row else "",
            )
            for row in raw
        ],
    )
    print(
        f"\nPrepared clips; cores and bandwidth for {CLIPS_PER_S_A_GPU:.1f} clips/s a GPU, {NODES} nodes of {GPUS_A_NODE}"
    )
    common.print_table(
        (
            "form",
            "kB a clip",
            "to raw",
            "ms a clip",
            "times as fast",
            "to its decoding",
            "kB read",
            "cores a GPU",
            "GB/s of all",
        ),
        [
            (
                row["name"].removeprefix(f"{OURS}: "),
                f"{row['stored_bytes_a_clip'] / 1e3:.0f}",
                f"{row['storage_to_raw']:.1f}",
                row["cpu_s"].show(1e3),
                row["speedup_over_raw"].show(),
                row["to_its_decoding"].show(digits=2) if "to_its_decoding" in row else "",
                f"{row['read_bytes_a_clip'] / 1e3:.0f}",
                f"{row['cores_a_gpu']:.2f}",
                f"{row['read_gb_per_s']:.1f}",
            )
            for row in rows
            if row["name"] == OURS or (":" in row["name"] and not row["name"].startswith("its"))
        ],
    )
    print(TARGETS)


def draw_chart(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot storage against CPU time of each form; `every N` is the key frame interval."""
    import matplotlib

    matplotlib.use("svg")
    # Make the file small and reproducible.
    matplotlib.rcParams |= {"svg.hashsalt": "input", "svg.fonttype": "none"}
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        if row["name"] == OURS or row["name"].startswith(f"{OURS}: "):
            name = row["name"].removeprefix(f"{OURS}: ").replace(OURS, RAW.name)
            x, y = row["stored_bytes_a_clip"] / 1e3, row["cpu_s"].median * 1e3
            axes.plot(x, y, "o", color=_COLOURS[name.split(",")[0]])
            label = name.replace("key frame ", "").removesuffix(f", {HEIGHT} lines")
            axes.annotate(label, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(150, 6000), ylim=(2, 100))
    axes.set(xlabel="kB stored, a clip of 10 s", ylabel="ms of one core, 8 frames of 224x224")
    for axis, ticks in ((axes.xaxis, (200, 500, 1000, 2000, 5000)), (axes.yaxis, (2, 5, 10, 20, 50, 100))):
        axis.set_major_locator(ticker.FixedLocator(ticks))
        axis.set_major_formatter(ticker.ScalarFormatter())
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = common.argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where pip has put the others (see above)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw storage against time")
    options = parser.parse_args()
    if options.peers:
        # Last, so that the environment's own packages take precedence.
        sys.path.append(str(options.peers))
    torch.set_num_threads(1)
    facts = common.machine_facts(threads=1)
    forms = (RAW, prepared("h264", 16), prepared("jpeg")) if options.quick else FORMS
    with tempfile.TemporaryDirectory(prefix="input-") as folder:
        made = make_clips(Path(folder), forms)
        contests = contests_of(made)
        take_turns(contests, 2 if options.quick else options.rounds)
        rows = rows_of(contests, made)
    show(rows)
    if options.chart:
        draw_chart(options.chart, rows)
    if options.json:
        common.write_rows(options.json, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
