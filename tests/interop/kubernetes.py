#!/usr/bin/env python3
"""Checks daemon/packaging/kubernetes: each object against the schema of Kubernetes, and what objects say of each other.

kubernetes-1.31.json has the schemas (strict: unknown fields are errors) of the kinds that are used, taken from the OpenAPI document of
Kubernetes 1.31 (Apache-2.0) without its descriptions. Prints the objects; ends with status 1 and the faults if there are any.
"""
import json
import pathlib
import sys

import jsonschema
import yaml

HERE = pathlib.Path(__file__).parent
# Made by the operator, as docs/nodes.md says.
SECRETS = {"claviger-pins", "claviger-tls", "claviger-etcd-client", "etcd-tls"}


def main(folder):
    faults, objects = [], []
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for name in kustomization["resources"]:
        objects += [(name, of) for of in yaml.safe_load_all((folder / name).read_text()) if of]
    schemas = json.loads((HERE / "kubernetes-1.31.json").read_text())
    for name, of in objects:
        kind = schemas["kinds"].get(of.get("kind"))
        if kind is None:
            faults.append(f"{name}: no schema for {of.get('kind')}")
            continue
        validator = jsonschema.Draft7Validator({**kind, "definitions": schemas["definitions"]})
        for error in validator.iter_errors(of):
            path = "/".join(map(str, error.absolute_path))
            faults.append(f"{name}: {of['kind']} {of['metadata']['name']}: {path}: {error.message[:300]}")
    generated = {}
    for of in kustomization["configMapGenerator"]:
        generated[of["name"]] = {}
        for file in of["files"]:
            if not (folder / file).is_file():
                faults.append(f"kustomization.yaml: there is no {file}")
            generated[of["name"]][file] = folder / file
    named = {(of["kind"], of["metadata"]["name"]) for _, of in objects}
    images = {of["name"] for of in kustomization["images"]}
    sets = [of for _, of in objects if of["kind"] == "StatefulSet"]
    for of in sets:
        name, spec = of["metadata"]["name"], of["spec"]
        pod = spec["template"]["spec"]
        labels = spec["template"]["metadata"]["labels"]

        def fault(what):
            faults.append(f"StatefulSet {name}: {what}")

        if not spec["selector"]["matchLabels"].items() <= labels.items():
            fault("its selector does not select its pods")
        if ("Service", spec["serviceName"]) not in named:
            fault(f"there is no service {spec['serviceName']}")
        if ("ServiceAccount", pod["serviceAccountName"]) not in named:
            fault(f"there is no service account {pod['serviceAccountName']}")
        volumes = {volume["name"] for volume in pod["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
        for volume in pod["volumes"]:
            if "configMap" in volume and volume["configMap"]["name"] not in generated:
                fault(f"there is no config map {volume['configMap']['name']}")
            if "secret" in volume:
                if volume["secret"]["secretName"] not in SECRETS:
                    fault(f"the secret {volume['secret']['secretName']} is not documented")
                if volume["secret"].get("defaultMode") != 0o440:
                    fault(f"the secret {volume['name']} is not of mode 0440")
        for container in pod["containers"]:
            if container["image"] not in images:
                fault(f"the image {container['image']} is not in the kustomization")
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            if mounts != volumes:
                fault(f"mounts {sorted(mounts)} and volumes {sorted(volumes)} differ")
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if container.get(probe, {}).get("httpGet", {}).get("port") not in ports:
                    fault(f"{probe} asks at no port of the container")
            security = container["securityContext"]
            if security["allowPrivilegeEscalation"] or security["capabilities"]["drop"] != ["ALL"]:
                fault("it has more rights than it needs")
    for _, of in objects:
        selector = {
            "Service": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"].get("matchLabels", {}),
        }.get(of["kind"])
        if selector is None:
            continue
        wanted = selector(of["spec"]).items()
        pods = [one["spec"]["template"] for one in sets if wanted <= one["spec"]["template"]["metadata"]["labels"].items()]
        if not pods:
            faults.append(f"{of['kind']} {of['metadata']['name']}: selects no pods")
        if of["kind"] == "Service":
            ports = {port["name"] for pod in pods for one in pod["spec"]["containers"] for port in one["ports"]}
            for port in of["spec"]["ports"]:
                if port["targetPort"] not in ports:
                    faults.append(f"Service {of['metadata']['name']}: no pod has the port {port['targetPort']}")
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        for of in sets:
            if (kind, of["metadata"]["name"]) not in named:
                faults.append(f"there is no {kind} for {of['metadata']['name']}")
    for kind, name in sorted(named):
        print(kind, name)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
