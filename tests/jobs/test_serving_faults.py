"""The endpoint while its samplers are killed: real Ray Serve replicas, a real `kill -9`."""

import asyncio
import threading

import pytest

from tests.benchmarks.serve_client import Told, client, streams
from tests.benchmarks.serve_runs import (
    busy_slots,
    busy_victim,
    config_of,
    kill,
    requests,
    running,
    serving,
    states,
    write_model,
)
from tests.benchmarks.waiting import wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def model(folder) -> str:
    return write_model(folder / "tiny")


@pytest.fixture(scope="module")
def url(ray_local, model, folder):
    with serving(config_of(model, folder, sampler_wait_seconds=60.0)) as url:
        yield url


def killed_in_stream(url: str, wanted: list[dict]) -> tuple[list[Told], dict]:
    """The streams, and the sampler that was killed while it had some of them in mid-stream."""
    found: list[Told] = []
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(streams(url, wanted))))
    thread.start()
    victim = busy_victim()
    kill(victim)
    thread.join()
    return found, victim


def test_a_sampler_killed_in_mid_stream_costs_no_stream_a_byte(url):
    wanted = requests(8)
    wanted[0]["n"], wanted[1]["logprobs"], wanted[2]["stop"] = 2, 1, ["q"]
    calm = asyncio.run(streams(url, wanted))
    assert calm[1].logprobs
    assert all(told.is_whole for told in calm)
    found, victim = killed_in_stream(url, wanted)
    assert [told.content() for told in found] == [told.content() for told in calm]
    assert all(len(told.fingerprints) == 1 for told in found)
    wait_until(lambda: running() == 2 and len(states()) == 2)
    assert victim["process"] not in {state["process"] for state in states()}
    assert busy_slots() == 0
    scrape = asyncio.run(scraped(url))
    assert lost_in(scrape) >= 1
    assert "cascade_samplers 2.0" in scrape


def test_a_sampler_killed_while_it_scores_costs_no_value(url):
    wait_until(lambda: running() == 2 and len(states()) == 2)
    before = lost_in(asyncio.run(scraped(url)))
    calm = asyncio.run(scores(url, TEXTS))
    assert len(calm) == len(TEXTS)
    assert all(len(each["logprobs"]["token_logprobs"]) == len(TEXTS[0]) for each in calm)
    found: list[list] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(scores(url, TEXTS))))
    thread.start()
    victims: list[dict] = []

    def scoring() -> list[dict]:
        victims[:] = [state for state in states() if state["scoring"]]
        return victims

    wait_until(scoring)
    kill(victims[0])
    thread.join()
    assert found == [calm]
    assert lost_in(asyncio.run(scraped(url))) == before + 1
    wait_until(lambda: running() == 2 and len(states()) == 2)


TEXTS = ["".join(chr(97 + (n * place) % 23) for place in range(900)) for n in range(1, 5)]
"""Each takes hundreds of passes to score."""


async def scores(url: str, texts: list[str]) -> list[dict]:
    """The log-probabilities of texts, by one request."""
    asked = {"model": "tiny", "prompt": texts, "echo": True, "logprobs": 1, "max_tokens": 0}
    async with client(url) as http:
        answer = await http.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_clients_that_leave_free_every_place_at_once(url):
    long = requests(6, max_tokens=800)

    def leave(told: Told) -> None:
        raise EOFError

    asyncio.run(streams(url, long, on_piece=leave))
    wait_until(lambda: busy_slots() == 0, 5)
    assert busy_victim_during(url, long)  # the control: they hold places while they stay


def busy_victim_during(url: str, wanted: list[dict]) -> dict:
    """What a busy sampler states while clients read on; then they leave."""
    seen: list[dict] = []

    def stay(told: Told) -> None:
        if told.pieces > 20 or seen:
            raise EOFError

    thread = threading.Thread(target=lambda: asyncio.run(streams(url, wanted, on_piece=stay)))
    thread.start()
    seen.append(busy_victim())
    thread.join()
    return seen[0]


async def scraped(url: str) -> str:
    async with client(url) as http:
        return (await http.get("/metrics")).text


def lost_in(scrape: str) -> float:
    [line] = [row for row in scrape.splitlines() if row.startswith("cascade_sampler_losses_total")]
    return float(line.split()[-1])
