"""The certificate and key that the endpoint serves https with."""

from __future__ import annotations

import ssl
from pathlib import Path

from app.errors import GryphonError


def context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or newer with a PEM certificate, or chain of them, and its key.

    Args:
        key: None where it is in the certificate's file.

    Raises:
        GryphonError: "invalid_tls": a file cannot be read or is no PEM, the key is encrypted, or
            it belongs to another certificate.
    """
    for what, path in (("certificate", certificate), ("key", key)):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise _invalid(f"The TLS {what} {path} cannot be read: {error.strerror}.") from None
    held = key or certificate
    asked: list[str] = []

    def password() -> str:
        asked.append("")
        return ""

    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        made.load_cert_chain(certificate, key, password)
    except (ssl.SSLError, OSError, ValueError) as error:
        if asked:
            raise _invalid(
                f"The TLS key {held} is encrypted; store it without a password, for example with "
                "`openssl pkey`."
            ) from None
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise _invalid(
                f"The TLS key {held} does not belong to the certificate {certificate}."
            ) from None
        raise _invalid(
            f"The TLS certificate {certificate} with the key {held} cannot be used: expected PEM "
            "files, beginning with -----BEGIN CERTIFICATE----- and -----BEGIN PRIVATE KEY-----."
        ) from None
    return made


def _invalid(message: str) -> GryphonError:
    return GryphonError("invalid_tls", message)
