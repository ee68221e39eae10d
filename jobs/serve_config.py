"""The settings of the endpoint, as flags and as `args` in a Serve YAML, and what they refuse."""

import dataclasses
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_model.engine_config import EngineConfig
from cascade_model.settings import check
from jobs.autoscaling import QueuedBlocks
from jobs.slow_readers import DEFAULT_SECONDS


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(QueuedBlocks):
    """When sampler replicas are added and taken away, between min_replicas and max_replicas."""

    up_seconds: float = 5.0
    """The load must have been there for this long before replicas are added; from none, at once."""
    down_seconds: float = 120.0
    """It must have been gone for this long before they are taken away."""
    to_zero_seconds: float = 600.0
    """The same for the last replica, where min_replicas is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("up_seconds", "down_seconds", "to_zero_seconds"):
            value = getattr(self, name)
            check(value >= 0, f"scaling.{name}={value} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """An OpenAI-compatible endpoint over a model folder."""

    model: str = ""
    """Model folder (weights, config, tokenizer, manifest)."""
    model_name: str = ""
    """Name that clients give; none: the model folder's name, or that of the folder around it where
    the model folder is called `model` (`run/model` is served as `run`)."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    api_keys: str | None = None
    """File with one API key a line; keys in the variable CASCADE_API_KEYS (commas) count too."""
    chat_template: str | None = None
    """How chats become text: plain, chatml, or a Jinja template or its file; none: the model
    folder's own, else plain."""
    no_auth: bool = False
    """Serve without any key; only on a loopback address."""
    min_replicas: int = 1
    """Sampler replicas at least."""
    max_replicas: int = 2
    """Sampler replicas at most."""
    streams_per_replica: int = 8
    """Completions that one sampler replica decodes at once, block by block in turn."""
    max_in_flight: int = 64
    """Completions decoded or waiting, of one ingress replica; beyond it clients get 429."""
    threads_per_replica: int = 1
    """Torch threads and Ray CPUs of one sampler replica."""
    max_sampler_losses: int = 3
    """Samplers that may die over a completion with no block in between; it goes on elsewhere. 0:
    the first loss is an error."""
    sampler_wait_seconds: float = 120.0
    """A request waits this long for a sampler while none is heard of, as during a cold start."""
    blocks_ahead: int = 64
    """Blocks decoded before their reader takes them; then its place is given to others."""
    reader_timeout_seconds: float = DEFAULT_SECONDS
    """A stream whose reader takes nothing for this long is ended."""
    drain_seconds: float = 60.0
    """When the server is to end, open streams get this long; what is left ends with an error."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """When sampler replicas come and go."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The decode engine of a sampler replica."""
    serve_config: str | None = None
    """A Serve config YAML to start instead; the other settings then stand in the YAML."""

    def __post_init__(self) -> None:
        if self.serve_config:
            ignored = [
                f"{each.name}={getattr(self, each.name)}"
                for each in dataclasses.fields(self)
                if each.name != "serve_config" and getattr(self, each.name) != _default(each)
            ]
            check(
                not ignored,
                f"serve_config={self.serve_config} is started as it stands and would ignore "
                f"{', '.join(ignored)}; write that into the YAML instead",
            )
            return
        check(bool(self.model), "model and serve_config: give one, a model folder or a Serve YAML")
        check(0 <= self.port < 65536, f"port={self.port} must be in 0..65535; use 8000")
        check(
            0 <= self.min_replicas <= self.max_replicas and self.max_replicas >= 1,
            f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas} must satisfy "
            "0 <= min_replicas <= max_replicas, with at least one; use 1 and 2",
        )
        for name in ("streams_per_replica", "threads_per_replica"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.max_in_flight >= 8, f"max_in_flight={self.max_in_flight} must be at least 8")
        check(
            self.max_sampler_losses >= 0,
            f"max_sampler_losses={self.max_sampler_losses} must not be negative; use 3",
        )
        check(self.blocks_ahead >= 1, f"blocks_ahead={self.blocks_ahead} must be at least 1")
        for name in ("sampler_wait_seconds", "reader_timeout_seconds"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")
        check(self.drain_seconds >= 0, f"drain_seconds={self.drain_seconds} must not be negative")
        check(
            not self.no_auth or is_loopback(self.host),
            f"no_auth=True with host={self.host} would serve strangers; use host=127.0.0.1 or "
            "give api_keys",
        )

    @property
    def name(self) -> str:
        """The model's name for clients; a folder called `model` takes its run's name."""
        folder = Path(self.model)
        run = folder.parent.name if folder.name == "model" else ""
        return self.model_name or run or folder.name


def _default(setting: dataclasses.Field) -> Any:
    factory = setting.default_factory
    return setting.default if factory is dataclasses.MISSING else factory()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
