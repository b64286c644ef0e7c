"""Attestation as a host sees it. Written from the protocol page alone."""

import base64
import datetime
import hashlib
import json
import os
import struct

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import ExtensionOID, NameOID

import kps
from kps import check, equal

CORE = ":#Microsoft.Windows.RemoteAttestation.Core"
HOST_KEY_ATTEST = "/Attestation/v2.0/hostkeyattest"
IDENTITY, HOST_KEY, HOST_KEY_SIGNATURE = 1, 8, 9
ENCODINGS = ("spki", "x509", "rsa1")


def rsa1(n, e):
    exponent = e.to_bytes((e.bit_length() + 7) // 8, "big")
    modulus = n.to_bytes((n.bit_length() + 7) // 8, "big")
    return struct.pack("<4s5I", b"RSA1", n.bit_length(), len(exponent), len(modulus), 0, 0) + exponent + modulus


def encode(key, how="spki"):
    """A public key in one of the three encodings."""
    if how == "spki":
        return kps.spki(key)
    if how == "x509":
        return kps.certificate(kps.spki(key), key, kps.cn("a key"))
    numbers = key.public_key().public_numbers()
    return rsa1(numbers.n, numbers.e)


def sign(key, octets, algorithm=hashes.SHA256):
    return key.sign(octets, padding.PKCS1v15(), algorithm())


def item(kind, octets):
    return {"m_Item1": kind, "m_Item2": octets if isinstance(octets, str) else kps.b64(octets)}


def request(host_key, idk, wanted=(1,), encodings=("spki", "spki"), host_octets=None, idk_octets=None, signature=None):
    host_octets = encode(host_key, encodings[0]) if host_octets is None else host_octets
    idk_octets = encode(idk, encodings[1]) if idk_octets is None else idk_octets
    signature = sign(host_key, host_octets + idk_octets) if signature is None else signature
    return {
        "__type": "AttestationRequest" + CORE,
        "SessionId": kps.b64(os.urandom(16)),
        "RequestedContent": list(wanted),
        "ProvidedContent": [item(IDENTITY, idk_octets), item(HOST_KEY, host_octets),
                            item(HOST_KEY_SIGNATURE, signature)],
    }


def post(client, body, path=HOST_KEY_ATTEST, content_type="application/json"):
    if isinstance(body, dict):
        body = json.dumps(body)
    return client.post(path, body, content_type)


def members(reply):
    """The object, its members in order; a member twice is an error."""
    def pairs(list_):
        names = [n for n, _ in list_]
        equal(len(set(names)), len(names), "number of distinct members")
        check("__type" not in names or names[0] == "__type", "__type is not first")
        return dict(list_)
    check(reply.type() == "application/json", "an answer of type %r" % reply.headers.get("Content-Type"))
    got = json.loads(reply.body.decode("utf-8"), object_pairs_hook=pairs)
    check(isinstance(got, dict) and isinstance(got.get("__type"), str), "no __type in %s" % reply)
    check(got["__type"].endswith(CORE), "__type is " + got["__type"])
    return got


def expect(reply, status, kind):
    check(reply.status == status, "wanted %d %s, got %s" % (status, kind, reply))
    got = members(reply)
    equal(got["__type"], kind + CORE, "__type")
    if kind.endswith("ErrorReply"):
        check(isinstance(got.get("Retryable"), bool), "no Retryable in %s" % reply)
    return got


def certificates(reply):
    """[(result type, DER)] of a HealthCertificateReply"""
    content = expect(reply, 200, "HealthCertificateReply")["Content"]
    for one in content:
        equal(sorted(one), ["m_Item1", "m_Item2"], "members of a tuple")
    return [(one["m_Item1"], base64.b64decode(one["m_Item2"], validate=True)) for one in content]


def signing_certificates(client):
    reply = client.request("GET", "/Attestation/v2.0/signingCertificates")
    equal(reply.status, 200, "status of signingCertificates")
    equal(reply.type(), "application/x-pkcs7-certificates", "type of signingCertificates")
    found = pkcs7.load_der_pkcs7_certificates(reply.body)
    check(found, "no certificate in signingCertificates")
    return found


def signed_by(certificate, issuer):
    public, how = issuer.public_key(), certificate.signature_hash_algorithm
    how = (ec.ECDSA(how),) if isinstance(public, ec.EllipticCurvePublicKey) else (padding.PKCS1v15(), how)
    try:
        public.verify(certificate.signature, certificate.tbs_certificate_bytes, *how)
        return issuer.subject == certificate.issuer
    except (InvalidSignature, ValueError):
        return False


def check_health(der, kind, host_name, host_key, idk, issuers):
    made = x509.load_der_x509_certificate(der)
    equal(kps.spki(made.public_key()), kps.spki(idk), "public key")
    subject = {a.oid: a.value for a in made.subject}
    equal(len(list(made.subject)), 2, "attributes in the subject")
    if host_name is not None:
        equal(subject.get(NameOID.COMMON_NAME), host_name, "CN")
    equal(subject.get(NameOID.SERIAL_NUMBER), hashlib.sha256(kps.spki(host_key)).hexdigest(), "serialNumber")
    usage = made.extensions.get_extension_for_oid(ExtensionOID.KEY_USAGE).value
    have = {name for name in ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
                              "key_agreement", "key_cert_sign", "crl_sign") if getattr(usage, name)}
    equal(have, {1: {"key_encipherment", "data_encipherment"}, 2: {"digital_signature"}}[kind], "key usage")
    extended = made.extensions.get_extension_for_oid(ExtensionOID.EXTENDED_KEY_USAGE)
    equal([o.dotted_string for o in extended.value], ["1.3.6.1.4.1.311.47.1.1"], "extended key usage")
    check(not extended.critical, "extended key usage is critical")
    equal(made.not_valid_after - made.not_valid_before, datetime.timedelta(hours=8), "validity")
    age = (datetime.datetime.utcnow() - made.not_valid_before).total_seconds()
    check(280 <= age <= 360, "notBefore is %d s ago" % age)
    check(64 < made.serial_number.bit_length() <= 128, "serial number of %d bits" % made.serial_number.bit_length())
    check(isinstance(made.signature_hash_algorithm, (hashes.SHA256, hashes.SHA384, hashes.SHA512)),
          "signed with a weak digest")
    check(any(signed_by(made, issuer) for issuer in issuers), "issued by nobody in signingCertificates")
    return made
