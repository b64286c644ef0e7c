"""Holds what was said on the wire against the schemas in docs/wire.

As a program it reads exchanges of attestation from standard input, one in each line as JSON: `method`, `path`, `status`, `type`,
`retry_after`, and in base64 `request` and `reply`.
"""

import base64
import json
import os
import re
import sys

import jsonschema
from lxml import etree

import kps

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../docs/wire")
SERVICE = "{%s}" % kps.S
# XML Schema collapses white space around a number before it is read; libxml2 does so in elements only. A plus sign before an
# unsigned number is allowed by XML Schema 1.1, and by the service; libxml2 knows version 1.0, which does not allow it.
ID = "{%s}Id" % kps.K
NUMBERS = {"MaxOfflineUnwraps", "ParentWrappingId", "WrappingId", "Version"}


class Wire:
    def __init__(self, folder=FOLDER):
        def schema(file):
            return etree.XMLSchema(etree.parse(os.path.join(folder, file)))

        def document(file):
            with open(os.path.join(folder, file)) as f:
                return json.load(f)

        self.schemas = {kps.K: schema("kps.xsd"), kps.S: schema("kps-service.xsd")}
        self.attestation, self.metrics = document("attestation.openapi.json"), document("metrics.openapi.json")
        self.checked = {}

    def note(self, what):
        self.checked[what] = self.checked.get(what, 0) + 1

    def xml(self, octets):
        """Validates a document, and gives its root."""
        root = etree.fromstring(octets, etree.XMLParser(resolve_entities=False))
        for element in root.iter(etree.Element):
            if element.tag == ID and element.text:
                element.text = element.text.replace("+", "")
            for attribute in NUMBERS & set(element.attrib):
                element.set(attribute, element.get(attribute).strip(" \t\r\n"))
        name = etree.QName(root)
        kps.check(name.namespace in self.schemas, "a root in namespace %r" % name.namespace)
        self.schemas[name.namespace].assertValid(root)
        self.note(name.localname)
        return root

    def exchange(self, method, path, body, reply):
        """Validates a reply, and a request that was granted."""
        if method == "HEAD" or not reply.body:
            return
        lower = path.split("?")[0].lower()
        if lower.startswith("/attestation/"):
            self.attested(method, lower[len("/attestation"):], body, reply)
        elif reply.type() in ("application/xml", "text/xml"):
            root = self.xml(reply.body)
            # One that was sent in pieces is gone.
            if reply.status == 200 and isinstance(body, bytes):
                self.granted(self.xml(body), root)

    def granted(self, request, reply):
        sent = request.findall(SERVICE + "IngressProtector")
        batch = reply.tag == SERVICE + "RollTransportKeysResponse"
        answers = list(reply) if batch else [reply]
        kps.equal(len(answers), len(sent), "answers for %d protectors" % len(sent))
        for ingress, answer in zip(sent, answers):
            egress = answer.find(SERVICE + "EgressProtector")
            if egress is not None:
                for protector in (ingress, egress):
                    self.xml(base64.b64decode("".join(protector.itertext())))

    def json(self, document, schema, instance, what):
        # References of a schema are to the document that it is in.
        whole = {**document, **schema}
        jsonschema.Draft202012Validator(whole).validate(instance)
        self.note(what)

    def attested(self, method, path, body, reply):
        operations = {known.lower(): operations for known, operations in self.attestation["paths"].items()}
        operation = operations.get(path, {}).get(method.lower())
        if operation is None:
            response = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}}
            kps.check(reply.status in (404, 405), "%d for %s %s, which is not described" % (reply.status, method, path))
        else:
            response = operation["responses"].get(str(reply.status))
            kps.check(response, "%s %s answers %d, which is not described" % (method, path, reply.status))
        kps.check(reply.type() in response["content"], "%s %s answers with %r" % (method, path, reply.type()))
        if reply.type() != "application/json":
            return self.note(reply.type())
        answer = json.loads(reply.body)
        schema = response["content"]["application/json"]["schema"]
        self.json(self.attestation, schema, answer, answer["__type"].split(":")[0])
        for header in response.get("headers", {}):
            kps.check(reply.headers.get(header), "%d without %s" % (reply.status, header))
        if operation and method == "POST" and reply.status == 200:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            self.json(self.attestation, schema, json.loads(body.decode("utf-8-sig")), "AttestationRequest")

    def watched(self, client):
        """Asks the metrics listener for everything that is described."""
        for path, operations in self.metrics["paths"].items():
            reply = client.request("GET", path)
            response = operations["get"]["responses"].get(str(reply.status))
            kps.check(response, "%s answers %d, which is not described" % (path, reply.status))
            kps.check(reply.type() in response["content"], "%s answers with %r" % (path, reply.type()))
            schema = response["content"][reply.type()]["schema"]
            kps.check(re.search(schema.get("pattern", ""), reply.body.decode()), "%s does not fit its pattern" % path)
            self.note(path)


def main():
    wire = Wire()
    for line in sys.stdin:
        said = json.loads(line)
        headers = {"Content-Type": said["type"], "Retry-After": said["retry_after"]}
        reply = kps.Reply(said["status"], headers, base64.b64decode(said["reply"]))
        try:
            wire.exchange(said["method"], said["path"], base64.b64decode(said["request"]), reply)
        except (AssertionError, jsonschema.ValidationError) as error:
            sys.exit("%s %s: %s: %s" % (said["method"], said["path"], reply, error))
    for what, times in sorted(wire.checked.items()):
        print("%s %d" % (what, times))


if __name__ == "__main__":
    main()
