"""The command of export.py: make a file, run it against PyTorch, and keep it with its model card."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import run_layout
from runtime.atomic_write import atomic_write
from runtime.environment import repair
from runtime.error_report import report_error
from runtime.exit_codes import EXIT_DONE, EXIT_INTERRUPTED
from runtime.stop_signals import Stopped, raise_in_main_thread
from training.deploy.load import TrainedRun, load_trained
from training.errors import ConfigError, DataError
from training.main import describe_error

from .card import CARD, card_of
from .check import FP32_LIMIT, FRAMES, ExportError, largest_difference
from .formats import Format, find_format, versions_of
from .forms import FORMS, Exportable, Files, exportable
from .int8 import AGREEMENT_PERCENT, LOSS_PERCENT, ClipSet, agreement_of, calls_of, open_clips

PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True)
class Kind:
    """What is exported; its fields are the command's own arguments."""

    format: str = "onnx"
    precision: str = "fp32"
    form: str = "stream"

    @property
    def name(self) -> str:
        """Name of the folder of this export."""
        return f"{self.format}-{self.precision}-{self.form}"


def run_export(arguments: Sequence[str], description: str) -> int:
    """Export the run that the arguments name, and return the exit code: 1 if the file differs from PyTorch."""
    named, kind_arguments, overrides = _parse(arguments, description)
    # So that temporary files are removed.
    raise_in_main_thread()
    try:
        for note in repair():
            print(note, flush=True)
        kind = _kind(kind_arguments)
        # Before the run is loaded, which takes time.
        found = find_format(kind.format)
        if kind.precision == "int8" and found.quantize is None:
            raise ConfigError(
                f"precision=int8 is not offered for format={kind.format}. Fix: format=onnx or format=executorch, or precision=fp32"
            )
        run = load_trained(named, overrides)
        for line in (f"{run.name} step {run.step}", *run.notes):
            print(line, flush=True)
        folder = export(run, kind, found)
    except KeyboardInterrupt as stop:
        report_error("export", f"{stop or 'interrupted'}. Fix: run the same command again")
        return stop.exit_code if isinstance(stop, Stopped) else EXIT_INTERRUPTED
    except ExportError as error:
        report_error("export", str(error))
        return error.exit_code
    except Exception as error:
        message, code = describe_error(error)
        report_error("export", message)
        return code
    print(f"exported: {folder}", flush=True)
    return EXIT_DONE


def export(run: TrainedRun, kind: Kind, found: Format) -> Path:
    """Export a run, and return the folder of the export. Raises ExportError if the file differs from PyTorch: none is left."""
    folder = run.folder / run_layout.EXPORT / kind.name
    network = exportable(run.network, kind.form, run.config.pipeline.size)
    # First, because the data may be gone.
    clips = open_clips(run) if kind.precision == "int8" else None
    try:
        files = found.make(network)
        check = _checked(network, files, found)
        if clips is not None and found.quantize is not None:
            files = found.quantize(files, network, calls_of(network, clips.calibration))
            # A network that was trained for streams never meets caches of zeros, but once.
            carried = kind.form == "stream" and run.config.pipeline.sampling == "stream"
            check |= _agreed(network, files, found, clips.validation, carried)
    except ExportError:
        # An export of an earlier checkpoint would be taken for this one.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    card = card_of(run, network, vars(kind), files, check, versions_of(kind.format))
    _write(folder, files, card)
    return folder


def _checked(network: Exportable, files: Files, found: Format) -> dict[str, Any]:
    """Run the files against PyTorch, and return the result for the card. Raises ExportError if they differ."""
    difference = largest_difference(network, found.open(files, network), found.batch)
    print(
        f"checked against PyTorch: {FRAMES} frames, largest difference {difference:.1e} of the largest logit",
        flush=True,
    )
    # Not `>`: a NaN must fail too.
    if not difference <= FP32_LIMIT:
        raise ExportError(
            f"the exported file differs from PyTorch by {difference:.1e} of the largest logit, and {FP32_LIMIT:.0e} is allowed: "
            "no file is kept. Fix: another format, or the versions of constraints.txt, which are tested"
        )
    return {"frames": FRAMES, "largest_difference": difference, "limit": FP32_LIMIT}


def _agreed(network: Exportable, files: Files, found: Format, validation: ClipSet, carried: bool) -> dict[str, Any]:
    """Compare the answers of int8 files with PyTorch's, and return the result for the card. Raises ExportError if they differ."""
    try:
        agreement = agreement_of(network, found.open(files, network), validation, found.batch, carried)
    except DataError:
        raise
    # Each runtime has errors of its own.
    except Exception as error:
        raise ExportError(f"the int8 file does not run: {error}. Fix: precision=fp32, or another format") from error
    line = (
        f"int8 answers {agreement.agreement_percent:.1f} % of {agreement.clips} validation clips as PyTorch does: top-1 "
        f"{agreement.top1_percent:.1f} %, float32 {agreement.fp32_top1_percent:.1f} %"
    )
    print(line, flush=True)
    if not agreement.good:
        raise ExportError(
            f"{line}. At least {AGREEMENT_PERCENT:g} % must agree, and {LOSS_PERCENT:g} points may be lost: no file is kept. "
            "Fix: precision=fp32, or train longer (int8 changes answers of which the network is not sure)"
        )
    return vars(agreement) | {"caches": "carried from clip to clip" if carried else "zeros before each clip"}


def _write(folder: Path, files: Files, card: dict[str, Any]) -> None:
    """Write the files and then the card, each atomically. A folder without a card is no export."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).unlink(missing_ok=True)
        for name, data in files.items():
            with atomic_write(folder / name) as file:
                file.write(data)
        with atomic_write(folder / CARD) as file:
            file.write(json.dumps(card, indent=1).encode() + b"\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror}. Fix: free the disk, or export where you may write"
        ) from error


def _parse(arguments: Sequence[str], description: str) -> tuple[str, dict[str, str], list[str]]:
    """Return the run as typed, the command's own arguments, and overrides. Exits for --help, and with 2 for a wrong line."""
    parser = argparse.ArgumentParser(
        "export.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder or one of its checkpoint folders")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="format=, precision=, form=, or an override")
    options = parser.parse_args(arguments)
    own, overrides = {}, []
    for setting in options.settings:
        key, _, value = setting.partition("=")
        if key in vars(Kind()):
            own[key] = value
        else:
            overrides.append(setting)
    if not any(override.startswith("distributed.device=") for override in overrides):
        # The file is made and checked on the CPU.
        overrides.append("distributed.device=cpu")
    return options.run, own, overrides


def _kind(own: dict[str, str]) -> Kind:
    kind = Kind(**own)
    for key, known in (("form", FORMS), ("precision", PRECISIONS)):
        if (value := getattr(kind, key)) not in known:
            raise ConfigError(f"{key}={value} is unknown. Fix: {key}={f' or {key}='.join(known)}")
    return kind
