"""Find faults in a manifest's columns and values, vectorized."""

import pyarrow as pa
import pyarrow.compute as pc

from .jpeg_clips import COMPONENT, JPEG_FLOW


def column_fault(schema: pa.Schema, types: dict[str, pa.DataType], required: int) -> str | None:
    """Describe what is wrong with the columns; None if they are the first ones of `types`, and at least `required` of them."""
    found = {field.name: field.type for field in schema}
    names = list(types)[: max(len(found), required)]
    expected = {name: types[name] for name in names}
    if found == expected and schema.names == names:
        return None
    wrong = [
        f"{name} is {found.get(name, 'missing')}, not {kind}"
        for name, kind in expected.items()
        if found.get(name) != kind
    ]
    wrong += [f"{name} is unknown" for name in found if name not in types]
    return f"wrong columns: {'; '.join(wrong) or f'the order must be {names}'}"


def value_fault(table: pa.Table, num_classes: int, nullable: str, unlabelled: int) -> str | None:
    """Describe the first value that is wrong, with its row; None if all are right. All labels are `unlabelled`, or none."""
    if table.num_rows == 0:
        return "has no rows: no clip was found for it"
    for name in table.schema.names:
        if table.column(name).null_count and name != nullable:
            return f"row {pc.index(pc.is_null(table.column(name)), True).as_py()} has no {name}"
    has_labels = pc.max(table.column("label")).as_py() != unlabelled
    allowed = {
        "label": (
            0 if has_labels else unlabelled,
            num_classes - 1,
            f"outside of 0 to {num_classes - 1} (there are {num_classes} classes)",
        ),
        "num_frames": (1, None, "below 1"),
        "offset": (0, None, "below 0"),
        "length": (1, None, "below 1"),
    }
    for name, (least, most, why) in allowed.items():
        column = table.column(name)
        range_ = pc.min_max(column).as_py()
        if range_["min"] < least or (most is not None and range_["max"] > most):
            bad = pc.less(column, least) if most is None else pc.or_(pc.less(column, least), pc.greater(column, most))
            row = pc.index(bad, True).as_py()
            return f"row {row} ({table.column('path')[row].as_py()}): {name} is {column[row].as_py()}, {why}"
    return None


def flow_fault(table: pa.Table, shard_suffix: str) -> str | None:
    """Find optical flow in files whose path does not say where x and y stand. Takes memory: not for each process of a node."""
    path = table.column("path")
    is_flow = pc.equal(table.column("codec"), JPEG_FLOW)
    named = pc.or_(pc.ends_with(path, shard_suffix), pc.match_substring(path, COMPONENT))
    row = pc.index(pc.and_not(is_flow, named), True).as_py()
    if row < 0:
        return None
    return f"row {row} ({path[row].as_py()}): a clip of {JPEG_FLOW} needs {COMPONENT} in its file names, for x and y"
