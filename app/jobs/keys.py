"""`KeyStore`: the API keys in Redis, by id, and never the keys themselves."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import datetime, timedelta
from typing import Annotated, cast

import redis
from pydantic import BaseModel, ConfigDict, Field

from app.jobs.record import now

KEYS = "passion:keys"
"""Hash: key id -> JSON of an `ApiKey`."""

_FORM = re.compile(r"passion_([0-9a-f]{8})_([A-Za-z0-9_-]{43})", re.ASCII)
_NOBODYS = hashlib.sha256(secrets.token_bytes(32)).hexdigest()

KeyName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]


class UnknownKeyError(LookupError):
    """No key has this id."""


class ApiKey(BaseModel):
    """What is kept of a key: enough to recognise it, not enough to use it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    name: KeyName
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    batch: bool = False
    """Whether its jobs have priority batch, whatever they ask for."""
    sha256: str

    @property
    def state(self) -> str:
        """active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now() else "active"


def _hash(secret: str) -> str:
    # A plain SHA-256, neither salted nor slow: those make guesses expensive, and a random secret of 256 bits cannot be
    # guessed however cheap a guess is. A request must not pay for what protects passwords.
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyStore:
    """Makes, lists, revokes and recognises keys. All methods raise `redis.RedisError` when Redis does not answer."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def create(self, name: str, days: float | None = None, batch: bool = False) -> tuple[ApiKey, str]:
        """A new key's record, and the key: nobody can read it again. `days` until it expires, else it does not.
        `batch`: for jobs of that priority alone."""
        created = now()
        expires = None if days is None else created + timedelta(days=days)
        secret = secrets.token_urlsafe(32)
        while True:
            key = ApiKey(
                id=secrets.token_hex(4), name=name, created=created, expires=expires, batch=batch, sha256=_hash(secret)
            )
            if self._redis.hsetnx(KEYS, key.id, key.model_dump_json()):
                return key, f"passion_{key.id}_{secret}"

    def all(self) -> list[ApiKey]:
        """Every key ever made, oldest first."""
        found = cast("dict[str, str]", self._redis.hgetall(KEYS))
        return sorted((ApiKey.model_validate_json(raw) for raw in found.values()), key=lambda key: key.created)

    def revoke(self, key_id: str) -> ApiKey:
        """End a key at once; a key that is revoked already stays so. Raises `UnknownKeyError`."""
        key = self._get(key_id)
        if key is None:
            raise UnknownKeyError(key_id)
        revoked = key if key.revoked else key.model_copy(update={"revoked": now()})
        self._redis.hset(KEYS, key_id, revoked.model_dump_json())
        return revoked

    def verify(self, text: str) -> ApiKey | None:
        """The key that `text` is, if it may be used now. Why not, if not, is told to nobody."""
        form = _FORM.fullmatch(text)
        if form is None:
            return None
        key = self._get(form[1])
        # Compared also where there is nothing to compare with, so that the time says nothing of which ids exist.
        same = hmac.compare_digest(key.sha256 if key else _NOBODYS, _hash(form[2]))
        return key if key and same and key.state == "active" else None

    def is_batch(self, key_id: str) -> bool:
        """Whether a key is for jobs of priority batch alone."""
        key = self._get(key_id) if key_id else None
        return key is not None and key.batch

    def _get(self, key_id: str) -> ApiKey | None:
        raw = cast("str | None", self._redis.hget(KEYS, key_id))
        return None if raw is None else ApiKey.model_validate_json(raw)
