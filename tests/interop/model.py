"""A small software model of the service, for `suite.py --self-test`: it shows that the cases and their XML and crypto
agree with one reading of the protocol page before they are held against a real service."""

import base64
import datetime
import hashlib
import hmac
import http.server
import json
import os
import re
import struct
import threading

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import ExtensionOID, NameOID
from lxml import etree

import hgsa
import kps
from kps import DS, K, MORE21, S, XENC11, value

MIB = 1024 * 1024
REQUEST_URIS = (
    ("TransferKeyEncryptionAlgorithm", (kps.OAEP_MGF1P, kps.OAEP)),
    ("WrappingKeyEncryptionAlgorithm", (kps.AES256_GCM, kps.AES128_GCM, kps.KW_AES256)),
    ("TransportKeysEncryptionAlgorithm", (kps.AES256_GCM, kps.AES128_GCM)),
)
PROTECTOR, WRAPPING, ALGORITHM, REQUEST = ("InvalidProtectorException", "InvalidWrappingException",
                                           "UnsupportedAlgorithmException", "InvalidRequestException")


class Fault(Exception):
    def __init__(self, code, message="refused", status=400):
        super().__init__(code, message)
        self.code, self.message, self.status = code, message, status


def error_xml(fault):
    message = fault.message.replace("&", "&amp;").replace("<", "&lt;")
    return "<Error xmlns='%s'><Code>%s</Code><Message>%s</Message></Error>" % (S, fault.code, message)


# ------------------------------------------------------------------------------------------------------- strict XML

def strict(octets, code):
    """The root of a document within the limits."""
    def bad(why):
        raise Fault(code, why)
    try:
        text = octets.decode("utf-8")
    except UnicodeDecodeError:
        bad("not UTF-8")
    declared = re.match("\ufeff?<\\?xml[^>]*encoding\\s*=\\s*[\"']([^\"']*)", text)
    if declared and declared.group(1).lower() != "utf-8":
        bad("declared encoding")
    try:
        tree = etree.ElementTree(kps.parse(octets))
    except (etree.XMLSyntaxError, ValueError):
        bad("not XML")
    if tree.docinfo.internalDTD is not None:
        bad("a DTD")
    root = tree.getroot()
    around = list(root.itersiblings()) + list(root.itersiblings(preceding=True))
    for node in list(root.iter()) + around:
        if node.tag is etree.ProcessingInstruction:
            bad("an instruction")
        if isinstance(node.tag, str) and len(list(node.iterancestors())) >= 32:
            bad("too deep")
    return root


def children(element, code, names, attributes=(), ns=K):
    """names: tags; ? may be missing, + one or more"""
    def bad(why):
        raise Fault(code, "%s: %s" % (element.tag, why))
    if set(element.attrib) - {a.rstrip("?") for a in attributes} or \
            {a for a in attributes if not a.endswith("?")} - set(element.attrib):
        bad("attributes")
    if (element.text or "").strip(" \t\r\n") or any((c.tail or "").strip(" \t\r\n") for c in element):
        bad("text")
    left, found = kps.elements(element), []
    for name in names:
        tag = "{%s}%s" % (ns, name.rstrip("?+"))
        taken = []
        while left and left[0].tag == tag and (name.endswith("+") or not taken):
            taken.append(left.pop(0))
        if not taken and not name.endswith("?"):
            bad("no " + name)
        found.append(taken if name.endswith("+") else taken[0] if taken else None)
    if left:
        bad("too much")
    return found


def text_of(element, code):
    if element.attrib or kps.elements(element):
        raise Fault(code, element.tag)
    return value(element)


def octets_of(element, code):
    text = re.sub("[ \t\r\n]", "", text_of(element, code))
    try:
        octets = base64.b64decode(text, validate=True)
    except ValueError:
        raise Fault(code, element.tag)
    if not octets or len(text) % 4:
        raise Fault(code, element.tag)
    return octets


def number(text, code):
    text = text.strip(" \t\r\n")
    if not re.fullmatch("[0-9]+", text) or int(text) > 0xFFFFFFFF:
        raise Fault(code, "a number")
    return int(text)


# -------------------------------------------------------------------------------------------------------- protectors

def strong(public):
    if not isinstance(public, rsa.RSAPublicKey):
        return False
    n = public.public_numbers()
    return 2048 <= n.n.bit_length() <= 8192 and n.e >= 65537 and n.e % 2 == 1


def strong_certificate(der):
    try:
        public = kps.public_key_of(der)
    except Exception:
        raise Fault(WRAPPING, "a certificate")
    if not strong(public):
        raise Fault(WRAPPING, "a weak key")
    return public


class SignatureNode:
    def __init__(self, holder, attributes=()):
        signature, = children(holder, PROTECTOR, ["Signature"], attributes)
        self._read(signature)

    def _read(self, signature):
        self.parameters, held = children(signature, PROTECTOR, ["Parameters?", "SignatureValue"], ["Algorithm"])
        if self.parameters is not None and (
                self.parameters.attrib or "".join([self.parameters.text or ""] + [c.tail or "" for c in self.parameters]).strip()):
            raise Fault(PROTECTOR, "attributes or text")
        self.uri, self.octets = signature.get("Algorithm"), octets_of(held, PROTECTOR)


class WrappingNode:
    def __init__(self, element):
        id, sc, scs, ec, ecs, tk = children(element, PROTECTOR, [
            "Id", "SigningCertificate", "SigningCertificateSignature", "EncryptionCertificate",
            "EncryptionCertificateSignature", "TransportKey"])
        self.id = number(text_of(id, PROTECTOR), PROTECTOR)
        self.sc, self.ec = octets_of(sc, PROTECTOR), octets_of(ec, PROTECTOR)
        self.scs, self.ecs = SignatureNode(scs, ["ParentWrappingId"]), SignatureNode(ecs)
        self.parent = number(scs.get("ParentWrappingId"), PROTECTOR)
        data, = children(tk, PROTECTOR, ["EncryptedData"])
        self.parameters, cipher = children(data, PROTECTOR, ["Parameters?", "CipherValue"], ["Algorithm"])
        self.uri, self.cipher = data.get("Algorithm"), octets_of(cipher, PROTECTOR)


def read_oaep(w):
    if w.uri not in (kps.OAEP, kps.OAEP_MGF1P):
        raise Fault(ALGORITHM, w.uri)
    oaep = kps.Oaep(w.uri)
    if w.parameters is None:
        return oaep
    if w.uri == kps.OAEP_MGF1P:
        raise Fault(ALGORITHM, "Parameters on " + w.uri)
    for child in kps.elements(w.parameters):
        uri = child.get("Algorithm", "")
        if child.tag == "{%s}DigestMethod" % DS and oaep.digest is None and uri in kps.DIGEST_BY_URI:
            oaep.digest = kps.DIGEST_BY_URI[uri]
        elif child.tag == "{%s}MGF" % XENC11 and oaep.mgf is None and uri in kps.MGF_BY_URI:
            oaep.mgf = kps.MGF_BY_URI[uri]
        else:
            raise Fault(ALGORITHM, "%s in Parameters: %s" % (child.tag, uri))
    return oaep


def read_hkdf(method, parameters):
    if method.get("Algorithm") != kps.HKDF_URI:
        raise Fault(ALGORITHM, method.get("Algorithm"))
    try:
        one, = children(parameters, ALGORITHM, ["HKDFParams"], ns=MORE21)
        prf, salt, info, length = children(one, ALGORITHM, ["PRF", "Salt", "Info?", "KeyLength"], ns=MORE21)
        if prf.get("Algorithm") != kps.HMAC_SHA256:
            raise Fault(ALGORITHM, prf.get("Algorithm"))
        if int(value(length)) != 32:
            raise Fault(ALGORITHM, "KeyLength")
        salt, info = value(salt).strip(), "" if info is None else value(info).strip()
        for hex in (salt, info):
            if not re.fullmatch("([0-9a-fA-F]{2})*", hex):
                raise Fault(ALGORITHM, "hex")
        if not 2 <= len(salt) <= 2048:
            raise Fault(ALGORITHM, "salt")
        return bytes.fromhex(salt), bytes.fromhex(info)
    except (AttributeError, ValueError, TypeError):
        raise Fault(ALGORITHM, "HKDFParams")


def certificate_signature_xml(made):
    parameters = ""
    if made.parameters is not None:
        parameters = kps.c14n(made.parameters).decode()
    return kps.signature_xml(made.uri, made.octets, parameters)


class Service:
    def __init__(self, directory):
        self.sign_key, self.enc_key = kps.key("model/s"), kps.key("model/e")
        self.party = kps.party("model")
        self.attestation_key, self.communications_key = kps.key("model/a"), kps.key("model/c")
        self.attestation_name = kps.cn("model attestation signer")
        self.attestation_cert = kps.certificate(kps.spki(self.attestation_key), self.attestation_key,
                                                self.attestation_name)
        self.hosts = {}
        self._lab(directory)
        self._metadata = self.metadata()

    # the administrator
    def add(self, name, path):
        with open(path, "rb") as f:
            self.hosts[name] = kps.spki(serialization.load_pem_public_key(f.read()))

    def remove(self, name):
        del self.hosts[name]

    def list(self):
        return "\n".join(self.hosts)

    def _lab(self, directory):
        def write(name, octets):
            path = os.path.join(directory, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as f:
                f.write(octets)

        def pem(private):
            return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                         serialization.NoEncryption())
        host, owner = kps.key("lab/host"), kps.party("lab owner")
        write("host/hostkey.pem", pem(host))
        self.hosts["lab-host"] = kps.spki(host)
        for part, private, der in (("signing", owner.sign_key, owner.sign_cert),
                                   ("encryption", owner.enc_key, owner.enc_cert)):
            write("tenant/owner-%s.key.pem" % part, pem(private))
            write("tenant/owner-%s.crt.pem" % part,
                  x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM))
        first = kps.Wrapping(0, owner)
        for n in range(2):
            write("tenant/vm%d.xml" % n, kps.Protector(first, kps.Wrapping(1, self.party, first)).make())

    def metadata(self):
        signature = kps.signature_xml(kps.RSA_SHA256, kps.sign(self.sign_key, kps.RSA_SHA256, self.party.enc_cert))
        own = kps.signature_xml(kps.RSA_SHA256, kps.sign(self.sign_key, kps.RSA_SHA256, self.party.sign_cert))
        body = (
            '<Metadata xmlns="%s" Version="1"><GuardianInformation><Version>1</Version>'
            "<EncryptionCertificate>%s</EncryptionCertificate><SigningCertificate>%s</SigningCertificate>"
            "%s%s</GuardianInformation>%%s</Metadata>"
        ) % (K, kps.b64(self.party.enc_cert), kps.b64(self.party.sign_cert),
             signature.replace("<Signature ", "<EncryptionCertificateSignature ")
             .replace("</Signature>", "</EncryptionCertificateSignature>"),
             own.replace("<Signature ", "<SigningCertificateSelfSignature ")
             .replace("</Signature>", "</SigningCertificateSelfSignature>"))
        digest = hashlib.sha256(kps.c14n(kps.parse((body % "").encode()))).digest()
        info = (
            '<ds:SignedInfo xmlns:ds="%s"><ds:CanonicalizationMethod Algorithm="%s"/><ds:SignatureMethod '
            'Algorithm="%s"/><ds:Reference URI=""><ds:Transforms><ds:Transform Algorithm="%s"/><ds:Transform '
            'Algorithm="%s"/></ds:Transforms><ds:DigestMethod Algorithm="%s"/><ds:DigestValue>%s</ds:DigestValue>'
            "</ds:Reference></ds:SignedInfo>"
        ) % (DS, kps.EXC_C14N, kps.RSA_SHA256, kps.ENVELOPED, kps.EXC_C14N, kps.DIGESTS["sha256"][0], kps.b64(digest))
        made = kps.sign(self.communications_key, kps.RSA_SHA256, kps.c14n(kps.parse(info.encode())))
        cert = kps.certificate(kps.spki(self.communications_key), self.communications_key, kps.cn("communications"))
        return (body % (
            '<ds:Signature xmlns:ds="%s">%s<ds:SignatureValue>%s</ds:SignatureValue><ds:KeyInfo><ds:X509Data>'
            "<ds:X509Certificate>%s</ds:X509Certificate></ds:X509Data></ds:KeyInfo></ds:Signature>"
        ) % (DS, info, kps.b64(made), kps.b64(cert))).encode()

    # release
    def release(self, body, version):
        root = strict(body, REQUEST)
        if root.tag != "{%s}RollTransportKeyRequest" % S:
            raise Fault(REQUEST, "the root")
        protector, health, *uris = children(root, REQUEST, ["IngressProtector", "HealthCertificate"] + [
            name for name, _ in REQUEST_URIS], ns=S)
        protector, health = octets_of(protector, REQUEST), octets_of(health, REQUEST)
        algorithms = self.algorithms(uris)
        return self.reply(protector, self.health(health), algorithms, version)

    def batch(self, body):
        root = strict(body, REQUEST)
        if root.tag != "{%s}RollTransportKeysRequest" % S:
            raise Fault(REQUEST, "the root")
        health, *uris, items = children(root, REQUEST, ["HealthCertificate"] + [
            name for name, _ in REQUEST_URIS] + ["IngressProtector+"], ns=S)
        if len(items) > 256:
            raise Fault(REQUEST, "too many")
        items, health = [octets_of(i, REQUEST) for i in items], octets_of(health, REQUEST)
        algorithms, public, parts = self.algorithms(uris), self.health(health), []
        for one in items:
            try:
                parts.append(self.reply(one, public, algorithms, "v2.0"))
            except Fault as fault:
                parts.append(error_xml(fault))
        return "<RollTransportKeysResponse xmlns='%s'>%s</RollTransportKeysResponse>" % (S, "".join(parts))

    @staticmethod
    def algorithms(found):
        texts = [text_of(e, REQUEST).strip() for e in found]
        if not all(texts):
            raise Fault(REQUEST, "an empty algorithm")
        for text, (_, known) in zip(texts, REQUEST_URIS):
            if text not in known:
                raise Fault(ALGORITHM, "unknown algorithm " + text)
        return kps.Algorithms(*texts)

    def health(self, der):
        def bad():
            raise Fault("HealthCertificateException", status=403)
        try:
            made = x509.load_der_x509_certificate(der)
            self.attestation_key.public_key().verify(made.signature, made.tbs_certificate_bytes, padding.PKCS1v15(),
                                                     made.signature_hash_algorithm)
            usage = made.extensions.get_extension_for_oid(ExtensionOID.KEY_USAGE).value
            subject = {a.oid: a.value for a in made.subject}
        except Exception:
            bad()
        if not (made.not_valid_before <= datetime.datetime.utcnow() <= made.not_valid_after):
            bad()
        host = self.hosts.get(subject.get(NameOID.COMMON_NAME))
        if not usage.key_encipherment or host is None or \
                hashlib.sha256(host).hexdigest() != subject.get(NameOID.SERIAL_NUMBER) or not strong(made.public_key()):
            bad()
        return made.public_key()

    def reply(self, protector, host, algorithms, version):
        ingress_tk, egress_tk, egress = self.roll(protector)
        payload = ingress_tk + egress_tk + (b"" if version == "v1.0" else struct.pack("<I", 0))
        payload = struct.pack("<4I", len(payload) + 16, 1 if version == "v1.0" else 2, 2, 32) + payload

        def gcm(key, data):
            iv = os.urandom(12)
            return iv + AESGCM(key).encrypt(iv, data, None)
        transfer = os.urandom(16 if algorithms.wrapping == kps.AES128_GCM else 32)
        wrapping = os.urandom(16 if algorithms.transport == kps.AES128_GCM else 32)
        return kps.request_xml([
            ("EgressProtector", kps.b64(egress)),
            ("EncryptedTransferKey", kps.b64(host.encrypt(transfer, kps.request_oaep(algorithms.transfer).padding()))),
            ("EncryptedWrappingKey", kps.b64(keywrap.aes_key_wrap(transfer, wrapping)
                                             if algorithms.wrapping == kps.KW_AES256 else gcm(transfer, wrapping))),
            ("EncryptedTransportKeys", kps.b64(gcm(wrapping, payload))),
        ], "RollTransportKeyResponse")

    def roll(self, document):
        # 3
        if len(document) > MIB // 2:
            raise Fault(PROTECTOR, "too large")
        root = strict(document, PROTECTOR)
        if root.tag != "{%s}Protector" % K:
            raise Fault(PROTECTOR, "root")
        signed, tks, gs = children(root, PROTECTOR, ["Wrappings", "TransportKeySignature", "GuardianSignature"],
                                   ["MaxOfflineUnwraps?"])
        number(root.get("MaxOfflineUnwraps", "0"), PROTECTOR)
        wrappings = [WrappingNode(w) for w in children(signed, PROTECTOR, ["Wrapping+"])[0]]
        by_id = {w.id: w for w in wrappings}
        if len(wrappings) > 64 or len(by_id) != len(wrappings):
            raise Fault(PROTECTOR, "wrappings")
        method, made = children(tks, PROTECTOR, ["KeyDerivationMethod", "Signature"])
        parameters, = children(method, PROTECTOR, ["Parameters?"], ["Algorithm"])
        transport = SignatureNode.__new__(SignatureNode)
        transport._read(made)
        guardian = SignatureNode(gs, ["WrappingId"])
        signer = by_id.get(number(gs.get("WrappingId"), PROTECTOR))
        if signer is None:
            raise Fault(PROTECTOR, "WrappingId")
        for one in [s for w in wrappings for s in (w.scs, w.ecs)] + [guardian]:
            if one.uri not in kps.SIGNATURES:
                raise Fault(ALGORITHM, one.uri)
        for w in wrappings:
            w.oaep = read_oaep(w)
        salt, info = read_hkdf(method, parameters)
        if transport.uri != kps.HMAC_SHA256:
            raise Fault(ALGORITHM, transport.uri)
        # 4
        octets = kps.c14n(signed)
        if not kps.verify(strong_certificate(signer.sc), guardian.uri, octets, guardian.octets):
            raise Fault(PROTECTOR, "guardian signature")
        # 5
        keys = {w.id: (strong_certificate(w.sc), strong_certificate(w.ec)) for w in wrappings}
        if len([w for w in wrappings if w.parent == w.id]) != 1:
            raise Fault(WRAPPING, "owners")
        for w in wrappings:
            seen, at = set(), w
            while at.parent != at.id:
                if at.id in seen or at.parent not in by_id:
                    raise Fault(WRAPPING, "parents")
                seen.add(at.id)
                at = by_id[at.parent]
            if not kps.verify(keys[w.parent][0], w.scs.uri, w.sc, w.scs.octets) or \
                    not kps.verify(keys[w.id][0], w.ecs.uri, w.ec, w.ecs.octets):
                raise Fault(WRAPPING, "certificate signatures")
        # 6
        ours = [w for w in wrappings if kps.spki(keys[w.id][1]) == kps.spki(self.enc_key)]
        if not ours or kps.spki(keys[ours[0].id][0]) != kps.spki(self.sign_key):
            raise Fault(WRAPPING, "not for this service")
        # 7
        try:
            tk = self.enc_key.decrypt(ours[0].cipher, ours[0].oaep.padding())
            right = len(tk) == 32
        except ValueError:
            right = False
        tk = tk if right else bytes(32)
        right &= hmac.compare_digest(transport.octets, kps.transport_signature(tk, salt, info, octets))
        if not right:
            raise Fault(PROTECTOR, "not right")
        # 8
        fresh, salt = os.urandom(32), os.urandom(32)
        inner = "".join(
            "<Wrapping><Id>%d</Id><SigningCertificate>%s</SigningCertificate><SigningCertificateSignature "
            'ParentWrappingId="%d">%s</SigningCertificateSignature><EncryptionCertificate>%s</EncryptionCertificate>'
            "<EncryptionCertificateSignature>%s</EncryptionCertificateSignature><TransportKey><EncryptedData "
            'Algorithm="%s">%s<CipherValue>%s</CipherValue></EncryptedData></TransportKey></Wrapping>' % (
                w.id, kps.b64(w.sc), w.parent, certificate_signature_xml(w.scs), kps.b64(w.ec),
                certificate_signature_xml(w.ecs), w.oaep.uri, w.oaep.parameters(),
                kps.b64(keys[w.id][1].encrypt(fresh, w.oaep.padding()))) for w in wrappings)
        text = ('<Protector xmlns="%s"><Wrappings>%s</Wrappings><TransportKeySignature><KeyDerivationMethod Algorithm='
                '"%s"><Parameters>%s</Parameters></KeyDerivationMethod>%%s</TransportKeySignature><GuardianSignature '
                'WrappingId="%d">%%s</GuardianSignature></Protector>') % (
                    K, inner.replace("%", "%%"), kps.HKDF_URI, kps.hkdf_parameters(salt), ours[0].id)
        octets = kps.wrappings_octets((text % ("", "")).encode())
        egress = (text % (
            kps.signature_xml(kps.HMAC_SHA256, kps.transport_signature(fresh, salt, None, octets)),
            kps.signature_xml(kps.RSA_SHA256, kps.sign(self.sign_key, kps.RSA_SHA256, octets)))).encode()
        if len(egress) > MIB // 2:
            raise Fault(PROTECTOR, "the egress is too large")
        return tk, fresh, egress

    # attestation
    def attest(self, body):
        def bad(why):
            raise Fault("PayloadErrorReply", why)

        def pairs(found):
            if len({n for n, _ in found}) != len(found):
                bad("a member twice")
            return dict(found)

        def depth(x):
            inner = x.values() if isinstance(x, dict) else x if isinstance(x, list) else None
            return 0 if inner is None else 1 + max(map(depth, inner), default=0)

        def octets(text):
            try:
                return base64.b64decode(text, validate=True)
            except (ValueError, TypeError):
                bad("base64")
        try:
            asked = json.loads(body.decode("utf-8"), object_pairs_hook=pairs)
        except (ValueError, RecursionError):
            bad("not JSON")
        if not isinstance(asked, dict) or depth(asked) > 32:
            bad("depth")
        if asked.get("__type", "AttestationRequest" + hgsa.CORE) != "AttestationRequest" + hgsa.CORE:
            bad("__type")
        if len(octets(asked.get("SessionId"))) != 16:
            bad("SessionId")
        wanted = asked.get("RequestedContent")
        if not isinstance(wanted, list) or not wanted or any(x not in (1, 2) or x is True for x in wanted):
            bad("RequestedContent")
        content = {}
        try:
            for one in asked.get("ProvidedContent"):
                if one["m_Item1"] in (1, 8, 9):
                    if one["m_Item1"] in content:
                        bad("content twice")
                    content[one["m_Item1"]] = octets(one["m_Item2"])
        except (TypeError, KeyError):
            bad("ProvidedContent")
        if set(content) != {1, 8, 9}:
            bad("missing content")
        host, idk = self.public(content[8]), self.public(content[1])
        if host is None or idk is None:
            bad("a key")
        names = [n for n, k in self.hosts.items() if k == kps.spki(host)]
        if not names:
            raise Fault("UnauthorizedErrorReply", status=403)
        try:
            host.verify(content[9], content[8] + content[1], padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            raise Fault("UnauthorizedErrorReply", status=403)
        made = [hgsa.item(kind, self.certify(names[0], host, idk, kind)) for kind in dict.fromkeys(wanted)]
        return {"__type": "HealthCertificateReply" + hgsa.CORE, "Content": made}

    @staticmethod
    def public(octets):
        found = None
        try:
            if octets[:4] == b"RSA1":
                _, bits, e, n, p, q = struct.unpack_from("<6I", octets)
                if len(octets) == 24 + e + n and p == q == 0:
                    found = rsa.RSAPublicNumbers(int.from_bytes(octets[24:24 + e], "big"),
                                                 int.from_bytes(octets[24 + e:], "big")).public_key()
            else:
                try:
                    found = kps.public_key_of(octets)
                except ValueError:
                    found = serialization.load_der_public_key(octets)
                    if kps.spki(found) != octets:
                        return None
        except Exception:
            return None
        return found if found is not None and strong(found) else None

    def certify(self, name, host, idk, kind):
        begin = kps.now() - datetime.timedelta(minutes=5)
        usage = b"\x03\x02\x04\x30" if kind == 1 else b"\x03\x02\x07\x80"
        return kps.certificate(
            kps.spki(idk), self.attestation_key,
            kps.der_name(("2.5.4.3", name), ("2.5.4.5", hashlib.sha256(kps.spki(host)).hexdigest())),
            self.attestation_name, begin, begin + datetime.timedelta(hours=8),
            [("2.5.29.15", True, usage),
             ("2.5.29.37", False, kps.tlv(0x30, kps.der_oid("1.3.6.1.4.1.311.47.1.1")))],
            int.from_bytes(b"\x7f" + os.urandom(15), "big"))

    def signing_certificates(self):
        one = kps.tlv(0x30, kps.der_int(1), kps.tlv(0x31), kps.tlv(0x30, kps.der_oid("1.2.840.113549.1.7.1")),
                      kps.tlv(0xA0, self.attestation_cert), kps.tlv(0x31))
        return kps.tlv(0x30, kps.der_oid("1.2.840.113549.1.7.2"), kps.tlv(0xA0, one))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_):
        pass

    def answer(self, status, type, body, **headers):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", type)
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def read(self, limit):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while True:
                size = int(self.rfile.readline(), 16)
                body += self.rfile.read(size)
                self.rfile.readline()
                if len(body) > limit:
                    self.close_connection = True
                    raise Fault("RequestTooLargeException", status=413)
                if not size:
                    return body
        size = int(self.headers.get("Content-Length", "0"))
        if size > limit:
            self.close_connection = True
            raise Fault("RequestTooLargeException", status=413)
        return self.rfile.read(size)

    def do(self):
        path, service = self.path.lower(), self.server.service
        attestation = path.startswith("/attestation/")
        try:
            self.route(path, service)
        except Fault as fault:
            if not attestation:
                return self.answer(fault.status, "application/xml", error_xml(fault))
            kind = fault.code if fault.code.endswith("Reply") else "ErrorReply"
            body = {"__type": kind + hgsa.CORE, "Retryable": fault.status == 409}
            if fault.status == 409:
                body["ExpectedOperationMode"] = 3
            self.answer(fault.status, "application/json", json.dumps(body))

    do_GET = do_POST = do_PUT = do_DELETE = do

    def route(self, path, service):
        posts = {
            "/keyprotection/service/v1.0/rolltransportkey": lambda b: service.release(b, "v1.0"),
            "/keyprotection/service/v2.0/rolltransportkey": lambda b: service.release(b, "v2.0"),
            "/keyprotection/service/v2.0/rolltransportkeys": service.batch,
            "/attestation/v2.0/hostkeyattest": service.attest,
            "/attestation/v2.0/attest": None, "/attestation/v1.0/attest": None, "/attestation/v1.0/domainattest": None,
        }
        gets = {
            "/keyprotection/service/metadata/2014-07/metadata.xml": ("application/xml", lambda: service._metadata),
            "/attestation/getinfo": ("application/json", lambda: json.dumps({
                "__type": "ServiceInfoReply" + hgsa.CORE, "FunctionalLevel": 2, "OperationMode": 3,
                "SupportedFunctionalLevels": [1, 2]})),
            "/attestation/v2.0/signingcertificates": ("application/x-pkcs7-certificates",
                                                      service.signing_certificates),
        }
        body = self.read(16 * MIB if path.endswith("rolltransportkeys") else MIB)
        if path not in posts and path not in gets:
            raise Fault("NotFoundException", status=404)
        if self.command != ("POST" if path in posts else "GET"):
            raise Fault("MethodNotAllowedException", status=405)
        if path in gets:
            type, made = gets[path]
            return self.answer(200, type, made())
        xml = path.startswith("/keyprotection")
        content = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        charset = self.headers.get_content_charset("utf-8")
        if content not in (("application/xml", "text/xml") if xml else ("application/json",)) or charset != "utf-8":
            raise Fault("UnsupportedMediaTypeException", status=415)
        if posts[path] is None:
            raise Fault("OperationModeErrorReply", status=409)
        made = posts[path](body)
        self.answer(200, "application/xml" if xml else "application/json", made if xml else json.dumps(made))


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        import traceback
        traceback.print_exc()


def start(directory):
    server = Server(("127.0.0.1", 0), Handler)
    server.service = Service(directory)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
