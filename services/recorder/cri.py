"""What Kubernetes calls a container: asked of containerd or CRI-O by the CRI, as the kubelet asks.

That is gRPC on a UNIX socket. Of its messages only the fields that are needed are declared:
https://github.com/kubernetes/cri-api/blob/master/pkg/apis/runtime/v1/api.proto
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crashbus.parts import Container
from services.recorder import containers

PACKAGE = "runtime.v1"
Declared = Mapping[str, Mapping[str, tuple[int, str]]]  # messages, their fields: number and type

_MESSAGES: Declared = {
    "ContainerStatusRequest": {"container_id": (1, "string")},
    "ContainerStatusResponse": {"status": (1, "ContainerStatus")},
    "ContainerStatus": {
        "id": (1, "string"),
        "metadata": (2, "ContainerMetadata"),
        "image": (8, "ImageSpec"),
        "image_ref": (9, "string"),
        "labels": (12, "repeated Label"),
    },
    "ContainerMetadata": {"name": (1, "string")},
    "ImageSpec": {"image": (1, "string")},
    "Label": {"key": (1, "string"), "value": (2, "string")},  # an entry of a map is a message
}
_LARGEST = 4 * 1024 * 1024  # bytes of an answer


def declared(messages: Declared) -> dict[str, Any]:
    """Return the classes of messages."""
    # Only whoever asks needs these: 24 MB of memory with gRPC.
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=PACKAGE, package=PACKAGE, syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            *repeated, kind = kind.split()
            made = message.field.add(name=field, number=number)
            made.label = made.LABEL_REPEATED if repeated else made.LABEL_OPTIONAL
            if kind == "string":
                made.type = made.TYPE_STRING
            elif kind == "int32":  # and of an enum: the same on the wire
                made.type = made.TYPE_INT32
            else:
                made.type, made.type_name = made.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in messages
    }


def call(path: Path, method: str, request: Any, answer: Any, within: float) -> Any:
    """Ask a CRI once; a connection for each question outlives no runtime.

    Args:
        method: such as ``RuntimeService/Version``.
        answer: class of the message that comes.

    Raises:
        TimeoutError: it is away, or hangs.
        ValueError: what it says instead of an answer.
    """
    import grpc

    options = [("grpc.max_receive_message_length", _LARGEST), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"unix://{path.absolute()}", options) as channel:
        ask = channel.unary_unary(
            f"/{PACKAGE}.{method}", type(request).SerializeToString, answer.FromString
        )
        try:
            return ask(request, timeout=within)
        except grpc.RpcError as error:
            code, text = error.code(), f"{error.code().name}: {error.details()}"
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise TimeoutError(text) from None
            raise ValueError(text) from None


def tell(path: Path, container: Container) -> Container:
    """Return a container with name, image and labels, which tell its pod and namespace."""
    messages = declared(_MESSAGES)
    told = call(
        path,
        "RuntimeService/ContainerStatus",
        messages["ContainerStatusRequest"](container_id=container.id),
        messages["ContainerStatusResponse"],
        containers.ANSWER_WITHIN,
    ).status
    return containers.described(
        container,
        told.id,
        told.metadata.name,
        told.image.image or told.image_ref,
        {label.key: label.value for label in told.labels},
    )
