"""Keys and certificates: a private authority, the SuperLink's certificate, and sites' key pairs.

Everything is NIST P-384. Certificates are X.509 v3 as RFC 5280 (sections 4.1 and 4.2) asks of a
certificate authority and of a server; site keys are in OpenSSH's format, which Flower reads.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora_app.config.schema import SAFE_NAME
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import make_private_dir, write_atomically

ROOT_DAYS = 10 * 365
SERVER_DAYS = 365
BACKDATED = timedelta(hours=1)
"""So that a new certificate is valid for a site whose clock is behind."""
OWN_NAMES = ("localhost", "127.0.0.1", "::1")
"""How the coordinator's own commands reach the SuperLink."""
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*")
REQUEST_FORMAT = 1
MAX_REQUEST_BYTES = 1 << 16


class CredentialError(UserError):
    """A key, certificate or request cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Request:
    """What a site asks to be let in with, after its signature was found right."""

    client: str
    public_key: str
    """One line, as OpenSSH writes it, without a comment."""
    signature: str

    def dump(self) -> dict[str, Any]:
        """Return the request as it is sent."""
        return {"format": REQUEST_FORMAT, **vars(self)}

    @property
    def fingerprint(self) -> str:
        """Of the key, to be compared out of band."""
        return fingerprint_public_key(self.public_key)


def make_root(name: str, days: int = ROOT_DAYS) -> tuple[bytes, bytes]:
    """Return a new authority's private key and its certificate, both PEM.

    Args:
        name: of the experiment, to tell authorities apart.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(f"fedlora-app {name} root")
    builder = (
        _builder(subject, subject, key.public_key(), days)
        # No authority below it: it signs the SuperLink's certificate and nothing else.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return _private_pem(key), _sign(builder, key)


def issue_certificate(
    root_key: bytes, root: bytes, host: str, days: int = SERVER_DAYS, start: datetime | None = None
) -> tuple[bytes, bytes]:
    """Return a new private key of the SuperLink and its certificate by this authority, both PEM.

    Args:
        host: the name or address by which sites reach it.
        days: of validity, from ``start``, which is now by default.

    Raises:
        CredentialError: the host is neither a name nor an address, or the root cannot be read.
    """
    try:
        authority = load_pem_private_key(root_key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CredentialError("The authority's private key cannot be read.") from None
    issuer = load_certificate(root)
    if not isinstance(authority, ec.EllipticCurvePrivateKey) or (
        authority.public_key() != issuer.public_key()
    ):
        raise CredentialError("The authority's private key is not that of its certificate.")
    key = ec.generate_private_key(ec.SECP384R1())
    names = [general_name(name) for name in dict.fromkeys((host, *OWN_NAMES))]
    builder = (
        _builder(issuer.subject, _name("fedlora-app SuperLink"), key.public_key(), days, start)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
    )
    return _private_pem(key), _sign(builder, authority)


def general_name(host: str) -> x509.GeneralName:
    """Return a host as certificates name it.

    Raises:
        CredentialError: it is neither an IP address nor a host name.
    """
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    if not HOST_NAME.fullmatch(host) or host.replace(".", "").isdigit():
        raise CredentialError(
            f'"{host}" is neither a host name nor an IP address. Expected what sites reach the '
            "SuperLink by, without a port: fed.example.org, 203.0.113.7 or 2001:db8::7."
        )
    return x509.DNSName(host)


def load_certificate(pem: bytes) -> x509.Certificate:
    """Read a PEM certificate.

    Raises:
        CredentialError: it is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise CredentialError("This is not a PEM certificate.") from None


def fingerprint_certificate(pem: bytes) -> str:
    """Return the sha256 of a certificate, as ``openssl x509 -fingerprint -sha256`` has it."""
    return group_digits(load_certificate(pem).fingerprint(hashes.SHA256()).hex())


def fingerprint_public_key(line: str) -> str:
    """Return the sha256 of a public key (its DER SubjectPublicKeyInfo), in groups."""
    key = _load_public_key(line)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return group_digits(digest.finalize().hex())


def group_digits(digits: str) -> str:
    """Return hex digits in groups of four, which two people can read to each other."""
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def make_site_key() -> tuple[bytes, str]:
    """Return a site's private key (OpenSSH, no password) and its public key as one line.

    There is no password because ``flower-supernode`` asks for none: the file's rights protect it.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, public_line(key.public_key())


def load_site_key(private: bytes) -> ec.EllipticCurvePrivateKey:
    """Read a site's private key.

    Raises:
        CredentialError: it is none, or has a password.
    """
    try:
        key = load_ssh_private_key(private, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CredentialError(
            "This is not an OpenSSH private key of a NIST curve without a password."
        )
    return key


def sign_request(private: bytes, client: str) -> Request:
    """Return what a site sends to the coordinator: id, public key, and proof of the private one."""
    key = load_site_key(private)
    line = public_line(key.public_key())
    signature = key.sign(_signed_text(client, line), ec.ECDSA(hashes.SHA384()))
    return Request(client, line, base64.b64encode(signature).decode())


def check_request(request: Any) -> Request:
    """Return a request whose signature was made with its own key, over its own id.

    Raises:
        CredentialError: it was not, or is no request.
    """
    fields = {"format": int, "client": str, "public_key": str, "signature": str}
    if not isinstance(request, dict) or {k: type(v) for k, v in request.items()} != fields:
        raise CredentialError(
            "This is not a site's request: expected the request.json that "
            '"fedlora deploy request" has written, with format, client, public_key and signature.'
        )
    if request["format"] != REQUEST_FORMAT:
        raise CredentialError(
            f"This request is of format {request['format']} and this version reads "
            f"{REQUEST_FORMAT}. Install the same fedlora-app at both ends."
        )
    client, line = request["client"], request["public_key"]
    if not re.fullmatch(SAFE_NAME, client):
        raise CredentialError("The request's client id is not made of letters, digits, . _ and -.")
    key = _load_public_key(line)
    try:
        signature = base64.b64decode(request["signature"], validate=True)
        key.verify(signature, _signed_text(client, line), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, binascii.Error, ValueError):
        raise CredentialError(
            f"The request of {client} is not signed by its own key: it was changed on its way, or "
            "made by somebody who does not have that key. Ask the site to send it again."
        ) from None
    return Request(client, public_line(key), request["signature"])


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, whatever the umask is.

    Its folder, where it is missing, is as private.
    """
    make_secret_dir(path.parent)
    write_atomically(path, content)  # 0600 from its first byte on, or less by the umask
    path.chmod(0o600)


def write_public(path: Path, content: bytes) -> None:
    """Write a file that tells nobody anything; who may enter its folder may read it."""
    make_secret_dir(path.parent)
    write_atomically(path, content)
    path.chmod(0o644)


def make_secret_dir(folder: Path) -> None:
    """Create a folder that only its owner can enter, whatever the umask is; others stay as are."""
    if folder.is_dir():
        return
    before = os.umask(0o077)
    try:
        make_private_dir(folder)
    finally:
        os.umask(before)


def keep_out_of_git(folder: Path) -> None:
    """Have git pass over a folder with keys, which may lie in a checkout."""
    write_public(folder / ".gitignore", b"*\n")


def describe_rights(path: Path) -> str:
    """Return how others than the owner may use a file or folder, empty if they may not."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{mode:04o}" if mode & 0o077 else ""


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    start: datetime | None = None,
) -> x509.CertificateBuilder:
    start = (start or datetime.now(UTC)).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATED)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _sign(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_line(key: ec.EllipticCurvePublicKey) -> str:
    """Return a public key as one line in OpenSSH's format, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _load_public_key(line: str) -> ec.EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise CredentialError("The public key is not an OpenSSH line of type ecdsa-sha2-nistp384.")
    return key


def _signed_text(client: str, line: str) -> bytes:
    """Return what a request signs, which no signature for another purpose can be taken for."""
    return f"fedlora deploy request\n{client}\n{line}\n".encode()
