"""Ports that a job may use at once."""

import socket

from llamapro.engine.ports import free_port, free_ports


def test_free_ports_differ_and_can_all_be_listened_on_at_once() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    listening = [socket.create_server(("127.0.0.1", port)) for port in ports]
    for one in listening:
        one.close()


def test_a_port_in_use_is_not_free() -> None:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(20)]
    assert free_port() not in {one.getsockname()[1] for one in taken}
    for one in taken:
        one.close()
