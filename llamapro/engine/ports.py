"""Ports of this host that nothing listens on, for jobs that meet on it alone."""

import socket


def free_ports(count: int) -> list[int]:
    """Different TCP ports on which nobody listens now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def free_port() -> int:
    """A TCP port on which nobody listens now."""
    return free_ports(1)[0]
