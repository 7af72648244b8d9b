"""The command of stream.py: a past-only network on a camera or a video, with JSON lines and an annotated video."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from torch import Tensor

from pipelines.errors import BadClip
from pipelines.stream.frame_clock import FrameClock
from runtime.environment import repair
from runtime.error_report import report_error
from runtime.exit_codes import EXIT_DATA, EXIT_DONE, EXIT_INTERRUPTED
from runtime.stop_signals import Stopped, raise_in_main_thread
from training.build.numerics import set_numerics
from training.main import describe_error

from .annotated_video import annotate, video_writer
from .exported import load_run_or_export
from .frame_interval import trained_interval
from .live_network import LiveNetwork, Speed
from .live_sources import LiveSource, open_source
from .output_file import why_no_file

_OVERRIDE = re.compile(r"\+{0,2}[a-z_]+(\.[a-z0-9_]+)*=.*")


def run_stream(arguments: Sequence[str], description: str) -> int:
    """Stream the source that the arguments name through the run's network, and return the exit code."""
    options = _parse(arguments, description)
    # So that a camera is released, and an unfinished video removed.
    raise_in_main_thread()
    try:
        for note in repair():
            _say(note)
        run = load_run_or_export(options.run, options.overrides)
        set_numerics(run.config.numerics, run.config.seed)
        network = LiveNetwork(run, options.mean)
        with open_source(options.source) as source:
            by_option = options.fps and (1 / options.fps, "as --fps says")
            interval_s, note = by_option or trained_interval(run.config, source.fps)
            _say(f"{run.name} step {run.step}  {source.name}  on {run.device}", *run.notes)
            _say(f"frames {1000 * interval_s:.3g} ms apart: {note}")
            _stream(source, network, FrameClock(interval_s), run.classes, options)
    except KeyboardInterrupt as stop:
        report_error("stream", f"{stop or 'interrupted'}. Fix: run the same command again")
        return stop.exit_code if isinstance(stop, Stopped) else EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has ended, as `head` does. At exit Python would flush into the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BadClip as error:
        report_error(
            "stream", str(error) if "Fix: " in str(error) else f"{error}. Fix: give a video that FFmpeg decodes"
        )
        return EXIT_DATA
    except Exception as error:
        message, code = describe_error(error)
        report_error("stream", message)
        return code
    return EXIT_DONE


def _stream(
    source: LiveSource, network: LiveNetwork, clock: FrameClock, classes: Sequence[str], options: argparse.Namespace
) -> None:
    """Print a JSON line for each frame that the network takes, and a last one with the speed; write the annotated video."""
    speed, scores, first_s = Speed(), dict[str, float](), None
    with video_writer(options.output, source.fps) if options.output else nullcontext() as write:
        try:
            for number, frame in enumerate(source.frames):
                first_s = frame.time_s if first_s is None else first_s
                if options.seconds is not None and frame.time_s - first_s >= options.seconds:
                    break
                taken, clock = clock.at(frame.time_s)
                if taken:
                    found = network(frame.image_HWC)
                    speed.add(found.latency_s)
                    scores = _best(found.score_K, classes, options.top)
                    _print(
                        frame=number,
                        time_s=round(frame.time_s - first_s, 4),
                        scores=scores,
                        latency_ms=round(1000 * found.latency_s, 2),
                    )
                if write is not None:
                    write(frame.time_s, annotate(frame.image_HWC, scores, _status(speed)))
        except KeyboardInterrupt:
            # The usual end of a camera.
            if not source.is_camera:
                raise
    _print(frames=speed.frames, fps=round(speed.fps, 2), latency_ms=speed.latency_ms())


def _best(score_K: Tensor, classes: Sequence[str], top: int) -> dict[str, float]:
    labels = score_K.argsort(descending=True, stable=True).tolist()
    return {classes[label]: round(float(score_K[label]), 6) for label in islice(labels, top)}


def _status(speed: Speed) -> str:
    latency = "  ".join(f"{name} {value:.1f}" for name, value in speed.latency_ms().items())
    return f"{speed.fps:.1f} frames/s   ms: {latency}"


def _print(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "stream.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, one of its checkpoint folders, or an ONNX export")
    parser.add_argument("source", metavar="SOURCE", help="a video file, or a camera: its number or /dev/videoN")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="an override, such as distributed.device=cpu")
    parser.add_argument("--top", type=_positive_int, default=5, metavar="N", help="give the N best classes (5)")
    parser.add_argument(
        "--mean", type=_positive_int, default=4, metavar="N", help="average the logits of the last N frames (4)"
    )
    parser.add_argument(
        "--fps",
        type=_positive,
        metavar="F",
        help="frames/s for the network; default: by the frame distance of training",
    )
    parser.add_argument("--seconds", type=_positive, metavar="S", help="stop after S seconds of the source")
    parser.add_argument("--output", type=Path, metavar="FILE.mp4", help="write all frames with the predictions on them")
    options = parser.parse_intermixed_args(arguments)
    for override in options.overrides:
        if not _OVERRIDE.fullmatch(override):
            parser.error(f"{override!r} is no KEY=VALUE. Fix: give one RUN and one SOURCE")
    if options.output is not None and options.output.suffix != ".mp4":
        parser.error(f"--output {options.output} has another suffix than .mp4. Fix: --output {options.output.stem}.mp4")
    if options.output is not None and (why := why_no_file(options.output, Path(options.source))):
        parser.error(f"--output {options.output}: {why}")
    return options


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more. Fix: give one")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0. Fix: give one")
    return number
