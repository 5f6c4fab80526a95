"""The connections between processes: the end of one is noticed by all; a goodbye or a stranger is not an end."""

import queue
import socket
import time

import pytest

from vqrae_jax import peers


class Store:
    """The part of JAX's key-value store that is used."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        return self.values[key]


@pytest.fixture
def connect(monkeypatch):
    """Connects processes; returns them, and for each a queue that receives the name of a lost process."""
    monkeypatch.setattr(peers, "GRACE", (0.02, 0.01))
    store, processes = Store(), []

    def build(count=3):
        losses = [queue.Queue() for _ in range(count)]
        processes.extend(peers.Peers(i, store, "127.0.0.1", losses[i].put) for i in range(count))
        deadline = time.monotonic() + 30
        while len(processes[0]._names) < count - 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return processes, losses

    yield build
    for process in processes:
        process.close()


def end(process):
    """Closes the connections of a process without a goodbye, as the kernel does after kill -9."""
    for connection in process._names:
        connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("ended", [0, 2])
def test_the_end_of_a_process_is_noticed_by_all(connect, ended):
    processes, losses = connect()
    assert not processes[1].wait_for_loss(0.0)
    end(processes[ended])
    for i in {0, 1, 2} - {ended}:
        assert losses[i].get(timeout=30) == f"process {ended} (on 127.0.0.1)"


def test_a_goodbye_is_not_an_end(connect):
    processes, losses = connect()
    processes[1].close()
    end(processes[1])
    end(processes[2])
    assert losses[0].get(timeout=30) == "process 2 (on 127.0.0.1)"
    assert losses[1].empty()  # it is leaving by itself


@pytest.mark.parametrize("content", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\n", bytes(20)])
def test_a_connection_without_the_token_is_not_a_process(connect, content):
    processes, losses = connect(2)
    server = next(key.fileobj for key in processes[0]._selector.get_map().values() if key.data is None)
    with socket.create_connection(("127.0.0.1", server.getsockname()[1])) as stranger:
        stranger.sendall(content)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1) == b""
    assert len(processes[0]._names) == 1
    assert not processes[0].wait_for_loss(0.0)
    end(processes[1])
    assert losses[0].get(timeout=30) == "process 1 (on 127.0.0.1)"


def test_a_silent_host_is_probed(connect):
    processes, _ = connect(2)
    for process in processes:
        (connection,) = process._names
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = [getattr(socket, f"TCP_KEEP{name}") for name in ("IDLE", "INTVL", "CNT")]
        idle, interval, count = [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options]
        assert idle + count * interval == 60
