"""Real Redis servers for tests and notebooks, on free ports of 127.0.0.1, in temporary folders.

    with RedisServer() as server:
        server.client().set("a", 1)
        config["volatile_db"]["address"] = server.address

    with RedisCluster(masters=3, replicas=1) as cluster:  # every node says cluster_state:ok
        cluster.client().set("a", 1)
        cluster.nodes[0].kill()

The servers die with the context and, when started from the main thread, with the process however it ends. Needs
Debian's package redis-tools (its redis-check-rdb is the server under another name) or a redis-server 7.0 or later in
PATH, and openssl for TLS. cc/tests/redis_service.h is the same for native tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence

import redis
import redis.cluster

SLOTS = 16384
_FIRST_PORT, _LAST_PORT = 12000, 31999  # below the range of outgoing connections


class FreePort:
    """A TCP port that nobody else's test takes while the object lives: the UDP port of the same number is the token."""

    def __init__(self):
        for _ in range(1000):
            self.number = random.SystemRandom().randint(_FIRST_PORT, _LAST_PORT)
            self._token = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self._token.bind(("127.0.0.1", self.number))
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", self.number))
                return
            except OSError:
                self._token.close()
        raise RuntimeError(f"no free TCP port of 127.0.0.1 was found between {_FIRST_PORT} and {_LAST_PORT}")

    def close(self) -> None:
        self._token.close()


def wait_until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Polls until `done` returns true; connection errors count as false."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            if done():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.01)


@dataclasses.dataclass(frozen=True)
class Tls:
    """Certificates in a folder: ca, server (localhost, redis.localhost, 127.0.0.1), named (localhost), client, and a
    foreign other_ca."""

    folder: pathlib.Path

    def certificate(self, name: str) -> str:
        return str(self.folder / f"{name}.crt")

    def key(self, name: str) -> str:
        return str(self.folder / f"{name}.key")

    @classmethod
    def make(cls, folder: pathlib.Path) -> Tls:
        tls = cls(folder)
        server = "DNS:localhost,DNS:redis.localhost,IP:127.0.0.1"
        alternatives_of = {"ca": "", "other_ca": "", "server": server, "named": "DNS:localhost", "client": "DNS:client"}
        for name, alternatives in alternatives_of.items():
            command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
            command += ["-days", "2", "-subj", f"/O=hps tests/CN={name}"]
            command += ["-keyout", tls.key(name), "-out", tls.certificate(name)]
            if alternatives:
                command += ["-CA", tls.certificate("ca"), "-CAkey", tls.key("ca")]
                command += ["-addext", "basicConstraints=critical,CA:FALSE"]
                command += ["-addext", f"subjectAltName={alternatives}"]
            subprocess.run(command, check=True, capture_output=True)
        return tls


@dataclasses.dataclass(frozen=True)
class Options:
    """How servers are started. `user` "" is no authentication; another than "default" switches "default" off."""

    tls: Tls | None = None
    user: str = ""
    password: str = ""
    acl_lines: Sequence[str] = ()
    appendonly: bool = False
    save: str = ""
    maxmemory: int = 0
    directives: Sequence[str] = ()

    @property
    def secured(self) -> bool:
        return bool(self.user or self.password)


class RedisNode:
    """One redis-server process, restartable on its port and folder."""

    def __init__(self, folder: pathlib.Path, options: Options, cluster_lines: Sequence[str] = ()):
        self.options = options
        self.folder = folder
        self._reserved = [FreePort(), FreePort()]
        self.port, self.bus_port = (port.number for port in self._reserved)
        self._process: subprocess.Popen | None = None
        folder.mkdir(parents=True)
        self._write_config(cluster_lines)

    def _write_config(self, cluster_lines: Sequence[str]) -> None:
        options = self.options
        lines = ["bind 127.0.0.1", "daemonize no", 'logfile ""', "enable-debug-command local", f"dir {self.folder}"]
        lines += [f"appendonly {'yes' if options.appendonly else 'no'}", "save " + (options.save or '""')]
        lines += [f"maxmemory {options.maxmemory}"]
        if options.tls:
            lines += ["port 0", f"tls-port {self.port}", "tls-auth-clients yes", "tls-replication yes"]
            lines += ["tls-cluster yes", f"tls-ca-cert-file {options.tls.certificate('ca')}"]
            lines += [f"tls-cert-file {options.tls.certificate('server')}", f"tls-key-file {options.tls.key('server')}"]
        else:
            lines += [f"port {self.port}"]
        if cluster_lines:
            lines += [*cluster_lines, f"cluster-port {self.bus_port}"]
        if options.secured:
            user = options.user or "default"
            rights = f"on >{options.password}" if options.password else "on nopass"
            users = [] if user == "default" else ["user default off"]
            users += [f"user {user} {rights} ~* &* +@all", *options.acl_lines]
            (self.folder / "users.acl").write_text("\n".join(users) + "\n")
            lines += [f"aclfile {self.folder / 'users.acl'}", f"masteruser {user}"]
            lines += [f"masterauth {options.password}"] if options.password else []
        (self.folder / "redis.conf").write_text("\n".join([*lines, *options.directives]) + "\n")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Starts the process and waits until it answers, which is when its data is loaded."""
        server = shutil.which("redis-server") or shutil.which("redis-check-rdb")
        if server is None:
            raise FileNotFoundError("neither redis-server nor redis-check-rdb is in PATH; install redis-tools")
        with open(self.folder / "log", "ab") as log:
            # setpriv: the server gets SIGKILL when the thread that started it is gone.
            command = ["setpriv", "--pdeathsig", "KILL", "bash", "-c", 'exec -a redis-server "$@"', "-", server]
            self._process = subprocess.Popen(
                [*command, self.folder / "redis.conf"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        with self.client(retry=None) as client:
            wait_until(lambda: self._answers(client), f"redis-server at {self.address}")

    def _answers(self, client: redis.Redis) -> bool:
        if not self.running:
            raise RuntimeError(f"redis-server at {self.address} ended by itself; its log:\n{self.log()}")
        try:
            return client.ping()
        except redis.exceptions.BusyLoadingError:
            return False

    def kill(self) -> None:
        """SIGKILL; also of a stopped process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: connections live and nobody answers, until resume()."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kills it if it runs, and starts it on the same port with what it has on disk."""
        self.kill()
        self.start()

    def shut_down(self) -> None:
        """SIGTERM: writes what its `save` rules ask for, and ends."""
        self._process.terminate()
        self._process.wait(timeout=60)
        self._process = None

    def close(self) -> None:
        self.kill()
        for port in self._reserved:
            port.close()

    def client_arguments(self) -> dict:
        """Arguments for redis.Redis and redis.cluster.RedisCluster."""
        options = self.options
        arguments = {"host": "127.0.0.1", "port": self.port}
        if options.secured:
            arguments.update(username=options.user or "default", password=options.password)
        if options.tls:
            arguments.update(ssl=True, ssl_ca_certs=options.tls.certificate("ca"))
            arguments.update(ssl_certfile=options.tls.certificate("client"), ssl_keyfile=options.tls.key("client"))
        return arguments

    def client(self, **arguments) -> redis.Redis:
        return redis.Redis(**{"socket_timeout": 20, **self.client_arguments(), **arguments})


class _Service:
    """The folder and the nodes of a server or cluster; a context manager."""

    def __init__(self, tls: bool, **options):
        self._folder = tempfile.TemporaryDirectory(prefix="hps_redis_", ignore_cleanup_errors=True)
        self.folder = pathlib.Path(self._folder.name)
        self.tls = Tls.make(self.folder) if tls else None
        self.options = Options(tls=self.tls, **options)
        self.nodes: list[RedisNode] = []

    def _start(self) -> None:
        raise NotImplementedError

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self._folder.cleanup()

    @property
    def address(self) -> str:
        """As ps.json has it: all nodes, separated by commas."""
        return ",".join(node.address for node in self.nodes)


class RedisServer(_Service):
    """A single server, not in cluster mode; the process is `nodes[0]`. For the arguments see Options."""

    def __init__(self, tls: bool = False, **options):
        super().__init__(tls, **options)

    def _start(self) -> None:
        self.nodes.append(RedisNode(self.folder / "node0", self.options))
        self.nodes[0].start()

    def client(self, **arguments) -> redis.Redis:
        return self.nodes[0].client(**arguments)


class RedisCluster(_Service):
    """A cluster: the masters in the order of their slots, then `replicas` rounds of one replica for each master."""

    def __init__(self, masters: int = 3, replicas: int = 0, tls: bool = False, node_timeout_ms: int = 1500, **options):
        super().__init__(tls, **options)
        self.masters, self.replicas, self.node_timeout_ms = masters, replicas, node_timeout_ms

    def _start(self) -> None:
        lines = ["cluster-enabled yes", "cluster-config-file nodes.conf", "cluster-replica-validity-factor 0"]
        lines += [f"cluster-node-timeout {self.node_timeout_ms}", "repl-diskless-sync-delay 0"]
        for i in range(self.masters * (1 + self.replicas)):
            self.nodes.append(RedisNode(self.folder / f"node{i}", self.options, lines))
            self.nodes[-1].start()
        with contextlib.ExitStack() as stack:
            self._form([stack.enter_context(node.client(decode_responses=True)) for node in self.nodes])
        self.wait_until_healthy()

    def _form(self, clients: list[redis.Redis]) -> None:
        for i, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            if i < self.masters:
                first, end = SLOTS * i // self.masters, SLOTS * (i + 1) // self.masters
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            for other in self.nodes[:i]:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus_port)
        replicas = clients[self.masters :]
        for i, client in enumerate(clients):
            wait_until(lambda c=client: self._agrees(c), "the nodes to know each other")
            if i >= self.masters:
                master = clients[i % self.masters].execute_command("CLUSTER MYID")
                client.execute_command("CLUSTER", "REPLICATE", master)
        for client in replicas:
            wait_until(lambda c=client: c.info("replication").get("master_link_status") == "up", "replication")
        for client in clients:  # a master fails over only to replicas that the others know as such
            wait_until(
                lambda c=client: _count(c.cluster("nodes"), "slave") == len(replicas), "all nodes to know the replicas"
            )

    def _agrees(self, client: redis.Redis) -> bool:
        info = client.cluster("info")
        return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == len(self.nodes)

    def wait_until_healthy(self) -> None:
        """Waits until every running node says cluster_state:ok."""
        for node in self.nodes:
            if node.running:
                with node.client(decode_responses=True) as client:
                    wait_until(lambda c=client: c.cluster("info")["cluster_state"] == "ok", f"{node.address} to be ok")

    def client(self, **arguments) -> redis.cluster.RedisCluster:
        running = next(node for node in self.nodes if node.running)
        return redis.cluster.RedisCluster(**{"socket_timeout": 20, **running.client_arguments(), **arguments})


def _count(nodes: dict, flag: str) -> int:
    return sum(flag in node["flags"].split(",") for node in nodes.values())
