"""Check before a job starts that wandb has a login, and whether its server answers. Does not import wandb."""

import netrc
import os
import socket
import threading
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from training.config.schema import LoggerConfig
from training.errors import ConfigError

_CONNECT_TIMEOUT_S = 3.0

_PORTS = {"http": 80, "https": 443}


def check_wandb_login(logger: LoggerConfig) -> str | None:
    """Raise ConfigError if wandb is to log online and has no login. Returns a warning if its server cannot be reached."""
    if logger.wandb != "online":
        return None
    if find_spec("wandb") is None:
        raise ConfigError("logger.wandb=online, but wandb is not installed. Fix: make setup, or logger=disabled")
    url = _base_url()
    host = urlsplit(url).netloc
    if not _has_login(host):
        raise ConfigError(
            f"logger.wandb=online, but there is no login for {host}: neither WANDB_API_KEY nor an entry in {_netrc_path()}. "
            "Fix: wandb login, or WANDB_API_KEY=..., or logger=offline (and wandb sync later)"
        )
    failed = _connect(url)
    if failed is None:
        return None
    return (
        f"wandb: cannot reach {host} from here ({failed}). If the node of rank 0 cannot either, the run logs offline; "
        "logger=offline does so from the start"
    )


def _settings_files() -> list[Path]:
    folder = os.environ.get("WANDB_CONFIG_DIR") or _home() / ".config/wandb"
    return [Path(folder, "settings"), Path(os.environ.get("WANDB_DIR", "."), "wandb", "settings")]


def _setting(key: str) -> str | None:
    """Return a value of wandb's settings files: the second overrides the first."""
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(_settings_files())
        return parser.get("default", key, fallback=None)
    except (ConfigParserError, OSError, UnicodeDecodeError):
        return None


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or _setting("base_url") or "https://api.wandb.ai"


def _has_login(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _setting("api_key"):
        return True
    try:
        return netrc.netrc(_netrc_path()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _netrc_path() -> Path:
    if "NETRC" in os.environ:
        return Path(os.environ["NETRC"].replace("~", str(_home()), 1))
    standard, other = _home() / ".netrc", _home() / "_netrc"
    return other if os.access(other, os.R_OK) and not os.access(standard, os.R_OK) else standard


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        # There is neither HOME nor an entry in passwd.
        return Path("/")


def _connect(url: str) -> str | None:
    """Return why the server, or the proxy for it, accepts no connection within a few seconds; None if it does."""
    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
    if proxy is not None:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 443)
    result: list[str | None] = [f"no answer within {_CONNECT_TIMEOUT_S:.0f} s"]

    def connect() -> None:
        try:
            socket.create_connection(address, _CONNECT_TIMEOUT_S).close()
            result[0] = None
        except OSError as error:
            result[0] = error.strerror or str(error)

    # Looking up a name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_TIMEOUT_S)
    return result[0]
