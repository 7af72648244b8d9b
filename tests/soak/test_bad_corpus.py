"""Scan, train on and evaluate 150 broken files with every decoder; `make faults` takes 1,000 (tests/soak/bad_corpus.py)."""

from pathlib import Path

import pytest

from pipelines.decoding.decode import choose_decoder
from pipelines.loading.dali_graph import DaliError, import_dali
from pipelines.loading.worker_loader import start_worker_server

from .bad_corpus import DALI, KINDS, run

pytestmark = pytest.mark.slow


def test_no_broken_file_ends_stops_or_swells_what_reads_it(tmp_path: Path) -> None:
    try:
        import_dali()
    except DaliError as error:
        pytest.skip(str(error))
    decoders = tuple(dict.fromkeys(("pyav", choose_decoder("auto"), DALI)))
    start_worker_server()
    outcome = run(tmp_path, num_files=150, decodes=700 * len(decoders), seed=1, decoders=decoders)
    assert outcome.wrong == []
    assert all(outcome.of_kind[kind] for kind in KINDS)
    for decoder in decoders:
        assert sum(outcome.missing[decoder].values()) > 50 and sum(outcome.replaced[decoder].values()) > 50, outcome
