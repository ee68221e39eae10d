"""The fault table's own rules: what counts as whole, as told, as equal, and as growth."""

import pytest

from tests.benchmarks.serve_client import Told
from tests.benchmarks.serve_load import growth, leaking, measured


def event(text: str, reason: str | None = None, **more) -> dict:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return {"choices": [choice], "system_fingerprint": "a", **more}


def told_of(*events: dict, is_done: bool = True) -> Told:
    told = Told(status=200, is_done=is_done)
    for each in events:
        told.add(each)
    return told


def test_a_stream_without_its_end_is_neither_whole_nor_told():
    assert told_of(event("a"), event("b", "stop")).is_whole
    for cut in (told_of(event("a")), told_of(event("a", "stop"), is_done=False)):
        assert not cut.is_whole
        assert not cut.is_told
    failed = told_of(event("a"), {"error": {"code": "sampler_lost"}}, is_done=False)
    assert not failed.is_whole
    assert failed.is_told


def test_streams_are_equal_by_content_however_they_were_cut():
    one, two = told_of(event("ab", "stop")), told_of(event("a"), event("b", "stop"))
    assert one.content() == two.content()
    for other in (event("ac", "stop"), event("ab", "length")):
        assert told_of(other).content() != one.content()
    used = {"usage": {"completion_tokens": 3}}
    assert told_of(event("ab", "stop", **used)).content() != one.content()


def test_a_leak_is_seen_and_noise_is_not():
    steps = list(range(100, 2000, 100))
    leak = [5e7 + 4096 * step for step in steps]
    assert growth(leak, steps) == pytest.approx(4096)
    noise = [5e7 + 1e5 * (-1) ** place for place in range(len(steps))]
    assert abs(growth(noise, steps)) < 100


def test_the_leak_of_the_control_is_measured_as_such():
    with leaking() as (control, leak):
        seen = []
        for _ in range(8):
            leak(100)
            seen.append(measured([control])[control.pid])
    memory, files = zip(*seen, strict=True)
    assert growth(memory, range(100, 900, 100)) > 4096  # bytes a request
    assert files[-1] - files[0] == 7
