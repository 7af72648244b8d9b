"""`prepare.py kinetics`, `ucf101`, `list` and so on: write the manifests of clips that are on the disk."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.manifest import UNLABELLED
from pipelines.prepare.annotations.base import Annotations, check_annotations
from pipelines.prepare.annotations.class_folders import read_class_folders
from pipelines.prepare.annotations.flow import FLOW_IMAGES, as_flow
from pipelines.prepare.annotations.kinetics import read_kinetics
from pipelines.prepare.annotations.lists import DELIMITER_NAMES, read_lists
from pipelines.prepare.annotations.same_files import check_same_files
from pipelines.prepare.annotations.twentybn import CLASS_ORDERS, read_something_v2, read_twentybn_csv
from pipelines.prepare.annotations.ucf101 import SPLITS, read_hmdb51, read_ucf101
from pipelines.prepare.scan.write_manifests import write_manifests
from pipelines.prepare.split_report import SplitReport

from .arguments import Commands, add_workers
from .summary import print_left_out

Reader = Callable[[argparse.Namespace], Annotations]


def add_datasets(commands: Commands) -> None:
    """Add a sub-command for each kind of data set."""
    _add_kinetics(commands)
    _add_twentybn(commands)
    _add_three_split_sets(commands)
    _add_folder(commands)
    _add_list(commands)


def _add_kinetics(commands: Commands) -> None:
    _add_published(
        commands,
        "kinetics",
        "Kinetics-400, 600 or 700 from DeepMind's CSV files and videos named ID_SSSSSS_EEEEEE",
        lambda args: read_kinetics(args.annotations, args.videos),
        root="data/kinetics400",
        folders=("annotations", "videos"),
        # YouTube removes videos.
        max_missing=0.5,
    )


def _add_twentybn(commands: Commands) -> None:
    something_v1 = _add_published(
        commands,
        "something-v1",
        "Something-Something v1: folders of frames",
        lambda args: read_twentybn_csv("something-something-v1", args.annotations, args.videos, args.class_order),
        root="data/something_v1",
        folders=("annotations", "20bn-something-something-v1"),
    )
    something_v2 = _add_published(
        commands,
        "something-v2",
        "Something-Something v2: webm videos",
        lambda args: read_something_v2(args.annotations, args.videos),
        root="data/something_v2",
        folders=("annotations", "20bn-something-something-v2"),
    )
    jester = _add_published(
        commands,
        "jester",
        "Jester: folders of frames",
        lambda args: read_twentybn_csv("jester-v1", args.annotations, args.videos, args.class_order),
        root="data/jester",
        folders=("annotations", "20bn-jester-v1"),
    )
    for parser in (something_v1, something_v2):
        _add_flow(parser)
    for parser in (something_v1, jester):
        parser.add_argument(
            "--class-order",
            choices=CLASS_ORDERS,
            default="sorted",
            help="sorted: by name, as in the official TSM networks; file: as in the labels file, as in mmaction2",
        )


def _add_three_split_sets(commands: Commands) -> None:
    ucf101 = _add_published(
        commands,
        "ucf101",
        "UCF101, one of its three splits",
        lambda args: read_ucf101(args.annotations, args.videos, args.split),
        root="data/ucf101",
        folders=("ucfTrainTestlist", "UCF-101"),
    )
    hmdb51 = _add_published(
        commands,
        "hmdb51",
        "HMDB51, one of its three splits",
        lambda args: read_hmdb51(args.annotations, args.videos, args.split),
        root="data/hmdb51",
        folders=("testTrainMulti_7030_splits", "hmdb51_org"),
    )
    for parser in (ucf101, hmdb51):
        parser.add_argument("--split", type=int, choices=SPLITS, default=1)


def _add_folder(commands: Commands) -> None:
    parser = _add(
        commands,
        "folder",
        "a folder for each class: ROOT/train/CLASS/CLIP and ROOT/val/CLASS/CLIP, or ROOT/CLASS/CLIP with --val-fraction",
        lambda args: read_class_folders(args.videos, args.val_fraction, args.seed),
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the manifests")
    parser.add_argument("--videos", type=Path, help="folder of the class folders, if not ROOT")
    parser.add_argument(
        "--val-fraction", type=float, help="fraction of the clips to hold out for validation, by a hash of their names"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses which clips are held out")


def _add_list(commands: Commands) -> None:
    parser = _add(
        commands,
        "list",
        "text lists of `path label` or `path num_frames label`; clips are videos or folders of JPEG frames",
        lambda args: read_lists(_lists_of(args), args.classes, args.videos, args.delimiter),
        aliases=["frames"],
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the manifests")
    parser.add_argument("--videos", type=Path, help="folder that the lists' paths are relative to, if not ROOT")
    parser.add_argument("--classes", type=Path, required=True, help="text file of class names, one per line")
    parser.add_argument("--train", type=Path, required=True, help="list of the training clips")
    parser.add_argument("--val", type=Path, required=True, help="list of the validation clips")
    parser.add_argument("--test", type=Path, help="list of test clips, with labels or only paths")
    parser.add_argument("--delimiter", choices=DELIMITER_NAMES, help="between the fields; detected by default")
    _add_flow(parser)


def _add_flow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flow",
        choices=FLOW_IMAGES,
        help="clips are folders of optical flow. xy: images flow_x_00001.jpg and flow_y_00001.jpg, or 000001-x_00001.jpg as for "
        "Something-Something v1; red-green: 000001.jpg with x in red and y in green, as for v2",
    )


def _lists_of(args: argparse.Namespace) -> dict[str, Path]:
    lists = {"train": args.train, "val": args.val, "test": args.test}
    return {split: path for split, path in lists.items() if path is not None}


def _add_published(
    commands: Commands,
    name: str,
    what: str,
    reader: Reader,
    root: str,
    folders: tuple[str, str],
    max_missing: float = 0.0,
) -> argparse.ArgumentParser:
    """Add a data set with usual folders for annotations and clips, `folders`."""
    parser = _add(commands, name, what, reader, max_missing=max_missing)
    parser.add_argument("--root", type=Path, default=Path(root), help=f"folder of the manifests ({root})")
    parser.add_argument("--annotations", type=Path, help=f"folder of the annotations (ROOT/{folders[0]})")
    parser.add_argument("--videos", type=Path, help=f"folder of the clips (ROOT/{folders[1]})")
    parser.set_defaults(folders=folders)
    return parser


def _add(
    commands: Commands,
    name: str,
    what: str,
    reader: Reader,
    max_missing: float = 0.0,
    aliases: list[str] | None = None,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what, aliases=aliases or [])
    add_workers(parser)
    parser.add_argument(
        "--max-bad", type=float, default=0.05, help="fraction of a split's clips that may fail to decode (0.05)"
    )
    parser.add_argument(
        "--max-missing", type=float, default=max_missing, help=f"fraction that may be missing ({max_missing})"
    )
    parser.add_argument(
        "--check-content", action="store_true", help="also find copies of a video among the splits, by their sha256"
    )
    parser.set_defaults(run=run_dataset, reader=reader, folders=("", ""))
    return parser


def run_dataset(args: argparse.Namespace) -> None:
    """Read the annotations, scan the clips, write the manifests, and print a summary."""
    start_s = time.perf_counter()
    annotations_folder, videos_folder = args.folders
    if args.videos is None:
        args.videos = args.root / videos_folder
    if getattr(args, "annotations", None) is None:
        args.annotations = args.root / annotations_folder
    annotations = args.reader(args)
    if getattr(args, "flow", None):
        annotations = as_flow(annotations, args.flow)
    check_annotations(annotations)
    notes = [*annotations.notes, *check_same_files(args.root, annotations, args.check_content)]
    reports = write_manifests(args.root, annotations, args.workers, args.max_bad, args.max_missing)
    print(f"{args.root}: {len(annotations.classes)} classes; {time.perf_counter() - start_s:.1f} s")
    for split, report in reports.items():
        labels = ", without labels" if annotations.splits[split][0].label == UNLABELLED else ""
        print(f"  {args.root / split}.arrow: {_describe(report)}{labels}")
    for note in notes:
        print(f"  {note}")
    for split, report in reports.items():
        if report.miscounted:
            print(
                f"  NOTE: {len(report.miscounted)} {split} clips hold another number of frames than listed; the manifest "
                f"has the number that decodes. The first: {report.miscounted[0]}"
            )
    if any(report.not_tried for report in reports.values()):
        print(
            "  NOTE: torchcodec does not load here, so its frames were compared in no new video. Training decodes these with "
            "PyAV, from the first frame. Fix: install FFmpeg's libraries and torchcodec, and run the same command again"
        )
    print_left_out(args.root, reports)


def _describe(report: SplitReport) -> str:
    parts = [f"{report.written} of {report.listed} clips"]
    parts += [f"{count} {codec}" for codec, count in report.codecs.most_common()]
    if report.unchanged:
        parts.append(f"{report.unchanged} reused from an earlier scan")
    if report.not_fast:
        parts.append(f"{report.not_fast} without fast seek")
    for what, clips in (("BAD", report.bad), ("MISSING", report.missing)):
        if clips:
            parts.append(f"{len(clips)} {what} ({len(clips) / report.listed:.2%})")
    return ", ".join(parts)
