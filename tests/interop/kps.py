"""Key protection as a host, an owner and a guardian see it.

Written from the protocol page alone; shares no code with the service.
"""

import base64
import datetime
import functools
import hashlib
import hmac
import http.client
import os
import re
import select
import socket
import ssl
import struct
import time
import urllib.parse

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from lxml import etree

K = "http://schemas.microsoft.com/kps/2014/07"
S = "http://schemas.microsoft.com/kps/2014/07/service"
DS = "http://www.w3.org/2000/09/xmldsig#"
XENC11 = "http://www.w3.org/2009/xmlenc11#"
MORE21 = "http://www.w3.org/2021/04/xmldsig-more#"

EXC_C14N = "http://www.w3.org/2001/10/xml-exc-c14n#"
ENVELOPED = DS + "enveloped-signature"

RSA_SHA256 = "http://www.w3.org/2001/04/xmldsig-more#rsa-sha256"
RSA_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#rsa-sha384"
RSA_SHA512 = "http://www.w3.org/2001/04/xmldsig-more#rsa-sha512"
PSS_SHA256 = "http://www.w3.org/2007/05/xmldsig-more#sha256-rsa-MGF1"
PSS_SHA384 = "http://www.w3.org/2007/05/xmldsig-more#sha384-rsa-MGF1"
PSS_SHA512 = "http://www.w3.org/2007/05/xmldsig-more#sha512-rsa-MGF1"
RSA_SHA1 = DS + "rsa-sha1"
SIGNATURES = {
    RSA_SHA256: (hashes.SHA256, False), RSA_SHA384: (hashes.SHA384, False), RSA_SHA512: (hashes.SHA512, False),
    PSS_SHA256: (hashes.SHA256, True), PSS_SHA384: (hashes.SHA384, True), PSS_SHA512: (hashes.SHA512, True),
}

OAEP_MGF1P = "http://www.w3.org/2001/04/xmlenc#rsa-oaep-mgf1p"
OAEP = XENC11 + "rsa-oaep"
AES256_GCM = XENC11 + "aes256-gcm"
AES128_GCM = XENC11 + "aes128-gcm"
KW_AES256 = "http://www.w3.org/2001/04/xmlenc#kw-aes256"
HKDF_URI = MORE21 + "hkdf"
HMAC_SHA256 = "http://www.w3.org/2001/04/xmldsig-more#hmac-sha256"

DIGESTS = {
    "sha1": (DS + "sha1", hashes.SHA1),
    "sha256": ("http://www.w3.org/2001/04/xmlenc#sha256", hashes.SHA256),
    "sha384": ("http://www.w3.org/2001/04/xmldsig-more#sha384", hashes.SHA384),
    "sha512": ("http://www.w3.org/2001/04/xmlenc#sha512", hashes.SHA512),
}
DIGEST_BY_URI = {uri: name for name, (uri, _) in DIGESTS.items()}
MGF_BY_URI = {XENC11 + "mgf1" + name: name for name in DIGESTS}


def check(condition, message):
    if not condition:
        raise AssertionError(message)


def equal(got, wanted, what):
    check(got == wanted, "%s: got %r, wanted %r" % (what, got, wanted))


def b64(octets):
    return base64.b64encode(octets).decode()


def unb64(text):
    return base64.b64decode(re.sub(r"[ \t\r\n]", "", text), validate=True)


# ---------------------------------------------------------------------------------------------- DER and certificates

def tlv(tag, *parts):
    body = b"".join(parts)
    n = len(body)
    if n < 128:
        return bytes([tag, n]) + body
    length = n.to_bytes((n.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def der_int(n):
    return tlv(0x02, n.to_bytes(n.bit_length() // 8 + 1, "big"))


def der_oid(dotted):
    arcs = [int(a) for a in dotted.split(".")]
    out = [bytes([arcs[0] * 40 + arcs[1]])]
    for arc in arcs[2:]:
        part = [arc & 0x7F]
        while arc > 0x7F:
            arc >>= 7
            part.insert(0, 0x80 | arc & 0x7F)
        out.append(bytes(part))
    return tlv(0x06, *out)


def der_name(*attributes):
    """attributes: (oid, text)"""
    return tlv(0x30, *[tlv(0x31, tlv(0x30, der_oid(oid), tlv(0x0C, text.encode()))) for oid, text in attributes])


NULL = b"\x05\x00"
SHA256_WITH_RSA = tlv(0x30, der_oid("1.2.840.113549.1.1.11"), NULL)


def rsa_spki(n, e):
    return tlv(0x30, tlv(0x30, der_oid("1.2.840.113549.1.1.1"), NULL),
               tlv(0x03, b"\0", tlv(0x30, der_int(n), der_int(e))))


def spki(key):
    public = key.public_key() if hasattr(key, "public_key") else key
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def der_time(when):
    return tlv(0x17, when.strftime("%y%m%d%H%M%SZ").encode())


def now():
    return datetime.datetime.utcnow().replace(microsecond=0)


def certificate(public_der, signer, subject, issuer=None, begin=None, end=None, extensions=(), serial=None):
    """A certificate over any octets of a SubjectPublicKeyInfo; extensions: (oid, critical, der)."""
    begin = begin or now() - datetime.timedelta(days=1)
    end = end or begin + datetime.timedelta(days=3650)
    listed = b""
    if extensions:
        listed = tlv(0xA3, tlv(0x30, *[
            tlv(0x30, der_oid(oid), b"\x01\x01\xff" if critical else b"", tlv(0x04, value))
            for oid, critical, value in extensions]))
    serial = int.from_bytes(os.urandom(15), "big") if serial is None else serial
    body = tlv(0x30, tlv(0xA0, der_int(2)), der_int(serial), SHA256_WITH_RSA, issuer or subject,
               tlv(0x30, der_time(begin), der_time(end)), subject, public_der, listed)
    signature = signer.sign(body, padding.PKCS1v15(), hashes.SHA256())
    return tlv(0x30, body, SHA256_WITH_RSA, tlv(0x03, b"\0", signature))


def cn(text):
    return der_name(("2.5.4.3", text))


def public_key_of(der):
    return x509.load_der_x509_certificate(der).public_key()


_KEYS = {}


def key(label, bits=2048, e=65537):
    """A key of this run; the same label gives the same key."""
    if (label, bits, e) not in _KEYS:
        _KEYS[label, bits, e] = rsa.generate_private_key(e, bits)
    return _KEYS[label, bits, e]


def load_key(path):
    with open(path, "rb") as f:
        return serialization.load_pem_private_key(f.read(), None)


def load_certificate(path):
    with open(path, "rb") as f:
        return x509.load_pem_x509_certificate(f.read()).public_bytes(serialization.Encoding.DER)


# ----------------------------------------------------------------------------------------------------------- signing

def _padding(algorithm, pss):
    return padding.PSS(padding.MGF1(algorithm()), algorithm.digest_size) if pss else padding.PKCS1v15()


def sign(private, uri, octets):
    algorithm, pss = SIGNATURES[uri]
    return private.sign(octets, _padding(algorithm, pss), algorithm())


def verify(public, uri, octets, signature):
    check(uri in SIGNATURES, "signature algorithm %s is not one of the page" % uri)
    algorithm, pss = SIGNATURES[uri]
    try:
        public.verify(signature, octets, _padding(algorithm, pss), algorithm())
        return True
    except InvalidSignature:
        return False


def derive(tk, salt, info):
    return HKDF(hashes.SHA256(), 32, salt, info or b"").derive(tk)


def transport_signature(tk, salt, info, octets):
    return hmac.new(derive(tk, salt, info), octets, hashlib.sha256).digest()


class Oaep:
    """RSA-OAEP as a protector names it; digest and mgf None: not said."""

    def __init__(self, uri=OAEP_MGF1P, digest=None, mgf=None, parameters=None):
        self.uri, self.digest, self.mgf, self._parameters = uri, digest, mgf, parameters

    def parameters(self):
        if self._parameters is not None:
            return self._parameters
        inner = ""
        if self.digest:
            inner += '<ds:DigestMethod xmlns:ds="%s" Algorithm="%s"/>' % (DS, DIGESTS[self.digest][0])
        if self.mgf:
            inner += '<xenc11:MGF xmlns:xenc11="%s" Algorithm="%smgf1%s"/>' % (XENC11, XENC11, self.mgf)
        return "<Parameters>%s</Parameters>" % inner if inner else ""

    def padding(self):
        return padding.OAEP(padding.MGF1(DIGESTS[self.mgf or "sha1"][1]()), DIGESTS[self.digest or "sha1"][1](), None)

    def meaning(self):
        return self.uri, self.digest or "sha1", self.mgf or "sha1"


def request_oaep(uri):
    """What the bare URI of a request means."""
    return Oaep(OAEP, "sha256", "sha256") if uri == OAEP else Oaep(OAEP_MGF1P)


# --------------------------------------------------------------------------------------------------------------- XML

def parse(octets):
    return etree.fromstring(octets, etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=True))


def c14n(element):
    return etree.tostring(element, method="c14n", exclusive=True, with_comments=False)


def wrappings_octets(document):
    """The octets both protector signatures are over."""
    return c14n(parse(document).find("{%s}Wrappings" % K))


def value(element):
    """The string value: text of all descendants without comments."""
    return str(element.xpath("string()"))


def elements(element):
    return [e for e in element if isinstance(e.tag, str)]


def named(element, *names, ns=K):
    """The children, which have to be exactly these (a trailing ? = may be missing)."""
    children, found = elements(element), []
    for name in names:
        optional = name.endswith("?")
        tag = "{%s}%s" % (ns, name.rstrip("?"))
        if children and children[0].tag == tag:
            found.append(children.pop(0))
        else:
            check(optional, "%s has no %s where it belongs" % (element.tag, tag))
            found.append(None)
    check(not children, "%s holds more: %s" % (element.tag, [c.tag for c in children]))
    return found


def shape(element):
    """What an element says, whatever its prefixes and comments."""
    parts = [element.text or ""]
    for child in element:
        if isinstance(child.tag, str):
            parts += [shape(child), child.tail or ""]
        else:
            parts[-1] += child.tail or ""
    if len(parts) > 1:
        parts = [p for p in parts if not isinstance(p, str) or p.strip(" \t\r\n")]
    return element.tag, tuple(sorted(element.attrib.items())), tuple(parts)


# --------------------------------------------------------------------------------------------------- making protectors

class Party:
    """Somebody with a signing and an encryption certificate; the service is one without private keys."""

    def __init__(self, name, sign_key=None, enc_key=None, sign_cert=None, enc_cert=None, ready=None):
        self.name, self.sign_key, self.enc_key = name, sign_key, enc_key
        self.sign_cert = sign_cert or certificate(spki(sign_key), sign_key, cn(name + " signing"))
        self.enc_cert = enc_cert or certificate(spki(enc_key), sign_key, cn(name + " encryption"))
        self.ready = ready  # (algorithm, parameters, octets) of a ready EncryptionCertificateSignature


@functools.lru_cache(maxsize=None)
def party(name, sign_bits=2048, enc_bits=2048):
    return Party(name, key(name + "/s", sign_bits), key(name + "/e", enc_bits))


def signature_xml(algorithm, octets, parameters=""):
    octets = octets if isinstance(octets, str) else b64(octets)
    return '<Signature Algorithm="%s">%s<SignatureValue>%s</SignatureValue></Signature>' % (
        algorithm, parameters, octets)


class Wrapping:
    def __init__(self, id, who, parent=None, **changes):
        self.id, self.who, self.parent = id, who, parent or self
        self.parent_id = None               # another value for ParentWrappingId
        self.sign_cert, self.enc_cert = who.sign_cert, who.enc_cert
        self.scs_alg, self.scs_params, self.scs_key, self.scs = RSA_SHA256, "", None, None
        self.ecs_alg, self.ecs_params, self.ecs_key, self.ecs = RSA_SHA256, "", None, None
        self.oaep, self.cipher, self.tk = Oaep(), None, None
        for name, changed in changes.items():
            check(hasattr(self, name), "no such setting: " + name)
            setattr(self, name, changed)

    def xml(self, tk):
        scs = self.scs
        if scs is None:
            alg = self.scs_alg if self.scs_alg in SIGNATURES else RSA_SHA256
            scs = sign(self.scs_key or self.parent.who.sign_key, alg, self.sign_cert)
        ecs_alg, ecs_params, ecs = self.ecs_alg, self.ecs_params, self.ecs
        if ecs is None and self.who.ready and self.ecs_key is None:
            made_alg, made_params, ecs = self.who.ready
            if ecs_alg == RSA_SHA256:
                ecs_alg, ecs_params = made_alg, ecs_params or made_params
        elif ecs is None:
            alg = ecs_alg if ecs_alg in SIGNATURES else RSA_SHA256
            ecs = sign(self.ecs_key or self.who.sign_key, alg, self.enc_cert)
        cipher = self.cipher
        if cipher is None:
            cipher = public_key_of(self.enc_cert).encrypt(self.tk or tk, self.oaep.padding())
        return (
            "<Wrapping><Id>%s</Id><SigningCertificate>%s</SigningCertificate>"
            '<SigningCertificateSignature ParentWrappingId="%s">%s</SigningCertificateSignature>'
            "<EncryptionCertificate>%s</EncryptionCertificate>"
            "<EncryptionCertificateSignature>%s</EncryptionCertificateSignature>"
            '<TransportKey><EncryptedData Algorithm="%s">%s<CipherValue>%s</CipherValue></EncryptedData></TransportKey>'
            "</Wrapping>"
        ) % (self.id, b64(self.sign_cert), self.parent.id if self.parent_id is None else self.parent_id,
             signature_xml(self.scs_alg, scs, self.scs_params), b64(self.enc_cert),
             signature_xml(ecs_alg, ecs, ecs_params), self.oaep.uri, self.oaep.parameters(), b64(cipher))


def hkdf_parameters(salt, info=None, upper=False, prf=HMAC_SHA256, length="32", order="PSIK", more=""):
    """salt and info: octets, or the text itself; None leaves the element out."""
    def text(x):
        return x if isinstance(x, str) else x.hex().upper() if upper else x.hex()
    parts = {
        "P": '<h:PRF Algorithm="%s"/>' % prf if prf is not None else "",
        "S": "<h:Salt>%s</h:Salt>" % text(salt) if salt is not None else "",
        "I": "<h:Info>%s</h:Info>" % text(info) if info is not None else "",
        "K": "<h:KeyLength>%s</h:KeyLength>" % length if length is not None else "",
    }
    return '<h:HKDFParams xmlns:h="%s">%s%s</h:HKDFParams>' % (MORE21, "".join(parts[o] for o in order), more)


class Protector:
    """An owner's protector. `make` renders it plainly; `before` changes that text and what is signed is the result,
    `after` changes the signed text."""

    def __init__(self, *wrappings, **changes):
        self.wrappings = wrappings
        self.tk = os.urandom(32)
        self.signed_tk = None               # another TK for the transport-key signature
        self.salt, self.info = os.urandom(32), None
        self.kdf_alg, self.kdf_params = HKDF_URI, None   # whole Parameters element or ""
        self.tks_alg, self.tks_params, self.tks = HMAC_SHA256, "", None
        self.by = wrappings[0]              # who makes the guardian signature
        self.by_id = None
        self.gs_alg, self.gs_params, self.gs_key, self.gs = RSA_SHA256, "", None, None
        self.attributes = ""
        for name, changed in changes.items():
            check(hasattr(self, name), "no such setting: " + name)
            setattr(self, name, changed)

    def make(self, before=None, after=None):
        wrappings = "".join(w.xml(self.tk) for w in self.wrappings)
        kdf = self.kdf_params
        if kdf is None:
            kdf = "<Parameters>%s</Parameters>" % hkdf_parameters(self.salt, self.info)

        def text(tks, gs):
            plain = (
                '<Protector xmlns="%s"%s><Wrappings>%s</Wrappings>'
                '<TransportKeySignature><KeyDerivationMethod Algorithm="%s">%s</KeyDerivationMethod>%s'
                '</TransportKeySignature><GuardianSignature WrappingId="%s">%s</GuardianSignature></Protector>'
            ) % (K, self.attributes, wrappings, self.kdf_alg, kdf, signature_xml(self.tks_alg, tks, self.tks_params),
                 self.by.id if self.by_id is None else self.by_id, signature_xml(self.gs_alg, gs, self.gs_params))
            return before(plain) if before else plain

        try:
            octets = wrappings_octets(text(b"\0" * 32, b"\0" * 256).encode())
        except (etree.XMLSyntaxError, TypeError):
            octets = b""                    # nothing to sign any more
        tks, gs = self.tks, self.gs
        if tks is None:
            tks = transport_signature(self.signed_tk or self.tk, self.salt or b"", self.info, octets)
        if gs is None:
            alg = self.gs_alg if self.gs_alg in SIGNATURES else RSA_SHA256
            gs = sign(self.gs_key or self.by.who.sign_key, alg, octets)
        done = text(tks, gs)
        done = after(done) if after else done
        return done if isinstance(done, bytes) else done.encode()


# ------------------------------------------------------------------------------------------------ reading protectors

class Signed:
    def __init__(self, element):
        self.algorithm = element.get("Algorithm")
        self.parameters, held = named(element, "Parameters?", "SignatureValue")
        self.octets = unb64(value(held))


class View:
    """A protector, taken apart."""

    def __init__(self, document):
        self.document = document
        self.root = parse(document)
        equal(self.root.tag, "{%s}Protector" % K, "root")
        self.max_offline = int(self.root.get("MaxOfflineUnwraps", "0"))
        wrappings, tks, gs = named(self.root, "Wrappings", "TransportKeySignature", "GuardianSignature")
        self.octets = c14n(wrappings)
        self.wrappings = [self._wrapping(w) for w in elements(wrappings)]
        self.by_id = {w["id"]: w for w in self.wrappings}
        equal(len(self.by_id), len(self.wrappings), "number of distinct Ids")
        self.kdf, tks = named(tks, "KeyDerivationMethod", "Signature")
        self.tks = Signed(tks)
        self.signer = int(gs.get("WrappingId"))
        self.gs = Signed(named(gs, "Signature")[0])

    @staticmethod
    def _wrapping(element):
        equal(element.tag, "{%s}Wrapping" % K, "child of Wrappings")
        id, sc, scs, ec, ecs, tk = named(element, "Id", "SigningCertificate", "SigningCertificateSignature",
                                         "EncryptionCertificate", "EncryptionCertificateSignature", "TransportKey")
        data, = named(tk, "EncryptedData")
        parameters, cipher = named(data, "Parameters?", "CipherValue")
        oaep = Oaep(data.get("Algorithm"))
        for child in elements(parameters) if parameters is not None else ():
            if child.tag == "{%s}DigestMethod" % DS:
                oaep.digest = DIGEST_BY_URI[child.get("Algorithm")]
            elif child.tag == "{%s}MGF" % XENC11:
                oaep.mgf = MGF_BY_URI[child.get("Algorithm")]
            else:
                raise AssertionError("strange parameter " + child.tag)
        check(oaep.uri == OAEP or parameters is None, "Parameters on " + oaep.uri)
        return {
            "id": int(value(id)), "sc": unb64(value(sc)), "ec": unb64(value(ec)),
            "parent": int(scs.get("ParentWrappingId")),
            "scs": Signed(named(scs, "Signature")[0]), "ecs": Signed(named(ecs, "Signature")[0]),
            "oaep": oaep, "cipher": unb64(value(cipher)),
        }

    def unwrap(self, id, private):
        w = self.by_id[id]
        return private.decrypt(w["cipher"], w["oaep"].padding())

    def kdf_parts(self):
        equal(self.kdf.get("Algorithm"), HKDF_URI, "key derivation")
        parameters, = named(self.kdf, "Parameters")
        params, = named(parameters, "HKDFParams", ns=MORE21)
        prf, salt, info, length = named(params, "PRF", "Salt", "Info?", "KeyLength", ns=MORE21)
        equal(prf.get("Algorithm"), HMAC_SHA256, "PRF")
        equal(int(value(length)), 32, "KeyLength")
        return bytes.fromhex(value(salt).strip()), None if info is None else bytes.fromhex(value(info).strip())

    def verify(self, tk):
        """All signatures, as an owner would."""
        owners = 0
        for w in self.wrappings:
            parent = self.by_id[w["parent"]]
            owners += parent is w
            check(verify(public_key_of(parent["sc"]), w["scs"].algorithm, w["sc"], w["scs"].octets),
                  "SigningCertificateSignature of %d" % w["id"])
            check(verify(public_key_of(w["sc"]), w["ecs"].algorithm, w["ec"], w["ecs"].octets),
                  "EncryptionCertificateSignature of %d" % w["id"])
        equal(owners, 1, "owners")
        check(verify(public_key_of(self.by_id[self.signer]["sc"]), self.gs.algorithm, self.octets, self.gs.octets),
              "GuardianSignature is wrong")
        salt, info = self.kdf_parts()
        equal(self.tks.algorithm, HMAC_SHA256, "transport-key signature algorithm")
        check(hmac.compare_digest(self.tks.octets, transport_signature(tk, salt, info, self.octets)),
              "TransportKeySignature is wrong")


def check_egress(ingress, egress, signer, egress_tk, private_keys):
    """signer: Id of the service's wrapping; private_keys: Id -> private encryption key."""
    old, new = View(ingress), View(egress)
    check(len(egress) <= 512 * 1024, "egress larger than a protector may be")
    equal([w["id"] for w in new.wrappings], [w["id"] for w in old.wrappings], "Ids and their order")
    for a, b in zip(old.wrappings, new.wrappings):
        where = " of wrapping %d" % a["id"]
        for part in ("sc", "ec", "parent"):
            equal(b[part], a[part], part + where)
        for part in ("scs", "ecs"):
            equal((b[part].algorithm, b[part].octets), (a[part].algorithm, a[part].octets), part + where)
            pa, pb = a[part].parameters, b[part].parameters
            equal(pb if pb is None else shape(pb), pa if pa is None else shape(pa), "Parameters of " + part + where)
        equal(b["oaep"].meaning(), a["oaep"].meaning(), "OAEP" + where)
        check(a["cipher"] != b["cipher"], "ciphertext unchanged" + where)
        if a["id"] in private_keys:
            equal(new.unwrap(a["id"], private_keys[a["id"]]), egress_tk, "TK" + where)
    equal(new.signer, signer, "GuardianSignature/@WrappingId")
    equal(new.gs.algorithm, RSA_SHA256, "algorithm of the GuardianSignature")
    salt, _ = new.kdf_parts()
    equal(len(salt), 32, "octets of salt")
    new.verify(egress_tk)
    no_added_space(new)
    return new


def no_added_space(view):
    space = " \t\r\n"
    document = view.document.decode()
    check(document == document.strip(space), "white space around the egress")
    check(not re.search(r"\?>\s", document), "white space after the XML declaration")
    kept = set()
    for w in view.wrappings:
        for part in ("scs", "ecs"):
            if w[part].parameters is not None:
                kept.update(w[part].parameters.iter())
    for element in view.root.iter():
        if element in kept:
            continue
        if isinstance(element.tag, str):
            check(not re.search(r"[ \t\r\n]", element.text or ""), "white space in " + element.tag)
        check(not re.search(r"[ \t\r\n]", element.tail or ""), "white space after %s" % element.tag)


# ------------------------------------------------------------------------------------------------------ the exchange

class Algorithms:
    def __init__(self, transfer=OAEP, wrapping=AES256_GCM, transport=AES256_GCM):
        self.transfer, self.wrapping, self.transport = transfer, wrapping, transport

    def items(self):
        return [("TransferKeyEncryptionAlgorithm", self.transfer), ("WrappingKeyEncryptionAlgorithm", self.wrapping),
                ("TransportKeysEncryptionAlgorithm", self.transport)]


def element_xml(name, text):
    return "<%s>%s</%s>" % (name, text, name)


def request_items(protector, health, algorithms=None):
    return [("IngressProtector", b64(protector)), ("HealthCertificate", b64(health))] + (
        algorithms or Algorithms()).items()


def request_xml(items, root="RollTransportKeyRequest", ns=S, attributes=""):
    return '<%s xmlns="%s"%s>%s</%s>' % (root, ns, attributes, "".join(element_xml(*i) for i in items), root)


def gcm_open(key_octets, data, what):
    check(len(data) >= 28, what + " is too short")
    return AESGCM(key_octets).decrypt(data[:12], data[12:], None)


class Release:
    """What a host gets out of a reply."""

    def __init__(self, element, idk, algorithms, version):
        egress, transfer, wrapping, transport = [unb64(value(e)) for e in named(
            element, "EgressProtector", "EncryptedTransferKey", "EncryptedWrappingKey", "EncryptedTransportKeys", ns=S)]
        self.egress = egress
        equal(len(transfer), idk.key_size // 8, "octets of EncryptedTransferKey")
        transfer_key = idk.decrypt(transfer, request_oaep(algorithms.transfer).padding())
        equal(len(transfer_key), 16 if algorithms.wrapping == AES128_GCM else 32, "octets of the transfer key")
        length = 16 if algorithms.transport == AES128_GCM else 32
        if algorithms.wrapping == KW_AES256:
            equal(len(wrapping), length + 8, "octets of EncryptedWrappingKey")
            wrapping_key = keywrap.aes_key_unwrap(transfer_key, wrapping)
        else:
            equal(len(wrapping), length + 28, "octets of EncryptedWrappingKey")
            wrapping_key = gcm_open(transfer_key, wrapping, "EncryptedWrappingKey")
        equal(len(wrapping_key), length, "octets of the wrapping key")
        payload = gcm_open(wrapping_key, transport, "EncryptedTransportKeys")
        size, self.version, keys, key_length = struct.unpack_from("<4I", payload)
        equal(size, len(payload), "DataSize")
        equal(self.version, 1 if version == "v1.0" else 2, "payload version")
        equal((keys, key_length), (2, 32), "NumberOfKeys and KeyLength")
        self.ingress_tk, self.egress_tk = payload[16:48], payload[48:80]
        check(self.ingress_tk != self.egress_tk, "the egress TK is the ingress TK")
        self.policy = 0
        if version == "v1.0":
            equal(len(payload), 80, "octets of the payload")
        else:
            policies, = struct.unpack_from("<I", payload, 80)
            check(policies in (0, 1), "NumberOfPolicies %d" % policies)
            equal(len(payload), 84 + 16 * policies, "octets of the payload")
            if policies:
                id, kind, length, self.policy = struct.unpack_from("<4I", payload, 84)
                equal((id, kind, length), (1, 6, 4), "PolicyId, PolicyType, PolicyDataSize")
                check(self.policy > 0, "a policy of no unwraps")


# -------------------------------------------------------------------------------------------------------------- HTTP

class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def type(self):
        return (self.headers.get("Content-Type") or "").split(";")[0].strip().lower()

    def __str__(self):
        return "%d %r" % (self.status, self.body[:300])


class Client:
    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.host, self.tls = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self._connection = None
        self.exchanges = []

    def connect(self):
        if self.tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return http.client.HTTPSConnection(self.host, self.port, timeout=60, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def close(self):
        if self._connection:
            self._connection.close()
        self._connection = None

    def request(self, method, path, body=None, headers=None, **how):
        for attempt in range(20):
            fresh = self._connection is None
            if fresh:
                self._connection = self.connect()
            try:
                self._connection.request(method, path, body, headers or {}, **how)
                answer = self._connection.getresponse()
                reply = Reply(answer.status, answer.headers, answer.read())
                self.exchanges.append((method, path, body, reply))
            except (http.client.HTTPException, OSError):
                self.close()
                if fresh:
                    raise
                continue
            if answer.will_close:
                self.close()
            if reply.status != 429:
                return reply
            check("Retry-After" in reply.headers, "429 without Retry-After")
            time.sleep(min(int(reply.headers["Retry-After"]), 10))
        raise AssertionError("429 twenty times")

    def post(self, path, body, content_type, **how):
        body = body.encode() if isinstance(body, str) else body
        return self.request("POST", path, body, {"Content-Type": content_type} if content_type else {}, **how)

    def flood(self, path, content_type, total, chunked):
        """Sends `total` octets of blanks until it has been answered."""
        raw = socket.create_connection((self.host, self.port), 60)
        if self.tls:
            raise AssertionError("not over TLS")
        with raw:
            head = "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: %s\r\n%s\r\n\r\n" % (
                path, self.host, self.port, content_type,
                "Transfer-Encoding: chunked" if chunked else "Content-Length: %d" % total)
            raw.sendall(head.encode())
            sent = 0
            try:
                while sent < total and not select.select([raw], [], [], 0)[0]:
                    part = b" " * min(16384, total - sent)
                    raw.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                    sent += len(part)
                if chunked and sent == total:
                    raw.sendall(b"0\r\n\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass
            answer = http.client.HTTPResponse(raw, method="POST")
            answer.begin()
            return Reply(answer.status, answer.headers, answer.read())


def expect_error(reply, status, code, naming=None):
    """A well-formed Error with this status and code."""
    check(reply.status == status, "wanted %d %s, got %s" % (status, code, reply))
    check(reply.type() in ("application/xml", "text/xml"), "an Error of type %r" % reply.headers.get("Content-Type"))
    root = parse(reply.body)
    equal(root.tag, "{%s}Error" % S, "root of the answer")
    return expect_error_element(root, code, naming)


def expect_error_element(root, code, naming=None):
    got, message = [value(e) for e in named(root, "Code", "Message", ns=S)]
    check(got == code, "wanted Code %s, got %s: %s" % (code, got, message))
    check(message.strip(), "an empty Message")
    check(naming is None or naming in message, "Message does not name %s: %s" % (naming, message))
    return message


# ---------------------------------------------------------------------------------------------------------- metadata

METADATA = "/KeyProtection/service/metadata/2014-07/metadata.xml"


def verify_enveloped(octets):
    """The ds:Signature of the metadata; returns the certificate it was made with."""
    root = parse(octets)
    found = root.findall("{%s}Signature" % DS)
    equal(len(found), 1, "number of ds:Signature")
    signature = found[0]
    info = signature.find("{%s}SignedInfo" % DS)

    def uri(element, name):
        child = element.find("{%s}%s" % (DS, name))
        check(child is not None, "no ds:" + name)
        return child.get("Algorithm")

    references = info.findall("{%s}Reference" % DS)
    equal(len(references), 1, "number of ds:Reference")
    reference = references[0]
    target = reference.get("URI")
    check(target == "" or root.get("ID") and target == "#" + root.get("ID"), "Reference URI %r" % target)
    transforms = [t.get("Algorithm") for t in reference.find("{%s}Transforms" % DS)]
    equal(transforms, [ENVELOPED, EXC_C14N], "transforms")
    equal(uri(reference, "DigestMethod"), DIGESTS["sha256"][0], "DigestMethod")
    equal(uri(info, "SignatureMethod"), RSA_SHA256, "SignatureMethod")
    method = uri(info, "CanonicalizationMethod")    # the page does not name it: either C14N 1.0 will do
    check(method in (EXC_C14N, "http://www.w3.org/TR/2001/REC-xml-c14n-20010315"), "CanonicalizationMethod " + method)
    certificates = signature.findall(".//{%s}X509Certificate" % DS)
    check(certificates, "no X509Certificate")
    der = unb64(value(certificates[0]))
    signed_info = etree.tostring(info, method="c14n", exclusive=method == EXC_C14N, with_comments=False)
    check(verify(public_key_of(der), RSA_SHA256, signed_info,
                 unb64(value(signature.find("{%s}SignatureValue" % DS)))), "the metadata's signature is wrong")
    digest = unb64(value(reference.find("{%s}DigestValue" % DS)))
    before, tail = signature.getprevious(), signature.tail or ""
    root.remove(signature)              # lxml takes the text behind it away, too
    if before is not None:
        before.tail = (before.tail or "") + tail
    else:
        root.text = (root.text or "") + tail
    equal(hashlib.sha256(c14n(root)).digest(), digest, "digest of the metadata")
    return der


def read_metadata(octets):
    """The service as a party."""
    verify_enveloped(octets)
    root = parse(octets)
    equal(root.tag, "{%s}Metadata" % K, "root of the metadata")
    equal(root.get("Version"), "1", "Metadata/@Version")
    kids = elements(root)
    equal([k.tag for k in kids], ["{%s}GuardianInformation" % K, "{%s}Signature" % DS], "children of Metadata")
    version, ec, sc, ecs, scs, others = named(
        kids[0], "Version", "EncryptionCertificate", "SigningCertificate", "EncryptionCertificateSignature",
        "SigningCertificateSelfSignature", "OtherSigningCertificates?")
    equal(value(version), "1", "GuardianInformation/Version")
    ec, sc = unb64(value(ec)), unb64(value(sc))
    public = public_key_of(sc)
    for name, holder, der in (("EncryptionCertificateSignature", ecs, ec), ("SigningCertificateSelfSignature", scs, sc)):
        made = Signed(holder)
        check(verify(public, made.algorithm, der, made.octets), name + " is wrong")
    for other in elements(others) if others is not None else ():
        equal(other.tag, "{%s}Certificate" % K, "child of OtherSigningCertificates")
        public_key_of(unb64(value(other)))
    made = Signed(ecs)
    parameters = "" if made.parameters is None else c14n(made.parameters).decode()
    return Party("service", sign_cert=sc, enc_cert=ec, ready=(made.algorithm, parameters, made.octets))
