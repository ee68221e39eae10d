"""Joining and starting Ray: the token, what an environment means, and what is refused."""

import os
import socket
import subprocess
import sys

import pytest

from cascade_model.errors import InputError
from pipelines.cluster import require_resources, settle_authentication, start_ray


def settled(**environment: str) -> dict[str, str]:
    settle_authentication(environment)
    return environment


def test_a_ray_of_our_own_gets_token_mode_and_a_fresh_token():
    one, two = settled(), settled(RAY_AUTH_MODE="", RAY_ADDRESS="local")
    assert one["RAY_AUTH_MODE"] == two["RAY_AUTH_MODE"] == "token"
    assert len(one["RAY_AUTH_TOKEN"]) == 64
    assert one["RAY_AUTH_TOKEN"] != two["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize(
    "named", [{"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/mine"}], ids=lambda n: min(n)
)
def test_a_token_that_the_environment_names_is_kept(named):
    assert settled(**named) == {**named, "RAY_AUTH_MODE": "token"}


def test_a_mode_that_the_user_set_stands():
    assert settled(RAY_AUTH_MODE="disabled") == {"RAY_AUTH_MODE": "disabled"}
    assert len(settled(RAY_AUTH_MODE="TOKEN")["RAY_AUTH_TOKEN"]) == 64
    joined = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "head:6379", "RAY_AUTH_TOKEN": "mine"}
    assert settled(**joined) == joined


def test_a_cluster_that_is_joined_gets_an_explicit_mode_and_no_token_of_ours(tmp_path):
    joined = {"RAY_ADDRESS": "head:6379", "HOME": str(tmp_path)}
    assert settled(**joined) == {**joined, "RAY_AUTH_MODE": "disabled"}
    assert settled(**joined, RAY_AUTH_TOKEN="mine")["RAY_AUTH_MODE"] == "token"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("mine")
    assert settled(**joined) == {**joined, "RAY_AUTH_MODE": "token"}


# A stranger on the network who found the port; then a process that knows the token.
ASK = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None)) > 0)
"""
# `import ray` first, as a library's user may do: Ray reads its mode then, once.
START = """
import sys
if sys.argv[1] == "late":
    import ray
from pipelines.cluster import start_ray
start_ray(3)
import ray, subprocess
assert ray.cluster_resources()["CPU"] >= 3
@ray.remote
def seen():
    import os
    return os.environ["RAY_AUTH_MODE"]
assert ray.get(seen.remote()) == "token"
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
@pytest.mark.parametrize("imported", ["early", "late"])
def test_strangers_cannot_talk_to_a_ray_that_we_start(imported):
    bare = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    known = {**bare, "RAY_AUTH_TOKEN": "a" * 64}
    server = subprocess.Popen(
        [sys.executable, "-c", START, imported],
        env=known,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().strip()  # type: ignore[union-attr]
        assert address
        asked = {
            mode: subprocess.run(
                [sys.executable, "-c", ASK, address],
                env={**known, "RAY_AUTH_MODE": mode},
                capture_output=True,
                text=True,
                timeout=240,
            )
            for mode in ("token", "disabled")
        }
    finally:
        server.communicate("end", timeout=240)
    assert asked["token"].stdout == "True\n", asked["token"].stderr
    assert asked["disabled"].returncode != 0
    assert "AuthenticationError" in asked["disabled"].stderr


def test_an_address_without_a_cluster_is_one_sentence():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = (
        "from cascade_model.errors import InputError\nfrom pipelines.cluster import start_ray\n"
        "try: start_ray()\nexcept InputError as error: print(error)"
    )
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.startswith(f"RAY_ADDRESS={address} cannot be joined"), done.stderr


@pytest.mark.ray
def test_what_no_machine_can_give_is_refused(ray_local):
    start_ray(1000)  # joins the one that runs
    require_resources(4, 0, "num_workers=4", "use fewer")
    with pytest.raises(InputError, match=r"num_workers=5 needs 5 CPUs and this Ray has 4; use 4"):
        require_resources(5, 0, "num_workers=5", "use 4")
    with pytest.raises(InputError, match=r"needs 99 GPUs and this Ray has \d+; use fewer"):
        require_resources(1, 99, "num_workers=99 with use_gpu=True", "use fewer")
