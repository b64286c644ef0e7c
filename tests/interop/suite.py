#!/usr/bin/python3
"""Interoperability cases for a key-protection and attestation service, written from its protocol page alone.

    python3 suite.py --url http://127.0.0.1:PORT --lab DIR --claviger PATH_TO_BINARY [-k substring]
    python3 suite.py --self-test        the same cases against the small model in model.py
"""

import argparse
import functools
import glob
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding

sys.dont_write_bytecode = True

import hgsa
import kps
import wire
from kps import (AES128_GCM, AES256_GCM, DIGESTS, DS, HMAC_SHA256, K, KW_AES256, MORE21, OAEP, OAEP_MGF1P, RSA_SHA1,
                 RSA_SHA256, S, SIGNATURES, XENC11, Algorithms, Oaep, Party, Protector, View, Wrapping, b64, check,
                 equal, expect_error, hkdf_parameters, key, party)

ROLL = {"v1.0": "/KeyProtection/service/v1.0/RollTransportKey", "v2.0": "/KeyProtection/service/v2.0/RollTransportKey"}
BATCH = "/KeyProtection/service/v2.0/RollTransportKeys"
PROTECTOR, WRAPPING, ALGORITHM, REQUEST, HEALTH = (
    "InvalidProtectorException", "InvalidWrappingException", "UnsupportedAlgorithmException",
    "InvalidRequestException", "HealthCertificateException")
MIB = 1024 * 1024
UNKNOWN = "urn:example:no-such-algorithm"
CASES = []


def case(name, run, *arguments, **named):
    CASES.append((name, lambda lab: run(lab, *arguments, **named)))


class Note(str):
    """What a case that asserts nothing has to say."""


# --------------------------------------------------------------------------------------------------------------- lab

class Admin:
    def __init__(self, binary, lab):
        self.binary, self.config = binary, os.path.join(lab, "claviger.toml")

    def _run(self, *arguments):
        done = subprocess.run([self.binary, "hosts", *arguments, "--config", self.config], capture_output=True,
                              text=True, timeout=60)
        check(done.returncode == 0, "claviger hosts %s: %s" % (" ".join(arguments), done.stderr or done.stdout))
        return done.stdout

    def add(self, name, path):
        self._run("add", name, "--public-key", path)

    def remove(self, name):
        self._run("remove", name)

    def list(self):
        return self._run("list")


class Lab:
    def __init__(self, url, directory, admin):
        self.client, self.directory, self.admin = kps.Client(url), directory, admin
        self.run = os.urandom(4).hex()
        self.added = []

    @functools.cached_property
    def host_key(self):
        return kps.load_key(os.path.join(self.directory, "host/hostkey.pem"))

    @functools.cached_property
    def service(self):
        reply = self.client.request("GET", kps.METADATA)
        equal(reply.status, 200, "status of the metadata")
        return kps.read_metadata(reply.body)

    @functools.cached_property
    def idk(self):
        return key("idk")

    def attest(self, kind=1, host_key=None, idk=None):
        reply = hgsa.post(self.client, hgsa.request(host_key or self.host_key, idk or self.idk, [kind]))
        (got, der), = hgsa.certificates(reply)
        equal(got, kind, "result type")
        return der

    @functools.cached_property
    def health(self):
        return self.attest()

    def add_host(self, name, private):
        with tempfile.NamedTemporaryFile(suffix=".pem") as f:
            f.write(private.public_key().public_bytes(serialization.Encoding.PEM,
                                                      serialization.PublicFormat.SubjectPublicKeyInfo))
            f.flush()
            self.admin.add(name, f.name)
        self.added.append(name)

    def remove_host(self, name):
        self.admin.remove(name)
        self.added.remove(name)

    def clean(self):
        for name in list(self.added):
            try:
                self.remove_host(name)
            except Exception as e:
                print("cannot remove host %s: %s" % (name, e))

    # requests
    def post(self, body, version="v2.0", content_type="application/xml", path=None):
        return self.client.post(path or ROLL[version], body, content_type)

    def items(self, protector=None, health=None, algorithms=None):
        protector = self.plain if protector is None else protector
        return kps.request_items(protector, self.health if health is None else health, algorithms)

    def send(self, protector=None, health=None, algorithms=None, version="v2.0", **how):
        return self.post(kps.request_xml(self.items(protector, health, algorithms)), version, **how)

    # protectors
    def pair(self, owner=None, service=None, **changes):
        first = Wrapping(1, party("owner"), **owner or {})
        return Protector(first, Wrapping(2, self.service, first, **service or {}), **changes)

    def trio(self, owner=None, guardian=None, service=None, who=None, **changes):
        first = Wrapping(1, party("owner"), **owner or {})
        second = Wrapping(2, who or party("guardian"), first, **guardian or {})
        return Protector(first, second, Wrapping(3, self.service, first, **service or {}), **changes)

    @functools.cached_property
    def plain(self):
        return self.pair().make()

    def roll(self, made, document=None, version="v2.0", algorithms=None, reply=None, idk=None, health=None, **how):
        """Releases a protector and checks everything about the answer."""
        document = made.make() if document is None else document
        if reply is None:
            reply = self.send(document, health, algorithms, version, **how)
        keys = {int(w.id): w.who.enc_key for w in made.wrappings if w.who.enc_key}
        ours = [int(w.id) for w in made.wrappings if w.who.name == "service"][0]
        return self.judge(reply, document, made.tk, keys, ours, version, algorithms, idk)

    def judge(self, reply, document, tk, keys, ours, version="v2.0", algorithms=None, idk=None):
        check(reply.status == 200, "wanted 200, got %s" % reply)
        check(reply.type() in ("application/xml", "text/xml"), "an answer of type %s" % reply.type())
        root = kps.parse(reply.body)
        equal(root.tag, "{%s}RollTransportKeyResponse" % S, "root of the answer")
        release = kps.Release(root, idk or self.idk, algorithms or Algorithms(), version)
        equal(release.ingress_tk, tk, "ingress TK")
        view = kps.check_egress(document, release.egress, ours, release.egress_tk, keys)
        if version == "v2.0":
            equal(view.max_offline, release.policy, "MaxOfflineUnwraps and the policy")
        return release


# --------------------------------------------------------------------------------------- changing the text of a protector

def swap(old, new, count=1):
    def change(text):
        check(old in text, "the case is wrong: no %r" % old)
        return text.replace(old, new, count)
    return change


def sub(pattern, new, count=1):
    def change(text):
        changed, n = re.subn(pattern, new, text, count)
        check(n, "the case is wrong: no %r" % pattern)
        return changed
    return change


def chain(*changes):
    def change(text):
        for one in changes:
            text = one(text)
        return text
    return change


def revalue(tag, nth, new):
    """new: text, or a function of octets"""
    def change(text):
        found = list(re.finditer("<%s>([^<]*)</%s>" % (tag, tag), text))[nth]
        inner = new if isinstance(new, str) else b64(new(kps.unb64(found.group(1))))
        return text[:found.start(1)] + inner + text[found.end(1):]
    return change


def flip(octets, at=-1):
    octets = bytearray(octets)
    octets[at] ^= 1
    return bytes(octets)


def values(change):
    return lambda text: re.sub(r">([^<>\s]+)<", lambda m: ">" + change(m.group(1)) + "<", text)


def fold(nl):
    """White space inside base64, but only around hexadecimal and decimal numbers."""
    return values(lambda v: nl + "\t" + (nl + "   ").join(v[i:i + 61] for i in range(0, len(v), 61)) + nl
                  if not re.fullmatch("[0-9a-f]*", v) else " %s%s" % (v, nl))


def comment_values(v):
    middle = len(v) // 2
    return "<!-- <Id>9</Id> -->" + v[:middle] + "<!---->" + v[middle:] + "<!-- ]]> &amp; &nothing; -->"


def prefix(p, which="[A-Z]"):
    return chain(sub("<(/?)(?=%s)" % which, r"<\1%s:" % p, 0), swap('xmlns="%s"' % K, 'xmlns:%s="%s"' % (p, K)))


def two_prefixes(text):
    text = re.sub("<(/?)(?=[A-R])", r"<\1q:", text)
    text = re.sub("<(/?)(?=[S-Z])", r"<\1_r.-1:", text)
    return text.replace('xmlns="%s"' % K, 'xmlns:q="%s" xmlns:_r.-1="%s"' % (K, K))


PRETTY = sub(">(?=<)", ">\n    ", 0)
STYLES = {
    "plain": lambda t: t,
    "pretty-printed": PRETTY,
    "pretty-printed, CRLF": sub(">(?=<)", ">\r\n\t", 0),
    "pretty-printed, bare CR": sub(">(?=<)", ">\r  ", 0),
    "base64 and numbers folded": fold("\n"),
    "base64 and numbers folded, CRLF": chain(PRETTY, fold("\n"), sub("\n", "\r\n", 0)),
    "white space around hex and attribute numbers": chain(
        values(lambda v: "\n %s\t" % v), sub(r'WrappingId="(\d+)"', r'WrappingId=" \1&#10;"', 0)),
    "a prefix": prefix("kp"),
    "two prefixes for one namespace": two_prefixes,
    "the namespace again on every element": sub("<((?!Protector )[A-Z][A-Za-z]*)", r'<\1 xmlns="%s"' % K, 0),
    "unused namespace declarations": chain(
        swap("<Protector ", '<Protector xmlns:unused="urn:u" xmlns:h="urn:other" xmlns:xsi="urn:z" '),
        swap("<Wrappings>", '<Wrappings xmlns:more="urn:more" xmlns:unused="urn:v">'),
        sub("<Id>", '<Id xmlns:here="urn:here">', 0)),
    "shadowed prefix": chain(
        prefix("a"), swap("<a:Protector xmlns:a=", '<b:Protector xmlns:a="urn:wrong" xmlns:b='),
        swap("</a:Protector>", "</b:Protector>"),
        sub("<a:(Wrappings|TransportKeySignature|GuardianSignature)", r'<a:\1 xmlns:a="%s"' % K, 0)),
    "default namespace is another one": chain(
        prefix("a"), swap("<a:Protector ", '<a:Protector xmlns="urn:wrong" ')),
    "comments between elements": chain(
        sub(">(?=<)", "><!-- between <Wrappings> & -->", 0), lambda t: "<!-- first -->\n" + t + "<!-- last -->\n\n"),
    "comments inside values": values(comment_values),
    "CDATA": values(lambda v: "<![CDATA[%s]]>%s" % (v[:len(v) // 2 + 1], v[len(v) // 2 + 1:])),
    "CDATA twice in a value": values(lambda v: "<![CDATA[]]><![CDATA[%s]]><![CDATA[%s]]>" % (v[:1], v[1:])),
    "character references in values": values(lambda v: "&#x%X;%s" % (ord(v[0]), "".join("&#%d;" % ord(c) for c in v[1:9])) + v[9:]),
    "character references in attributes": sub('="(.)(.)', lambda m: '="&#x%x;&#%05d;' % (ord(m[1]), ord(m[2])) if m[2] != '"' else m[0], 0),
    "white space as character references": values(lambda v: "&#9;&#xA;&#x20;%s&#x0d;" % v),
    "BOM": lambda t: "\ufeff" + t,
    "XML declaration": lambda t: '<?xml version="1.0"?>\n' + t,
    "XML declaration, encoding utf-8": lambda t: '<?xml version="1.0" encoding="utf-8"?>\r\n' + t,
    "XML declaration, encoding UTF-8, standalone": lambda t: "<?xml version='1.0' encoding='UTF-8' standalone='yes' ?>" + t,
    "BOM and XML declaration": lambda t: '\ufeff<?xml version="1.0" encoding="UTF-8"?>' + t,
    "leading zeros": chain(sub(r"<Id>", "<Id>000", 0), sub('WrappingId="', 'WrappingId="0000000000', 0),
                           swap("<h:KeyLength>32", "<h:KeyLength>0032")),
    "single-quoted attributes": sub('="([^"]*)"', r"='\1'", 0),
    "white space inside tags": chain(sub('="([^"]*)"', r'  =\n"\1"\t', 0), sub(r"<(/[\w:]+)>", "<\\1\n >", 0)),
    "empty elements written out": sub(r"<([\w:]+)([^<>]*)/>", r"<\1\2></\1>", 0),
    "everything at once": lambda t: "\ufeff<?xml version='1.0' encoding='utf-8'?><!-- x -->" + chain(
        prefix("kp"), PRETTY, values(comment_values), sub('="([^"]*)"', r"='\1'", 0), sub("\n", "\r\n", 0))(t),
}

# what exclusive canonicalization has to get right
TORTURE = (
    '<Parameters><x:a xmlns:x="urn:a" xmlns:y="urn:b" xmlns:z="urn:unused" z="1" y:b="2" x:c="3" a=\'&quot;&lt;&amp;>&#9;&#10;&#13;'
    '\n x\' xml:lang="de">t &amp; &lt; > &#13; &#x1F600; \u00e9 e\u0301 "q" <!-- c --> <![CDATA[<&>]]><x:e/><e xmlns=""><x:f '
    'xmlns:x="urn:other" x:g=""/></e><y:h  y:i = "1"><x:j xmlns="urn:d" ><k/></x:j></y:h >tail</x:a><p:PSS xmlns:p="%s" '
    'one="1"/></Parameters>' % K)


# ---------------------------------------------------------------------------------------------- release, as it should be

def metadata(lab):
    lab.service
    reply = lab.client.request("GET", kps.METADATA)
    equal(reply.status, 200, "status")
    check(reply.type() in ("application/xml", "text/xml"), "type " + reply.type())


def metadata_tampered(lab):
    """That this client notices."""
    octets = lab.client.request("GET", kps.METADATA).body
    changed = re.sub(rb"(<(?:\w+:)?Version>)1<", rb"\g<1>2<", octets, count=1)
    check(changed != octets, "the case is wrong")
    try:
        kps.verify_enveloped(changed)
    except AssertionError:
        return
    raise AssertionError("changed metadata verifies")


def lab_protectors(lab):
    owner = [kps.load_key(os.path.join(lab.directory, "tenant/owner-%s.key.pem" % p)) for p in ("signing", "encryption")]
    certificates = [kps.load_certificate(os.path.join(lab.directory, "tenant/owner-%s.crt.pem" % p))
                    for p in ("signing", "encryption")]
    files = sorted(glob.glob(os.path.join(lab.directory, "tenant/*.xml")))
    check(files, "no protector in the lab")
    for path in files[:4]:
        with open(path, "rb") as f:
            document = f.read()
        view = View(document)
        mine = [w for w in view.wrappings if w["sc"] == certificates[0] and w["ec"] == certificates[1]]
        equal(len(mine), 1, "wrappings of the owner in " + path)
        id = mine[0]["id"]
        tk = view.unwrap(id, owner[1])
        view.verify(tk)
        equal(kps.spki(owner[0]), kps.spki(kps.public_key_of(mine[0]["sc"])), "owner's signing key")
        service = kps.public_key_of(lab.service.enc_cert)
        ours = [w["id"] for w in view.wrappings if kps.spki(kps.public_key_of(w["ec"])) == kps.spki(service)]
        for version in ("v1.0", "v2.0"):
            lab.judge(lab.send(document, version=version), document, tk, {id: owner[1]}, ours[0], version)


def roll(lab, build, version="v2.0", algorithms=None):
    lab.roll(build(lab), version=version, algorithms=algorithms)


def styled(lab, change):
    made = lab.trio(info=b"\x01\xab", guardian={"oaep": Oaep(OAEP, "sha256", "sha512")})
    lab.roll(made, made.make(before=change))


def comments_later(lab):
    """Comments are not in the canonical form: they may come after signing."""
    made = lab.pair()
    lab.roll(made, made.make(after=chain(STYLES["comments between elements"], STYLES["comments inside values"])))


def oaep_everywhere(oaep):
    return lambda lab: lab.trio(owner={"oaep": oaep}, guardian={"oaep": oaep}, service={"oaep": oaep})


def oaep_mixed(lab):
    return lab.trio(owner={"oaep": Oaep(OAEP, "sha512", "sha1")}, guardian={"oaep": Oaep(OAEP)},
                    service={"oaep": Oaep(OAEP, "sha256", "sha384")})


def signed_by_guardian(lab):
    made = lab.trio()
    made.by = made.wrappings[1]
    return made


def with_parameters(slot, text):
    def build(lab):
        if slot in ("gs_params", "tks_params"):
            return lab.trio(**{slot: text})
        return lab.trio(owner={slot: text}, guardian={slot: text}, service={slot: text})
    return build


def parent_is_guardian(lab):
    first = Wrapping(1, party("owner"))
    second = Wrapping(4000000000, party("guardian"), first)
    return Protector(first, Wrapping(0, lab.service, second), second)


def deep_parents(lab):
    """Every wrapping's parent is the one behind it; the owner comes last."""
    first = Wrapping(20, party("owner"))
    line = [first]
    for n in range(8):
        line.append(Wrapping(n + 1, party("guardian" if n % 2 else "guardian2"), line[-1]))
    line.append(Wrapping(99, lab.service, line[-1]))
    return Protector(*reversed(line), by=first)


def many(count, at):
    def build(lab):
        first = Wrapping(1, party("owner"))
        rest = [Wrapping(n + 10, party("guardian" if n % 2 else "guardian2"), first) for n in range(count - 2)]
        rest.insert(at, Wrapping(2, lab.service, first))
        return Protector(first, *rest)
    return build


def service_first(lab):
    first = Wrapping(5, party("owner"))
    return Protector(Wrapping(3, lab.service, first), first, by=first)


def service_twice(lab):
    first = Wrapping(1, party("owner"))
    return Protector(first, Wrapping(7, lab.service, first), Wrapping(3, lab.service, first))


def renewed_signing_certificate(lab):
    public = kps.spki(kps.public_key_of(lab.service.sign_cert))
    return lab.pair(service={"sign_cert": kps.certificate(public, party("owner").sign_key, kps.cn("renewed"))})


def expired_certificates(lab):
    def cert(private):
        begin = kps.now() - kps.datetime.timedelta(days=800)
        return kps.certificate(kps.spki(private), party("guardian").sign_key, kps.cn("old"), begin=begin,
                               end=begin + kps.datetime.timedelta(days=1))
    owner = party("owner")
    return lab.pair(owner={"sign_cert": cert(owner.sign_key), "enc_cert": cert(owner.enc_key)})


def large_keys(lab):
    first = Wrapping(1, party("large owner", 4096, 3072))
    return Protector(first, Wrapping(2, lab.service, first))


def rolls(lab, change):
    """Each egress is the next ingress."""
    made = lab.trio(salt=b"\x01")
    document, tk, seen = made.make(before=change), made.tk, set()
    for n in range(4):
        release = lab.roll(made, document, ("v1.0", "v2.0")[n % 2])
        equal(release.ingress_tk, tk, "TK of roll %d" % n)
        document, tk = release.egress, release.egress_tk
        made.tk = tk
        seen.add(tk)
    equal(len(seen), 4, "distinct TKs")


def same_ingress_twice(lab):
    made = lab.pair()
    document = made.make()
    one, two = lab.roll(made, document), lab.roll(made, document)
    check(one.egress_tk != two.egress_tk and one.egress != two.egress, "the same egress twice")


def max_offline(lab, attribute):
    made = lab.pair(attributes=attribute)
    got = lab.roll(made)
    equal(got.policy, lab.roll(lab.pair()).policy, "policy with and without MaxOfflineUnwraps in the ingress")


def identity_of(lab, bits):
    idk = key("idk", bits)
    health = lab.attest(1, idk=idk)
    for uri in (OAEP, OAEP_MGF1P):
        lab.roll(lab.pair(), health=health, idk=idk, algorithms=Algorithms(uri))


def padded_protector(lab, size):
    made = lab.pair()
    document = made.make()
    return made, document + b" " * (size - len(document))


def largest_protector(lab):
    lab.roll(*padded_protector(lab, MIB // 2))


def largest_body(lab):
    made = lab.pair()
    document = made.make()
    body = kps.request_xml(lab.items(document)).encode()
    lab.roll(made, document, reply=lab.post(body + b"\n" * (MIB - len(body))))


def deepest(depth):
    levels = depth - 4                  # Protector, GuardianSignature, Signature, Parameters
    return "<Parameters>%s%s</Parameters>" % ("<d>" * levels, "</d>" * levels)


def request_styles(lab, change):
    made = lab.pair()
    document = made.make()
    lab.roll(made, document, reply=lab.post(change(kps.request_xml(lab.items(document)))))


def send_as(lab, **how):
    made = lab.pair()
    document = made.make()
    lab.roll(made, document, reply=lab.send(document, **how))


def chunked(lab):
    made = lab.pair()
    document = made.make()
    body = kps.request_xml(lab.items(document)).encode()
    reply = lab.client.request("POST", ROLL["v2.0"], iter([body[:5], body[5:900], body[900:]]),
                               {"Content-Type": "application/xml", "Transfer-Encoding": "chunked"}, encode_chunked=True)
    lab.roll(made, document, reply=reply)


def keep_alive(lab):
    connection = lab.client.connect()
    connection.connect()
    first = connection.sock
    body = kps.request_xml(lab.items()).encode()
    for n in range(6):
        if n % 2:
            connection.request("GET", kps.METADATA)
        else:
            connection.request("POST", ROLL["v2.0"], body, {"Content-Type": "application/xml"})
        answer = connection.getresponse()
        answer.read()
        equal(answer.status, 200, "status of request %d" % n)
        check(connection.sock is first, "the connection was closed after request %d" % n)
    connection.close()


def positive():
    case("metadata", metadata)
    case("metadata: a change is noticed", metadata_tampered)
    case("release: protectors of the lab's tenant", lab_protectors)
    names = {OAEP: "rsa-oaep", OAEP_MGF1P: "rsa-oaep-mgf1p", AES256_GCM: "aes256-gcm", AES128_GCM: "aes128-gcm",
             KW_AES256: "kw-aes256"}
    for version in ("v1.0", "v2.0"):
        for transfer in (OAEP_MGF1P, OAEP):
            for wrapping in (AES256_GCM, AES128_GCM, KW_AES256):
                for transport in (AES256_GCM, AES128_GCM):
                    case("release %s: %s, %s, %s" % (version, names[transfer], names[wrapping], names[transport]),
                         roll, Lab.pair, version, Algorithms(transfer, wrapping, transport))
    for digest in (None, *DIGESTS):
        for mgf in (None, *DIGESTS):
            case("protector: rsa-oaep, digest %s, MGF %s" % (digest, mgf), roll, oaep_everywhere(Oaep(OAEP, digest, mgf)))
    case("protector: rsa-oaep-mgf1p", roll, oaep_everywhere(Oaep(OAEP_MGF1P)))
    case("protector: rsa-oaep, empty Parameters", roll, oaep_everywhere(Oaep(OAEP, parameters="<Parameters/>")))
    case("protector: another OAEP in each wrapping", roll, oaep_mixed)
    for uri in SIGNATURES:
        short = uri.split("#")[1]
        case("protector: guardian signature " + short, roll, lambda lab, u=uri: lab.pair(gs_alg=u))
        case("protector: signing certificates signed with " + short, roll, lambda lab, u=uri: lab.trio(
            owner={"scs_alg": u}, guardian={"scs_alg": u}, service={"scs_alg": u}))
        case("protector: encryption certificates signed with " + short, roll, lambda lab, u=uri: lab.trio(
            owner={"ecs_alg": u}, guardian={"ecs_alg": u}))
    for name, parameters in (("empty", "<Parameters/>"),
                             ("PSS", '<Parameters><r:RSAPSSParams xmlns:r="http://www.w3.org/2007/05/xmldsig-more#"><r:'
                                     "SaltLength>20</r:SaltLength></r:RSAPSSParams></Parameters>"),
                             ("canonicalization torture", TORTURE),
                             ("32 deep", None)):
        for slot in ("gs_params", "tks_params", "scs_params", "ecs_params"):
            # certificate signatures are two levels further down
            text = parameters or deepest(32 if slot in ("gs_params", "tks_params") else 30)
            case("protector: Parameters of signatures, %s, %s" % (slot, name), roll, with_parameters(slot, text))
    for name, changes in (
            ("Info absent", {}), ("Info of one octet", {"info": b"\0"}), ("Info of 200 octets", {"info": bytes(range(200))}),
            ("salt of 1 octet", {"salt": b"\xff"}), ("salt of 1024 octets", {"salt": os.urandom(1024)}),
            ("salt of 65 octets", {"salt": os.urandom(65)})):
        case("protector: HKDF, " + name, roll, lambda lab, c=changes: lab.pair(**c))
    case("protector: HKDF, Info empty", roll, lambda lab: lab.pair(
        salt=b"salt", kdf_params="<Parameters>%s</Parameters>" % hkdf_parameters(b"salt", b"")))
    case("protector: HKDF, upper-case hex", roll, lambda lab: lab.pair(
        salt=b"\xab\xcd\xef", info=b"\xfe\xdc",
        kdf_params="<Parameters>%s</Parameters>" % hkdf_parameters(b"\xab\xcd\xef", b"\xfe\xdc", True)))
    for name, change in STYLES.items():
        case("protector text: " + name, styled, change)
    case("protector text: comments added after signing", comments_later)
    for name, build in (
            ("owner, guardian, service", Lab.trio), ("parent of the service is a guardian", parent_is_guardian),
            ("signed by a guardian", signed_by_guardian), ("a long line of parents, owner last", deep_parents),
            ("10 guardians", many(12, 4)), ("64 wrappings, service in the middle", many(64, 30)),
            ("64 wrappings, service last", many(64, 62)), ("service's wrapping first", service_first),
            ("service twice: the first counts", service_twice),
            ("signing certificate renewed with the same key", renewed_signing_certificate),
            ("expired certificates, issued by somebody", expired_certificates), ("larger keys of the owner", large_keys)):
        case("protector: " + name, roll, build)
    case("chain of four rolls", rolls, STYLES["plain"])
    case("chain of four rolls, from a weird protector", rolls, STYLES["everything at once"])
    case("the same ingress twice", same_ingress_twice)
    for attribute in ("0", "1", "4294967295", " 007 "):
        case("MaxOfflineUnwraps=%r of the ingress is ignored" % attribute, max_offline,
             ' MaxOfflineUnwraps="%s"' % attribute)
    for bits in (3072, 4096):
        case("identity key of %d bits" % bits, identity_of, bits)
    case("protector of 512 KiB", largest_protector)
    case("body of 1 MiB", largest_body)
    request_prefix = chain(sub("<(/?)(?=[A-Z])", r"<\1s:", 0), swap('xmlns="', 'xmlns:s="'))
    for name in ("pretty-printed", "pretty-printed, CRLF", "comments between elements", "BOM",
                 "XML declaration, encoding utf-8", "BOM and XML declaration", "white space inside tags"):
        case("request text: " + name, request_styles, STYLES[name])
    octets = re.compile(r">([A-Za-z0-9+/=]{100,})<")
    for name, change in (
            ("prefix", request_prefix),
            ("base64 folded", lambda t: octets.sub(lambda m: ">%s<" % re.sub("(.{1,76})", "\\1\r\n ", m[1]), t)),
            ("comments inside values", values(comment_values)), ("CDATA", STYLES["CDATA"]),
            ("character references", STYLES["character references in values"])):
        case("request text: " + name, request_styles, change)
    for kind in ("application/xml", "text/xml", "application/xml; charset=utf-8", 'text/xml;charset="UTF-8"',
                 'Application/XML; Charset=UTF-8'):
        case("content type " + kind, send_as, content_type=kind)
    case("path in lower case", send_as, path=ROLL["v2.0"].lower())
    case("path in upper case", send_as, path=ROLL["v2.0"].upper())
    case("metadata path in mixed case", lambda lab: equal(
        lab.client.request("GET", "/keyprotection/SERVICE/MetaData/2014-07/METADATA.XML").status, 200, "status"))
    case("chunked request", chunked)
    case("keep-alive", keep_alive)


# ------------------------------------------------------------------------------------------------- release, the request

def bad_request(lab, change, code=REQUEST, naming=None, status=400):
    """change: of the list of elements, or of the text"""
    items = lab.items()
    try:
        changed = change(items)
    except (TypeError, AttributeError):
        changed = change(kps.request_xml(items))
    if isinstance(changed, list):
        changed = kps.request_xml(changed)
    expect_error(lab.post(changed), status, code, naming)


def on_text(change):
    def run(given):
        if isinstance(given, list):
            raise TypeError
        return change(given)
    return run


def put(n, text):
    return lambda items: items[:n] + [(items[n][0], text)] + items[n + 1:]


NAMES = ["IngressProtector", "HealthCertificate", "TransferKeyEncryptionAlgorithm", "WrappingKeyEncryptionAlgorithm",
         "TransportKeysEncryptionAlgorithm"]


def requests():
    for n, name in enumerate(NAMES):
        case("request: no " + name, bad_request, lambda i, n=n: i[:n] + i[n + 1:])
        case("request: empty " + name, bad_request, put(n, ""))
        case("request: %s twice" % name, bad_request, lambda i, n=n: i[:n] + [i[n]] + i[n:])
        case("request: %s in another namespace" % name, bad_request, on_text(
            sub("<%s>" % name, '<%s xmlns="%s">' % (name, K))))
        case("request: an element inside %s" % name, bad_request, on_text(sub("</%s>" % name, "<x/></%s>" % name)))
        if n:
            case("request: %s one place too early" % name, bad_request,
                 lambda i, n=n: i[:n - 1] + [i[n], i[n - 1]] + i[n + 1:])
    for n in (0, 1):
        for text in ("!", "QUI", "QUJDR", "QQ==QQ==", "A\u00e9==", "QUJD-_AB", " \n "):
            case("request: %s is %r" % (NAMES[n], text), bad_request, put(n, text))
    for name, change in (
            ("extra element at the end", lambda i: i + [("More", "1")]),
            ("extra element first", lambda i: [("More", "1")] + i),
            ("extra element in another namespace", on_text(swap("</RollTransportKeyRequest>",
                                                                '<x xmlns="urn:x"/></RollTransportKeyRequest>'))),
            ("no element at all", lambda i: [])):
        case("request: " + name, bad_request, change)
    end = "</RollTransportKeyRequest>"
    for name, change in (
            ("another namespace", swap(S, K)), ("no namespace", swap(' xmlns="%s"' % S, "")),
            ("another root", sub("RollTransportKeyRequest", "RollTransportKeyRequests", 0)),
            ("an attribute on the root", swap(' xmlns=', ' more="1" xmlns=')),
            ("text between elements", swap("<HealthCertificate>", "text<HealthCertificate>")),
            ("empty body", lambda t: ""), ("not XML", lambda t: "hello"), ("not well-formed", swap(end, "")),
            ("something behind the root", lambda t: t + "<x/>"),
            ("DTD", lambda t: "<!DOCTYPE RollTransportKeyRequest>" + t),
            ("DTD with an entity", lambda t: '<!DOCTYPE RollTransportKeyRequest [<!ENTITY x "%s">]>' % OAEP +
             t.replace(OAEP, "&x;")),
            ("DTD with an external entity", lambda t: '<!DOCTYPE R [<!ENTITY x SYSTEM "file:///etc/hostname">]>' +
             t.replace(OAEP, "&x;")),
            ("unknown entity", swap(OAEP, "&x;")),
            ("instruction before the root", lambda t: "<?go now?>" + t),
            ("instruction behind the root", lambda t: t + "<?go now?>"),
            ("instruction inside", swap("<HealthCertificate>", "<?go now?><HealthCertificate>")),
            ("instruction inside a value", swap("</HealthCertificate>", "<?go now?></HealthCertificate>")),
            ("depth 33", swap(end, "<x>" * 32 + "</x>" * 32 + end)),
            ("depth 5000", swap(end, "<x>" * 5000 + "</x>" * 5000 + end)),
            ("declared encoding iso-8859-1", lambda t: '<?xml version="1.0" encoding="iso-8859-1"?>' + t),
            ("octets that are not UTF-8", lambda t: t.encode().replace(b"><Health", b"><!-- \xff\xfe --><Health", 1)),
            ("a NUL character reference", swap("</HealthCertificate>", "&#0;</HealthCertificate>"))):
        case("request: " + name, bad_request, on_text(change))
    others = [[UNKNOWN, AES256_GCM, DS + "rsa-1_5", "http://www.w3.org/2001/04/xmlenc#rsa-1_5", OAEP.upper(), OAEP + "#"],
              [UNKNOWN, OAEP, "http://www.w3.org/2001/04/xmlenc#kw-aes128", "http://www.w3.org/2001/04/xmlenc#aes256-cbc"],
              [UNKNOWN, KW_AES256, OAEP, "http://www.w3.org/2001/04/xmlenc#aes256-cbc"]]
    for n, uris in enumerate(others):
        for uri in uris:
            case("request: %s is %s" % (NAMES[n + 2], uri), bad_request, put(n + 2, uri), ALGORITHM, uri)


# ----------------------------------------------------------------------------------------------- release, the health

def bad_health(lab, build):
    expect_error(lab.send(health=build(lab)), 403, HEALTH)


def forged_health(lab, signer=None, issuer=None, begin=None, subject=None, public=None):
    real = x509.load_der_x509_certificate(lab.health)
    begin = begin or kps.now() - kps.datetime.timedelta(minutes=5)
    usage = [("2.5.29.15", True, b"\x03\x02\x04\x30"),
             ("2.5.29.37", False, kps.tlv(0x30, kps.der_oid("1.3.6.1.4.1.311.47.1.1")))]
    return kps.certificate(public or kps.spki(lab.idk), signer or key("forger"),
                           subject or real.subject.public_bytes(), issuer or real.issuer.public_bytes(), begin,
                           begin + kps.datetime.timedelta(hours=8), usage)


def resigned_health(lab):
    real = x509.load_der_x509_certificate(lab.health)
    signature = key("forger").sign(real.tbs_certificate_bytes, padding.PKCS1v15(), hashes.SHA256())
    return kps.tlv(0x30, real.tbs_certificate_bytes, kps.SHA256_WITH_RSA, kps.tlv(0x03, b"\0", signature))


def flipped_body(lab):
    """One bit of the identity key."""
    der, modulus = lab.health, lab.idk.public_key().public_numbers().n.to_bytes(256, "big")
    at = der.index(modulus) + 100
    return flip(der, at)


def removed_host(lab):
    name, private = "interop-removed-" + lab.run, key("removed host")
    lab.add_host(name, private)
    check(name in lab.admin.list(), "the host is not listed")
    health = lab.attest(1, private)
    lab.roll(lab.pair(), health=health)
    lab.remove_host(name)
    check(name not in lab.admin.list(), "the host is still listed")
    expect_error(lab.send(health=health), 403, HEALTH)
    hgsa.expect(hgsa.post(lab.client, hgsa.request(private, lab.idk)), 403, "UnauthorizedErrorReply")


def replaced_key(lab):
    name, old, new = "interop-replaced-" + lab.run, key("replaced host"), key("replacing host")
    lab.add_host(name, old)
    health = lab.attest(1, old)
    lab.roll(lab.pair(), health=health)
    lab.remove_host(name)
    lab.add_host(name, new)
    expect_error(lab.send(health=health), 403, HEALTH)
    lab.roll(lab.pair(), health=lab.attest(1, new))
    hgsa.expect(hgsa.post(lab.client, hgsa.request(old, lab.idk)), 403, "UnauthorizedErrorReply")
    lab.remove_host(name)


def renamed_host(lab):
    old, new, private = "interop-old-" + lab.run, "interop-new-" + lab.run, key("renamed host")
    lab.add_host(old, private)
    health = lab.attest(1, private)
    lab.remove_host(old)
    lab.add_host(new, private)
    expect_error(lab.send(health=health), 403, HEALTH)
    lab.remove_host(new)


def healths():
    ago = kps.datetime.timedelta
    for name, build in (
            ("garbage", lambda lab: b"garbage"), ("one octet", lambda lab: b"\x30"),
            ("cut short", lambda lab: lab.health[:-1]), ("trailing octet", lambda lab: lab.health + b"\0"),
            ("twice", lambda lab: lab.health * 2), ("PEM", lambda lab: b"-----BEGIN CERTIFICATE-----\n" +
                                                    b64(lab.health).encode() + b"\n-----END CERTIFICATE-----\n"),
            ("flipped signature", lambda lab: flip(lab.health)), ("flipped identity key", flipped_body),
            ("signed by the wrong key", resigned_health),
            ("self-made, the right names", forged_health),
            ("self-signed", lambda lab: forged_health(lab, lab.idk, kps.cn("me"), subject=kps.cn("me"))),
            ("self-made, expired", lambda lab: forged_health(lab, begin=kps.now() - ago(days=2))),
            ("self-made, not yet valid", lambda lab: forged_health(lab, begin=kps.now() + ago(days=2))),
            ("self-made, weak key", lambda lab: forged_health(lab, public=kps.spki(key("weak", 1024)))),
            ("signed by the host key", lambda lab: forged_health(lab, lab.host_key)),
            ("the service's own encryption certificate", lambda lab: lab.service.enc_cert),
            ("the attestation signer itself", lambda lab: hgsa.signing_certificates(lab.client)[0].public_bytes(
                serialization.Encoding.DER))):
        case("health certificate: " + name, bad_health, build)
    case("health certificate of a removed host", removed_host)
    case("health certificate of a host whose key was replaced", replaced_key)
    case("health certificate of a host that has another name now", renamed_host)


# --------------------------------------------------------------------------------------------- release, the protector

def bad(lab, code, build, naming=None):
    document = build(lab)
    expect_error(lab.send(document), 400, code, naming)


def refuse(name, code, build, naming=None):
    case("protector refused: " + name, bad, code, build, naming)


def made(before=None, after=None, **changes):
    return lambda lab: lab.pair(**changes).make(before, after)


def three(before=None, after=None, **changes):
    return lambda lab: lab.trio(**changes).make(before, after)


def evil(lab):
    """Wrappings that a thief would like to see in place."""
    thief = Wrapping(3, party("thief"))
    text = lab.pair().make().decode()
    inner = re.search("<Wrappings>(.*)</Wrappings>", text).group(1)
    return "<Wrappings>%s%s</Wrappings>" % (inner, thief.xml(os.urandom(32)))


def moved(change):
    """change(text, wrappings, evil)"""
    def build(lab):
        text = lab.pair().make().decode()
        good = re.search("<Wrappings>.*</Wrappings>", text).group(0)
        return change(text, good, evil(lab)).encode()
    return build


INTO = '(<GuardianSignature [^>]*><Signature [^>]*>)'


def broken_text():
    both = (("before signing", "before"), ("after signing", "after"))
    for name, document in (("empty of XML", b" "), ("not XML", b"hello"), ("half of it", None), ("another root", b"<a/>"),
                           ("NUL octets", b"\0" * 100), ("only a root", b'<Protector xmlns="%s"/>' % K.encode())):
        refuse(name, PROTECTOR, lambda lab, d=document: lab.plain[:len(lab.plain) // 2] if d is None else d)
    for name, change in (
            ("root in no namespace", swap(' xmlns="%s"' % K, "")), ("root in another namespace", swap(K, S)),
            ("root KeyProtector", chain(swap("<Protector ", "<KeyProtector "), swap("</Protector>", "</KeyProtector>"))),
            ("an envelope around it", lambda t: "<e>%s</e>" % t),
            ("lower-case element name", chain(swap("<Id>", "<id>"), swap("</Id>", "</id>"))),
            ("DTD", lambda t: "<!DOCTYPE Protector>" + t),
            ("DTD with an entity", lambda t: '<!DOCTYPE Protector [<!ENTITY x "1">]>' + t.replace("<Id>1<", "<Id>&x;<")),
            ("DTD with a default attribute", lambda t: '<!DOCTYPE Protector [<!ATTLIST Protector MaxOfflineUnwraps CDATA '
                                                      '"9">]>' + t),
            ("unknown entity", swap("<Id>1<", "<Id>&x;1<")),
            ("instruction before the root", lambda t: "<?go now?>" + t),
            ("instruction behind the root", lambda t: t + "<?go now?>"),
            ("instruction between elements", swap("<TransportKeySignature>", "<?go now?><TransportKeySignature>")),
            ("instruction in a value", swap("<Id>1<", "<Id>1<?go now?><")),
            ("something behind the root", lambda t: t + "<x/>"), ("text behind the root", lambda t: t + "x"),
            ("declared encoding iso-8859-1", lambda t: '<?xml version="1.0" encoding="iso-8859-1"?>' + t),
            ("declared encoding us-ascii", lambda t: '<?xml version="1.0" encoding="us-ascii"?>' + t),
            ("declared encoding utf-16 in UTF-8", lambda t: '<?xml version="1.0" encoding="utf-16"?>' + t),
            ("UTF-16", lambda t: t.encode("utf-16")),
            ("UTF-16 that says so", lambda t: ('<?xml version="1.0" encoding="utf-16"?>' + t).encode("utf-16")),
            ("octets that are not UTF-8", lambda t: t.encode().replace(b"<Wrappings>", b"<!-- \xe9 --><Wrappings>")),
            ("a surrogate in UTF-8", lambda t: t.encode().replace(b"<Wrappings>", b"<!-- \xed\xa0\x80 --><Wrappings>")),
            ("a control character", swap("<Wrappings>", "<Wrappings>&#1;")),
            ("an attribute twice", sub('(WrappingId="1")', r"\1 \1")),
            ("an undeclared prefix", swap("<Wrappings>", "<Wrappings><x:y/>"))):
        refuse(name, PROTECTOR, made(after=change))
    refuse("depth 33 in a guardian signature's Parameters", PROTECTOR, made(gs_params=deepest(33)))
    refuse("depth 33 in a certificate signature's Parameters", PROTECTOR, made(owner={"scs_params": deepest(31)}))
    refuse("depth 3000", PROTECTOR, made(gs_params=deepest(3000)))
    refuse("65 wrappings", PROTECTOR, lambda lab: many(65, 3)(lab).make())
    refuse("no wrappings", PROTECTOR, made(before=sub("<Wrappings>.*</Wrappings>", "<Wrappings/>")))
    refuse("512 KiB and one octet", PROTECTOR, lambda lab: padded_protector(lab, MIB // 2 + 1)[1])
    refuse("700 KiB", PROTECTOR, lambda lab: padded_protector(lab, 700 * 1024)[1])
    case("protector refused: egress too large", egress_too_large)

    for name, change in (
            ("two wrappings of one Id", chain(swap("<Id>2<", "<Id>1<"))), ("Ids 1 and 01", swap("<Id>2<", "<Id>01<")),
            ("Ids 1 and ' 1 '", swap("<Id>2<", "<Id> 1\n<")),
            ("an Id of letters", swap("<Id>2<", "<Id>two<")), ("a negative Id", swap("<Id>2<", "<Id>-2<")),
            ("an Id of 2^32", swap("<Id>2<", "<Id>4294967296<")), ("an empty Id", swap("<Id>2<", "<Id><")),
            ("an Id of 1.0", swap("<Id>2<", "<Id>1.0<")), ("a hexadecimal Id", swap("<Id>2<", "<Id>0x2<")),
            ("an Id of two numbers", swap("<Id>2<", "<Id>2 3<")),
            ("an element inside Id", swap("<Id>2<", "<Id><x/>2<")),
            ("ParentWrappingId missing", swap(' ParentWrappingId="1"', "")),
            ("ParentWrappingId not a number", swap('ParentWrappingId="1"', 'ParentWrappingId="x"')),
            ("ParentWrappingId empty", swap('ParentWrappingId="1"', 'ParentWrappingId=""')),
            ("WrappingId missing", swap(' WrappingId="1"', "")),
            ("WrappingId not a number", swap(' WrappingId="1"', ' WrappingId="x"')),
            ("WrappingId of nobody", swap(' WrappingId="1"', ' WrappingId="7"')),
            ("an attribute on Wrappings", swap("<Wrappings>", '<Wrappings more="1">')),
            ("an attribute on Wrapping", swap("<Wrapping>", '<Wrapping more="1">')),
            ("an attribute on Id", swap("<Id>", '<Id more="1">')),
            ("an attribute on CipherValue", swap("<CipherValue>", '<CipherValue Algorithm="x">')),
            ("an attribute on Signature", swap("<Signature ", '<Signature Id="x" ')),
            ("an attribute on GuardianSignature", swap("<GuardianSignature ", '<GuardianSignature URI="" ')),
            ("an attribute on the root", swap("<Protector ", '<Protector Version="1" ')),
            ("MaxOfflineUnwraps in another namespace", swap("<Protector ", '<Protector xmlns:k="%s" k:MaxOfflineUnwraps="1" ' % K)),
            ("WrappingId in a namespace", swap(' WrappingId="1"', ' xmlns:k="%s" k:WrappingId="1"' % K)),
            ("text between elements", swap("<Wrapping>", "<Wrapping>x")),
            ("text in CDATA between elements", swap("<Wrapping>", "<Wrapping><![CDATA[x]]>")),
            ("an element more in Wrapping", swap("</Wrapping>", "<More/></Wrapping>")),
            ("an element more in the protector", swap("</Protector>", "<More/></Protector>")),
            ("an element of another namespace in Wrapping", swap("</Wrapping>", '<x xmlns="urn:x"/></Wrapping>')),
            ("an element more in a Signature", swap("</SignatureValue>", "</SignatureValue><More/>")),
            ("an element inside a value", swap("</SigningCertificate>", "<x/></SigningCertificate>")),
            ("Parameters twice", swap("<SignatureValue>", "<Parameters/><Parameters/><SignatureValue>")),
            ("Parameters behind SignatureValue", swap("</SignatureValue>", "</SignatureValue><Parameters/>")),
            ("Parameters in another namespace", swap("<SignatureValue>", '<Parameters xmlns="urn:x"/><SignatureValue>'))):
        for when, how in both:
            refuse("%s, %s" % (name, when), PROTECTOR, made(**{how: change}))
    for text in ("-1", "4294967296", "x", "", "1 2", "0x1"):
        refuse("MaxOfflineUnwraps=%r" % text, PROTECTOR, made(attributes=' MaxOfflineUnwraps="%s"' % text))
    for tag in ("Wrappings", "Id", "SigningCertificate", "SigningCertificateSignature", "EncryptionCertificate",
                "EncryptionCertificateSignature", "TransportKey", "EncryptedData", "CipherValue", "TransportKeySignature",
                "KeyDerivationMethod", "GuardianSignature", "Signature", "SignatureValue"):
        gone = sub("<%s[ >].*?</%s>" % (tag, tag), "")
        refuse("no " + tag, PROTECTOR, made(before=gone))
        refuse("%s twice" % tag, PROTECTOR, made(before=sub("(<%s[ >].*?</%s>)" % (tag, tag), r"\1\1")))
        refuse("%s in another namespace" % tag, PROTECTOR, made(before=sub("<%s([ >])" % tag, r'<%s xmlns="urn:x"\1' % tag)))
    for one, two in (("Id", "SigningCertificate"), ("SigningCertificate", "SigningCertificateSignature"),
                     ("EncryptionCertificate", "EncryptionCertificateSignature"), ("Wrappings", "TransportKeySignature"),
                     ("TransportKeySignature", "GuardianSignature")):
        refuse("%s behind %s" % (one, two), PROTECTOR, made(before=sub(
            "(<%s[ >].*?</%s>)(<%s[ >].*?</%s>)" % (one, one, two, two), r"\2\1")))
    for tag in ("EncryptedData", "Signature", "KeyDerivationMethod"):
        refuse("no Algorithm on " + tag, PROTECTOR, made(before=sub('<%s Algorithm="[^"]*"' % tag, "<" + tag)))
    for n, name in enumerate(("signing certificate's", "encryption certificate's", "service's signing certificate's",
                              "service's encryption certificate's", "transport-key", "guardian")):
        refuse("empty value of the %s signature" % name, PROTECTOR, made(after=revalue("SignatureValue", n, "")))
        refuse("blank value of the %s signature" % name, PROTECTOR, made(after=revalue("SignatureValue", n, " \n")))
        refuse("value of the %s signature is not base64" % name, PROTECTOR, made(after=revalue("SignatureValue", n, "QUI")))
    for tag in ("SigningCertificate", "EncryptionCertificate", "CipherValue"):
        for nth, whose in ((0, "owner"), (1, "service")):
            refuse("empty %s of the %s" % (tag, whose), PROTECTOR, made(before=revalue(tag, nth, "")))
            refuse("%s of the %s is not base64" % (tag, whose), PROTECTOR, made(before=revalue(tag, nth, "*AAA")))


def egress_too_large(lab):
    """The text grows when it is written again; a service that writes it as short as it was may well release it."""
    text = "<Parameters><a><![CDATA[%s]]></a></Parameters>" % ("<" * 300000)
    made = lab.pair(owner={"scs_params": text})
    document = made.make()
    reply = lab.send(document)
    if reply.status == 200:
        lab.roll(made, document, reply=reply)
    else:
        expect_error(reply, 400, PROTECTOR)


def signatures():
    for name, change in (
            ("guardian signature flipped", revalue("SignatureValue", 5, flip)),
            ("guardian signature flipped in front", revalue("SignatureValue", 5, lambda v: flip(v, 0))),
            ("guardian signature cut short", revalue("SignatureValue", 5, lambda v: v[:-1])),
            ("guardian signature with an octet more", revalue("SignatureValue", 5, lambda v: v + b"\0")),
            ("guardian signature with a zero in front", revalue("SignatureValue", 5, lambda v: b"\0" + v)),
            ("guardian signature of zeros", revalue("SignatureValue", 5, lambda v: bytes(len(v)))),
            ("guardian signature is one", revalue("SignatureValue", 5, lambda v: bytes(len(v) - 1) + b"\1")),
            ("another known algorithm named for the guardian signature", sub(
                '(GuardianSignature WrappingId="1"><Signature Algorithm=")[^"]*', r"\1" + kps.PSS_SHA256)),
            ("WrappingId of the service, signature of the owner", swap(' WrappingId="1"', ' WrappingId="2"')),
            ("Id changed", swap("<Id>2<", "<Id>7<")), ("ParentWrappingId changed", sub(
                '(<Id>2<.*?ParentWrappingId=")1"', r'\g<1>2"')),
            ("OAEP algorithm changed", sub('<EncryptedData Algorithm="[^"]*"', '<EncryptedData Algorithm="%s"' % OAEP)),
            ("Parameters added", swap("<SignatureValue>", "<Parameters/><SignatureValue>")),
            ("white space added", swap("<Wrapping>", "<Wrapping> ")),
            ("base64 folded", sub("(<CipherValue>.{30})", "\\1\n")),
            ("leading zero added", swap("<Id>2<", "<Id>02<")),
            ("another prefix", chain(prefix("p", "(?:Wrappings|Protector)"), swap("<p:Protector ", '<p:Protector xmlns="%s" ' % K))),
            ("a wrapping removed", sub(
                "<Wrapping><Id>2<.*?</Wrapping>", "")),
            ("wrappings in another order", sub("(<Wrapping>.*?</Wrapping>)(<Wrapping>.*?</Wrapping>)", r"\2\1"))):
        refuse(name, PROTECTOR, made(after=change))
    for nth, whose in ((0, "owner"), (1, "service")):
        for tag in ("SigningCertificate", "EncryptionCertificate", "CipherValue"):
            refuse("one bit of the %s's %s" % (whose, tag), PROTECTOR, made(after=revalue(tag, nth, flip)))
        for n, name in enumerate(("signing", "encryption")):
            refuse("one bit of the %s's %s certificate signature" % (whose, name), PROTECTOR,
                   made(after=revalue("SignatureValue", 2 * nth + n, flip)))
    refuse("guardian signature of somebody else", PROTECTOR, made(gs_key=key("thief/s")))
    refuse("guardian signature over something else", PROTECTOR, lambda lab: lab.pair(
        gs=kps.sign(party("owner").sign_key, RSA_SHA256, b"something else")).make())
    refuse("guardian signature with the digest of another algorithm", PROTECTOR, lambda lab: made(
        after=sub('(GuardianSignature WrappingId="1"><Signature Algorithm=")[^"]*', r"\1" + kps.RSA_SHA512))(lab))
    refuse("guardian signature over inclusive C14N of other namespaces", PROTECTOR, inclusive)
    refuse("wrapping of a thief added", PROTECTOR, moved(lambda t, g, e: t.replace(g, e)))
    for name, change in (
            ("Wrappings twice, theirs first", lambda t, g, e: t.replace(g, e + g)),
            ("Wrappings twice, theirs second", lambda t, g, e: t.replace(g, g + e)),
            ("Wrappings again at the end", lambda t, g, e: t.replace("</Protector>", e + "</Protector>")),
            ("Wrappings moved into Parameters", lambda t, g, e: re.sub(
                INTO, lambda m: m[1] + "<Parameters>%s</Parameters>" % g, t.replace(g, e))),
            ("Wrappings moved into Parameters, none left", lambda t, g, e: re.sub(
                INTO, lambda m: m[1] + "<Parameters>%s</Parameters>" % g, t.replace(g, ""))),
            ("Wrappings moved into the signature of the TK", lambda t, g, e: t.replace(g, e).replace(
                "<KeyDerivationMethod", g + "<KeyDerivationMethod")),
            ("Wrappings nested in Wrappings", lambda t, g, e: t.replace(g, e.replace("</Wrappings>", g + "</Wrappings>"))),
            ("Wrappings in a wrapping", lambda t, g, e: t.replace(g, e.replace("</Wrapping>", g + "</Wrapping>", 1))),
            ("Wrappings of another namespace in front", lambda t, g, e: t.replace(
                g, e.replace("<Wrappings>", '<Wrappings xmlns="urn:x">') + g)),
            ("Wrappings of another namespace behind", lambda t, g, e: t.replace(
                g, g + e.replace("<Wrappings>", '<w:Wrappings xmlns:w="urn:x">').replace("</Wrappings>", "</w:Wrappings>"))),
            ("only Wrappings of another namespace", lambda t, g, e: t.replace(
                g, g.replace("<Wrappings>", '<w:Wrappings xmlns:w="urn:x">').replace("</Wrappings>", "</w:Wrappings>"))),
            ("a protector in the protector", lambda t, g, e: t.replace("</Protector>", t + "</Protector>")),
            ("their protector around it", lambda t, g, e: t.replace(g, e).replace("</Protector>", t + "</Protector>"))):
        refuse(name, PROTECTOR, moved(change))


def inclusive(lab):
    """Signed over inclusive C14N, which an unused declaration on the root changes."""
    from lxml import etree
    proto = lab.pair()
    text = proto.make(before=swap("<Protector ", '<Protector xmlns:unused="urn:u" ')).decode()
    octets = etree.tostring(kps.parse(text.encode()).find("{%s}Wrappings" % K), method="c14n")
    check(octets != kps.wrappings_octets(text.encode()), "the case is wrong")
    return revalue("SignatureValue", 5, lambda _: kps.sign(party("owner").sign_key, RSA_SHA256, octets))(text).encode()


def numbers(n=None, e=65537, bits=2048):
    """A certificate over a public key of these numbers, which nobody holds."""
    n = n or key("guardian/e").public_key().public_numbers().n
    if n.bit_length() != bits:
        n = (1 << bits - 1) | 12345
    return kps.certificate(kps.rsa_spki(n, e), party("guardian").sign_key, kps.cn("numbers"))


def ec_certificate():
    return kps.certificate(kps.spki(ec.generate_private_key(ec.SECP256R1())), party("guardian").sign_key, kps.cn("ec"))


def weak_party(bits=1024, e=65537):
    return Party("weak", key("weak %d %d" % (bits, e), bits, e), key("guardian/e"))


def cycle(lab):
    one = Wrapping(1, party("owner"))
    a, b = Wrapping(2, party("guardian"), one), Wrapping(3, party("guardian2"), one)
    a.parent, b.parent = b, a
    return Protector(one, a, b, Wrapping(4, lab.service, one)).make()


def no_owner(lab):
    one, a = Wrapping(1, party("owner")), Wrapping(2, party("guardian"))
    one.parent, a.parent = a, one
    return Protector(one, a, Wrapping(3, lab.service, one)).make()


def two_owners(lab):
    one, two = Wrapping(1, party("owner")), Wrapping(2, party("guardian"))
    return Protector(one, two, Wrapping(3, lab.service, one)).make()


def two_owners_same(lab):
    one, two = Wrapping(1, party("owner")), Wrapping(2, party("owner"))
    return Protector(one, two, Wrapping(3, lab.service, two)).make()


def half_ours(lab):
    """Our encryption certificate, in the wrapping of a thief."""
    return {"sign_cert": party("thief").sign_cert, "ecs_key": party("thief").sign_key}


def first_is_half_ours(lab):
    one = Wrapping(1, party("owner"))
    return Protector(one, Wrapping(2, lab.service, one, **half_ours(lab)), Wrapping(3, lab.service, one)).make()


def wrappings():
    junk = os.urandom(256)
    for name, changes in (
            ("signing certificate is garbage", {"sign_cert": b"garbage"}),
            ("encryption certificate is garbage", {"enc_cert": b"garbage", "cipher": junk}),
            ("signing certificate is a public key", {"sign_cert": kps.spki(key("guardian/s"))}),
            ("encryption certificate is cut short", {"enc_cert": party("guardian").enc_cert[:-1], "cipher": junk}),
            ("encryption key of 1024 bits", {"enc_cert": numbers(bits=1024), "cipher": junk}),
            ("encryption key of 2047 bits", {"enc_cert": numbers(bits=2047), "cipher": junk}),
            ("encryption key of 8193 bits", {"enc_cert": numbers(bits=8193), "cipher": junk}),
            ("encryption key with e = 3", {"enc_cert": numbers(e=3), "cipher": junk}),
            ("encryption key with e = 1", {"enc_cert": numbers(e=1), "cipher": junk}),
            ("encryption key with e = 65535", {"enc_cert": numbers(e=65535), "cipher": junk}),
            ("encryption key with e = 65538", {"enc_cert": numbers(e=65538), "cipher": junk}),
            ("elliptic encryption key", {"enc_cert": ec_certificate(), "cipher": junk}),
            ("elliptic signing key", {"sign_cert": ec_certificate()}),
            ("signing certificate signed by itself, not by the parent", {"scs_key": party("guardian").sign_key}),
            ("signing certificate signed by nobody", {"scs": os.urandom(256)}),
            ("signing certificate's signature over the encryption certificate", {"scs": kps.sign(
                party("owner").sign_key, RSA_SHA256, party("guardian").enc_cert)}),
            ("encryption certificate signed by the parent", {"ecs_key": party("owner").sign_key}),
            ("encryption certificate signed by nobody", {"ecs": os.urandom(256)}),
            ("parent unknown", {"parent_id": 77})):
        refuse("guardian's " + name, WRAPPING, three(guardian=changes))
    for name, weak in (("1024 bits", weak_party()), ("e = 3", weak_party(2048, 3))):
        refuse("guardian's signing key, " + name, WRAPPING, three(who=weak))

        def by_weak(lab, weak=weak):
            weak_owner = Wrapping(1, weak)
            return Protector(weak_owner, Wrapping(2, lab.service, weak_owner)).make()
        refuse("owner's signing key, " + name, WRAPPING, by_weak)
    refuse("owner's signing certificate garbage", WRAPPING, made(owner={"sign_cert": b"garbage"}))
    refuse("owner's encryption key of 1024 bits", WRAPPING, made(owner={"enc_cert": numbers(bits=1024), "cipher": junk}))
    for n, name in enumerate(("owner's signing", "owner's encryption", "service's signing", "service's encryption")):
        refuse("one bit of the %s certificate's signature, signed anew" % name, WRAPPING,
               made(before=revalue("SignatureValue", n, flip)))
    for nth, whose in ((0, "owner"), (1, "service")):
        for tag in ("SigningCertificate", "EncryptionCertificate"):
            refuse("one bit of the %s's %s, signed anew" % (whose, tag), WRAPPING, made(before=revalue(tag, nth, flip)))
    refuse("owner's ParentWrappingId is the service's", WRAPPING, made(owner={"parent_id": 2}))
    refuse("service's ParentWrappingId is its own", WRAPPING, made(service={"parent_id": 2}))
    refuse("service's ParentWrappingId of nobody", WRAPPING, made(service={"parent_id": 9}))
    refuse("ParentWrappingId is a guardian, the signature the owner's", WRAPPING, three(service={"parent_id": 2}))
    refuse("parents in a circle", WRAPPING, cycle)
    refuse("no owner", WRAPPING, no_owner)
    refuse("two owners", WRAPPING, two_owners)
    refuse("two owners of one key", WRAPPING, two_owners_same)
    refuse("not for this service", WRAPPING, lambda lab: (lambda one: Protector(
        one, Wrapping(2, party("guardian"), one)).make())(Wrapping(1, party("owner"))))
    refuse("our signing certificate, another encryption key", WRAPPING, made(
        service={"enc_cert": party("thief").enc_cert}))
    refuse("our encryption certificate in another's wrapping", WRAPPING, lambda lab: lab.pair(service=half_ours(lab)).make())
    refuse("the first wrapping with our key has another's signing certificate", WRAPPING, first_is_half_ours)


# -------------------------------------------------------------------------------------------------- the secret steps

def flipped_cipher(lab):
    cipher = kps.public_key_of(lab.service.enc_cert).encrypt(os.urandom(32), Oaep().padding())
    return lab.pair(service={"cipher": flip(cipher)}).make()


def wrong_tk(lab):
    return lab.pair(service={"tk": os.urandom(32)}).make()


def tk_of(length):
    return made(tk=b"\x5a" * length)


def tks(change):
    return made(after=revalue("SignatureValue", 4, change))


SECRET = {
    "flipped ciphertext": flipped_cipher,
    "right ciphertext of a wrong TK": wrong_tk,
    "random ciphertext": made(service={"cipher": b"\x11" * 256}),
    "ciphertext of zeros": made(service={"cipher": bytes(256)}),
    "ciphertext larger than the modulus": made(service={"cipher": b"\xff" * 256}),
    "ciphertext of 255 octets": made(service={"cipher": b"\x11" * 255}),
    "ciphertext of 257 octets": made(service={"cipher": b"\x11" * 257}),
    "ciphertext of 512 octets": made(service={"cipher": b"\x11" * 512}),
    "ciphertext of 1 octet": made(service={"cipher": b"\x11"}),
    "ciphertext with a zero in front": lambda lab: lab.pair(service={"cipher": b"\0" + kps.public_key_of(
        lab.service.enc_cert).encrypt(os.urandom(32), Oaep().padding())}).make(),
    "TK of 31 octets": tk_of(31), "TK of 33 octets": tk_of(33), "TK of 16 octets": tk_of(16), "TK of 64 octets": tk_of(64),
    "TK of 1 octet": tk_of(1),
    "transport-key signature flipped": tks(flip),
    "transport-key signature cut to 31 octets": tks(lambda v: v[:31]),
    "transport-key signature cut to 16 octets": tks(lambda v: v[:16]),
    "transport-key signature of 1 octet": tks(lambda v: v[:1]),
    "transport-key signature of 33 octets": tks(lambda v: v + b"\0"),
    "transport-key signature of zeros": tks(lambda v: bytes(32)),
    "another salt": made(after=sub("(<h:Salt>)[^<]*", r"\g<1>00")),
    "another Info": made(after=swap("<h:KeyLength>", "<h:Info>00</h:Info><h:KeyLength>")),
    "transport-key signature keyed by the TK itself": lambda lab: keyed_by_tk(lab),
}
SECRET["decrypted with another OAEP than encrypted"] = made(
    service={"oaep": Oaep(OAEP, "sha256", "sha1")}, before=swap(DIGESTS["sha256"][0], DIGESTS["sha512"][0]))
SECRET["decrypted with another MGF than encrypted"] = made(
    service={"oaep": Oaep(OAEP, "sha256", "sha1")}, before=swap("mgf1sha1", "mgf1sha256"))


def keyed_by_tk(lab):
    proto = lab.pair()
    return proto.make(after=lambda t: revalue("SignatureValue", 4, lambda _: kps.hmac.new(
        proto.tk, kps.wrappings_octets(t.encode()), kps.hashlib.sha256).digest())(t))


def secret(lab, build):
    wanted = lab.send(wrong_tk(lab))
    expect_error(wanted, 400, PROTECTOR)
    got = lab.send(build(lab))
    expect_error(got, 400, PROTECTOR)
    equal((got.status, got.body), (wanted.status, wanted.body), "answer, compared with the one to a wrong TK")


def same_length(lab):
    """All headers alike but those that vary anyhow."""
    def headers(reply):
        return [(n.lower(), v) for n, v in reply.headers.items() if n.lower() not in ("date", "x-request-id")]
    one, two = lab.send(flipped_cipher(lab)), lab.send(wrong_tk(lab))
    equal(headers(one), headers(two), "headers")


def timing(lab, tries=100):
    times = {"flipped ciphertext": [], "wrong TK": [], "cut transport-key signature": []}
    documents = {"flipped ciphertext": flipped_cipher(lab), "wrong TK": wrong_tk(lab),
                 "cut transport-key signature": SECRET["transport-key signature cut to 31 octets"](lab)}
    bodies = {n: kps.request_xml(lab.items(d)).encode() for n, d in documents.items()}
    for _ in range(tries):
        for name, body in bodies.items():
            begin = time.perf_counter()
            lab.post(body)
            times[name].append(time.perf_counter() - begin)
    return Note("medians of %d: %s" % (tries, ", ".join(
        "%s %.3f ms" % (name, 1000 * statistics.median(list_)) for name, list_ in times.items())))


def secrets():
    for name, build in SECRET.items():
        case("secret step: " + name, secret, build)
    case("secret step: headers", same_length)
    case("timing of the secret steps", timing)


# ------------------------------------------------------------------------------------- algorithms of the protector

def kdf(text):
    return made(kdf_params=text and "<Parameters>%s</Parameters>" % text)


def oaep_parameters(uri, inner):
    oaep = Oaep(uri, parameters="<Parameters>%s</Parameters>" % inner)
    return three(guardian={"oaep": oaep})


def algorithms():
    slots = {
        "a guardian signature": lambda uri: made(gs_alg=uri),
        "the transport-key signature": lambda uri: made(tks_alg=uri),
        "the owner's signing certificate's signature": lambda uri: made(owner={"scs_alg": uri}),
        "the service's signing certificate's signature": lambda uri: made(service={"scs_alg": uri}),
        "the owner's encryption certificate's signature": lambda uri: made(owner={"ecs_alg": uri}),
        "the service's encryption certificate's signature": lambda uri: made(service={"ecs_alg": uri}),
        "key derivation": lambda uri: made(kdf_alg=uri),
        "the owner's TK": lambda uri: made(owner={"oaep": Oaep(uri), "cipher": b"\x11" * 256}),
        "the service's TK": lambda uri: made(service={"oaep": Oaep(uri), "cipher": b"\x11" * 256}),
    }
    for slot, build in slots.items():
        uris = [UNKNOWN, "http://www.w3.org/2009/xmldsig11#dsa-sha256"]
        if "signature" in slot:
            uris += [RSA_SHA1, "http://www.w3.org/2007/05/xmldsig-more#sha1-rsa-MGF1", OAEP]
            uris += [RSA_SHA256, DS + "hmac-sha1"] if "transport" in slot else [HMAC_SHA256, RSA_SHA256.upper()]
        elif "TK" in slot:
            uris += ["http://www.w3.org/2001/04/xmlenc#rsa-1_5", AES256_GCM]
        else:
            uris += [HMAC_SHA256, "http://www.w3.org/2009/xmlenc11#pbkdf2"]
        for uri in uris:
            refuse("%s by %s" % (slot, uri), ALGORITHM, build(uri), uri)
    digest = '<ds:DigestMethod xmlns:ds="%s" Algorithm="%%s"/>' % DS
    mgf = '<xenc11:MGF xmlns:xenc11="%s" Algorithm="%%s"/>' % XENC11
    sha256, mgf256 = digest % DIGESTS["sha256"][0], mgf % (XENC11 + "mgf1sha256")
    for name, uri, inner, naming in (
            ("an unknown digest", OAEP, digest % UNKNOWN, UNKNOWN),
            ("MD5", OAEP, digest % "http://www.w3.org/2001/04/xmldsig-more#md5", "http://www.w3.org/2001/04/xmldsig-more#md5"),
            ("an unknown MGF", OAEP, mgf % UNKNOWN, UNKNOWN),
            ("a digest as MGF", OAEP, mgf % DIGESTS["sha256"][0], DIGESTS["sha256"][0]),
            ("DigestMethod twice", OAEP, sha256 * 2, None), ("MGF twice", OAEP, mgf256 * 2, None),
            ("OAEPparams", OAEP, "<OAEPparams>AAAA</OAEPparams>", None),
            ("xenc:OAEPparams", OAEP, sha256 + '<e:OAEPparams xmlns:e="http://www.w3.org/2001/04/xmlenc#">AAAA</e:OAEPparams>', None),
            ("an empty xenc:OAEPparams", OAEP, '<e:OAEPparams xmlns:e="http://www.w3.org/2001/04/xmlenc#"/>', None),
            ("something else", OAEP, sha256 + mgf256 + '<x xmlns="urn:x"/>', None),
            ("DigestMethod in another namespace", OAEP, '<DigestMethod Algorithm="%s"/>' % DIGESTS["sha256"][0], None),
            ("MGF in another namespace", OAEP, '<MGF Algorithm="%smgf1sha256"/>' % XENC11, None),
            ("DigestMethod on rsa-oaep-mgf1p", OAEP_MGF1P, sha256, None),
            ("SHA-1 on rsa-oaep-mgf1p", OAEP_MGF1P, digest % DIGESTS["sha1"][0], None),
            ("empty Parameters on rsa-oaep-mgf1p", OAEP_MGF1P, "", None)):
        refuse("OAEP Parameters, " + name, ALGORITHM, oaep_parameters(uri, inner), naming)
    salt = b"\x01" * 32
    good = hkdf_parameters(salt)
    hmac512 = "http://www.w3.org/2001/04/xmldsig-more#hmac-sha512"
    for name, text, naming in (
            ("no Parameters", "", None), ("empty Parameters", " ", None), ("HKDFParams twice", good * 2, None),
            ("something before HKDFParams", "<x/>" + good, None), ("something behind HKDFParams", good + "<x/>", None),
            ("HKDFParams in another namespace", good.replace(MORE21, K), None),
            ("another element", good.replace("HKDFParams", "HKDFParameters"), None),
            ("PRF hmac-sha512", hkdf_parameters(salt, prf=hmac512), hmac512),
            ("PRF unknown", hkdf_parameters(salt, prf=UNKNOWN), UNKNOWN),
            ("no PRF", hkdf_parameters(salt, prf=None), None), ("no Salt", hkdf_parameters(None), None),
            ("no KeyLength", hkdf_parameters(salt, length=None), None),
            ("KeyLength 16", hkdf_parameters(salt, length="16"), None),
            ("KeyLength 64", hkdf_parameters(salt, length="64"), None),
            ("KeyLength 256", hkdf_parameters(salt, length="256"), None),
            ("KeyLength empty", hkdf_parameters(salt, length=""), None),
            ("KeyLength of letters", hkdf_parameters(salt, length="many"), None),
            ("Salt empty", hkdf_parameters(b""), None), ("Salt of 1025 octets", hkdf_parameters(bytes(1025)), None),
            ("Salt of an odd number of digits", hkdf_parameters("abc"), None),
            ("Salt not hex", hkdf_parameters("zz"), None), ("Salt base64", hkdf_parameters("q83vASNFZ4k="), None),
            ("Salt 0x", hkdf_parameters("0x00"), None), ("Salt twice", good.replace("<h:KeyLength", "<h:Salt>00</h:Salt><h:KeyLength"), None),
            ("Info before Salt", hkdf_parameters(salt, b"i", order="PISK"), None),
            ("KeyLength before Salt", hkdf_parameters(salt, order="PKSI"), None),
            ("PRF last", hkdf_parameters(salt, order="SIKP"), None),
            ("something more", hkdf_parameters(salt, more="<h:More/>"), None),
            ("something foreign more", hkdf_parameters(salt, more='<x xmlns="urn:x"/>'), None),
            ("Salt in another namespace", good.replace("h:Salt", "Salt"), None),
            ("PRF in another namespace", good.replace("h:PRF", "PRF"), None)):
        refuse("HKDF, " + name, ALGORITHM, kdf(text), naming)


# ----------------------------------------------------------------------------------------------------- who comes first

def request_with(lab, wanted, protector=None, health=None, items=None, text=None):
    status, code, naming = wanted
    got = lab.items(protector and protector(lab), health)
    got = items(got) if items else got
    body = kps.request_xml(got)
    expect_error(lab.post(text(body) if text else body), status, code, naming)


def precedence():
    wrong = revalue("SignatureValue", 5, flip)
    unknown_gs = sub('(GuardianSignature [^>]*><Signature Algorithm=")[^"]*', r"\1" + UNKNOWN)
    unknown_tk = sub('(<EncryptedData Algorithm=")[^"]*', r"\1" + UNKNOWN)
    bad_scs = {"scs": b"\x11" * 256}
    for name, wanted, how in (
            ("missing element, then unknown algorithm", (400, REQUEST, None), {"items": lambda i: put(3, UNKNOWN)(i)[:1] + put(3, UNKNOWN)(i)[2:]}),
            ("unknown algorithm, then extra element", (400, REQUEST, None), {"items": lambda i: put(2, UNKNOWN)(i) + [("More", "1")]}),
            ("missing element, then bad health", (400, REQUEST, None), {"health": b"garbage", "items": lambda i: i[1:]}),
            ("unknown algorithm, then bad health", (400, ALGORITHM, UNKNOWN), {"health": b"garbage", "items": put(4, UNKNOWN)}),
            ("unknown algorithm, then bad protector", (400, ALGORITHM, UNKNOWN), {"protector": lambda lab: b"x", "items": put(2, UNKNOWN)}),
            ("bad health, then bad protector", (403, HEALTH, None), {"health": b"garbage", "protector": lambda lab: b"x"}),
            ("bad health, then protector too large", (403, HEALTH, None), {"health": b"garbage", "protector": lambda lab: b" " * 600000}),
            ("bad health, then unknown algorithm in the protector", (403, HEALTH, None), {"health": b"garbage", "protector": made(gs_alg=UNKNOWN)}),
            ("extra element, then unknown algorithm in the protector", (400, PROTECTOR, None), {"protector": made(gs_alg=UNKNOWN, after=swap("</Protector>", "<More/></Protector>"))}),
            ("unknown algorithm early, schema error late", (400, PROTECTOR, None), {"protector": made(after=chain(unknown_tk, swap("</Protector>", "<More/></Protector>")))}),
            ("same Ids, then unknown algorithm", (400, PROTECTOR, None), {"protector": made(after=chain(unknown_tk, swap("<Id>2<", "<Id>1<")))}),
            ("WrappingId of nobody, then unknown algorithm", (400, PROTECTOR, None), {"protector": made(by_id=9, gs_alg=UNKNOWN)}),
            ("unknown algorithm, then wrong guardian signature", (400, ALGORITHM, UNKNOWN), {"protector": made(after=chain(unknown_tk, wrong))}),
            ("unknown algorithm of the guardian signature, garbage certificate", (400, ALGORITHM, UNKNOWN), {"protector": made(owner={"sign_cert": b"garbage"}, after=unknown_gs)}),
            ("unknown key derivation, then wrong guardian signature", (400, ALGORITHM, UNKNOWN), {"protector": made(kdf_alg=UNKNOWN, after=wrong)}),
            ("unknown transport-key signature, then not for this service", (400, ALGORITHM, UNKNOWN), {"protector": made(tks_alg=UNKNOWN, service=None, before=sub("<Wrapping><Id>2<.*?</Wrapping>", ""))}),
            ("bad salt, then wrong TK", (400, ALGORITHM, None), {"protector": made(service={"tk": b"\0" * 32}, kdf_params="<Parameters>%s</Parameters>" % hkdf_parameters(b""))}),
            ("bad OAEP Parameters, then wrong guardian signature", (400, ALGORITHM, UNKNOWN), {"protector": made(owner={"oaep": Oaep(OAEP, parameters='<Parameters><ds:DigestMethod xmlns:ds="%s" Algorithm="%s"/></Parameters>' % (DS, UNKNOWN))}, after=wrong)}),
            ("garbage certificate of the signer, then wrong guardian signature", (400, WRAPPING, None), {"protector": made(owner={"sign_cert": b"garbage"}, after=wrong)}),
            ("wrong guardian signature, then garbage certificate of another", (400, PROTECTOR, None), {"protector": three(guardian={"sign_cert": b"garbage"}, after=wrong)}),
            ("wrong guardian signature, then garbage encryption certificate of the signer", (400, PROTECTOR, None), {"protector": made(owner={"enc_cert": b"garbage", "cipher": b"\x11" * 256}, after=wrong)}),
            ("wrong guardian signature, then wrong certificate signature", (400, PROTECTOR, None), {"protector": made(service=bad_scs, after=wrong)}),
            ("wrong guardian signature, then unknown parent", (400, PROTECTOR, None), {"protector": made(service={"parent_id": 9}, after=wrong)}),
            ("wrong guardian signature, then wrong TK", (400, PROTECTOR, None), {"protector": made(service={"tk": b"\0" * 32}, after=wrong)}),
            ("wrong certificate signature, then wrong TK", (400, WRAPPING, None), {"protector": made(service={"tk": b"\0" * 32, **bad_scs})}),
            ("unknown parent, then flipped ciphertext", (400, WRAPPING, None), {"protector": made(service={"cipher": b"\x11" * 256, "parent_id": 9})}),
            ("not for this service, then wrong transport-key signature", (400, WRAPPING, None), {"protector": lambda lab: (lambda one: Protector(one, Wrapping(2, party("guardian"), one)).make(after=revalue("SignatureValue", 4, flip)))(Wrapping(1, party("owner")))}),
            ("weak key of another, then wrong TK", (400, WRAPPING, None), {"protector": three(guardian={"enc_cert": numbers(bits=1024), "cipher": b"\x11" * 256}, service={"tk": b"\0" * 32})})):
        case("first failure: " + name, request_with, wanted, **how)


# --------------------------------------------------------------------------------------------------------------- HTTP

def status_of(lab, method, path, status, code, body=None, content_type="application/xml"):
    reply = lab.client.request(method, path, body, {"Content-Type": content_type} if content_type else {})
    expect_error(reply, status, code)


def too_large(lab, chunked, total):
    expect_error(lab.client.flood(ROLL["v2.0"], "application/xml", total, chunked), 413, "RequestTooLargeException")


def media(lab, content_type, body=None):
    body = kps.request_xml(lab.items()).encode() if body is None else body
    expect_error(lab.client.post(ROLL["v2.0"], body, content_type), 415, "UnsupportedMediaTypeException")


def utf16(lab, content_type):
    media(lab, content_type, kps.request_xml(lab.items()).encode("utf-16"))


def http_cases():
    for path in ("/KeyProtection/service/v3.0/RollTransportKey", "/KeyProtection/service/v1/RollTransportKey",
                 "/KeyProtection/service/v2.0/Nothing", "/KeyProtection/service/v2.0/RollTransportKey/more",
                 "/KeyProtection/service/RollTransportKey", "/KeyProtection/nothing",
                 "/KeyProtection/service/v1.0/RollTransportKeys"):
        case("404 POST " + path, status_of, "POST", path, 404, "NotFoundException", b"<x/>")
    case("404 GET another metadata", status_of, "GET", "/KeyProtection/service/metadata/2015-07/metadata.xml", 404,
         "NotFoundException", None, None)
    for method, path in (("GET", ROLL["v2.0"]), ("GET", ROLL["v1.0"]), ("PUT", ROLL["v2.0"]), ("DELETE", ROLL["v2.0"]),
                         ("GET", BATCH)):
        case("405 %s %s" % (method, path), status_of, method, path, 405, "MethodNotAllowedException", None, None)
    case("405 POST metadata", status_of, "POST", kps.METADATA, 405, "MethodNotAllowedException", b"<x/>")
    for total, name in ((MIB + 1, "1 MiB and one octet"), (8 * MIB, "8 MiB")):
        case("413 %s, Content-Length" % name, too_large, False, total)
        case("413 %s, chunked" % name, too_large, True, total)
    for kind in (None, "application/json", "text/plain", "application/octet-stream", "application/x-www-form-urlencoded",
                 "application/xml; charset=latin1", "text/xml; charset=iso-8859-1", 'application/xml; charset="us-ascii"',
                 "application/xml; charset=utf-16"):
        case("415 content type %s" % kind, media, kind)
    case("415 UTF-16 that says so", utf16, "application/xml; charset=utf-16")


# -------------------------------------------------------------------------------------------------------------- batch

def batch_text(items, health, algorithms=None):
    return kps.request_xml([("HealthCertificate", b64(health))] + (algorithms or Algorithms()).items() + [
        ("IngressProtector", i if isinstance(i, str) else b64(i)) for i in items], "RollTransportKeysRequest")


def batch_mixed(lab):
    good = [lab.pair(), lab.trio(), lab.pair(gs_alg=kps.PSS_SHA512)]
    documents = [g.make() for g in good]
    items = [documents[0], b"garbage", documents[1], wrong_tk(lab), b" " * (MIB // 2 + 1), made(tks_alg=UNKNOWN)(lab),
             no_owner(lab), documents[2]]
    reply = lab.client.post(BATCH, batch_text(items, lab.health), "application/xml")
    check(reply.status == 200, "wanted 200, got %s" % reply)
    root = kps.parse(reply.body)
    equal(root.tag, "{%s}RollTransportKeysResponse" % S, "root")
    parts = kps.elements(root)
    equal(len(parts), len(items), "number of answers")
    for n, code in ((1, PROTECTOR), (3, PROTECTOR), (4, PROTECTOR), (5, ALGORITHM), (6, WRAPPING)):
        equal(parts[n].tag, "{%s}Error" % S, "answer %d" % n)
        kps.expect_error_element(parts[n], code)
    for n, proto, document in ((0, good[0], documents[0]), (2, good[1], documents[1]), (7, good[2], documents[2])):
        equal(parts[n].tag, "{%s}RollTransportKeyResponse" % S, "answer %d" % n)
        release = kps.Release(parts[n], lab.idk, Algorithms(), "v2.0")
        equal(release.ingress_tk, proto.tk, "ingress TK")
        ours = len(proto.wrappings)
        kps.check_egress(document, release.egress, ours, release.egress_tk,
                         {w.id: w.who.enc_key for w in proto.wrappings if w.who.enc_key})


def batch_bad(lab, status, code, build, naming=None):
    expect_error(lab.client.post(BATCH, build(lab), "application/xml"), status, code, naming)


def batch_many(lab):
    reply = lab.client.post(BATCH, batch_text([lab.plain] * 256, lab.health), "application/xml")
    check(reply.status == 200, "wanted 200, got %s" % reply)
    parts = kps.elements(kps.parse(reply.body))
    equal([p.tag for p in parts], ["{%s}RollTransportKeyResponse" % S] * 256, "answers")
    keys = {kps.Release(p, lab.idk, Algorithms(), "v2.0").egress_tk for p in parts}
    equal(len(keys), 256, "distinct TKs")


def batches():
    case("batch: good and bad ones", batch_mixed)
    case("batch: 256", batch_many)
    for name, status, code, build, naming in (
            ("none", 400, REQUEST, lambda lab: batch_text([], lab.health), None),
            ("257", 400, REQUEST, lambda lab: batch_text([lab.plain] * 257, lab.health), None),
            ("an empty item", 400, REQUEST, lambda lab: batch_text([lab.plain, ""], lab.health), None),
            ("bad health", 403, HEALTH, lambda lab: batch_text([lab.plain], b"garbage"), None),
            ("unknown algorithm", 400, ALGORITHM, lambda lab: batch_text(
                [lab.plain], lab.health, Algorithms(wrapping=UNKNOWN)), UNKNOWN),
            ("a single request", 400, REQUEST, lambda lab: kps.request_xml(lab.items()), None),
            ("protectors first", 400, REQUEST, lambda lab: kps.request_xml(lab.items(), "RollTransportKeysRequest"), None)):
        case("batch refused: " + name, batch_bad, status, code, build, naming)


# -------------------------------------------------------------------------------------------------------- attestation

def attested(lab, encodings, wanted):
    idk = key("idk")
    reply = hgsa.post(lab.client, hgsa.request(lab.host_key, idk, wanted, encodings))
    got = hgsa.certificates(reply)
    equal(sorted(k for k, _ in got), sorted(set(wanted)), "result types")
    issuers = hgsa.signing_certificates(lab.client)
    names = set()
    for kind, der in got:
        names.add(hgsa.check_health(der, kind, None, lab.host_key, idk, issuers).subject.rfc4514_string())
    equal(len(names), 1, "subjects")


def host_is_listed(lab):
    subject = x509.load_der_x509_certificate(lab.health).subject
    name = subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
    check(name in lab.admin.list(), "the host %s is not listed" % name)


def own_host(lab):
    name, private, idk = "interop-own-" + lab.run, key("own host", 3072), key("idk")
    lab.add_host(name, private)
    issuers = hgsa.signing_certificates(lab.client)
    for how in hgsa.ENCODINGS:
        for kind, der in hgsa.certificates(hgsa.post(lab.client, hgsa.request(private, idk, [1, 2], (how, how)))):
            hgsa.check_health(der, kind, name, private, idk, issuers)
            if kind == 1:
                lab.roll(lab.pair(), health=der, idk=idk)
    lab.remove_host(name)


def attest_as(lab, change=None, text=None, path=hgsa.HOST_KEY_ATTEST, **how):
    body = hgsa.request(lab.host_key, lab.idk)
    if change:
        change(body)
    body = json.dumps(body)
    (kind, der), = hgsa.certificates(hgsa.post(lab.client, text(body) if text else body, path))
    hgsa.check_health(der, 1, None, lab.host_key, lab.idk, hgsa.signing_certificates(lab.client))


def get_info(lab):
    for path in ("/Attestation/getinfo", "/attestation/GetInfo"):
        got = hgsa.expect(lab.client.request("GET", path), 200, "ServiceInfoReply")
        equal((got["FunctionalLevel"], got["OperationMode"], got["SupportedFunctionalLevels"]), (2, 3, [1, 2]), "what it says")


def bad_attest(lab, status, kind, change=None, text=None, path=hgsa.HOST_KEY_ATTEST, content_type="application/json", **how):
    body = hgsa.request(lab.host_key, how.pop("idk", None) or lab.idk, **{n: (v(lab) if callable(v) else v) for n, v in how.items()})
    if change:
        change(body)
    body = json.dumps(body)
    got = hgsa.expect(hgsa.post(lab.client, text(body) if text else body, path, content_type), status, kind)
    if status == 409:
        equal((got.get("ExpectedOperationMode"), got["Retryable"]), (3, True), "ExpectedOperationMode and Retryable")


def setting(name, new):
    def change(body):
        body[name] = new
    return change


def dropping(kind):
    def change(body):
        body["ProvidedContent"] = [c for c in body["ProvidedContent"] if c["m_Item1"] != kind]
    return change


def provided(kind, text):
    def change(body):
        for one in body["ProvidedContent"]:
            if one["m_Item1"] == kind:
                one["m_Item2"] = text
    return change


def more(*items):
    def change(body):
        body["ProvidedContent"] += items
    return change


def again(kind):
    def change(body):
        body["ProvidedContent"] += [c for c in body["ProvidedContent"] if c["m_Item1"] == kind]
    return change


def other_order(lab):
    host, idk = hgsa.encode(lab.host_key), hgsa.encode(lab.idk)
    return hgsa.sign(lab.host_key, idk + host)


def json_depth(depth):
    return lambda t: t[:-1] + ', "more": %s%s}' % ("[" * (depth - 1), "]" * (depth - 1))


def ec_spki():
    return kps.spki(ec.generate_private_key(ec.SECP256R1()))


def attestations():
    for host in hgsa.ENCODINGS:
        for idk in hgsa.ENCODINGS:
            for wanted in ([1], [2], [1, 2], [2, 1], [1, 1], [2, 2, 1, 2]):
                case("attestation: host key %s, identity key %s, requested %s" % (host, idk, wanted), attested,
                     (host, idk), wanted)
    case("attestation: the lab's host is listed", host_is_listed)
    case("attestation: a host of our own, its name in the certificate", own_host)
    case("attestation: getinfo", get_info)
    case("attestation: signingCertificates", lambda lab: hgsa.signing_certificates(lab.client) and None)
    case("attestation: path in lower case", attest_as, path=hgsa.HOST_KEY_ATTEST.lower())
    case("attestation: no __type", attest_as, lambda b: b.pop("__type") and None)
    case("attestation: unknown members", attest_as, lambda b: b.update(More={"a": [1, None, "x", {}]}, x=1.5))
    case("attestation: content of other types", attest_as, more(
        hgsa.item(2, b"context"), hgsa.item(4, b"certificate"), hgsa.item(3, b"health")))
    case("attestation: escaped names and values", attest_as, text=lambda t: t.replace('"SessionId"', '"Session\\u0049d"').replace(
        '"m_Item2": "M', '"m_Item2": "\\u004d'))
    case("attestation: pretty-printed", attest_as, text=lambda t: json.dumps(json.loads(t), indent=4).replace("\n", "\r\n"))
    case("attestation: depth 32", attest_as, text=json_depth(32))

    def payload(name, *arguments, **how):
        case("attestation refused: " + name, bad_attest, 400, "PayloadErrorReply", *arguments, **how)

    def unauthorized(name, *arguments, **how):
        case("attestation refused: " + name, bad_attest, 403, "UnauthorizedErrorReply", *arguments, **how)

    names = {1: "identity key", 8: "host key", 9: "signature"}
    for kind, name in names.items():
        payload("no " + name, dropping(kind))
        payload("%s twice" % name, again(kind))
        payload("%s is not base64" % name, provided(kind, "!!!!"))
        payload("%s is base64url" % name, provided(kind, "-_-_"))
        payload("%s is cut base64" % name, provided(kind, "QUJDR"))
        payload("%s is a number" % name, provided(kind, 5))
        payload("%s is null" % name, provided(kind, None))
    for n, which in enumerate(("host", "idk")):
        for how in hgsa.ENCODINGS:
            payload("trailing octet in the %s key, %s" % (which, how), **{
                which + "_octets": lambda lab, w=which, h=how: hgsa.encode(lab.host_key if w == "host" else lab.idk, h) + b"\0"})
            payload("%s key cut short, %s" % (which, how), **{
                which + "_octets": lambda lab, w=which, h=how: hgsa.encode(lab.host_key if w == "host" else lab.idk, h)[:-1]})
        payload("%s key is garbage" % which, **{which + "_octets": b"garbage"})
        payload("%s key is empty" % which, **{which + "_octets": b""})
        payload("%s key is a private RSA2 blob" % which, **{
            which + "_octets": lambda lab: b"RSA2" + hgsa.encode(lab.idk, "rsa1")[4:]})
        payload("%s key is elliptic" % which, **{which + "_octets": lambda lab: ec_spki()})
        for how in hgsa.ENCODINGS:
            payload("%s key of 1024 bits, %s" % (which, how), **{
                which + "_octets": lambda lab, h=how: hgsa.encode(key("weak", 1024), h)})
            payload("%s key with e = 3, %s" % (which, how), **{
                which + "_octets": lambda lab, h=how: hgsa.encode(key("weak 2048 3", 2048, 3), h)})
        modulus = key("guardian/e").public_key().public_numbers().n
        for name, octets in (("e = 65535", kps.rsa_spki(modulus, 65535)), ("e even", kps.rsa_spki(modulus, 65538)),
                             ("e = 65535, RSA1", hgsa.rsa1(modulus, 65535)), ("e even, RSA1", hgsa.rsa1(modulus, 65538)),
                             ("2047 bits", kps.rsa_spki((1 << 2046) | 12345, 65537)),
                             ("2047 bits, RSA1", hgsa.rsa1((1 << 2046) | 12345, 65537)),
                             ("8193 bits", kps.rsa_spki((1 << 8192) | 12345, 65537)),
                             ("8193 bits, RSA1", hgsa.rsa1((1 << 8192) | 12345, 65537))):
            payload("%s key with %s" % (which, name), **{which + "_octets": octets})
    for name, new in (("empty", []), ("three", [3]), ("one and three", [1, 3]), ("zero", [0]), ("four", [4]),
                      ("a string", ["1"]), ("not an array", 1), ("null", None)):
        payload("RequestedContent is " + name, setting("RequestedContent", new))
    for name, new in (("15 octets", b64(bytes(15))), ("17 octets", b64(bytes(17))), ("empty", ""), ("not base64", "????"),
                      ("a GUID as text", "6f9619ff-8b86-d011-b42d-00c04fc964ff"), ("a number", 5)):
        payload("SessionId is " + name, setting("SessionId", new))
    payload("ProvidedContent empty", setting("ProvidedContent", []))
    payload("ProvidedContent not an array", setting("ProvidedContent", "x"))
    payload("a tuple that is none", more("x"))
    for member in ("SessionId", "RequestedContent", "ProvidedContent", "__type"):
        payload("%s twice" % member, text=lambda t, m=member: t[:-1] + ", " + json.dumps(
            {m: json.loads(t)[m]})[1:-1] + "}")
    payload("SessionId twice, once escaped", text=lambda t: t[:-1] + ', "Session\\u0049d": "AAAAAAAAAAAAAAAAAAAAAA=="}')
    payload("m_Item1 twice", text=swap('"m_Item1": 8', '"m_Item1": 8, "m_Item1": 8'))
    payload("m_Item2 twice", text=sub('("m_Item2": "[^"]*")', r"\1, \1"))
    payload("__type of another request", setting("__type", "TpmRequestInitial" + hgsa.CORE))
    payload("__type in another namespace", setting("__type", "AttestationRequest:#Somebody.Else"))
    payload("__type without a namespace", setting("__type", "AttestationRequest"))
    payload("__type is a number", setting("__type", 1))
    payload("depth 33", text=json_depth(33))
    payload("depth 33 of objects", text=lambda t: t[:-1] + ', "more": ' + '{"a":' * 31 + "{}" + "}" * 31 + "}")
    payload("depth 50000", text=json_depth(50000))
    for name, body in (("empty body", ""), ("not JSON", "hello"), ("an array", "[]"), ("null", "null"), ("XML", "<a/>"),
                       ("an empty object", "{}")):
        payload(name, text=lambda t, b=body: b)
    payload("cut short", text=lambda t: t[:-1])
    payload("something behind", text=lambda t: t + "x")
    payload("octets that are not UTF-8", text=lambda t: t.encode()[:-1] + b', "x": "\xff"}')
    payload("a weak identity key and a wrong signature", idk_octets=lambda lab: hgsa.encode(key("weak", 1024)),
            signature=b"\0" * 256)
    payload("an unknown host key and RequestedContent 3", setting("RequestedContent", [3]),
            host_octets=lambda lab: hgsa.encode(key("stranger")))
    for how in hgsa.ENCODINGS:
        unauthorized("unknown host key, " + how, lambda b, h=how: b.update(hgsa.request(
            key("stranger"), key("idk"), [1], (h, "spki"))))
    for name, signature in (
            ("signature of another key", lambda lab: hgsa.sign(key("stranger"), hgsa.encode(lab.host_key) + hgsa.encode(lab.idk))),
            ("signature over the other order", other_order),
            ("signature over the identity key only", lambda lab: hgsa.sign(lab.host_key, hgsa.encode(lab.idk))),
            ("signature over the host key only", lambda lab: hgsa.sign(lab.host_key, hgsa.encode(lab.host_key))),
            ("signature with SHA-512", lambda lab: hgsa.sign(
                lab.host_key, hgsa.encode(lab.host_key) + hgsa.encode(lab.idk), hashes.SHA512)),
            ("signature with SHA-1", lambda lab: hgsa.sign(
                lab.host_key, hgsa.encode(lab.host_key) + hgsa.encode(lab.idk), hashes.SHA1)),
            ("PSS signature", lambda lab: kps.sign(
                lab.host_key, kps.PSS_SHA256, hgsa.encode(lab.host_key) + hgsa.encode(lab.idk))),
            ("signature over another encoding of the keys", lambda lab: hgsa.sign(
                lab.host_key, hgsa.encode(lab.host_key, "rsa1") + hgsa.encode(lab.idk, "rsa1"))),
            ("signature over base64", lambda lab: hgsa.sign(
                lab.host_key, (b64(hgsa.encode(lab.host_key)) + b64(hgsa.encode(lab.idk))).encode())),
            ("signature flipped", lambda lab: flip(hgsa.sign(
                lab.host_key, hgsa.encode(lab.host_key) + hgsa.encode(lab.idk)))),
            ("signature cut short", lambda lab: hgsa.sign(
                lab.host_key, hgsa.encode(lab.host_key) + hgsa.encode(lab.idk))[:-1]),
            ("signature by the identity key", lambda lab: hgsa.sign(
                lab.idk, hgsa.encode(lab.host_key) + hgsa.encode(lab.idk)))):
        unauthorized(name, signature=signature)
    for path in ("/Attestation/v2.0/attest", "/Attestation/v1.0/attest", "/Attestation/v1.0/domainattest"):
        for name, text in (("a good request", None), ("a broken payload", lambda t: "{"), ("an empty body", lambda t: ""),
                           ("an array", lambda t: "[]")):
            case("attestation: 409 %s, %s" % (path, name), bad_attest, 409, "OperationModeErrorReply", text=text, path=path)
    for path in ("/Attestation/v3.0/hostkeyattest", "/Attestation/v1.0/hostkeyattest", "/Attestation/v2.0/nothing",
                 "/Attestation/v2.0/domainattest", "/Attestation/nothing"):
        case("attestation: 404 " + path, bad_attest, 404, "ErrorReply", path=path)
    for method, path in (("GET", hgsa.HOST_KEY_ATTEST), ("PUT", hgsa.HOST_KEY_ATTEST), ("POST", "/Attestation/getinfo"),
                         ("POST", "/Attestation/v2.0/signingCertificates")):
        case("attestation: 405 %s %s" % (method, path), lambda lab, m=method, p=path: hgsa.expect(lab.client.request(
            m, p, b"{}" if m != "GET" else None, {"Content-Type": "application/json"}), 405, "ErrorReply") and None)
    for chunks in (False, True):
        case("attestation: 413, %s" % ("chunked" if chunks else "Content-Length"), lambda lab, c=chunks: hgsa.expect(
            lab.client.flood(hgsa.HOST_KEY_ATTEST, "application/json", MIB + 1, c), 413, "ErrorReply") and None)
    for kind in (None, "application/xml", "text/plain", "application/x-www-form-urlencoded"):
        case("attestation: 415 content type %s" % kind, bad_attest, 415, "ErrorReply", content_type=kind)


# ---------------------------------------------------------------- what the page leaves open: seen, not judged

def seen(lab, act):
    try:
        reply = act(lab)
    except Exception as e:
        return Note("%s: %s" % (type(e).__name__, e))
    return Note("%d %s" % (reply.status, re.sub(r"\s+", " ", reply.body[:160].decode("utf-8", "replace"))))


def open_questions():
    order = ('<Parameters><xenc11:MGF xmlns:xenc11="%s" Algorithm="%smgf1sha256"/><ds:DigestMethod xmlns:ds="%s" Algorithm="%s"/>'
             "</Parameters>" % (XENC11, XENC11, DS, DIGESTS["sha256"][0]))

    def reordered(lab):
        oaep = Oaep(OAEP, "sha256", "sha256", order)
        return lab.send(lab.trio(guardian={"oaep": oaep}).make())
    for name, act in (
            ("release to a digitalSignature health certificate", lambda lab: lab.send(health=lab.attest(2))),
            ("UTF-16 request that does not say so", lambda lab: lab.post(kps.request_xml(lab.items()).encode("utf-16"))),
            ("white space around an algorithm URI of a request", lambda lab: lab.post(
                kps.request_xml(put(2, " %s\n" % OAEP)(lab.items())))),
            ("white space around an Algorithm attribute", lambda lab: lab.send(made(before=sub(
                '<EncryptedData Algorithm="([^"]*)"', r'<EncryptedData Algorithm=" \1 "', 0))(lab))),
            ("MGF before DigestMethod", reordered),
            ("trailing octet in a certificate of a protector", lambda lab: lab.send(made(
                owner={"sign_cert": party("owner").sign_cert + b"\0"})(lab))),
            ("an Id of +1", lambda lab: lab.send(made(before=swap("<Id>1<", "<Id>+1<"))(lab))),
            ("xsi:schemaLocation on the root", lambda lab: lab.send(made(before=swap(
                "<Protector ", '<Protector xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="a b" '))(lab))),
            ("XML 1.1", lambda lab: lab.send(made(before=lambda t: '<?xml version="1.1"?>' + t)(lab))),
            ("text in Parameters", lambda lab: lab.send(made(gs_params="<Parameters>text</Parameters>")(lab))),
            ("an attribute on a signature's Parameters", lambda lab: lab.send(made(gs_params='<Parameters a="1"/>')(lab))),
            ("an attribute on HKDFParams", lambda lab: lab.send(kdf(hkdf_parameters(b"1").replace(
                "<h:HKDFParams ", '<h:HKDFParams a="1" '))(lab))),
            ("Info of an odd number of digits", lambda lab: lab.send(kdf(hkdf_parameters(b"1", "abc"))(lab))),
            ("unknown path and unknown media type", lambda lab: lab.post(b"x", path="/KeyProtection/x", content_type=None)),
            ("unknown path outside both services", lambda lab: lab.client.request("GET", "/nothing")),
            ("wrong endpoint of attestation and unknown media type", lambda lab: lab.client.post(
                "/Attestation/v2.0/attest", b"{}", "text/plain")),
            ("application/json; charset=latin1 in attestation", lambda lab: hgsa.post(
                lab.client, hgsa.request(lab.host_key, lab.idk), content_type="application/json; charset=latin1")),
            ("a BOM in attestation", lambda lab: hgsa.post(
                lab.client, "\ufeff" + json.dumps(hgsa.request(lab.host_key, lab.idk)))),
            ("an unknown member twice in attestation", lambda lab: hgsa.post(
                lab.client, json.dumps(hgsa.request(lab.host_key, lab.idk))[:-1] + ', "x": 1, "x": 1}'))):
        case("open: " + name, seen, act)


# ---------------------------------------------------------------------------------------------------------- self-test

def self_checks(lab):
    """The tools of these files against written-down results."""
    document = (b'<?xml version="1.0"?>\n<a:R xmlns:a="urn:a" xmlns:u="urn:u" xmlns="urn:d"><!-- c --><a:W b=\'2\' a="1"  >\r\n'
                b'<C xmlns:u="urn:u"/><![CDATA[<&>]]>&#13;<!-- c --><u:e u:z="&#9;&quot;" q="1"></u:e></a:W>tail</a:R>')
    equal(kps.c14n(kps.parse(document)[1]),
          b'<a:W xmlns:a="urn:a" a="1" b="2">\n<C xmlns="urn:d"></C>&lt;&amp;&gt;&#xD;<u:e xmlns:u="urn:u" q="1" '
          b'u:z="&#x9;&quot;"></u:e></a:W>', "canonical form")
    equal(kps.derive(b"\x0b" * 22, bytes(range(13)), bytes(range(0xf0, 0xfa))).hex(),
          "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf", "RFC 5869, case 1")
    equal(kps.der_oid("1.3.6.1.4.1.311.47.1.1").hex(), "060a2b060104018237" + "2f0101", "an OID")
    for private in (key("owner/s"), key("weak", 1024)):
        numbers_ = private.public_key().public_numbers()
        equal(kps.rsa_spki(numbers_.n, numbers_.e), kps.spki(private), "SubjectPublicKeyInfo")
    for name, change in STYLES.items():
        proto = lab.trio(info=b"\x01")
        view = View(proto.make(before=change))
        view.verify(proto.tk)
        equal(view.unwrap(2, party("guardian").enc_key), proto.tk, "TK in style " + name)
        if name != "plain":
            check(change(proto.make().decode()) != proto.make().decode() or "written out" in name, "style %s does nothing" % name)


# ----------------------------------------------------------------------------------------------------------- schemas

def fits(lab):
    """All that was said until now, and what the metrics listener says."""
    lab.attest()
    equal(lab.send().status, 200, "status of a release")
    schemas, complaints = wire.Wire(), []
    for method, path, body, reply in lab.client.exchanges:
        try:
            schemas.exchange(method, path, body, reply)
        except Exception as e:
            complaints.append("%s %s -> %s: %s" % (method, path, reply, e))
    if lab.metrics:
        schemas.watched(lab.metrics)
    for needed in ("RollTransportKeyRequest", "RollTransportKeyResponse", "Protector", "AttestationRequest",
                   "HealthCertificateReply"):
        check(schemas.checked.get(needed), "no %s among what was checked" % needed)
    check(not complaints, "%d of %d messages: %s" % (len(complaints), len(lab.client.exchanges), "; ".join(complaints[:5])))


# --------------------------------------------------------------------------------------------------------------- main

def collect():
    attestations()
    positive()
    requests()
    healths()
    broken_text()
    signatures()
    wrappings()
    secrets()
    algorithms()
    precedence()
    http_cases()
    batches()
    open_questions()
    # Last, since it is about what the others said.
    case("schemas: every reply, and every request that was granted, fits docs/wire", fits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--lab")
    parser.add_argument("--claviger")
    parser.add_argument("--metrics", help="URL of the metrics listener")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--traceback", action="store_true", help="print where a failed case failed")
    parser.add_argument("-k", default="", help="only the cases whose name holds this")
    parser.add_argument("-x", action="append", default=[], metavar="SUBSTRING",
                        help="not the cases whose name holds this; may be given several times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.self_test:
            import model
            server = model.start(directory)
            lab = Lab("http://127.0.0.1:%d" % server.server_address[1], directory, server.service)
            case("self-test: tools", self_checks)
        else:
            if not (options.url and options.lab and options.claviger):
                parser.error("--url, --lab and --claviger, or --self-test")
            lab = Lab(options.url, options.lab, Admin(options.claviger, options.lab))
        lab.metrics = kps.Client(options.metrics) if options.metrics else None
        collect()
        names = [name for name, _ in CASES]
        doubled = {name for name in names if names.count(name) > 1}
        check(not doubled, "two cases of one name: %s" % doubled)
        passed = failed = 0
        for name, run in CASES:
            if options.k not in name or any(left_out in name for left_out in options.x):
                continue
            try:
                said = run(lab)
            except Exception as e:
                failed += 1
                why = str(e) if isinstance(e, AssertionError) else "%s: %s" % (type(e).__name__, e)
                print("FAILED %s: %s" % (name, re.sub(r"\s+", " ", why)[:600]), flush=True)
                if options.traceback:
                    traceback.print_exc()
                continue
            if isinstance(said, Note):
                print("note %s: %s" % (name, said), flush=True)
            else:
                passed += 1
                print("ok %s" % name, flush=True)
        lab.clean()
        print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
