"""The Kubernetes manifests: valid by Kubernetes's own schemas, and no wider than they say."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.recorder.settings import RecorderSettings
from tests.support.units import values

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSION = "1.31"  # appArmorProfile is a field since 1.30
MANIFESTS = {
    f"{path.parent.name}/{path.name} {number}": document
    for path in sorted(KUBERNETES.rglob("*.yaml"))
    if path.name != "kustomization.yaml"
    for number, document in enumerate(yaml.safe_load_all(path.read_text()))
}
# A custom resource, whose schema is KEDA's.
OF_KUBERNETES = {name: one for name, one in MANIFESTS.items() if one["kind"] != "ScaledObject"}


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod template of everything that has one."""
    return {
        one["metadata"]["name"]: one["spec"]["template"]
        for one in MANIFESTS.values()
        if "template" in one.get("spec", {})
    }


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for pod in pods().values():
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            yield pod["spec"], container


@pytest.mark.parametrize("name", OF_KUBERNETES)
def test_a_manifest_is_valid(name: str) -> None:
    kubernetes_validate.validate(OF_KUBERNETES[name], VERSION, strict=True)


def test_kustomizations_name_all_files_and_no_others() -> None:
    for path in KUBERNETES.rglob("kustomization.yaml"):
        found = yaml.safe_load(path.read_text())
        resources = found.get("resources", [])
        named = {one for one in resources if not one.startswith("..")}
        there = {one.name for one in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert named == there
        for resource in set(resources) - named:
            assert (path.parent / resource / "kustomization.yaml").exists()


def test_no_container_is_privileged_or_has_more_than_its_unit() -> None:
    for pod, container in containers():
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert not security.get("privileged")
        assert security["capabilities"]["drop"] == ["ALL"]
        assert not pod["automountServiceAccountToken"]
        added = {f"CAP_{name}" for name in security["capabilities"].get("add", [])}
        name = container["name"]
        # The unit of the recorder does the guard's work, with the recorder's rights.
        if name in ("guard", "cli"):
            assert added == ({"CAP_KILL"} if name == "guard" else set())
            continue
        unit = f"crashbus-{name}{'@' if name == 'shipper' else ''}.service"
        (kept,) = values(unit, "CapabilityBoundingSet")
        assert added <= set(kept.split())


def test_collector_may_read_the_kernel_s_log() -> None:
    """There is no /dev/kmsg in a pod; syslog(2) is asked instead."""
    (rights,) = [
        one["securityContext"]["capabilities"]["add"]
        for _, one in containers()
        if one["name"] == "collector"
    ]
    assert "SYSLOG" in rights


def test_whoever_has_no_capability_is_not_root() -> None:
    for pod, container in containers():
        rights = container["securityContext"]["capabilities"].get("add")
        if not rights:
            assert pod["securityContext"]["runAsNonRoot"]


def test_every_mount_has_a_volume_and_every_volume_a_mount() -> None:
    for manifest in MANIFESTS.values():
        spec = manifest.get("spec", {})
        if "template" not in spec:
            continue
        pod = spec["template"]["spec"]
        there = {one["name"] for one in pod["volumes"]}
        there |= {one["metadata"]["name"] for one in spec.get("volumeClaimTemplates", [])}
        every = [*pod.get("initContainers", []), *pod["containers"]]
        mounted = {mount["name"] for one in every for mount in one["volumeMounts"]}
        assert mounted == there


def test_the_instructions_make_every_secret_that_is_named() -> None:
    instructions = (KUBERNETES / "README.md").read_text()
    secrets = {
        volume["secret"]["secretName"]
        for pod in pods().values()
        for volume in pod["spec"]["volumes"]
        if "secret" in volume
    }
    for user in ("detector", "recorder", "collector", "shipper", "operator"):
        assert f"crashbus-nkey-{user}" in secrets
        assert re.search(rf"for user in .*\b{user}\b", instructions)
    for secret in secrets - {one for one in secrets if one.startswith("crashbus-nkey-")}:
        assert f"create secret generic {secret} " in instructions


def test_spool_is_elsewhere_after_what_the_instructions_say(tmp_path: Path) -> None:
    instructions = (KUBERNETES / "README.md").read_text()
    (command, setting) = re.findall(
        r"`(sed [^`]*agent\.yaml)`, and `CRASHBUS_SPOOL=(\S+)`", instructions
    )[0]
    shutil.copytree(KUBERNETES / "base", tmp_path / "base")

    subprocess.run(command, shell=True, check=True, cwd=tmp_path)

    pod = yaml.safe_load((tmp_path / "base" / "agent.yaml").read_text())["spec"]["template"]["spec"]
    paths = [one["hostPath"]["path"] for one in pod["volumes"] if one["name"] == "spool"]
    mounts = [mount for one in pod["containers"] for mount in one["volumeMounts"]]
    paths += [mount["mountPath"] for mount in mounts if mount["name"] == "spool"]
    assert paths == [setting] * 3


def test_the_scaler_scales_what_is_there_by_a_metric_that_is_there() -> None:
    (scaler,) = (one for one in MANIFESTS.values() if one["kind"] == "ScaledObject")
    assert scaler["spec"]["scaleTargetRef"]["name"] in pods()
    (trigger,) = scaler["spec"]["triggers"]
    operations = (KUBERNETES.parents[1] / "docs" / "operations.md").read_text()
    for metric in re.findall(r"crashbus_\w+", trigger["metadata"]["query"]):
        assert f"| `{metric}` | gauge |" in operations


def test_patch_for_the_runtime_s_socket_fits_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    # As kustomize would merge it: containers and volumes by their names.
    component = yaml.safe_load((KUBERNETES / "cri" / "kustomization.yaml").read_text())
    (patch,) = (yaml.safe_load(one["patch"]) for one in component["patches"])
    (agent,) = (
        deepcopy(one) for one in MANIFESTS.values() if one["kind"] == patch["kind"] == "DaemonSet"
    )
    assert agent["metadata"]["name"] == patch["metadata"]["name"]
    ours, theirs = (one["spec"]["template"]["spec"] for one in (agent, patch))
    (added,), (volume,) = theirs["containers"], theirs["volumes"]
    (recorder,) = (one for one in ours["containers"] if one["name"] == added["name"])
    (setting,), (mount,) = added["env"], added["volumeMounts"]

    assert mount["name"] == volume["name"] not in {one["name"] for one in ours["volumes"]}
    monkeypatch.setenv(setting["name"], setting["value"])
    socket = RecorderSettings.load().cri_socket
    # A socket that is mounted itself is a dead one once the runtime was started anew.
    assert socket is not None and socket.parent == Path(mount["mountPath"])
    assert volume["hostPath"] == {"path": "/run/containerd", "type": "Directory"}
    recorder["env"].append(setting)
    recorder["volumeMounts"].append(mount)
    ours["volumes"].append(volume)
    kubernetes_validate.validate(agent, VERSION, strict=True)
