"""The backlog of a listener."""

import socket

from service.server.fd_passing import accept, has_pending


def test_connection_waits_until_it_is_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        assert not has_pending(listener)
        with socket.create_connection(listener.getsockname()):
            assert has_pending(listener)
            accepted = accept(listener)
            assert accepted
            accepted.close()
            assert not has_pending(listener)
