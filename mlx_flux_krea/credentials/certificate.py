"""The certificate and the private key that sign pictures: this installation's own, or files of the user's.

    HOME/credentials/certificate.pem   the certificate "flux-krea local" and the root that issued it, for anybody
    HOME/credentials/key.pem           its private key, for its owner alone

Both are made once, when a picture is first to be signed. They name no person. The root's key is not kept, so nothing
else can be issued by it. Since one certificate signs all pictures of an installation, it links them to each other.
"""

import contextlib
import datetime
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import home
from ..errors import CredentialsError, FluxKreaError, UsageError
from ..files import open_descriptor, read_small, replacing, wait_for_lock

NAME = "flux-krea local"
_YEARS = 30  # that a certificate of ours is valid: a picture that is signed without a timestamp shows no longer
_MOST = 2**16  # bytes of a file of certificates or of a key
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}  # C2PA's names of algorithms
_NEW = "or remove both files, and a new certificate is made, which does not link to earlier pictures"


@dataclass(frozen=True)
class Identity:
    """A certificate with its key.

    Attributes:
        chain: PEM of the certificate, and of those that issued it.
        key: PEM of the private key.
        algorithm: C2PA's name of the signature, such as "es256".
        name: of the certificate's holder.
    """

    chain: bytes
    key: bytes
    algorithm: str
    name: str

    def __repr__(self) -> str:
        return f"Identity({self.name!r}, {self.algorithm})"  # never the key


def find_identity(certificate: Path | None = None, key: Path | None = None) -> Identity:
    """Returns the certificate and the key in these files, or this installation's own, which is made if there is none.

    Raises:
        UsageError: one of the two files is not named.
        CredentialsError: they cannot be read or made, do not go together or are not valid now; or others can read the
            key.
    """
    if (certificate is None) != (key is None):
        raise UsageError("one of `certificate` and `key` is set", "both", "flux-krea config sets them")
    if certificate is None or key is None:
        certificate, key = _local()
        todo = _NEW
    else:
        todo = "flux-krea config names the files"
    chain = _read(certificate, "a certificate")
    secret = _read(key, "a private key", private=True)
    return _checked(chain, secret, certificate=certificate, key=key, todo=todo)


def known_certificates(certificate: Path | None = None) -> tuple[bytes, set[str]]:
    """Returns the certificates that this installation signs by, to recognise its own pictures.

    Args:
        certificate: a file of the user's besides the installation's own.

    Returns:
        PEM of their chains, b"" if there are none; and the serial numbers of those that sign, in decimals.
    """
    chains, serials = [], set()
    for path in filter(None, (home.path(home.CREDENTIALS, "certificate.pem"), certificate)):
        with contextlib.suppress(OSError, ValueError):
            data = read_small(path, most=_MOST)
            serials.add(str(_x509().load_pem_x509_certificates(data)[0].serial_number))
            chains.append(data.strip() + b"\n")
    return b"".join(chains), serials


def _local() -> tuple[Path, Path]:
    """Returns the files of this installation's certificate and key; they are made where there are none.

    A key without its certificate has signed nothing: its process died, and another takes its place.
    """
    folder = home.path(home.CREDENTIALS)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    with _locked(folder):
        if not certificate.exists():
            chain, secret = make_certificate()
            key.unlink(missing_ok=True)
            for path, data, mode in ((key, secret, 0o600), (certificate, chain, 0o644)):
                with replacing(path, force=False, mode=mode) as file:  # created as new, and whole or not at all
                    file.write(data)
    return certificate, key


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of the folder, which is made if it is not there; errors are those of a certificate.

    Raises:
        CredentialsError: the folder cannot be written, or the disk is full.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            wait_for_lock(lock)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise CredentialsError(f"{folder} cannot be written: {error.strerror}", "a place for the key") from None
    except CredentialsError:
        raise
    except FluxKreaError as error:
        raise CredentialsError(error.found, error.expected, error.todo) from None


def make_certificate(
    start: datetime.datetime | None = None, end: datetime.datetime | None = None
) -> tuple[bytes, bytes]:
    """Makes a certificate for signing by ECDSA on P-256, issued by a root that issues no other.

    Args:
        start: of its validity; None: a day ago, so that clocks may differ.
        end: None: 30 years later.

    Returns:
        PEM of the certificate and its root, and of its private key.
    """
    x509 = _x509()
    from cryptography.hazmat.primitives import hashes, serialization  # with the extra `credentials`
    from cryptography.hazmat.primitives.asymmetric import ec

    start = start or datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    end = end or start + datetime.timedelta(days=365 * _YEARS)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [_subject(f"{NAME} root"), _subject(NAME)]
    made = []
    for i, (name, key) in enumerate(zip(names, keys, strict=True)):
        is_root = i == 0
        may = dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"), False)
        may |= dict.fromkeys(("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False)
        may |= {"key_cert_sign": True, "crl_sign": True} if is_root else {"digital_signature": True}
        builder = (
            x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number(), start, end)
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
            .add_extension(x509.KeyUsage(**may), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )
        if not is_root:  # the purpose that readers of C2PA accept by default
            purpose = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made[1] + made[0], secret


def _subject(name: str) -> Any:
    x509 = _x509()
    parts = ((x509.NameOID.COMMON_NAME, name), (x509.NameOID.ORGANIZATION_NAME, NAME))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])


def _x509() -> Any:
    """Returns the package that reads certificates, which comes with the extra `credentials`."""
    from cryptography import x509

    return x509


def _read(path: Path, noun: str, private: bool = False) -> bytes:
    """Reads a small file.

    Raises:
        CredentialsError: it cannot be read; or it is private, and others can read it.
    """
    try:
        descriptor = open_descriptor(path)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode & 0o777
            data = file.read(_MOST + 1)
    except OSError as error:
        raise CredentialsError(f"{path} cannot be read: {error.strerror}", noun) from None
    if private and mode & 0o077:
        todo = f"type: chmod 600 {shlex.quote(str(path))}"
        raise CredentialsError(f"others can read {path} (its mode is {mode:o})", "a key for its owner alone", todo)
    if len(data) > _MOST:
        raise CredentialsError(f"{path} is larger than {_MOST >> 10} KiB", noun)
    return data


def _checked(chain: bytes, secret: bytes, *, certificate: Path, key: Path, todo: str) -> Identity:
    """Checks that a chain is one, that it is valid now, and that the key is that of its first certificate.

    Raises:
        CredentialsError: it is not.
    """
    x509 = _x509()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # with the extra `credentials`
    from cryptography.hazmat.primitives import serialization

    public = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        certificates = x509.load_pem_x509_certificates(chain)
        leaf = certificates[0]
        holder = leaf.public_key().public_bytes(*public)
    except (ValueError, UnsupportedAlgorithm, IndexError):
        raise CredentialsError(f"{certificate} cannot be read", "a PEM file of certificates", todo) from None
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except TypeError:
        raise CredentialsError(f"{key} needs a password", "a PEM file without one", todo) from None
    except (ValueError, UnsupportedAlgorithm):
        raise CredentialsError(f"{key} cannot be read", "a PEM file of a private key", todo) from None
    if private.public_key().public_bytes(*public) != holder:
        raise CredentialsError(f"{key} is not the key of {certificate}", "a key and its certificate", todo)
    for child, parent in pairwise(certificates):
        try:
            child.verify_directly_issued_by(parent)
        except (ValueError, TypeError, InvalidSignature):
            found = f"a certificate in {certificate} was not issued by the one after it"
            raise CredentialsError(found, "a chain, the signing certificate first", todo) from None
    now = datetime.datetime.now(datetime.UTC)
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if not start <= now <= end:
        span = f"valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}, and the clock says {now:%Y-%m-%d %H:%M}"
        clock = f"set the clock, {todo}" if now < start else todo
        raise CredentialsError(f"{certificate} is {span} (UTC)", "a certificate that is valid now", clock)
    return Identity(chain, secret, _algorithm(private, key), _name_of(leaf))


def _algorithm(private: Any, path: Path) -> str:
    """Returns C2PA's name of the signature that a key makes.

    Raises:
        CredentialsError: it makes none that C2PA knows.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # with the extra `credentials`

    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    raise CredentialsError(f"{path} is a key of a kind that signs no credentials", "ECDSA, Ed25519 or RSA")


def _name_of(certificate: Any) -> str:
    """Returns the name of a certificate's holder."""
    oid = _x509().NameOID
    for kind in (oid.COMMON_NAME, oid.ORGANIZATION_NAME):
        for attribute in certificate.subject.get_attributes_for_oid(kind):
            return str(attribute.value)
    return "unnamed"
