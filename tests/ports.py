"""Where processes of one test find each other."""

import socket


def free_address() -> str:
    """HOST:PORT that nobody listens at. The system gives the port, so that tests side by side do
    not meet at one.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"
