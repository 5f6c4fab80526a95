"""Connections between the processes of a run; the end of a connection shows that a process has ended.

Every process has one TCP connection to process 0. The kernel closes the connections of a process that is killed, and
answers probes for one that is busy, so neither a long compilation nor a blocked interpreter looks like an end.
"""

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

TIMEOUT = 10.0  # seconds to connect to process 0, and to send a message
SILENCE = 15, 15, 3  # seconds until a host is probed, between probes, and unanswered probes of a lost host: 60 s
# Seconds in which a process may end by itself after another one, as after an error that all raise: in process 0, and in
# the other processes, which must end first; JAX aborts them at the end of process 0, with stack traces.
GRACE = 5.0, 4.0
GOODBYE = b"\n"
_KEY = "vqrae_jax/peers"


class Peers:
    """The connections of this process, and a thread that watches them."""

    def __init__(self, index: int, client: Any, host: str, on_loss: Callable[[str], None]):
        """Connects to process 0, or accepts connections as process 0.

        Args:
          index: index of this process.
          client: client of JAX's key-value store, which passes the port and a token.
          host: host of process 0.
          on_loss: called with the name of a process that ended without `close`.

        Raises:
          OSError: process 0 is not reachable.
        """
        self._is_first, self._on_loss, self._grace = index == 0, on_loss, GRACE[index > 0]
        self._names: dict[socket.socket, str] = {}
        self._lost, self._closed = threading.Event(), False
        self._selector = selectors.DefaultSelector()
        if self._is_first:
            server, self._token = open_server(0), secrets.token_hex()
            client.key_value_set(_KEY, f"{server.getsockname()[1]} {self._token}")
            self._selector.register(server, selectors.EVENT_READ)
        else:
            port, token = client.blocking_key_value_get(_KEY, int(TIMEOUT * 1000)).split()
            connection = socket.create_connection((host, int(port)), TIMEOUT)
            connection.sendall(f"{token} {index}".encode())
            self._add(connection, f"process 0 (on {host})")
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def wait_for_loss(self, seconds: float) -> bool:
        """Returns whether a process has ended or ends within `seconds`."""
        return self._lost.wait(seconds)

    def close(self) -> None:
        """Leaves the run: the end of this process is not a loss to the others, nor theirs to this one."""
        self._closed = True
        self._send(GOODBYE)

    def _watch(self) -> None:
        while not self._lost.is_set():
            for key, _ in self._selector.select():
                if key.fileobj in self._names:
                    self._receive(key.fileobj)
                else:
                    self._accept(key.fileobj)
        self._send(self._name.encode())
        time.sleep(self._grace)
        if not self._closed:
            self._on_loss(self._name)

    def _send(self, message: bytes) -> None:
        for connection in list(self._names):
            with contextlib.suppress(OSError):  # that process has ended
                connection.sendall(message)

    def _accept(self, server: socket.socket) -> None:
        """Adds a process; a connection that does not know the token, as from a port scan, is closed."""
        with contextlib.suppress(OSError):
            connection, (host, *_) = server.accept()
            connection.settimeout(TIMEOUT)
            token, _, index = connection.recv(100).decode(errors="replace").partition(" ")
            if token == self._token:
                self._add(connection, f"process {index} (on {host.removeprefix('::ffff:')})")
            else:
                connection.close()

    def _add(self, connection: socket.socket, name: str) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
            for option, value in zip(("IDLE", "INTVL", "CNT"), SILENCE, strict=True):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option}"), value)
        self._names[connection] = name
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        """Handles a goodbye, the name of a lost process (from process 0), or the end of a connection."""
        try:
            message = connection.recv(1024)
        except OSError:
            message = b""
        if message == GOODBYE:
            self._selector.unregister(connection)
            del self._names[connection]
        elif not self._lost.is_set():
            if not (message or self._is_first):
                self._grace = 0.0
            self._name = message.decode() or self._names[connection]
            self._lost.set()


def open_server(port: int) -> socket.socket:
    """Returns a socket that listens on all interfaces at `port` (0: any that is free)."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
