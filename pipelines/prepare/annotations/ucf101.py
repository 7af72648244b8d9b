"""UCF101 (Soomro et al., arXiv:1212.0402) and HMDB51 (Kuehne et al., ICCV 2011), each with three published splits."""

from pathlib import Path

from pipelines.prepare.errors import DataSetError

from .base import Annotations, Clip, first_file, label_of, number_classes, read_fields, read_lines

SPLITS = (1, 2, 3)


def read_ucf101(annotations: Path, videos: Path, split: int) -> Annotations:
    """Read `classInd.txt` (numbers from 1), `trainlist0N.txt` and `testlist0N.txt`; videos are `Class/v_Class_g01_c01.avi`.

    The published test list becomes `val`, as in the official TSM code.
    """
    index_file = annotations / "classInd.txt"
    names = []
    for expected, (where, fields) in enumerate(read_fields(index_file, " "), start=1):
        if len(fields) != 2 or fields[0] != str(expected):
            raise DataSetError(
                f"{where}: {' '.join(fields)!r} is not `{expected} CLASS`. Fix: number the classes from 1 without gaps"
            )
        names.append(fields[1])
    labels = number_classes(index_file, names)
    splits = {}
    for name, file_name in (("train", f"trainlist{split:02d}.txt"), ("val", f"testlist{split:02d}.txt")):
        path = first_file(annotations, [file_name])
        splits[name] = [_ucf101_clip(where, line, labels, index_file, videos) for where, line in read_lines(path)]
    return Annotations(names, splits)


def _ucf101_clip(where: str, line: str, labels: dict[str, int], index_file: Path, videos: Path) -> Clip:
    """Parse `Class/v_Class_g01_c01.avi 1`; the number is optional, and must be that of the class."""
    path, *numbers = line.split()
    folder, _, name = path.rpartition("/")
    label = label_of(labels, folder, where, index_file)
    if numbers and numbers != [str(label + 1)]:
        raise DataSetError(
            f"{where}: {' '.join(numbers)} is not the number of {folder}, {label + 1}, in {index_file}. "
            "Fix: correct one of the two"
        )
    return Clip(videos / folder / name, label, where)


def read_hmdb51(annotations: Path, videos: Path, split: int) -> Annotations:
    """Read `CLASS_test_splitN.txt` with lines `name.avi 1` (1: training, 2: test, which becomes `val`, 0: unused).

    Classes are sorted by name; videos are `CLASS/name.avi`.
    """
    ending = f"_test_split{split}.txt"
    files = {path.name.removesuffix(ending): path for path in sorted(annotations.glob(f"*{ending}"))}
    if not files:
        raise DataSetError(f"{annotations} has no file CLASS{ending}. Fix: give their folder with --annotations")
    labels = number_classes(annotations, sorted(files))
    splits: dict[str, list[Clip]] = {"train": [], "val": []}
    for name, path in files.items():
        for where, line in read_lines(path):
            file_name, _, use = line.rpartition(" ")
            if use not in ("0", "1", "2") or not file_name:
                raise DataSetError(
                    f"{where}: {line!r} is not a file name and 0, 1 or 2. Fix: correct or remove the line"
                )
            if use != "0":
                splits["train" if use == "1" else "val"].append(
                    Clip(videos / name / file_name.strip(), labels[name], where)
                )
    return Annotations(list(labels), splits)
