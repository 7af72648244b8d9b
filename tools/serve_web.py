"""Serve the browser demo (web/) and an exported stream on this machine's loopback address: `python -m tools.serve_web EXPORT`.

Sends the headers with which browsers give a page threads. Any web server can serve the same files (docs/edge.md).
"""

import argparse
import json
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from runtime.checkout import CHECKOUT

WEB = CHECKOUT / "web"
# The page looks for its model here, unless ?model=FOLDER says otherwise.
_MODEL = "/model/"


class Handler(SimpleHTTPRequestHandler):
    """Maps /model/ to the export, all else to web/."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}  # noqa: RUF012

    def __init__(self, *arguments: object, export: Path, threads: bool, **options: object) -> None:
        self._export, self._threads = export, threads
        super().__init__(*arguments, **options)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        self.directory = str(WEB)
        if path.startswith(_MODEL):
            self.directory = str(self._export)
            path = path.removeprefix(_MODEL.rstrip("/"))
        return super().translate_path(path)

    def end_headers(self) -> None:
        if self._threads:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        # A new export must not meet an old one's card.
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: the page tells what is missing."""


def make_server(export: Path, port: int = 0, threads: bool = True) -> ThreadingHTTPServer:
    """Return a server on the loopback address. Port 0: any free one. `threads`: send the headers for them."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, export=export, threads=threads))


def main() -> int:
    parser = argparse.ArgumentParser("serve_web", description=__doc__)
    parser.add_argument("export", type=Path, metavar="EXPORT", help="a folder written by export.py, form=stream")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-threads", action="store_true", help="send no headers, as plain static hosts")
    options = parser.parse_args()
    if problem := _problem(options.export):
        print(f"serve_web: {problem}", file=sys.stderr)
        return 2
    with make_server(options.export, options.port, not options.no_threads) as server:
        print(f"http://localhost:{server.server_port}/  (end with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def missing_packages() -> str:
    """Tell what the page lacks, and the fix; empty if it has all packages."""
    has = (WEB / "node_modules/onnxruntime-web").is_dir()
    return "" if has else "web/node_modules has no onnxruntime-web. Fix: make web"


def _problem(export: Path) -> str:
    if missing := missing_packages():
        return missing
    if not (export / "model.json").is_file():
        return f"{export} has no model.json. Fix: python export.py RUN, and the folder that it prints"
    card = json.loads((export / "model.json").read_text())
    if (card["format"], card["form"]) != ("onnx", "stream"):
        return f"{export} is {card['format']}, {card['form']}. Fix: python export.py RUN format=onnx form=stream"
    return ""


if __name__ == "__main__":
    sys.exit(main())
