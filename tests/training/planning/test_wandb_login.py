"""plan.py with logger.wandb=online: a login that is missing is a problem, a server that cannot be reached a warning."""

import os
import socket
from pathlib import Path

import pytest

from tests.training.config.test_config import config_of
from training.config.schema import LoggerConfig
from training.errors import ConfigError
from training.planning.output import as_dict, as_text
from training.planning.plan import make_plan
from training.planning.wandb_login import check_wandb_login

ONLINE = LoggerConfig(wandb="online")


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account without a login, and a server whose port refuses connections."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR", "NETRC", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")


def host() -> str:
    return os.environ["WANDB_BASE_URL"].removeprefix("http://")


def test_a_missing_login_is_a_problem_before_the_job_starts(tmp_path: Path) -> None:
    plan = make_plan(config_of("experiment=smoke", "logger=online", f"data.root={tmp_path}", "data.train_clips=100"))
    assert plan.exit_code == 2
    (problem,) = [str(problem) for problem in plan.problems if "logger.wandb" in str(problem)]
    assert problem.startswith(f"logger.wandb=online, but there is no login for {host()}: neither WANDB_API_KEY nor")
    assert "Fix: wandb login" in problem and "logger=offline" in problem


@pytest.mark.parametrize("wandb", ["offline", "disabled"])
def test_without_online_logging_no_login_is_needed(wandb: str) -> None:
    assert check_wandb_login(LoggerConfig(wandb=wandb)) is None


@pytest.mark.parametrize("where", ["WANDB_API_KEY", "~/.netrc", "NETRC", "settings"])
def test_a_login_is_found_where_wandb_finds_it(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = f"machine {host()}\n  login user\n  password {'0' * 40}\n"
    if where == "WANDB_API_KEY":
        monkeypatch.setenv(where, "0" * 40)
    elif where == "settings":
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb/settings").write_text("[default]\napi_key = " + "0" * 40 + "\n")
    else:
        path = tmp_path / (".netrc" if where == "~/.netrc" else "logins")
        path.write_text(entry)
        path.chmod(0o600)
        if where == "NETRC":
            monkeypatch.setenv("NETRC", str(path))
    warning = check_wandb_login(ONLINE)
    assert warning is not None
    assert f"cannot reach {host()} from here (Connection refused)" in warning and "logs offline" in warning


def test_a_login_for_another_server_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    with pytest.raises(ConfigError, match="no login for"):
        check_wandb_login(ONLINE)


def test_a_server_that_answers_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert check_wandb_login(ONLINE) is None


def test_a_warning_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    plan = make_plan(config_of("experiment=smoke", "logger=online", f"data.root={tmp_path}", "data.train_clips=100"))
    assert [problem for problem in map(str, plan.problems) if "wandb" in problem] == []
    (warning,) = as_dict(plan)["warnings"]
    assert "cannot reach" in warning and "wandb" not in as_text(plan)
