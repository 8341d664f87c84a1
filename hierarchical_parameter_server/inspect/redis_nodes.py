"""Connections to Redis for looking, never for writing: one to each node that holds keys, cluster or not.

Passwords come from the caller, who has them from the environment, a file or a prompt. They are in no message.
"""

from __future__ import annotations

import dataclasses
import os
import re
import ssl
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    HpsError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)

DEFAULT_PORT = 7000  # the predecessor's, of its default address 127.0.0.1:7000
PASSWORD_VARIABLE = "HPS_REDIS_PASSWORD"

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/@\[\]]+))(?::(?P<port>\d{1,5}))?")


@dataclasses.dataclass
class RedisOptions:
    """How to reach a server. Addresses are tried in order until one answers."""

    addresses: list[tuple[str, int]]
    user: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)
    tls: bool = False
    tls_ca: str | None = None  # file or folder of trusted certificates; None: those of the system
    tls_certificate: str | None = None
    tls_key: str | None = None
    # Asked for and checked at all nodes, as servers do; None: the host of the address that answers.
    tls_server_name: str | None = None
    timeout_seconds: float = 5.0
    config: str | None = None  # the ps.json that says all this; remedies then name its keys

    @property
    def place(self) -> str:
        return ",".join(address_text(address) for address in self.addresses)


def address_text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_addresses(text: str) -> list[tuple[str, int]]:
    """host[:port][,host[:port]...] with IPv6 addresses in brackets. InvalidArgumentError for anything else."""
    addresses = []
    for part in re.split(r"[,;]", text):
        match = _ADDRESS.fullmatch(part.strip())
        if not match or int(match["port"] or DEFAULT_PORT) not in range(1, 65536):
            raise InvalidArgumentError(f"{part.strip()!r} is no address; write host:port, with a port of 1 to 65535")
        addresses.append((match["v6"] or match["host"], int(match["port"] or DEFAULT_PORT)))
    return addresses


def parse_place(place: str) -> RedisOptions | None:
    """`redis://[user@]host[:port][,...]`, `rediss://` (TLS) or host:port; None where it is none of them.

    Raises:
        InvalidArgumentError: an address that is wrong, or one with a password in it, which the shell's history and the
            list of processes would show.
    """
    match = re.fullmatch(r"(rediss?)://(.*)", place)
    if not match:
        return RedisOptions(parse_addresses(place)) if re.fullmatch(r"[^/\s]+:\d+", place) else None
    authority = urlsplit("//" + match[2])
    login, at, hosts = authority.netloc.rpartition("@")
    if ":" in login:
        raise InvalidArgumentError(
            f"a password does not belong in an address, where others can see it; put it into the environment variable "
            f"{PASSWORD_VARIABLE}, and write {match[1]}://user@host:port"
        )
    if authority.path.strip("/") or authority.query or authority.fragment:
        raise InvalidArgumentError(f"{place}: nothing may follow host:port; there is one keyspace, number 0")
    return RedisOptions(parse_addresses(hosts), user=unquote(login) if at else None, tls=match[1] == "rediss")


class _NamedSSLConnection(redis.SSLConnection):
    """Asks for a server name that is not the host's: certificates of clusters are often made for one name."""

    tls_server_name: str

    def __init__(self, *, tls_server_name: str, **kwargs):
        super().__init__(**kwargs)
        self.tls_server_name = tls_server_name

    def _wrap_socket_with_ssl(self, sock):
        host, self.host = self.host, self.tls_server_name
        try:
            return super()._wrap_socket_with_ssl(sock)
        finally:
            self.host = host


def connect(options: RedisOptions, address: tuple[str, int]) -> redis.Redis:
    """A client of one node; nothing is sent yet."""
    arguments = {
        "host": address[0],
        "port": address[1],
        "username": options.user,
        "password": options.password,
        "socket_timeout": options.timeout_seconds,
        "socket_connect_timeout": options.timeout_seconds,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
    }
    if not options.tls:
        return redis.Redis(connection_pool=redis.ConnectionPool(**arguments))
    of_folder = options.tls_ca is not None and os.path.isdir(options.tls_ca)
    arguments |= {
        "ssl_ca_path" if of_folder else "ssl_ca_certs": options.tls_ca,
        "ssl_certfile": options.tls_certificate,
        "ssl_keyfile": options.tls_key,
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
    }
    for name in ("tls_ca", "tls_certificate", "tls_key"):
        path = getattr(options, name)
        if path is not None and not os.path.exists(path):
            raise InvalidArgumentError(f"{name}: {path} does not exist")
    kind = redis.SSLConnection
    if options.tls_server_name:
        kind = _NamedSSLConnection
        arguments["tls_server_name"] = options.tls_server_name
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=kind, **arguments))


def mapped(error: Exception, address: tuple[str, int], options: RedisOptions) -> HpsError:
    """An error of the package redis as one of ours, with the remedy."""
    where = f"Redis at {address_text(address)}"
    text = str(error)
    user = options.user or "default"
    causes = [error, error.__cause__, error.__context__]
    if isinstance(error, redis.AuthenticationError) or text.startswith(("WRONGPASS", "NOAUTH", "ERR invalid password")):
        given = "refuses the password of" if options.password else "wants a password for"
        remedy = (
            f"correct user_name and password (or password_env, password_file) in {options.config}, or set "
            f"{PASSWORD_VARIABLE}, which goes before them here"
            if options.config
            else f"set {PASSWORD_VARIABLE}, or --password-env, and redis://USER@host:port for another user"
        )
        return FailedPreconditionError(f"{where} {given} user {user}; {remedy}")
    if isinstance(error, redis.exceptions.NoPermissionError) or text.startswith("NOPERM"):
        return FailedPreconditionError(
            f"{where}: user {user} may not do what an inspection needs ({text}); allow +@read +ping +info "
            f"+cluster|slots +memory|usage and the keys hps*"
        )
    if isinstance(error, redis.BusyLoadingError):
        return UnavailableError(f"{where} is still loading its data; try again")
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        names = (
            f"tls_ca_certificate, tls_client_certificate, tls_client_key, tls_server_name_identification in "
            f"{options.config}"
            if options.config
            else "--tls-ca, --tls-cert, --tls-key, --tls-server-name"
        )
        return UnavailableError(f"{where}: TLS failed ({text}); see {names}")
    tls_hint = "set enable_tls" if options.config else "write rediss://"
    if isinstance(error, redis.TimeoutError):
        hint = "" if options.tls else f"; if it speaks TLS only, {tls_hint}"
        return DeadlineExceededError(f"{where} did not answer within {options.timeout_seconds:g} s{hint}")
    if isinstance(error, redis.exceptions.InvalidResponse):
        return UnavailableError(f"{where} answers, but not as a Redis server does")
    if isinstance(error, redis.ConnectionError):
        hint = "" if options.tls or "refused" in text else f"; if it speaks TLS only, {tls_hint}"
        reason = re.sub(r"^Error -?\d+ connecting to \S+\. (.+?)\.?$", r"\1", text)  # the address is said already
        return UnavailableError(f"{where} cannot be reached ({reason}){hint}")
    if isinstance(error, redis.ResponseError) and "unknown command" in text.lower():
        return UnimplementedError(f"{where} lacks a command ({text})")
    return UnavailableError(f"{where}: {text}")


@dataclasses.dataclass
class Nodes:
    """The nodes that hold keys, those that do not answer by their address, and what the first said of itself."""

    clients: dict[str, redis.Redis]
    unreachable: dict[str, str]
    info: dict
    cluster: bool

    def close(self) -> None:
        for client in self.clients.values():
            client.close()


def find_nodes(options: RedisOptions) -> Nodes:
    """Connects to the first address that answers and to all nodes of its cluster that own slots.

    Raises:
        HpsError: no address answers (each is named), or the user is refused.
    """
    failures: list[HpsError] = []
    for address in options.addresses:
        client = connect(options, address)
        try:
            info = client.info()
            break
        except (redis.RedisError, OSError) as error:
            client.close()
            failure = mapped(error, address, options)
            if isinstance(failure, FailedPreconditionError):
                raise failure from error
            failures.append(failure)
    else:
        if len(failures) == 1:
            raise failures[0]
        raise UnavailableError(f"none of the {len(failures)} addresses answers: {'; '.join(map(str, failures))}")
    if not info.get("cluster_enabled"):
        return Nodes({address_text(address): client}, {}, info, False)
    nodes = Nodes({}, {}, info, True)
    # Nodes tell numeric addresses of each other, for which certificates are seldom made.
    of_nodes = dataclasses.replace(options, tls_server_name=options.tls_server_name or address[0])
    try:
        owners = _slot_owners(client, address)
    except redis.RedisError as error:
        raise mapped(error, address, options) from error
    finally:
        client.close()
    for owner in owners:
        node = connect(of_nodes, owner)
        try:
            node.ping()
            nodes.clients[address_text(owner)] = node
        except (redis.RedisError, OSError) as error:
            node.close()
            nodes.unreachable[address_text(owner)] = str(mapped(error, owner, options))
    return nodes


def _slot_owners(client: redis.Redis, asked: tuple[str, int]) -> list[tuple[str, int]]:
    """The masters that own slots."""
    owners = {}  # an ordered set
    for _, _, (host, port, *_), *_ in client.execute_command("CLUSTER SLOTS"):
        host = host.decode() if isinstance(host, bytes) else host
        owners[host if host and host != "?" else asked[0], int(port)] = None  # without a name: the one that was asked
    return list(owners)
