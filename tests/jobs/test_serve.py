"""The deployed endpoint: settings, Serve YAMLs, and the real client over real Ray Serve."""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from cascade_model.engine_config import EngineConfig
from cascade_model.errors import CheckpointMismatch, InputError
from jobs import serve
from jobs.deployment import deployed, drain
from jobs.replicas import Ingress, Sampler
from jobs.serve import (
    announce,
    require_free_port,
    require_keys,
    serve_document,
    validate_serve_config,
    wanted_of,
)
from jobs.serve_config import ServeConfig, is_loopback
from pipelines.endpoint_client import KEY_VARIABLE
from tests.benchmarks.serve_client import streams
from tests.benchmarks.serve_runs import write_model
from tests.benchmarks.waiting import wait_until
from tests.jobs.client_cases import CASES
from tests.tiny_models import text_config

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "cluster" / "serve.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    from cascade_model.model import Transformer
    from cascade_model.tokenizer import byte_tokenizer
    from cascade_model.weights import save_model

    tokenizer = byte_tokenizer()
    config = text_config(tokenizer, max_sequence_length=256)
    network = Transformer(config)
    network.init_weights(0)
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    save_model(folder, network, tokenizer)
    return str(folder)


@pytest.fixture
def no_keys(monkeypatch):
    monkeypatch.delenv(serve.KEYS_VARIABLE, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def written(tmp_path, change) -> Path:
    """The shipped YAML with one change."""
    document = yaml.safe_load(SHIPPED.read_text())
    change(document)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def sampler_of(document) -> dict:
    [sampler] = [d for d in document["applications"][0]["deployments"] if d["name"] == "sampler"]
    return sampler


def test_the_shipped_yaml_is_valid_and_listens_on_loopback():
    document = validate_serve_config(SHIPPED)
    assert is_loopback(document["http_options"]["host"])
    bounds = sampler_of(document)["autoscaling_config"]
    assert 1 <= bounds["min_replicas"] < bounds["max_replicas"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(aplications=[]), "did you mean `applications`"),
        (lambda d: d["http_options"].update(prt=1), "did you mean `http_options.port`"),
        (lambda d: d["http_options"].update(port="x"), "http_options.port"),
        (
            lambda d: sampler_of(d).update(max_ongoing_request=1),
            r"deployments\[1\].max_ongoing_request`; did you mean .*max_ongoing_requests",
        ),
        (
            lambda d: sampler_of(d)["autoscaling_config"].update(min_replica=1),
            "autoscaling_config.min_replicas",
        ),
        (
            lambda d: sampler_of(d)["autoscaling_config"].update(min_replicas=9),
            "min_replicas=9, initial_replicas=None, max_replicas=4",
        ),
        (
            lambda d: sampler_of(d)["ray_actor_options"].update(num_cpu=1),
            "ray_actor_options.num_cpus",
        ),
        (lambda d: sampler_of(d).update(name="samplr"), "no deployment `samplr`"),
        (lambda d: sampler_of(d).update(max_ongoing_requests=9), "is not args.streams_per_replica"),
        (
            lambda d: d["applications"][0]["args"].update(max_replicas=9),
            "args.max_replicas has no effect beside deployments: sampler.autoscaling_config",
        ),
        (
            lambda d: d["applications"][0]["args"].update(port=8001),
            "port=8001 has no effect, http_options has port=8000",
        ),
        (lambda d: d["applications"][0]["args"].update(modl="x"), "did you mean `model`"),
        (lambda d: d["applications"][0]["args"].update(max_in_flight="x"), "a whole number"),
        (
            lambda d: (
                d["applications"][0]["args"].update(no_auth=True),
                d["http_options"].update(host="0.0.0.0"),
            ),
            "would serve strangers",
        ),
    ],
)
def test_a_mistake_in_a_serve_yaml_is_named_with_its_place(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        validate_serve_config(written(tmp_path, change))


def test_flags_lead_to_a_document_that_passes_the_same_check(tmp_path):
    config = ServeConfig(model="m", no_auth=True, port=8123)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(serve_document(config)))
    assert validate_serve_config(path)["http_options"] == {"host": "127.0.0.1", "port": 8123}


def test_every_replica_gets_its_cpus_by_flags_and_by_yaml():
    flags = ServeConfig(model="m", min_replicas=2, max_replicas=3, threads_per_replica=4)
    assert wanted_of(serve_document(flags)) == (8, 12)
    assert wanted_of(validate_serve_config(SHIPPED)) == (1, 4)
    document = serve_document(flags)
    document["applications"][0]["deployments"] = [{"name": "sampler", "num_replicas": 5}]
    assert wanted_of(document) == (20, 20)
    assert wanted_of(document, "num_gpus") == (0, 0)
    on_gpus = ServeConfig(
        model="m", min_replicas=2, max_replicas=3, engine=EngineConfig(device="cuda")
    )
    assert wanted_of(serve_document(on_gpus), "num_gpus") == (2, 3)
    foreign = {"name": "other", "import_path": "other:app", "deployments": [{"name": "x"}]}
    assert wanted_of({"applications": [*document["applications"], foreign]}) == (21, 21)


@pytest.mark.ray
def test_replicas_that_no_machine_can_hold_are_refused(model, ray_local, capsys):
    argv = ["--model", model, "--no-auth", "True", "--port", str(free_port())]
    argv += ["--min-replicas", "20", "--max-replicas", "20", "--threads-per-replica", "3"]
    assert serve.main(argv) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "a GPU each on cuda) needs 60 CPUs and this Ray has 4" in shown


def test_applications_of_others_are_announced_by_their_place(capsys):
    ours = serve_document(ServeConfig(model="runs/tiny"))["applications"]
    others = [{"name": "other", "route_prefix": "/other", "import_path": "other:app"}]
    announce({"applications": [*ours, *others]}, "http://here")
    shown = capsys.readouterr().out
    assert "serving tiny at http://here/v1" in shown
    assert "serving other at http://here/other" in shown


def test_the_line_to_try_reads_the_variable_of_clients_and_says_where_keys_are(capsys):
    def announced(**settings) -> str:
        announce(serve_document(ServeConfig(model="runs/tiny", **settings)), "http://here")
        return capsys.readouterr().out

    shown = announced(api_keys="keys")
    assert f'-H "Authorization: Bearer ${KEY_VARIABLE}"' in shown
    places = f"{serve.KEYS_VARIABLE} or in {Path('keys').absolute()}"
    assert f"the server's variable {places}; first: export {KEY_VARIABLE}=KEY" in shown
    assert f"variable {serve.KEYS_VARIABLE}; first" in announced()
    assert "KEY" not in announced(no_auth=True)


def test_a_server_without_any_key_is_refused_unless_it_says_so(tmp_path, no_keys, monkeypatch):
    with pytest.raises(InputError, match="no key is set"):
        require_keys(ServeConfig(model="m"))
    require_keys(ServeConfig(model="m", no_auth=True))
    (tmp_path / "keys").write_text("# ours\n\nalpha\n")
    require_keys(ServeConfig(model="m", api_keys=str(tmp_path / "keys")))
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(InputError, match="no key is set"):
        require_keys(ServeConfig(model="m", api_keys=str(tmp_path / "keys")))
    with pytest.raises(InputError, match="cannot be read"):
        require_keys(ServeConfig(model="m", api_keys=str(tmp_path / "none")))
    monkeypatch.setenv(serve.KEYS_VARIABLE, "a, b")
    require_keys(ServeConfig(model="m"))


def test_a_port_in_use_is_refused_before_ray_starts(model, capsys):
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        with pytest.raises(InputError, match=f"port={port}"):
            require_free_port("127.0.0.1", port)
        assert serve.main(["--model", model, "--no-auth", "True", "--port", str(port)]) == 2
    assert f"port={port}" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["203.0.113.5", "2001:db8::5", "no-such-machine.invalid"])
def test_an_address_of_another_machine_is_refused_by_the_host(host):
    with pytest.raises(InputError, match=rf"host={host} is no address .* give --host 127\.0\.0\.1"):
        require_free_port(host, 0)


@pytest.mark.parametrize("host", ["é..x", "a\0b", "é" * 80, "fe80::1"])
def test_a_host_that_no_machine_can_have_is_refused_by_the_host(host):
    with pytest.raises(InputError) as refused:
        require_free_port(host, 0)
    assert str(refused.value).startswith(f"host={host} is no address of this machine (")
    assert "--port" not in str(refused.value)


@pytest.mark.parametrize("port", [-1, 65536, 2**70])
def test_a_number_that_is_no_port_is_refused(port):
    with pytest.raises(InputError, match=rf"port={port} is no port; give --port one of 1024"):
        require_free_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("template", "words"),
    [("nope", "chat_template=nope cannot be read"), ("{% if %}", "chat_template")],
)
def test_a_template_that_cannot_be_used_is_refused_before_ray_starts(
    model, template, words, tmp_path, capsys
):
    argv = ["--model", model, "--no-auth", "True", "--chat-template", template]
    assert serve.main([*argv, "--port", str(free_port())]) == 2
    assert words in capsys.readouterr().err

    def change(document) -> None:
        document["applications"][0]["args"] |= {"model": model, "chat_template": template}
        document["applications"][0]["args"] |= {"no_auth": True}

    assert serve.main(["--serve-config", str(written(tmp_path, change))]) == 2
    assert words in capsys.readouterr().err


def test_the_text_of_a_template_travels_and_not_its_path(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    for given, sent in ((str(file), "{{ messages }}"), ("chatml", "chatml"), (None, None)):
        document = serve_document(ServeConfig(model="m", chat_template=given))
        assert document["applications"][0]["args"]["chat_template"] == sent


def test_a_missing_model_is_refused_before_ray_starts(tmp_path, capsys):
    argv = ["--model", str(tmp_path), "--no-auth", "True", "--port", str(free_port())]
    assert serve.main(argv) == CheckpointMismatch.exit_code
    assert "manifest.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def endpoint(model, ray_local, tmp_path_factory):
    """A deployed endpoint: its URL; the key comes from a file."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("sesame\n")
    config = ServeConfig(
        model=model,
        api_keys=str(keys),
        port=free_port(),
        max_replicas=1,
        reader_timeout_seconds=5.0,
    )
    with deployed(serve_document(config)):
        yield f"http://127.0.0.1:{config.port}/v1"


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(base_url=endpoint, api_key="sesame", max_retries=0, timeout=240) as client:
        yield client


@pytest.mark.ray
def test_a_serve_that_runs_already_is_neither_replaced_nor_ended(endpoint, client, model):
    """Serve's deploy would end what the new config does not name, our end would end all."""
    document = serve_document(ServeConfig(model=model, no_auth=True, port=free_port()))
    document["applications"][0]["name"] = "another"
    refused = pytest.raises(InputError, match=r"runs on this cluster already .*\['cascade'\]")
    with refused, deployed(document):
        raise AssertionError("it was deployed")
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.ray
def test_the_real_client_lists_and_retrieves_the_model(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "cascade"


@pytest.mark.ray
def test_the_real_client_completes_and_repeats_with_a_seed(client):
    request = {"model": "tiny", "prompt": "def", "max_tokens": 13, "seed": 7, "n": 2}
    first, second = (client.completions.create(**request) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert first.usage.prompt_tokens == 3
    assert 2 <= first.usage.completion_tokens <= 26
    assert first.usage.completion_tokens_details.passes > 0
    assert first._request_id
    raw = client.completions.with_raw_response.create(**request, user="x")
    assert len(raw.headers.get_list("x-request-id")) == 1


@pytest.mark.ray
def test_the_endpoint_gives_the_engines_own_tokens(client, model):
    from cascade_model.llm import LLM
    from cascade_model.sampling import SamplingParams

    params = SamplingParams(max_tokens=12, seed=3, temperature=0.5, confidence_threshold=0.1)
    [own] = LLM.load(model).generate(["abc"], params)
    served = client.completions.create(
        model="tiny",
        prompt="abc",
        max_tokens=12,
        seed=3,
        temperature=0.5,
        extra_body={"confidence_threshold": 0.1},
    )
    assert served.choices[0].text == own.text
    assert served.usage.completion_tokens == len(own.token_ids)
    assert served.usage.completion_tokens_details.passes == own.passes


@pytest.mark.ray
def test_the_real_client_streams_block_by_block(client):
    request = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "seed": 1}
    whole = client.completions.create(**request)
    stream = client.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage
    assert len(pieces) > 2


@pytest.mark.ray
def test_the_real_client_chats_whole_and_streamed(client):
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello <|mask|>"}],
        "max_completion_tokens": 10,
        "seed": 2,
    }
    whole = client.chat.completions.create(**request).choices[0].message
    pieces = list(client.chat.completions.create(**request, stream=True))
    assert whole.role == pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole.content


@pytest.mark.ray
def test_the_real_client_raises_its_own_errors(client, endpoint):
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.completions.create(model="tiny", prompt="x", logit_bias={"5": 1})
    assert unsupported.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x", max_tokens=1000)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.ray
def test_every_case_of_the_client_holds_behind_serve(client):
    for case in CASES:
        case(client, "tiny")


@pytest.mark.ray
def test_operators_routes_hold_behind_serve(endpoint):
    root, key = endpoint.removesuffix("/v1"), {"Authorization": "Bearer sesame"}
    wait_until(lambda: httpx.get(f"{root}/ready", headers=key, timeout=120).status_code == 200)
    assert httpx.get(f"{root}/health", timeout=120).json() == {"status": "ok"}
    assert "cascade_requests" in httpx.get(f"{root}/metrics", headers=key, timeout=120).text
    assert httpx.get(f"{root}/tokenizer_info", headers=key, timeout=120).json()["eos_token"]
    for path in ("/ready", "/metrics", "/tokenizer_info", "/openapi.json", "/v1/models"):
        refused = httpx.get(f"{root}{path}", timeout=120)
        assert refused.status_code == 401
        assert refused.headers["x-request-id"]


class EndlessSampler:
    """Decodes for ever and writes a dot for every block."""

    def __init__(self, file: str) -> None:
        self.file = file

    async def blocks(self, prompt_tokens, params, choice, weights, *behind):
        yield {"weights": weights}
        while True:
            with open(self.file, "a") as file:
                file.write(".")
            await asyncio.sleep(0.02)
            yield {"tokens": [97], "passes": 1, "steps": 1, "finish_reason": None}


@pytest.fixture
def endless(endpoint, model, tmp_path):
    """An endpoint beside the first whose streams never end: its URL, and the blocks so far."""
    from ray import cloudpickle

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    dots = tmp_path / "dots"
    with beside(endpoint, "endless", model, tmp_path, EndlessSampler, str(dots)) as url:
        yield url, lambda: dots.stat().st_size
    cloudpickle.unregister_pickle_by_value(here)


@contextlib.contextmanager
def beside(
    endpoint: str, name: str, model: str, folder: Path, kind: type, *given, replicas: int = 1
):
    """Another application, in front of samplers of that kind: its URL."""
    from ray import serve as ray_serve

    keys = folder / "keys"
    keys.write_text("sesame\n")
    config = ServeConfig(model=model, api_keys=str(keys), sampler_wait_seconds=2.0)
    options = {"max_ongoing_requests": 8, "num_replicas": replicas}
    sampler = ray_serve.deployment(name="sampler", **options)(kind)
    ingress = ray_serve.deployment(name="ingress")(ray_serve.ingress()(Ingress))
    ray_serve.run(ingress.bind(config, sampler.bind(*given)), name=name, route_prefix=f"/{name}")
    try:
        yield endpoint.replace("/v1", f"/{name}/v1")
    finally:
        ray_serve.delete(name)


@pytest.mark.ray
def test_a_client_that_leaves_ends_its_decoding(endless):
    url, blocks = endless
    with openai.OpenAI(base_url=url, api_key="sesame", max_retries=0, timeout=240) as client:
        stream = client.completions.create(model="tiny", prompt="a", stream=True)
        next(iter(stream))
        wait_until(lambda: blocks() > 20)  # the control: it goes on while the client stays
        stream.close()
    wait_until(lambda: grown(blocks) == 0)


SCORED = {"model": "tiny", "prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}


@pytest.mark.ray
def test_a_score_is_of_the_weights_that_answers_are_of_and_none_begins_at_the_end(
    endpoint, model, tmp_path
):
    given = (write_model(tmp_path / "other", seed=1), 1, EngineConfig())
    with (
        beside(endpoint, "swapped", model, tmp_path, Sampler, *given) as url,
        openai.OpenAI(base_url=url, api_key="sesame", max_retries=0, timeout=240) as client,
    ):

        def refusal(**changes) -> tuple:
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(**{**SCORED, **changes})
            return refused.value.status_code, refused.value.code

        assert refusal() == (503, "model_changed")
        assert refusal(max_tokens=4, echo=False) == (503, "model_changed")
        drain("swapped", 0)
        assert refusal() == (503, "server_ending")


class SlowSampler:
    """Answers nothing for seconds, since it decodes: a block takes its whole process."""

    def __init__(self, file: str) -> None:
        Path(file).write_text(str(os.getpid()))

    async def ready(self):
        return True

    async def blocks(self, prompt_tokens, params, choice, weights, *behind):
        yield {"weights": weights}
        while True:
            await asyncio.sleep(0.01)
            time.sleep(3)
            yield {"tokens": [97], "passes": 1, "steps": 1, "finish_reason": None}


@pytest.mark.ray
def test_a_sampler_that_decodes_is_ready_and_a_dead_or_an_ending_one_is_not(
    endpoint, model, tmp_path
):
    from ray import cloudpickle

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    head, process = {"Authorization": "Bearer sesame"}, tmp_path / "process"
    with (
        beside(endpoint, "slow", model, tmp_path, SlowSampler, str(process)) as url,
        openai.OpenAI(base_url=url, api_key="sesame", max_retries=0, timeout=240) as client,
    ):

        def told() -> tuple[int, str | None]:
            answer = httpx.get(url.replace("/v1", "/ready"), headers=head, timeout=120)
            return answer.status_code, answer.json().get("error", {}).get("code")

        wait_until(lambda: told() == (200, None))
        stream = client.completions.create(model="tiny", prompt="a", stream=True)
        next(iter(stream))
        for _ in range(8):
            assert told() == (200, None)
            time.sleep(0.3)
        os.kill(int(process.read_text()), signal.SIGKILL)
        wait_until(lambda: told() == (503, "not_ready"))
        wait_until(lambda: told() == (200, None))  # another one has come
        stream.close()
        drain("slow", 0)
        assert told() == (503, "server_ending")
    cloudpickle.unregister_pickle_by_value(here)


class SilentSampler(Sampler):
    """The first of its kind answers no question; another does."""

    def __init__(self, file: str, *given) -> None:
        super().__init__(*given)
        try:
            Path(file).touch(exist_ok=False)
        except FileExistsError:
            self.is_silent = False
        else:
            self.is_silent = True

    async def ready(self):
        return await self.spoken(True)

    async def state(self):
        return await self.spoken(super().state())

    async def spoken(self, answer):
        if self.is_silent:
            await asyncio.sleep(12)  # longer than anybody waits for an answer
        return answer


@pytest.mark.ray
def test_a_silent_sampler_keeps_neither_readiness_nor_metrics_of_another_back(
    endpoint, model, tmp_path
):
    from ray import cloudpickle

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    head = {"Authorization": "Bearer sesame"}
    given = (str(tmp_path / "silent"), model, 1, EngineConfig())
    with beside(endpoint, "silent", model, tmp_path, SilentSampler, *given, replicas=2) as url:
        root = url.removesuffix("/v1")

        def ready() -> bool:
            return httpx.get(f"{root}/ready", headers=head, timeout=120).status_code == 200

        wait_until(ready)  # a probe waits for half a second, and the other may need more for once
        assert [ready() for _ in range(3)] == [True] * 3
        wait_until(
            lambda: (
                "cascade_samplers 1.0\n"
                in httpx.get(f"{root}/metrics", headers=head, timeout=120).text
            )
        )
    cloudpickle.unregister_pickle_by_value(here)


@pytest.mark.ray
def test_what_was_never_deployed_is_drained_without_a_word(endpoint, caplog):
    from ray import serve as ray_serve

    drain("absent", 0)

    @ray_serve.deployment(
        name="ingress", ray_actor_options={"num_cpus": 1000}, graceful_shutdown_timeout_s=0.1
    )
    class Waiting:
        pass

    target = ray_serve.RunTarget(Waiting.bind(), name="waiting", route_prefix="/waiting")
    ray_serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    wait_until(lambda: ray_serve.status().applications["waiting"].deployments)
    try:
        drain("waiting", 0)
    finally:
        ray_serve.delete("waiting")
    assert [each for each in caplog.records if each.name == "cascade.endpoint"] == []


@pytest.mark.ray
def test_what_a_sampler_alone_refuses_is_a_400_that_says_why(endpoint, model, tmp_path):
    """It has less memory than its server's settings say."""
    given = (model, 1, EngineConfig(cache_bytes=32 * 256))
    with (
        beside(endpoint, "cramped", model, tmp_path, Sampler, *given) as url,
        openai.OpenAI(base_url=url, api_key="sesame", max_retries=0, timeout=240) as client,
    ):
        asked = {"model": "tiny", "prompt": "abc", "max_tokens": 100}
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(**asked, stream=stream)
            assert refused.value.code == "invalid_value"
            assert "the request needs keys and values of" in refused.value.message
            assert "Traceback" not in refused.value.message
        assert client.completions.create(**{**asked, "max_tokens": 8}).choices


def grown(blocks) -> int:
    """Blocks decoded in half a second."""
    before = blocks()
    time.sleep(0.5)
    return blocks() - before


@pytest.mark.ray
def test_the_shipped_yaml_serves_and_ends_cleanly_on_sigterm_with_streams_open(tmp_path):
    port = free_port()

    def change(document) -> None:
        document["http_options"]["port"] = port
        document["applications"][0]["args"] |= {
            "model": write_model(tmp_path / "tiny"),
        }

    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"CASCADE_API_KEYS": "sesame"}
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", "--serve-config", str(written(tmp_path, change))],
            cwd=REPOSITORY,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 200
        while "try: curl" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert "sesame" not in log.read_text()
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="sesame", max_retries=0, timeout=240) as client:
            assert client.completions.create(model="cascade", prompt="a", max_tokens=4).choices
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="other").models.list()
        found, has_begun = [], threading.Event()
        long = {"max_tokens": 200, "confidence_threshold": 1.0, "temperature": 1.0}
        wanted = [{"model": "cascade", "prompt": "a", "seed": seed, **long} for seed in range(4)]
        answers = threading.Thread(
            target=lambda: found.extend(
                asyncio.run(
                    streams(url.removesuffix("/v1"), wanted, on_piece=lambda _: has_begun.set())
                )
            )
        )
        answers.start()
        assert has_begun.wait(60), log.read_text()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=240) == 0, log.read_text()
    answers.join()
    assert [told.is_whole for told in found] == [True] * 4
    assert "ServeController" not in log.read_text()
    require_free_port("127.0.0.1", port)
    assert not processes_of(server.pid)


@pytest.mark.slow  # a minute and a half, until the kernel's buffers are full
@pytest.mark.ray
def test_a_reader_that_takes_nothing_is_let_go(endpoint):
    assert is_let_go(int(endpoint.rsplit(":", 1)[1].removesuffix("/v1")), seconds=150)


def is_let_go(port: int, seconds: float) -> bool:
    """Whether the server drops a client that asks for megabytes and takes nothing."""
    settings = {"n": 8, "logprobs": 5, "max_tokens": 900, "stream": True, "seed": 1}
    settings |= {"stop_at_eos": False, "confidence_threshold": 0.0}
    body = json.dumps({"model": "cascade", "prompt": ["a"] * 4, **settings}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nAuthorization: Bearer sesame\r\n\r\n"
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port))
        reader.sendall(head.encode() + body)
        watch = select.poll()
        watch.register(reader, 0)  # errors and hang-ups alone
        return bool(watch.poll(seconds * 1000))


def processes_of(session: int) -> list[str]:
    """Command lines of what still lives in a session of processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
        except (OSError, IndexError):
            continue
    return found
