"""The command of predict.py: predictions for many videos, as a table, JSON lines or CSV."""

import argparse
import csv
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path

from pipelines.loading.worker_loader import start_worker_server
from pipelines.prepare.scan.find_clips import find_clips
from runtime.environment import repair
from runtime.error_report import report_error
from runtime.exit_codes import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_INTERRUPTED
from runtime.stop_signals import Stopped, raise_in_main_thread
from training.build.numerics import set_numerics
from training.main import describe_error
from training.out_of_memory import is_out_of_memory, out_of_memory_message

from .exported import load_run_or_export
from .load import TrainedRun
from .output_file import why_no_file
from .predict import Prediction, Predictor, Refused

# More videos than this are worth the start of worker processes, which import torch.
_FEW_VIDEOS = 16

# Clips on a page of --explain.
_MOST_EXPLAINED = 50

_OVERRIDE = re.compile(r"\+{0,2}[a-z_]+(\.[a-z0-9_]+)*=")

Write = Callable[[Prediction], None]


def run_predict(arguments: Sequence[str], description: str) -> int:
    """Predict the videos that the arguments name, print each as soon as it is known, and return the exit code."""
    options = _parse(arguments, description)
    # So that temporary files are removed.
    raise_in_main_thread()
    run: TrainedRun | None = None
    try:
        for note in repair():
            print(note, file=sys.stderr, flush=True)
        refused, videos = _videos(options.videos)
        processes = len(os.sched_getaffinity(0)) if len(videos) > _FEW_VIDEOS else 0
        if processes:
            # Before CUDA starts.
            start_worker_server()
        run = load_run_or_export(options.run, options.overrides)
        set_numerics(run.config.numerics, run.config.seed)
        predictor, predicted = Predictor(run), []
        for line in (f"{run.name} step {run.step}  {run.protocol.name}  on {run.device}", *run.notes):
            print(line, file=sys.stderr, flush=True)
        write = _FORMATS[options.format](options.top, videos)
        for found in chain(tuple(refused), predictor.predict(videos, processes)):
            if isinstance(found, Refused):
                print(f"refused: {_printable(found.reason)}", file=sys.stderr, flush=True)
                refused.append(found)
            else:
                write(found)
                predicted.append(Path(found.video))
        if options.explain is not None:
            predictor.explain(predicted[:_MOST_EXPLAINED], options.explain)
            print(f"explained: {options.explain}", file=sys.stderr, flush=True)
    except KeyboardInterrupt as stop:
        report_error("predict", f"{stop or 'interrupted'}. Fix: run the same command again")
        return stop.exit_code if isinstance(stop, Stopped) else EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has ended, as `head` does. At exit Python would flush into the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        if run is not None and is_out_of_memory(error):
            message = out_of_memory_message(error, run.config.batch, run.config.evaluation.batch, 1, "evaluation")
            report_error("predict", message)
            return EXIT_CONFIG
        message, code = describe_error(error)
        report_error("predict", message)
        return code
    return EXIT_DATA if refused else EXIT_DONE


def _parse(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """Return `run`, `videos`, `overrides` and the options. What is no file and looks like KEY=VALUE is an override."""
    parser = argparse.ArgumentParser(
        "predict.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, one of its checkpoint folders, or an ONNX export")
    parser.add_argument(
        "videos",
        metavar="VIDEO",
        nargs="+",
        help="a video, a folder of JPEG frames, or a folder with such below it; also an override (evaluation=ten_crop)",
    )
    parser.add_argument("--top", type=_count, default=5, metavar="N", help="print the N best classes (5)")
    parser.add_argument("--format", choices=_FORMATS, default="table", help="table, json (a line per video) or csv")
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="FILE.html",
        help=f"also write a page: frames of the first {_MOST_EXPLAINED} videos, and the logits for other orders of them",
    )
    options = parser.parse_intermixed_args(arguments)
    # os.path, because Path.exists raises an error for what is too long for a name.
    options.overrides = [each for each in options.videos if _OVERRIDE.match(each) and not os.path.exists(each)]  # noqa: PTH110
    options.videos = [Path(each) for each in options.videos if each not in options.overrides]
    if not options.videos:
        parser.error("no VIDEO given")
    if options.explain is not None and (why := why_no_file(options.explain)):
        parser.error(f"--explain {options.explain}: {why}")
    return options


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of classes. Fix: give 1 or more")
    return int(text)


def _videos(named: Sequence[Path]) -> tuple[list[Refused], list[Path]]:
    """Return the videos of all files and folders, each once, and the folders that hold none."""
    refused: list[Refused] = []
    videos: dict[Path, None] = {}
    for path in named:
        clips = find_clips(path)
        if not clips:
            refused.append(Refused(str(path), f"{path}: no video and no folder of JPEG frames in it or below it"))
        videos |= dict.fromkeys(clips)
    return refused, list(videos)


def _printable(text: str) -> str:
    """Escape characters that would break a line, or control the terminal: a file name may have any."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _table(top: int, videos: Sequence[Path]) -> Write:
    width = max((len(_printable(str(video))) for video in videos), default=0)

    def write(found: Prediction) -> None:
        name = _printable(found.video)
        for class_name, score in islice(found.scores.items(), top):
            print(f"{name:{width}}  {score:7.2%}  {class_name}", flush=True)
            name = ""

    return write


def _json(top: int, videos: Sequence[Path]) -> Write:
    def write(found: Prediction) -> None:
        scores = dict(islice(found.scores.items(), top))
        print(json.dumps({"video": found.video, "class": found.class_name, "scores": scores}), flush=True)

    return write


def _csv(top: int, videos: Sequence[Path]) -> Write:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["video", "rank", "class", "score"])

    def write(found: Prediction) -> None:
        for rank, (class_name, score) in enumerate(islice(found.scores.items(), top), start=1):
            writer.writerow([found.video, rank, class_name, score])
        sys.stdout.flush()

    return write


_FORMATS = {"table": _table, "json": _json, "csv": _csv}
