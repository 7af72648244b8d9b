"""docs/security.md says where a job listens, as the tests of real jobs saw it with `ss`."""

import re

from runtime.checkout import CHECKOUT
from tests.helpers.processes import LISTENING


def test_the_page_names_the_addresses_that_jobs_listen_on() -> None:
    text = (CHECKOUT / "docs/security.md").read_text()
    cell = r"((?:none|any|loopback)(?:, (?:any|loopback))*)"
    rows = re.findall(rf"^\| (\w+) \| {cell} \| {cell} \| {cell} \|$", text, re.M)
    named = {
        launcher: {
            (process, address)
            for process, addresses in zip(("launcher", "rank", "monitor"), cells, strict=True)
            for address in addresses.split(", ")
            if address != "none"
        }
        for launcher, *cells in rows
    }
    assert named == LISTENING
