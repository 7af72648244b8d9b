"""Check on a corpus of video files that training gets the frames that the ffmpeg program shows.

    python -m tests.soak.frame_corpus --files 300 --seed 0

Prints a line per file with a fault, then counts. The exit code is 1 if a frame of an accepted file is wrong.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers.frame_corpus import Checked, check, write_corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start_s, results = time.process_time(), []
    with tempfile.TemporaryDirectory() as folder:
        for made in write_corpus(Path(folder), arguments.seed, arguments.files):
            results.append(check(made, arguments.seed))
            if results[-1].wrong:
                print(f"WRONG: {made.path.name} ({made.how}): {results[-1].wrong}", flush=True)
    print(f"{time.process_time() - start_s:.0f} s of one core, without ffmpeg's processes")
    return report(results)


def report(results: list[Checked]) -> int:
    """Print the counts; return the exit code."""
    left_out = Counter(result.left_out for result in results if result.left_out)
    accepted = [result for result in results if not result.left_out]
    wrong = sum(bool(result.wrong) for result in accepted)
    print(f"{len(results)} files, {len(accepted)} accepted, {sum(result.decodes for result in results)} decodes")
    print(f"{sum(result.fast for result in accepted)} of the accepted by torchcodec; wrong: {wrong}")
    for reason, count in left_out.most_common():
        print(f"left out: {count} of {reason}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
