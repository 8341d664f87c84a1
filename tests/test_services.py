"""The test services themselves: what tests and notebooks rely on."""

import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest
import redis
from services import RedisCluster, RedisServer, wait_until


def test_a_server_keeps_what_it_was_told_to_keep():
    with RedisServer(appendonly=True, directives=["appendfsync always"]) as server:
        assert server.client().set("a", "1")
        server.nodes[0].kill()
        with pytest.raises(redis.exceptions.ConnectionError):
            server.client(retry=None).ping()
        server.nodes[0].restart()
        assert server.client().get("a") == b"1"
        folder = server.folder
    assert not folder.exists()


def test_a_snapshot_is_written_on_shut_down():
    with RedisServer(save="3600 1000000") as server:
        server.client().set("a", "1")
        server.nodes[0].shut_down()
        server.nodes[0].restart()
        assert server.client().get("a") == b"1"


def test_a_stopped_server_is_silent_until_it_is_resumed():
    with RedisServer() as server:
        server.nodes[0].stop()
        with pytest.raises(redis.exceptions.TimeoutError):
            server.client(socket_timeout=0.2, retry=None).ping()
        server.nodes[0].resume()
        assert server.client().ping()


def test_tls_and_users():
    with RedisServer(tls=True, user="trainer", password="s3cret") as server:
        assert server.client(decode_responses=True).acl_whoami() == "trainer"
        with pytest.raises(redis.exceptions.AuthenticationError):
            server.client(password="wrong", retry=None).ping()
        with pytest.raises(redis.exceptions.ConnectionError):
            server.client(ssl_ca_certs=server.tls.certificate("other_ca"), retry=None).ping()


def test_a_cluster_survives_the_loss_of_a_master():
    with RedisCluster(masters=3, replicas=1) as cluster:
        assert len(cluster.nodes) == 6
        client = cluster.client()
        for i in range(100):
            assert client.set(f"key{i}", i)
        assert client.wait(1, 20_000, target_nodes=redis.cluster.RedisCluster.PRIMARIES) is not None
        cluster.nodes[0].kill()
        with cluster.nodes[3].client() as replica:
            wait_until(lambda: replica.role()[0] == b"master", "the replica to take over")
        cluster.wait_until_healthy()
        assert [cluster.client().get(f"key{i}") for i in range(100)] == [b"%d" % i for i in range(100)]


def test_a_server_dies_with_a_process_that_is_killed():
    script = """
        import time
        from services import RedisServer
        with RedisServer() as server:
            print(server.nodes[0].pid, flush=True)
            time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=pathlib.Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pid = process.stdout.readline().strip()
        assert pathlib.Path(f"/proc/{pid}/cmdline").read_text().startswith("redis-server")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()

    def dead() -> bool:
        try:
            return ") Z " in pathlib.Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return True

    wait_until(dead, "the end of the server")


def test_a_server_that_does_not_start_shows_its_log():
    with pytest.raises(RuntimeError, match="no-such-directive"), RedisServer(directives=["no-such-directive 1"]):
        pass
