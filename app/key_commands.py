"""`passion-server keys`: make, list and revoke API keys."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.endings import REFUSED, give_up, settings_with

if TYPE_CHECKING:
    from app.jobs.keys import KeyStore

keys = typer.Typer(
    name="keys",
    help="API keys: who may send images and fetch masks. They are kept in the service's Redis: of REDIS_URL, or of the "
    "`passion-server up` that runs with this store.",
    no_args_is_help=True,
)

Store = Annotated[
    Path | None, typer.Option(help="Store of a running `passion-server up`. [PASSION_STORE]", show_default=False)
]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for; for the list alone.")],
    days: Annotated[float | None, typer.Option(help="Days until it expires; else it does not.", min=0.001)] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Its jobs wait behind all others, for some time.")] = False,
    store: Store = None,
) -> None:
    """Make a key and print it, this once, alone on standard output."""
    from pydantic import ValidationError

    with _keys(store) as kept:
        try:
            _, text = kept.create(name, days, batch)
        except ValidationError:
            give_up("a key's name has 1 to 64 characters, none of them a control character", REFUSED)
        except OverflowError:
            give_up("no key lasts that many days", REFUSED)
    print(text)
    print("This is shown once; only its hash is kept. Clients read it from PASSION_KEY.", file=sys.stderr)


@keys.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False, store: Store = None
) -> None:
    """List the keys: id, name, when made, until when, for which jobs, state."""
    with _keys(store) as kept:
        found = kept.all()
    if as_json:
        rows = [key.model_dump(mode="json", exclude={"sha256"}) | {"state": key.state} for key in found]
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("id", "name", "created", "expires", "jobs", "state")
    for key in found:
        table.add_row(
            key.id, Text(key.name), _day(key.created), _day(key.expires), "batch" if key.batch else "any", key.state
        )
    Console().print(table)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")], store: Store = None
) -> None:
    """End a key at once."""
    from app.jobs.keys import UnknownKeyError

    with _keys(store) as kept:
        try:
            key = kept.revoke(key_id)
        except UnknownKeyError:
            give_up(f"no key has the id {key_id}; `passion-server keys list` shows them", REFUSED)
    print(f"{key.id} ({key.name}) is revoked.")


def _day(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"


@contextmanager
def _keys(store: Path | None) -> Iterator[KeyStore]:
    """The keys of the service that is meant. Ends the command if its Redis does not answer."""
    from redis import RedisError

    from app.jobs.connection import connect
    from app.jobs.keys import KeyStore
    from app.redis_server import kept_url

    settings = settings_with(store=store)
    try:
        # As `up` asks: without a Redis of the user's it has started one, which only its store knows.
        given = os.environ.get("PASSION_REDIS_URL") or os.environ.get("REDIS_URL")
        own = None if given else kept_url(settings.store)
        if store is not None and not given and own is None:
            give_up(f"no Redis of `passion-server up` has kept its records in {store}; set REDIS_URL to another one")
        if own is not None:
            settings = settings.model_copy(update={"redis_url": own})
        with connect(settings) as client:
            yield KeyStore(client)
    except OSError as error:
        give_up(f"cannot read where the service's Redis is: {error.strerror}")
    except RedisError:
        # Without the address: it may hold a password.
        give_up("Redis does not answer: start the service, and name its Redis by REDIS_URL or its store by --store")
