"""The manifests that the pages show are held against the JSON schemas that Kubernetes publishes.

`kubernetes-1.37.json.xz` has those of the three kinds, in their strict form (no field that is not described) and
without their prose, from the package kubernetes-validate 1.37.0 (Apache-2.0).
"""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from blocks import blocks

SCHEMAS = json.loads(lzma.decompress((Path(__file__).parent / "kubernetes-1.37.json.xz").read_bytes()))
MANIFESTS = [
    document
    for page in ("docs/serving.md", "docs/clusters.md")
    for block in blocks(page, "yaml")
    for document in yaml.safe_load_all(block)
    if "apiVersion" in document
]


def complaints(manifest: dict[str, Any]) -> list[str]:
    kind = SCHEMAS["kinds"][f"{manifest['apiVersion']} {manifest['kind']}"]
    schema = {"$defs": SCHEMAS["$defs"], "$ref": f"#/$defs/{kind}"}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for manifest in MANIFESTS:
        pod = manifest["spec"].get("template", {}).get("spec", {"containers": []})
        yield from ((pod, container) for container in pod["containers"])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["metadata"]["name"])
def test_a_manifest_is_valid(manifest):
    assert complaints(manifest) == []


def test_the_schemas_notice_mistakes():
    job = next(manifest for manifest in MANIFESTS if manifest["kind"] == "Job")
    assert complaints({**job, "spec": {**job["spec"], "completion": 1}})
    assert complaints({**job, "spec": {**job["spec"], "parallelism": "50"}})
    assert complaints({**job, "spec": {}}) == ["'template' is a required property"]


def test_what_is_mounted_is_there_and_the_service_finds_its_pods():
    assert len(list(containers())) == 3
    for pod, container in containers():
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
    deployment, service = (next(one for one in MANIFESTS if one["kind"] == kind) for kind in ("Deployment", "Service"))
    labels, pod = service["spec"]["selector"], deployment["spec"]["template"]
    assert labels == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["ports"][0]["targetPort"] == pod["spec"]["containers"][0]["ports"][0]["name"]


@pytest.mark.parametrize("container", [container for _, container in containers()], ids=lambda one: one["name"])
def test_the_commands_take_these_options(container):
    from darht.cache.cli import cache
    from darht.trainer.cli import train

    program, *words = container["command"]
    command = train
    if program == "darht-cache":
        command = cache.commands[words.pop(0)]
    command.make_context(program, [str(word) for word in words], resilient_parsing=False)
