"""What is said of servers that are not the coordinator's SuperLink, asked over real sockets."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import pytest

from fedlora_app.deployment.connection import examine_certificate, examine_connection
from fedlora_app.deployment.keys import issue_certificate, make_root, make_site_key
from fedlora_app.deployment.proxies import find_proxy


@contextmanager
def serving(
    tmp_path, certificate: tuple[bytes, bytes] | None, address: str = "127.0.0.1"
) -> Iterator[int]:
    """Answer connections on loopback with a handshake, or with plain text; yield the port."""
    context = None
    if certificate is not None:
        (tmp_path / "key").write_bytes(certificate[0])
        (tmp_path / "crt").write_bytes(certificate[1])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    with socket.create_server((address, 0)) as server:

        def answer() -> None:
            with suppress(OSError):  # the test has ended
                while True:
                    connection, _ = server.accept()
                    with suppress(OSError), connection:
                        if context is None:
                            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        else:
                            context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize(
    "days, level, words",
    [(-366, "fault", "has expired"), (2, "fault", "is not valid yet"), (0, "ok", "valid for 36")],
)
def test_dates(tmp_path, days, level, words):
    root = make_root("tiny")
    start = datetime.now(UTC) + timedelta(days=days)
    with serving(tmp_path, issue_certificate(*root, "127.0.0.1", start=start)) as port:
        found = examine_certificate("127.0.0.1", port, root[1].decode())
    assert found.level == level and words in found.what


def test_a_certificate_that_ends_soon(tmp_path):
    root = make_root("tiny")
    with serving(tmp_path, issue_certificate(*root, "127.0.0.1", days=10)) as port:
        found = examine_certificate("127.0.0.1", port, root[1].decode())
    assert found.level == "warning" and "valid for 9 days" in found.what
    assert "fedlora deploy renew" in found.advice


def test_another_host(tmp_path):
    root = make_root("tiny")
    certificate = issue_certificate(*root, "fed.example.org")
    with serving(tmp_path, certificate, "127.0.0.2") as port:
        found = examine_certificate("127.0.0.2", port, root[1].decode())
    assert found.level == "fault" and "is for another address" in found.what
    with serving(tmp_path, certificate) as port:
        assert examine_certificate("localhost", port, root[1].decode()).level == "ok"


def test_another_authority_and_plain_text(tmp_path):
    root, other = make_root("tiny")[1].decode(), make_root("tiny")
    with serving(tmp_path, issue_certificate(*other, "127.0.0.1")) as port:
        found = examine_certificate("127.0.0.1", port, root)
    assert found.level == "fault" and "not by the authority" in found.what
    assert "by telephone" in found.advice
    with serving(tmp_path, None) as port:
        found = examine_certificate("127.0.0.1", port, root)
    assert found.level == "fault" and "does not speak TLS" in found.what


def test_nobody_there():
    root, key = make_root("tiny")[1].decode(), make_site_key()[0]
    found = list(examine_connection("no-such-host.invalid", 1, root, key))
    assert [(f.level, f.name) for f in found] == [("fault", "name")]
    found = list(examine_connection("127.0.0.1", 1, root, key))
    assert [(f.level, f.name) for f in found] == [("ok", "name"), ("fault", "port")]


def test_a_proxy_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.example.org:3128")
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert find_proxy("fed.example.org") == "proxy.example.org:3128"
    root, key = make_root("tiny")[1].decode(), make_site_key()[0]
    first = next(examine_connection("fed.invalid", 1, root, key))
    assert first.level == "warning" and "NO_PROXY=fed.invalid" in first.advice
    assert "secret" not in str(first)
