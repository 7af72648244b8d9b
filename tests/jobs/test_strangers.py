"""Another user of the node attacks a running job: it trains on, and still stops in good order when its owner asks."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.health.messages import Hello, LastStep, StopRequest
from tests.helpers.jobs import RunningJob, last_checkpoint, make_clips, start_training, wait_for_record
from tests.helpers.stranger import STRANGER, needs_root, shared_folder
from tests.helpers.worlds import World
from training.telemetry.records import read_metrics

pytestmark = [pytest.mark.slow, needs_root]

# Allows for a busy machine.
START_S = 180
END_S = 60

ENDLESS = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.workers=1 pipeline.size=32 model.num_frames=4 "
    "pipeline.decoder=pyav batch.global_batch=8 schedule.warmup_epochs=0 schedule.epochs=4000 evaluation.every_epochs=10000 "
    "checkpoint.every_epochs=10000"
).split()

# Files that each process of the job may open; the attack holds more connections to each port.
OPEN_FILES = 256

GARBAGE = [
    b"\n" * 4096,
    b"[" * 200_000 + b"\n",
    os.urandom(100_000),
    b'{"kind": "Hello", "rank": 1, "host": "h", "pid": -1, "token": "' + b"x" * 100_000,
    b"GET / HTTP/1.1\r\n\r\n",
    StopRequest("SIGINT").to_line(),
    LastStep(1).to_line(),
    Hello(0, "h", 1, "0" * 32).to_line() + StopRequest("SIGINT").to_line() + LastStep(1).to_line(),
]

# Prints what it reached, then holds its connections until its standard input ends.
PROGRAM = """
import json, os, pathlib, signal, socket, sys
garbage, ports, pids, folders = (json.loads(sys.stdin.readline()) for _ in range(4))
"loaded before the interpreter's own files are out of reach".encode("idna")
os.setgroups([]), os.setgid(STRANGER), os.setuid(STRANGER)

def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=0.3)

def attack(port):
    for text in garbage:
        with connect(port) as connection:
            try:
                connection.sendall(text.encode("latin-1"))
            except OSError:
                # The monitor has closed the connection, or is busy.
                pass
    for _ in range(1000):
        connect(port).close()
    held.extend(connect(port) for _ in range(300))

held, answered, reached = [], 0, []
for port in ports:
    try:
        attack(port)
        answered += 1
    except OSError:
        pass
for act, names in (
    (lambda pid: os.kill(pid, signal.SIGTERM), pids),
    (lambda pid: pathlib.Path(f"/proc/{pid}/environ").read_bytes(), pids),
    (lambda pid: open(f"/proc/{pid}/mem", "r+b"), pids),
    (lambda pid: os.listdir(f"/proc/{pid}/fd"), pids),
    (os.listdir, folders),
    (lambda folder: os.mkdir(f"{folder}/planted"), folders),
    (lambda folder: os.rename(folder, f"{folder}-moved"), folders),
):
    for name in names:
        try:
            act(name)
            reached.append(name)
        except PermissionError:
            pass
print(json.dumps([answered, reached]), flush=True)
sys.stdin.read()
""".replace("STRANGER", str(STRANGER))


def ports_of(job: RunningJob) -> list[int]:
    shown = subprocess.run(["ss", "-Htlnp"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if any(f"pid={pid}," in line for pid in job.processes())]
    return [int(line.split()[3].rsplit(":", 1)[1]) for line in lines]


def last_step(run: Path) -> int:
    return max(int(record["step"]) for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train")


def test_a_job_under_attack_trains_on_and_stops_when_its_owner_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "attacked"
    arguments = [*ENDLESS, f"data.root={make_clips(tmp_path / 'clips')}", f"outputs={tmp_path}", "run_id=attacked"]
    with shared_folder() as temporary:
        monkeypatch.setenv("TMPDIR", str(temporary))
        job = start_training(World("local", 2), tmp_path / "console.txt", *arguments)
        try:
            wait_for_record(run / "metrics.jsonl", "train", START_S)
            for pid in job.processes():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
            # torch makes torchinductor_USER, which others may read.
            folders = [folder for folder in temporary.iterdir() if not folder.name.startswith("torchinductor_")]
            ports = ports_of(job)
            # The store of launch/local.py, the sockets of two fork servers, and the ranks' logs.
            assert len(folders) >= 4
            given = [
                [each.decode("latin-1") for each in GARBAGE],
                ports,
                list(job.processes()),
                list(map(str, folders)),
            ]
            with subprocess.Popen(
                [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as stranger:
                assert stranger.stdin is not None and stranger.stdout is not None
                stranger.stdin.writelines(json.dumps(each) + "\n" for each in given)
                stranger.stdin.flush()
                answered, reached = json.loads(stranger.stdout.readline())
                # Only the monitor answers, and it could not read or change anything of the job.
                assert (answered, reached) == (1, [])
                # Its connections are still open.
                wait_for_record(run / "metrics.jsonl", "train", START_S, step=last_step(run) + 3)
                job.process.send_signal(signal.SIGTERM)
                ended = job.wait(END_S)
        finally:
            job.kill()
    assert ended.exit_code == 75 and ended.left_running == [], ended.output
    step = last_step(run)
    assert f"stopped by SIGTERM after step {step}, with a checkpoint" in ended.output
    assert last_checkpoint(run, step)
