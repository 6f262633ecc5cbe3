"""`Settings`: everything that can be set from outside, each by one environment variable."""

from __future__ import annotations

import importlib.util
import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, cast
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.jobs.lines import NEEDS, Needs

MiB = 1 << 20
GiB = 1 << 30

Bytes = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


def packaged_checkpoints() -> Path:
    """Where the installed `models` package keeps its checkpoints; found without importing it, and so without torch."""
    spec = importlib.util.find_spec("models")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0] if places else "models") / "checkpoints"


def default_store() -> Path:
    """A folder of this user's own, so that jobs never lie where others of the machine can read them."""
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "passion-seg" / "jobs"


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this machine's own and nobody else's."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listed(text: str) -> tuple[str, ...]:
    """The names in a setting that holds several, in lower case."""
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


class Settings(BaseSettings):
    """Read from `PASSION_<NAME>`; a value that cannot be right stops the process at its start, naming the variable."""

    model_config = SettingsConfigDict(env_prefix="PASSION_", env_ignore_empty=True, frozen=True)

    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        validation_alias=AliasChoices("PASSION_REDIS_URL", "REDIS_URL", "redis_url"),
        description="The Redis that holds job records and the queue (`REDIS_URL` is read too). One database per stack.",
    )
    redis_master: str = Field(
        default="mymaster", description="Name of the master, where the Redis address is that of Sentinels."
    )
    store: Path = Field(
        default_factory=default_store,
        description="Folder of the jobs' files, shared by API and workers; with a bucket, this machine's own, for what "
        "is on its way.",
    )
    bucket: str = Field(
        default="",
        pattern=r"^(s3://[a-z0-9][a-z0-9.-]+(/[\w.-]+)*)?$",
        description="s3://BUCKET/PREFIX: where the jobs' files are instead, at any S3-compatible store.",
    )
    link_seconds: int = Field(
        default=0,
        ge=0,
        le=7 * 86400,
        description="With a bucket: seconds for which links to results there are good; 0: they come by way of the API.",
    )
    models: Path = Field(
        default_factory=packaged_checkpoints, description="Folder of checkpoint folders, one per model served."
    )
    default_model: str | None = Field(
        default=None, description="Model for requests that name none. Unset: the only one there is."
    )

    host: str = Field(default="127.0.0.1", description="Address the API listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port of the API; 0 takes a free one.")
    auth: Literal["auto", "on", "off"] = Field(
        default="auto", description="Whether requests need an API key; auto asks for one beyond loopback."
    )
    allowed_hosts: str = Field(
        default="",
        description="Names the API answers under, comma-separated. Unset: loopback's alone without keys, else any.",
    )
    cors_origins: str = Field(
        default="",
        description="Origins whose web pages may use the API, such as https://viewer.example; comma-separated.",
    )

    uploads: int = Field(default=64, ge=1, description="Uploads received at the same time; more are answered 503.")
    upload_timeout: Seconds = Field(default=600, description="Seconds one request's body may take.")
    idle_timeout: Seconds = Field(
        default=30,
        description="Seconds a connection may make no headway: a request's head, a body's next byte, an answer.",
    )
    connections: int = Field(default=512, ge=1, description="Connections open at the same time; more are answered 503.")

    max_file_bytes: Bytes = Field(default=256 * MiB, description="Bytes of one uploaded file, as sent.")
    max_request_bytes: Bytes = Field(default=GiB, description="Bytes of one request.")
    max_uncompressed_bytes: Bytes = Field(default=GiB, description="Bytes one file may decompress to.")
    max_archive_files: int = Field(default=4096, ge=1, description="Files that one zip of a DICOM series may hold.")
    max_voxels: int = Field(default=1 << 26, gt=0, description="Voxels of one volume (2^26 is 512 x 512 x 256).")
    min_axis: int = Field(default=2, ge=1, description="Voxels that each axis must have at least.")
    min_spacing: float = Field(default=0.1, gt=0, description="Smallest voxel edge, mm.")
    max_spacing: float = Field(default=30.0, gt=0, description="Largest voxel edge, mm.")
    min_overlap: float = Field(
        default=0.5, ge=0, le=1, description="Share of the smaller of two fields of view that both must cover."
    )
    checks: int = Field(default=2, ge=1, description="Uploads whose voxels are checked at the same time.")

    soft_time_limit: Seconds = Field(default=1800, description="Seconds a job may run before it fails with a reason.")
    hard_time_limit: Seconds = Field(default=1860, description="Seconds after which its process is killed.")
    max_attempts: int = Field(default=3, ge=1, description="Times a job is started before it is given up.")
    lease: Seconds = Field(
        default=15, description="Seconds without a sign of life after which a running job is given to another worker."
    )
    queue_limit: int = Field(default=200, ge=1, description="Jobs that may wait; beyond, uploads are answered 503.")
    jobs_per_key: int = Field(
        default=50, ge=1, description="Jobs of one API key that may wait or run; beyond, uploads are answered 429."
    )
    needs: str = Field(
        default="",
        description="What models are to run on: MODEL=cuda, MODEL=cpu or MODEL=any, comma-separated; * for all others.",
    )
    batch_wait: Seconds = Field(
        default=1800, description="Seconds after which a waiting job of priority batch counts as interactive."
    )
    unserved_limit: float = Field(
        default=0, ge=0, description="Seconds after which a job that no worker serves fails; 0 lets it wait."
    )
    streams: int = Field(default=100, ge=1, description="Readers of job events at the same time, per API process.")
    retention: Seconds = Field(
        default=7 * 86400, description="Seconds after its end at which a job is removed, record and files together."
    )
    cancelled_kept: Seconds = Field(default=3600, description="Seconds the record of a cancelled job stays readable.")
    orphans_kept: Seconds = Field(
        default=3600, description="Seconds after which files on the store that belong to no job are removed."
    )
    stop_grace: Seconds = Field(default=5, description="Seconds a stopping process has for what it is doing.")
    redis_timeout: Seconds = Field(default=3, description="Seconds to wait for Redis before answering 503.")

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    overlap: float = Field(
        default=0.5,
        ge=0,
        le=0.9,
        description="Share of a window that the next one covers again; 0.25 is faster and less accurate.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the encoders' arithmetic; bfloat16 is for a GPU that has it."
    )
    serve_models: str = Field(
        default="", description="Models whose jobs a worker takes, comma-separated. Unset: all that it has."
    )
    serve_devices: str = Field(
        default="",
        description="Kinds of needs whose jobs a worker takes: any, cuda, cpu. Unset: any, and what its device is.",
    )
    concurrency: int = Field(
        default=1, ge=1, description="Child processes of one worker, one per GPU: child i of `cuda` takes GPU i."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Least level logged.")

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.hard_time_limit <= self.soft_time_limit:
            raise ValueError("PASSION_HARD_TIME_LIMIT must be longer than PASSION_SOFT_TIME_LIMIT")
        if self.max_file_bytes > self.max_request_bytes:
            raise ValueError("PASSION_MAX_FILE_BYTES must not be larger than PASSION_MAX_REQUEST_BYTES")
        kinds = {urlsplit(address).scheme for address in self.redis_url.split(";")}
        if len(kinds) > 1 or not kinds <= {"redis", "rediss", "unix", "sentinel"}:
            raise ValueError(
                "PASSION_REDIS_URL must be redis://HOST:PORT/0, rediss:// for TLS, unix:// for a socket, or "
                "sentinel://HOST:26379;sentinel://HOST:26379/0"
            )
        if self.orphans_kept <= self.upload_timeout:
            raise ValueError("PASSION_ORPHANS_KEPT must be longer than PASSION_UPLOAD_TIMEOUT")
        if self.min_spacing >= self.max_spacing:
            raise ValueError("PASSION_MIN_SPACING must be smaller than PASSION_MAX_SPACING")
        for model, need in self._needs.items():
            if not model or need not in NEEDS:
                raise ValueError("PASSION_NEEDS must be MODEL=cuda, MODEL=cpu or MODEL=any, comma-separated")
        if not set(listed(self.serve_devices)) <= set(NEEDS):
            raise ValueError("PASSION_SERVE_DEVICES must name any, cuda or cpu, comma-separated")
        for origin in listed(self.cors_origins):
            if not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise ValueError(
                    "PASSION_CORS_ORIGINS must name origins, such as https://viewer.example, without a path"
                )
        return self

    @property
    def guarded(self) -> bool:
        """Whether requests need an API key."""
        return self.auth == "on" or (self.auth == "auto" and not is_loopback(self.host))

    def needs_of(self, model: str) -> Needs:
        """What a model is to run on."""
        needs = self._needs
        return cast(Needs, needs.get(model, needs.get("*", "any")))

    @property
    def _needs(self) -> dict[str, str]:
        pairs = (pair.partition("=") for pair in self.needs.split(",") if pair.strip())
        return {model.strip(): need.strip().lower() for model, _, need in pairs}

    def environment(self) -> dict[str, str]:
        """The variables that make a child process read these very settings."""
        return {f"PASSION_{name.upper()}": str(value) for name, value in self.model_dump().items() if value is not None}
