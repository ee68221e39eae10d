"""What the README promises a platform engineer: a head started by the line in `cluster/local.yaml`,
`prepare` and `pretrain` sent to it by one `ray job submit` line each, and their results on disk."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import grpc
import psutil
import pytest
import yaml

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head: its folder, the environment of its clients and its dashboard's address."""

    folder: Path
    environment: dict[str, str]
    address: str

    def submit(self, *command: str) -> str:
        """`ray job submit --working-dir .`, waited for; returns what it printed."""
        words = ["ray", "job", "submit", "--address", self.address, "--working-dir", "."]
        done = subprocess.run(
            [*words, "--", *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-6000:]
        return output


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """The head of `cluster/local.yaml` on free ports, with a token and a home of its own."""
    # Unix sockets allow 107 bytes of path, pytest's own folders are longer.
    folder = Path(tempfile.mkdtemp(prefix="cascade-"))
    gcs, dashboard, client, agent = free_ports(4)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CASCADE_"))},
        "HOME": str(folder),
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        # Ray Data leaves detached actors; a head that ends waits for them, by default 30 s.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "CASCADE_RAY_DIR": str(folder / "ray"),
        "CASCADE_GCS_PORT": str(gcs),
        "CASCADE_DASHBOARD_PORT": str(dashboard),
        "CASCADE_CLIENT_PORT": str(client),
        "CASCADE_AGENT_PORT": str(agent),
        "CASCADE_NUM_CPUS": "4",
    }
    launcher = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text(encoding="utf-8"))
    make_token, start = launcher["head_start_ray_commands"]
    subprocess.run(["bash", "-c", make_token], env=environment, check=True, timeout=240)
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(
        ["bash", "-c", f"{start} --block"], env=environment, stdout=log, stderr=log
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_until_up(address, token(folder), process, folder / "head.log")
        yield Head(folder=folder, environment=environment, address=address)
    finally:
        end_processes_of(folder)
        process.wait(timeout=120)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on at this moment, below the range Ray gives to its workers."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def token(folder: Path) -> str:
    """The token that the launcher file made in the private home."""
    return (folder / ".ray" / "auth_token").read_text(encoding="utf-8").strip()


def status(url: str, bearer: str | None = None) -> int | None:
    """HTTP status of a GET; None while nobody listens."""
    request = urllib.request.Request(url)
    if bearer:
        request.add_header("Authorization", f"Bearer {bearer}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def wait_until_up(address: str, bearer: str, process: subprocess.Popen, log: Path) -> None:
    """Return when the job interface answers; fail with the log if the head dies or takes 90 s."""
    deadline = time.monotonic() + 240
    while status(f"{address}/api/jobs/", bearer) != 200:
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.5)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of this head alone: those whose environment names its private folder."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("CASCADE_RAY_DIR") == str(folder / "ray")
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def end_processes_of(folder: Path) -> None:
    """Ask `ray start --block` to end its cluster, and insist with whatever of it is left."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for process in processes_of(folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                if how == signal.SIGKILL or "--block" in process.cmdline():
                    process.send_signal(how)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and processes_of(folder):
            time.sleep(0.2)


def test_the_control_plane_asks_for_the_token(head):
    url = f"{head.address}/api/jobs/"
    assert status(url) == 401
    assert status(url, "0" * 64) in (401, 403)
    assert status(url, token(head.folder)) == 200
    mode = (head.folder / ".ray" / "auth_token").stat().st_mode
    assert mode & 0o077 == 0, oct(mode)


PORTS = ("GCS", "DASHBOARD", "CLIENT")


def listeners_of(folder: Path) -> set[tuple[str, int, str]]:
    """Address, port and command line of whatever of this head listens now."""
    found = set()
    for process in processes_of(folder):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended has no port
            words = " ".join(process.cmdline())
            found |= {
                (connection.laddr.ip, connection.laddr.port, words)
                for connection in process.net_connections(kind="tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    return found


def listeners_once_all_are_up(head: Head) -> set[tuple[str, int, str]]:
    """What listens when the ports that were asked for are open and for 3 s no other has come.

    The job interface answers before its neighbours listen; after 120 s the last look is told.
    """
    wanted = {int(head.environment[f"CASCADE_{name}_PORT"]) for name in PORTS}
    deadline, found, since = time.monotonic() + 120, set(), time.monotonic()
    while time.monotonic() < deadline:
        before, found = found, listeners_of(head.folder)
        if found != before:
            since = time.monotonic()
        if wanted <= {port for _, port, _ in found} and time.monotonic() - since >= 3:
            break
        time.sleep(0.5)
    return found


def test_no_port_is_open_to_the_network_but_those_ray_cannot_close(head):
    """Ray 2.60 binds GCS, raylet, Ray Client (all ask for the token) and metrics to them."""
    listening = listeners_once_all_are_up(head)
    assert {int(head.environment[f"CASCADE_{name}_PORT"]) for name in PORTS} <= {
        port for _, port, _ in listening
    }
    assert len(listening) >= 4
    wide = [(port, words) for ip, port, words in listening if ip not in ("127.0.0.1", "::1")]
    tokened = ("/gcs_server", "/raylet/raylet")
    others = [(port, words) for port, words in wide if not any(t in words for t in tokened)]
    jobs_port = int(head.address.rsplit(":", 1)[1])
    assert jobs_port not in [port for port, _ in wide]
    for port, words in others:
        is_closed = is_metrics(port) or refuses_strangers(port, token(head.folder))
        assert is_closed, f"port {port} of {words} answers to anybody"


def is_metrics(port: int) -> bool:
    """Whether the port serves Prometheus text and nothing else that we know of."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            return answer.read(2) in (b"# ", b"")
    except (OSError, http.client.HTTPException):
        return False


def refuses_strangers(port: int, bearer: str) -> bool:
    """Whether the port is Ray Client's, and lets a call in with the token alone."""
    codes = []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.rpc.RayletDriver/ClusterInfo")
        for said in (None, "0" * 64, bearer):
            try:
                call(b"", metadata=said and [("authorization", f"Bearer {said}")], timeout=20)
                codes.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.append(error.code())
    refused, unknown = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND
    # Past the guard, a client of no name is not known.
    return codes == [refused, refused, unknown]


def test_prepare_and_pretrain_run_where_they_are_sent(head, documents_jsonl):
    corpus, run = head.folder / "corpus", head.folder / "run"
    prepare = ["--output", str(corpus), "--source.paths", str(documents_jsonl)]
    prepare += ["--tokenizer", "bytes", "--sequence-length", "64", "--noise.block-size", "4"]
    prepare += ["--part-bytes", "200000", "--held-out-rate", "0.1", "--runner", "ray"]
    log = head.submit("python", "-m", "jobs.prepare", *prepare)
    assert "succeeded" in log

    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    train = manifest["splits"]["train"]
    assert train["num_sequences"] == sum(shard["rows"] for shard in train["shards"]) > 100
    assert len(train["shards"]) >= 2, "one part only: nothing was spread"
    assert all((corpus / shard["name"]).is_file() for shard in train["shards"])

    pretrain = ["--corpus", str(corpus), "--output", str(run), "--num-workers", "2"]
    pretrain += ["--model.hidden-size", "64", "--model.num-layers", "1", "--model.num-heads", "2"]
    pretrain += ["--model.num-kv-heads", "2", "--model.head-dim", "32"]
    pretrain += ["--model.intermediate-size", "128", "--trainer.num-steps", "40"]
    pretrain += ["--trainer.sequences-per-step", "8", "--trainer.sequences-per-forward", "4"]
    pretrain += ["--trainer.checkpoint-every", "20", "--trainer.log-every", "1"]
    log = head.submit("python", "-m", "jobs.pretrain", *pretrain)
    assert "succeeded" in log

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for line in lines if "loss" in (record := json.loads(line))]
    assert len(losses) == 40
    assert mean(losses[-10:]) < mean(losses[:10])
    assert (run / "checkpoints" / "step_00000040" / "COMMIT").is_file()
    assert (run / "model" / "model.safetensors").is_file()
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["model"]


def test_a_users_mistake_fails_the_job_with_its_sentence(head):
    words = ["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--"]
    words += ["python", "-m", "jobs.prepare", "--output", str(head.folder / "none")]
    words += ["--source.paths", str(head.folder / "missing.jsonl")]
    done = subprocess.run(
        words, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=120
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "missing.jsonl" in output
    assert "Traceback" not in output
    assert not (head.folder / "none").exists()


@pytest.mark.slow
def test_a_job_that_is_stopped_has_saved_its_last_step(head, tiny_corpus):
    """The README's lines, with their patience: Ray's stop by itself kills after 3 s."""
    run = head.folder / "stopped"
    words = ["ray", "job", "submit", "--address", head.address, "--working-dir", "."]
    words += ["--submission-id", "first", "--no-wait"]
    words += ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}', "--"]
    words += ["python", "-m", "jobs.pretrain", "--corpus", tiny_corpus, "--output", str(run)]
    words += ["--num-workers", "1", "--model.hidden-size", "16", "--model.num-layers", "1"]
    words += ["--trainer.num-steps", "1000000", "--trainer.checkpoint-every", "5"]
    words += ["--trainer.sequences-per-step", "4"]
    run_here = {"cwd": ROOT, "env": head.environment, "capture_output": True, "text": True}
    assert subprocess.run(words, **run_here, timeout=120).returncode == 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(run.glob("checkpoints/*/COMMIT")):
        time.sleep(0.2)
    stop = ["ray", "job", "stop", "--address", head.address, "first"]
    assert subprocess.run(stop, **run_here, timeout=120).returncode == 0
    logs = ["ray", "job", "logs", "--address", head.address, "first"]
    said = " ".join(subprocess.run(logs, **run_here, timeout=240).stdout.replace("│", "").split())
    found = re.search(r"stopped at step (\d+) \(SIGTERM\)", said)
    assert found, said[-3000:]
    assert (run / f"checkpoints/step_{int(found[1]):08d}/COMMIT").is_file()
