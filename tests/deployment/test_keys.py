"""Certificates as TLS itself takes them, keys as Flower takes them, and who may read the files."""

from __future__ import annotations

import argparse
import os
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedlora_app.deployment import keys
from fedlora_app.deployment.keys import (
    CredentialError,
    check_request,
    fingerprint_certificate,
    fingerprint_public_key,
    issue_certificate,
    make_root,
    make_site_key,
    sign_request,
    write_secret,
)


@pytest.fixture(scope="module")
def root() -> tuple[bytes, bytes]:
    return make_root("tiny")


def handshake(tmp_path: Path, root: bytes, server: tuple[bytes, bytes], host: str) -> None:
    """Run a TLS handshake in memory, with the strictest checks that OpenSSL has."""
    (tmp_path / "key").write_bytes(server[0])
    (tmp_path / "crt").write_bytes(server[1])
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    here.verify_flags |= ssl.VERIFY_X509_STRICT
    here.load_verify_locations(cadata=root.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = here.wrap_bio(down, up, server_hostname=host)
    server_side = there.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (client, server_side):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("host", ["fed.example.org", "203.0.113.7", "2001:db8::7"])
def test_the_certificate_is_for_the_host_and_for_the_machine_itself(root, tmp_path, host):
    server = issue_certificate(*root, host)
    for name in (host, "localhost", "127.0.0.1", "::1"):
        handshake(tmp_path, root[1], server, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tmp_path, root[1], server, "other.example.org")


def test_another_authority_and_other_dates_are_refused(root, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, make_root("tiny")[1], issue_certificate(*root, "a.org"), "a.org")
    past, future = (datetime.now(UTC) + timedelta(days=days) for days in (-400, 2))
    for start, word in ((past, "expired"), (future, "not yet valid")):
        with pytest.raises(ssl.SSLCertVerificationError, match=word):
            handshake(tmp_path, root[1], issue_certificate(*root, "a.org", start=start), "a.org")


def test_the_authority_makes_no_other_authority(root, tmp_path):
    """Whoever has the SuperLink's key can sign nothing that a site accepts."""
    server_key, server = issue_certificate(*root, "a.org")
    forged = issue_certificate(server_key, server, "b.org")
    (tmp_path / "chain").mkdir()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "chain", root[1], (forged[0], forged[1] + server), "b.org")
    certificate = x509.load_pem_x509_certificate(root[1])
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value.ca and basic.value.path_length == 0
    assert isinstance(certificate.public_key().curve, ec.SECP384R1)


def test_a_renewed_certificate_needs_no_new_root(root, tmp_path):
    first, second = (issue_certificate(*root, "a.org") for _ in range(2))
    assert first[0] != second[0]
    handshake(tmp_path, root[1], second, "a.org")
    with pytest.raises(CredentialError, match="not that of its certificate"):
        issue_certificate(make_root("x")[0], root[1], "a.org")


@pytest.mark.parametrize("host", ["", "a b", "https://a.org", "a.org:8000", "10.0.0", "münchen.de"])
def test_what_is_no_host_is_refused(root, host):
    with pytest.raises(CredentialError, match="neither a host name nor an IP address"):
        issue_certificate(*root, host)


def test_fingerprints_are_those_that_openssl_shows(root, tmp_path):
    (tmp_path / "root.crt").write_bytes(root[1])
    command = ["openssl", "x509", "-in", tmp_path / "root.crt", "-noout", "-fingerprint", "-sha256"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("openssl is not here")
    digits = shown.partition("=")[2].strip().replace(":", "").lower()
    assert fingerprint_certificate(root[1]).replace(" ", "") == digits
    assert len(fingerprint_certificate(root[1]).split()) == 16


def test_flower_reads_both_halves_of_a_site_key(tmp_path):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    private, public = make_site_key()
    write_secret(tmp_path / "site.key", private)
    (tmp_path / "site.pub").write_text(public + "\n")
    arguments = argparse.Namespace(
        auth_supernode_private_key=str(tmp_path / "site.key"), auth_supernode_public_key=None
    )
    found = _try_setup_client_authentication(arguments)
    assert found is not None
    assert public_key_to_bytes(found[1]) == try_load_public_key(tmp_path / "site.pub")
    with pytest.raises(CredentialError, match="not an OpenSSH private key"):
        keys.load_site_key(b"nonsense")


def test_a_request_is_signed_by_its_own_key_over_its_own_id():
    (mine, line), (other, other_line) = make_site_key(), make_site_key()
    sent = sign_request(mine, "ayr").dump()
    read = check_request(dict(sent))
    assert (read.client, read.public_key) == ("ayr", line)
    assert read.fingerprint == fingerprint_public_key(line)
    assert read.fingerprint != fingerprint_public_key(other_line)
    for change in (
        {"client": "bute"},
        {"public_key": other_line},
        {"signature": sign_request(other, "ayr").signature},
        {"signature": "no base64"},
    ):
        with pytest.raises(CredentialError, match="not signed by its own key"):
            check_request(sent | change)
    for wrong in ({}, [], None, sent | {"more": 1}, sent | {"client": 3}, sent | {"format": True}):
        with pytest.raises(CredentialError, match="not a site's request"):
            check_request(wrong)
    with pytest.raises(CredentialError, match="of format 2"):
        check_request(sent | {"format": 2})
    with pytest.raises(CredentialError, match="not made of"):
        check_request(sign_request(mine, "../ayr").dump())


def test_a_signature_for_another_purpose_is_none_for_a_request():
    """Flower signs times with the same key; nobody can make a request of such a signature."""
    private, line = make_site_key()
    text = datetime.now(UTC).isoformat().encode()
    signature = keys.load_site_key(private).sign(text, ec.ECDSA(hashes.SHA256()))
    sent = sign_request(private, "ayr").dump()
    with pytest.raises(CredentialError):
        check_request(sent | {"signature": keys.base64.b64encode(signature).decode()})
    assert line == sent["public_key"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277])
def test_secrets_are_their_owner_s_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_secret(tmp_path / "new" / "folder" / "site.key", b"secret")
        keys.write_public(tmp_path / "new" / "root.crt", b"public")
    finally:
        os.umask(before)
    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert mode == {"new": 0o700, "folder": 0o700, "site.key": 0o600, "root.crt": 0o644}


def test_private_keys_have_no_password_and_certificates_are_of_version_3(root):
    key = load_pem_private_key(root[0], password=None)
    certificate = x509.load_pem_x509_certificate(root[1])
    assert key.public_key() == certificate.public_key()
    assert certificate.version is x509.Version.v3
