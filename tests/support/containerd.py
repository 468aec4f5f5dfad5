"""A containerd of a test's own, asked by the CRI as the kubelet asks: no network, no registry."""

import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from services.recorder import cri
from tests.support.crashers import SOURCES
from tests.support.requirements import lacking, need_program, need_root

START_WITHIN = 60  # seconds
IMAGE = "docker.io/library/crashers:test"
PROGRAMS = ("null_pointer", "waiting")
POD = {
    "io.kubernetes.pod.name": "web-7d4b",
    "io.kubernetes.pod.namespace": "shop",
    "io.kubernetes.pod.uid": "0c1b2a39-1111-2222-3333-444455556666",
}
_CONTAINER = 1  # its own
_NODE = 2  # the host's own network: no plugin is needed
_CONFIG = """version = 2
root = "{place}/root"
state = "{place}/state"
[grpc]
  address = "{place}/s"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"""

_MESSAGES: cri.Declared = {
    "VersionRequest": {"version": (1, "string")},
    "VersionResponse": {"runtime_name": (2, "string")},
    "RunPodSandboxRequest": {"config": (1, "PodSandboxConfig")},
    "RunPodSandboxResponse": {"pod_sandbox_id": (1, "string")},
    "PodSandboxConfig": {
        "metadata": (1, "PodSandboxMetadata"),
        "log_directory": (3, "string"),
        "labels": (6, "repeated Label"),
        "linux": (8, "LinuxPodSandboxConfig"),
    },
    "PodSandboxMetadata": {
        "name": (1, "string"),
        "uid": (2, "string"),
        "namespace": (3, "string"),
    },
    "LinuxPodSandboxConfig": {
        "security_context": (2, "LinuxSandboxSecurityContext"),
    },
    "LinuxSandboxSecurityContext": {"namespace_options": (1, "NamespaceOption")},
    "NamespaceOption": {"network": (1, "int32"), "pid": (2, "int32")},
    "CreateContainerRequest": {
        "pod_sandbox_id": (1, "string"),
        "config": (2, "ContainerConfig"),
        "sandbox_config": (3, "PodSandboxConfig"),
    },
    "CreateContainerResponse": {"container_id": (1, "string")},
    "ContainerConfig": {
        "metadata": (1, "ContainerMetadata"),
        "image": (2, "ImageSpec"),
        "command": (3, "repeated string"),
        "labels": (9, "repeated Label"),
        "log_path": (11, "string"),
        "linux": (15, "LinuxContainerConfig"),
    },
    "LinuxContainerConfig": {"security_context": (2, "LinuxContainerSecurityContext")},
    "LinuxContainerSecurityContext": {"namespace_options": (3, "NamespaceOption")},
    "ContainerMetadata": {"name": (1, "string")},
    "ImageSpec": {"image": (1, "string")},
    "Label": {"key": (1, "string"), "value": (2, "string")},
    "StartContainerRequest": {"container_id": (1, "string")},
    "RemovePodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "StopPodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "Nothing": {},
}


class Containerd:
    """``containerd`` in the background, with one image and one pod."""

    def __init__(self) -> None:
        need_root()
        need_program("containerd")
        need_program("ctr")
        self._messages = cri.declared(_MESSAGES)
        self._directory = Path(tempfile.mkdtemp(prefix="cb-cri-", dir="/tmp"))
        self.socket = self._directory / "s"
        config = self._directory / "config.toml"
        config.write_text(_CONFIG.format(place=self._directory, image=IMAGE))
        self._log = (self._directory / "log").open("wb")
        self._pod = ""
        self._start()
        try:
            self._wait_until_it_answers()
            self._import_image()
            self._run_pod()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        command = ["containerd", "--config", str(self._directory / "config.toml")]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def restart(self) -> None:
        """End it and start it anew, with a socket of its own; what runs goes on."""
        self._process.terminate()
        self._process.wait(30)
        self._start()
        self._wait_until_it_answers()

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def run(self, name: str, *command: str, labels: dict[str, str]) -> str:
        """Start a container in the pod, and return its ID."""
        made = self._call(
            "CreateContainer",
            "CreateContainerResponse",
            pod_sandbox_id=self._pod,
            config={
                "metadata": {"name": name},
                "image": {"image": IMAGE},
                "command": list(command),
                "labels": _labels(POD | labels),
                "log_path": f"{name}.log",
                "linux": {
                    "security_context": {"namespace_options": {"network": _NODE, "pid": _CONTAINER}}
                },
            },
            sandbox_config=self._sandbox(),
        ).container_id
        self._call("StartContainer", "Nothing", container_id=made)
        return str(made)

    def _call(self, method: str, answer: str, **fields: Any) -> Any:
        request = self._messages[f"{method}Request"](**fields)
        return cri.call(
            self.socket, f"RuntimeService/{method}", request, self._messages[answer], 30
        )

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + START_WITHIN
        while True:
            try:
                self._call("Version", "VersionResponse")
                return
            except (TimeoutError, ValueError) as error:  # not there, or without the CRI yet
                if self._process.poll() is not None or time.monotonic() > end:
                    lacking(f"needs containerd, and it does not start: {error}\n{self.log[-2000:]}")
                time.sleep(0.1)

    def _import_image(self) -> None:
        archive = self._directory / "image.tar"
        archive.write_bytes(_image(self._directory))
        command = ["ctr", "--address", self.socket, "--namespace", "k8s.io", "images", "import"]
        done = subprocess.run(
            [*map(str, command), "--snapshotter", "native", str(archive)], capture_output=True
        )
        assert done.returncode == 0, done.stderr

    def _sandbox(self) -> dict[str, Any]:
        return {
            "metadata": {
                "name": POD["io.kubernetes.pod.name"],
                "uid": POD["io.kubernetes.pod.uid"],
                "namespace": POD["io.kubernetes.pod.namespace"],
            },
            "log_directory": str(self._directory / "logs"),
            "labels": _labels(POD),
            "linux": {"security_context": {"namespace_options": {"network": _NODE}}},
        }

    def _run_pod(self) -> None:
        end = time.monotonic() + START_WITHIN
        while not self._pod:
            try:
                made = self._call("RunPodSandbox", "RunPodSandboxResponse", config=self._sandbox())
                self._pod = made.pod_sandbox_id
            except ValueError as error:  # it has not seen the new image yet
                if "registry" not in str(error) and "resolve" not in str(error):
                    lacking(f"containerd runs no pod: {error}\n{self.log[-2000:]}")
                if time.monotonic() > end:
                    raise

    def close(self) -> None:
        """Stop it with its pod, and leave nothing."""
        if self._pod:
            with suppress(TimeoutError, ValueError):  # it has ended, or hangs
                self._call("StopPodSandbox", "Nothing", pod_sandbox_id=self._pod)
                self._call("RemovePodSandbox", "Nothing", pod_sandbox_id=self._pod)
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            place = line.split()[1]
            if place.startswith(str(self._directory)):
                subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(self._directory, ignore_errors=True)


def _labels(labels: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in labels.items()]


def _image(place: Path) -> bytes:
    """Return an image as ``docker save`` writes it: programs that crash, and one that waits."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in PROGRAMS:
            source = SOURCES / f"{name}.c"
            command = ["gcc", "-g", "-O0", "-static", "-pthread", "-o", place / name, source]
            subprocess.run([str(part) for part in command], check=True)
            tar.add(place / name, arcname=name)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": ["/waiting"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    files = {
        "layer.tar": layer.getvalue(),
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()
