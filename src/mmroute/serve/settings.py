"""Everything the gateway can be told: a YAML file, `MMROUTE_*` variables over it, `--set path=value` over both."""

import hashlib
import hmac
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from mmroute.errors import ConfigError

__all__ = ["Keys", "Settings", "UpstreamSettings", "read", "upstream"]

MIB = 2**20
_KEY_LINE = re.compile(r"([\w.@-]+):([0-9a-f]{64})")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UpstreamSettings(_Strict):
    """One model that can answer."""

    model: str
    """Name the server knows it by; of a local model: a bundled name, folder or Hub id."""
    url: str | None = None
    """Base address of an OpenAI-compatible server, e.g. http://127.0.0.1:8001/v1; None: a model of this process."""
    recipe: str = "none"
    """How a local model routes and thinks."""
    served: str | None = None
    """Name it has for our clients; default `model`."""
    api_key_env: str | None = None
    """Environment variable with the server's key; a client's key is never passed on."""
    vision: bool = True
    tools: bool = True
    json_mode: bool = True
    logprobs: bool = True
    max_context: int | None = Field(default=None, ge=1)
    """Tokens; longer requests (four characters a token) do not go there."""
    price_in: float | None = Field(default=None, ge=0)
    """USD per million prompt tokens."""
    price_out: float | None = Field(default=None, ge=0)
    """USD per million answer tokens."""

    @property
    def name(self) -> str:
        return self.served or self.model

    @model_validator(mode="after")
    def _consistent(self) -> "UpstreamSettings":
        if self.url is not None:
            if not self.url.startswith(("http://", "https://")):
                raise ValueError(f"url starts with http:// or https://, given {self.url!r}")
            if self.recipe != "none":
                raise ValueError("recipe routes models of this process; a server behind a url is not routed")
        return self


class Timeouts(_Strict):
    """Seconds."""

    connect_s: float = Field(default=3, gt=0)
    pool_s: float = Field(default=5, gt=0)
    rating_s: float = Field(default=5, gt=0)
    first_byte_s: float = Field(default=120, gt=0)
    between_bytes_s: float = Field(default=60, gt=0)
    total_s: float = Field(default=600, gt=0)
    keep_alive_s: float = Field(default=15, gt=0)
    """Silence after which a stream gets a comment."""


class Limits(_Strict):
    body_bytes: int = Field(default=20 * MIB, ge=1)
    messages: int = Field(default=512, ge=1)
    json_depth: int = Field(default=64, ge=4)
    images: int = Field(default=16, ge=0)
    image_bytes: int = Field(default=10 * MIB, ge=1)
    image_pixels: int = Field(default=32_000_000, ge=1)
    in_flight: int = Field(default=512, ge=1)
    queue: int = Field(default=256, ge=0)
    queue_s: float = Field(default=5, ge=0)


class Retries(_Strict):
    attempts: int = Field(default=3, ge=1)
    backoff_s: float = Field(default=0.25, ge=0)
    backoff_cap_s: float = Field(default=4, ge=0)
    retry_after_cap_s: float = Field(default=10, ge=0)
    """A server that asks for a longer wait is believed: its 429 goes to the client."""
    share: float = Field(default=0.2, ge=0)
    """Retries per request over the last 10 s; beyond it failures are passed on at once."""


class Circuit(_Strict):
    failures: int = Field(default=5, ge=1)
    """Failures in a row that open it."""
    window_calls: int = Field(default=20, ge=1)
    """So many calls in 30 s, half of them failures, open it too."""
    open_s: float = Field(default=15, gt=0)
    """Time until the first probe; doubles with each failed one."""
    open_cap_s: float = Field(default=120, gt=0)


class Settings(BaseSettings):
    """The gateway, resolved."""

    model_config = SettingsConfigDict(
        env_prefix="MMROUTE_", env_nested_delimiter="__", extra="forbid", frozen=True, protected_namespaces=()
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    draft: UpstreamSettings = UpstreamSettings(model="tiny", recipe="schedule", served="tiny-schedule")
    target: UpstreamSettings = UpstreamSettings(model="tiny")
    mode: Literal["auto", "inprocess", "stream_peek", "rate_call"] = "auto"
    """How a rating is got: on the session of a local draft, from the head of the draft's own stream, or by a call."""
    policy: dict[str, Any] = {"name": "budget", "budget": 0.4}
    """`name` and options of a policy of `gate._policy`; `shadow: true` decides and logs, and acts as `shadow_acts`."""
    verify: Literal["none", "logprob"] = "none"
    """`logprob`: a part of the budget is kept for finished answers of the draft, which then wait to be looked at."""
    verify_share: float = Field(default=0.25, ge=0, le=1)
    """That part."""
    target_in_flight: int | None = Field(default=None, ge=1)
    """Most requests that are sent to the target at a time, by all replicas together; beyond them the draft answers,
    reason `budget_cap`. Who names the target is counted and let through."""
    target_usd_per_hour: float | None = Field(default=None, gt=0)
    """Most that answers of the target may have cost in the last hour, by its prices and by all replicas together;
    beyond it the draft answers. What is being written when it is reached is written to its end."""
    replicas: int = Field(default=1, ge=1)
    """Gateways behind one balancer, this one included: each keeps to its part of the caps on the target. Shares are
    not divided: where each replica sends a share b of its own traffic, all of them together send b of the sum."""
    rater: str | Path | None = None
    """Folder that `mmroute train prp` wrote, bundled name, or Hub id. Without one a local draft's first token rates,
    untrained, and what a draft behind HTTP writes is taken as it is."""
    num_ratings: Literal[1, 2] = 2
    """Digits the draft writes: its own chance, and the target's."""
    peek_logprobs: bool = True
    """Ask for the rating tokens' distribution; without it a rating is one of ten levels."""
    rating_prefix: Literal["template", "continue"] = "template"
    """`template`: the draft's chat template knows `mmroute_rating`; `continue`: a turn `<rate>` is continued."""
    on_unrated: Literal["draft", "target"] = "target"
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    retries: Retries = Retries()
    circuit: Circuit = Circuit()
    image_urls: Literal["auto", "forward", "fetch", "refuse"] = "auto"
    """What happens to http(s) images; `auto` fetches for local models and forwards otherwise."""
    media_domains: tuple[str, ...] = ()
    """If any: the only hosts images may come from."""
    api_keys_file: Path | None = None
    """Lines `name:sha256-of-key`; without it everybody on this machine may ask."""
    insecure: bool = False
    """Serve beyond loopback without keys."""
    replay_log: Path | None = None
    replay_content: Literal["hash", "none", "full"] = "hash"
    """What of the prompt stands in the replay log."""
    replay_bytes: int = Field(default=64 * MIB, ge=1024)
    """Size at which the log is rotated."""
    replay_files: int = Field(default=4, ge=1)
    """Rotated logs that are kept."""
    drain_delay_s: float = Field(default=5, ge=0)
    """After SIGTERM: how long requests are still accepted, so that a balancer can notice that /ready says 503."""
    drain_s: float = Field(default=300, ge=0)
    """How long what runs may then take."""
    reload: Literal["signal", "poll"] = "signal"
    """`poll` also looks at the file times every 2 s."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    @model_validator(mode="after")
    def _safe(self) -> "Settings":
        if self.host not in ("127.0.0.1", "::1", "localhost") and self.api_keys_file is None and not self.insecure:
            raise ValueError(
                f"host {self.host} can be reached from other machines and nobody is asked for a key; set "
                "api_keys_file, or --insecure behind something that asks"
            )
        if self.mode == "inprocess" and self.draft.url is not None:
            raise ValueError("mode inprocess rates on the session of a local draft; give a draft without a url")
        if self.mode in ("stream_peek", "rate_call") and self.draft.url is None:
            raise ValueError(f"mode {self.mode} asks a server; a local draft is rated inprocess")
        if self.verify != "none" and (self.policy.get("name") != "budget" or self.policy.get("shadow")):
            raise ValueError(f"verify shares a budget, and policy {self.policy} keeps none; give policy.name budget")
        if self.target_in_flight is not None and self.target_in_flight < self.replicas:
            raise ValueError(
                f"target_in_flight {self.target_in_flight} leaves some of {self.replicas} replicas no request at all; "
                "give at least one for each, or run fewer replicas"
            )
        if self.target_usd_per_hour is not None and None in (self.target.price_in, self.target.price_out):
            raise ValueError("target_usd_per_hour counts by prices; give the target price_in and price_out")
        if self.draft.name == self.target.name:
            raise ValueError(f"draft and target are both served as {self.draft.name!r}; give one a `served` name")
        return self

    @property
    def own_target_in_flight(self) -> int | None:
        """This replica's part of `target_in_flight`, rounded down, so that all parts together stay within it."""
        return None if self.target_in_flight is None else self.target_in_flight // self.replicas

    @property
    def own_target_usd_per_hour(self) -> float | None:
        """This replica's part of `target_usd_per_hour`."""
        return None if self.target_usd_per_hour is None else self.target_usd_per_hour / self.replicas

    @property
    def rates_by(self) -> Literal["inprocess", "stream_peek", "rate_call"]:
        if self.mode != "auto":
            return self.mode
        return "inprocess" if self.draft.url is None else "stream_peek"


def read(file: Path | None = None, given: dict[str, Any] | None = None) -> Settings:
    """Settings from defaults, a YAML file, the environment and what was given, later ones first.

    Raises:
        ConfigError: the file is missing or not YAML, or a setting is wrong; every fault in one message.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"no settings file {file}; write one as docs/serving.md shows, or leave --config out")

    class Here(Settings):
        model_config = SettingsConfigDict(yaml_file=file)

    try:
        return Here(**(given or {}))
    except ValidationError as error:
        faults = (".".join(["serve", *map(str, e["loc"])]) + f": {e['msg']}" + _given(e) for e in error.errors())
        raise ConfigError("; ".join(faults)) from None
    except Exception as error:  # PyYAML's and pydantic-settings' own
        raise ConfigError(f"serve settings: {error}") from None


def _given(error: Any) -> str:
    return "" if isinstance(error["input"], dict | BaseModel) else f" (given {error['input']!r})"


def upstream(text: str) -> dict[str, Any]:
    """What `--draft` and `--target` mean: `http://host:port/v1#served-name`, or a local model.

    Raises:
        ConfigError: an address without the name of the model on it.

    Example:
        >>> upstream("http://127.0.0.1:8001/v1#Qwen/Qwen2.5-VL-3B-Instruct")["model"], upstream("tiny")
        ('Qwen/Qwen2.5-VL-3B-Instruct', {'model': 'tiny'})
    """
    if not text.startswith(("http://", "https://")):
        return {"model": text}
    url, mark, model = text.partition("#")
    if not mark or not model:
        raise ConfigError(f"{text}: write the model's name on that server after a #, e.g. {url}#my-model")
    return {"url": url, "model": model}


class Keys:
    """Who may ask: names and hashes, never the keys themselves."""

    def __init__(self, file: Path | None) -> None:
        self.hashes: dict[str, str] = {}
        if file is None:
            return
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"api_keys_file: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _KEY_LINE.fullmatch(line.strip())
            if match is None:
                raise ConfigError(f"api_keys_file, line {number}: write name:sha256 of the key in 64 hex digits")
            self.hashes[match[1]] = match[2]
        if not self.hashes:
            raise ConfigError("api_keys_file holds no key, so nobody could ask; add a line name:sha256")

    def owner(self, authorization: str) -> str | None:
        """The name behind an Authorization header; None for a wrong or missing key. Takes equally long for any."""
        if not self.hashes:
            return "anyone"
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode()).hexdigest()
        found = None
        for name, known in self.hashes.items():
            if hmac.compare_digest(given, known):
                found = name
        return found if scheme.lower() == "bearer" else None
