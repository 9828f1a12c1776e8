"""What an application says about its servers: addresses, and keys in the place of pinned ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from ensembler.protocol.errors import ConfigError
from ensembler.transport.keys import public_of

Servers: TypeAlias = str | Sequence[str | Sequence[str]]
ServerKey: TypeAlias = str | os.PathLike[str]
ServerKeys: TypeAlias = ServerKey | Mapping[str, ServerKey]


def server_addresses(server: Servers, operators: int, bundle: Path) -> tuple[tuple[str, ...], ...]:
    """Returns the addresses of each operator's replicas, the preferred one first.

    Args:
        server: as ``EdgeClient``.
        operators: for how many the bundle was exported.
        bundle: its folder.

    Raises:
        ConfigError: no addresses, not one entry for each operator, or an address twice for one operator.
    """
    entries = (server,) if isinstance(server, str) or not isinstance(server, Iterable) else tuple(server)
    found = [_replicas(entry) for entry in entries]
    if not all(found):
        raise ConfigError(
            f"server = {server!r}: give tcp://host:port, for several operators a list of such addresses, for "
            "replicas of one operator a tuple of addresses in the place of one"
        )
    if len(found) != operators:
        raise ConfigError(
            f"the bundle {bundle} was exported for {operators} operators, {len(found)} server "
            "addresses were given; give one for each, in the order of the export, and replicas of one operator as one "
            "entry: tcp://a:5555,tcp://b:5555"
        )
    for replicas in found:
        twice = {address for address in replicas if replicas.count(address) > 1}
        if twice:
            raise ConfigError(f"server = {server!r}: {min(twice)} is there twice; a replica is another server")
    return tuple(found)


def server_keys(
    server_key: ServerKeys | None, servers: Sequence[Sequence[str]], pinned: Sequence[str | None]
) -> list[tuple[str, str | None]]:
    """Returns every address with the public key that its server must have: the one that is given, else the pinned one.

    Args:
        server_key: as ``EdgeClient``.
        servers: the addresses of each operator.
        pinned: what the client's bundle pins for each operator.

    Raises:
        ConfigError: a key for an address that is none of the servers', or what is neither a path nor a key.
        KeyFileError: a file that is missing or no key.
    """
    known = [address for replicas in servers for address in replicas]
    if server_key is None:
        given = {}
    elif isinstance(server_key, Mapping):
        given = {address: public_of(key) for address, key in server_key.items()}
    else:
        given = dict.fromkeys(known, public_of(server_key))
    for address in given:
        if address not in known:
            raise ConfigError(f"a server_key was given for {address!r}, which is none of {', '.join(known)}")
    return [
        (address, given.get(address, key))
        for key, replicas in zip(pinned, servers, strict=True)
        for address in replicas
    ]


def _replicas(entry: object) -> tuple[str, ...]:
    """Returns the addresses of one entry, none of an impossible one."""
    several = entry.split(",") if isinstance(entry, str) else entry
    if not isinstance(several, Iterable):
        return ()
    addresses = tuple(several)
    return tuple(each.strip() for each in addresses) if all(isinstance(each, str) for each in addresses) else ()
