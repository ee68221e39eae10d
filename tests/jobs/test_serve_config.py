"""The settings of the endpoint: what contradicts is refused, and what a model is called."""

import pytest

from cascade_model.errors import InputError
from jobs.serve_config import ServeConfig, is_loopback


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give one, a model folder or a Serve YAML"),
        ({"model": "m", "serve_config": "x"}, "serve_config=x .* would ignore model=m"),
        ({"port": 9, "no_auth": True, "serve_config": "x"}, "ignore port=9, no_auth=True; write"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "min_replicas=3"),
        ({"model": "m", "port": 70000}, "port=70000"),
        ({"model": "m", "no_auth": True, "host": "0.0.0.0"}, "would serve strangers"),
        ({"model": "m", "streams_per_replica": 0}, "streams_per_replica=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        ServeConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model": "runs/first/model"}, "first"),
        ({"model": "models/tiny"}, "tiny"),
        ({"model": "model"}, "model"),
        ({"model": "/model"}, "model"),
        ({"model": "runs/first/model", "model_name": "mine"}, "mine"),
    ],
)
def test_a_model_is_called_by_its_name_its_folder_or_its_run(settings, name):
    assert ServeConfig(**settings).name == name


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_an_address_of_this_machine_alone_is_known(host):
    assert is_loopback(host)
    assert ServeConfig(model="m", no_auth=True, host=host).no_auth


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_every_other_address_may_be_reached_by_strangers(host):
    assert not is_loopback(host)
