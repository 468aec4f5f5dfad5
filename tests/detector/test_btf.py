"""The BTF reader: on made-up types whose layout is known, and on the running kernel's."""

import struct
import time

import pytest

from services.detector import offsets
from services.detector.btf import Btf, BtfError
from services.detector.program import BTF_FILE
from tests.support.requirements import need_btf

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, PROTO = 1, 2, 3, 4, 5, 6, 8, 13


class Types:
    """Builds BTF, Documentation/bpf/btf.rst."""

    def __init__(self) -> None:
        self.names, self.types, self.count = b"\0", b"", 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = len(self.names)
        self.names += text.encode() + b"\0"
        return at

    def add(
        self,
        kind: int,
        name: str = "",
        target: int = 0,
        trailer: bytes = b"",
        n: int = 0,
        flag: int = 0,
    ) -> int:
        info = flag << 31 | kind << 24 | n
        self.types += struct.pack("=III", self.name(name), info, target) + trailer
        self.count += 1
        return self.count

    def struct(
        self, kind: int, name: str, size: int, *members: tuple[str, int, int], flag: int = 0
    ) -> int:
        trailer = b"".join(struct.pack("=III", self.name(m), t, bits) for m, t, bits in members)
        return self.add(kind, name, size, trailer, len(members), flag)

    def data(self) -> bytes:
        size = len(self.types)
        head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, size, size, len(self.names))
        return head + self.types + self.names


def example() -> bytes:
    types = Types()
    number = types.add(INT, "int", 4, b"\0\0\0\x20")
    pointer = types.add(PTR, target=0)
    numbers = types.add(ARRAY, trailer=struct.pack("=III", number, number, 8))
    pointers = types.add(ARRAY, trailer=struct.pack("=III", pointer, number, 8))
    inner = types.struct(STRUCT, "inner", 8, ("x", number, 0), ("y", number, 32))
    alias = types.add(TYPEDEF, "inner_t", inner)
    anonymous = types.struct(UNION, "", 8, ("deep", number, 0), ("wide", alias, 0))
    rows = types.add(ARRAY, trailer=struct.pack("=III", inner, number, 2))
    outer = types.struct(
        STRUCT,
        "outer",
        200,
        ("first", number, 0),
        ("", anonymous, 64),
        ("table", numbers, 128),
        ("pointers", pointers, 512),
        ("rows", rows, 1024),
    )
    types.struct(
        STRUCT, "bits", 4, ("low", number, 3 << 24 | 0), ("high", number, 5 << 24 | 3), flag=1
    )
    types.add(
        ENUM, "colour", 4, struct.pack("=IiIi", types.name("red"), 0, types.name("green"), 7), 2
    )
    to_outer = types.add(PTR, target=outer)
    parameters = struct.pack("=IIIIII", 0, pointer, 0, to_outer, 0, number)
    proto = types.add(PROTO, trailer=parameters, n=3)
    types.add(TYPEDEF, "callback", types.add(PTR, target=proto))
    types.add(TYPEDEF, "circle", types.count + 1)
    return types.data()


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        ("first", 0),
        ("deep", 8),
        ("wide.y", 12),
        ("table", 16),
        ("table[3]", 28),
        ("pointers[2]", 80),
        ("rows[1].y", 140),
    ],
)
def test_offset(path: str, offset: int) -> None:
    assert Btf(example()).offset("outer", path) == offset


def test_bit_fields() -> None:
    assert Btf(example()).offset("bits", "low") == 0
    with pytest.raises(BtfError, match="bit field"):
        Btf(example()).offset("bits", "high")


def test_size_enumerator_and_parameters() -> None:
    btf = Btf(example())
    assert btf.size("inner") == 8
    assert btf.enumerator("colour", "green") == 7
    assert btf.points_to("callback", 1) == "outer"
    assert btf.points_to("callback", 0) is None
    assert btf.points_to("callback", 2) is None


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda btf: btf.offset("nothing", "x"), "nothing is named nothing"),
        (lambda btf: btf.offset("outer", "nothing"), "no member nothing"),
        (lambda btf: btf.offset("outer", "first.x"), "no member first.x"),
        (lambda btf: btf.offset("outer", "first[1]"), "no array"),
        (lambda btf: btf.size("inner_t"), "kind"),
        (lambda btf: btf.enumerator("colour", "blue"), "no blue"),
        (lambda btf: btf.points_to("callback", 3), "no parameter 3"),
        (lambda btf: btf.points_to("circle", 0), "refers to itself"),
    ],
)
def test_what_is_not_there_is_a_clear_error(ask, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BtfError, match=says):
        ask(Btf(example()))


def test_data_cut_short_anywhere_is_an_error() -> None:
    data = example()
    for size in range(len(data)):
        with pytest.raises(BtfError):
            Btf(data[:size])


def test_other_data_is_an_error() -> None:
    with pytest.raises(BtfError, match="not BTF"):
        Btf(b"\x7fELF" + bytes(100))
    types = Types()
    types.add(31, "of_the_future")
    with pytest.raises(BtfError, match="unknown kind 31"):
        Btf(types.data())


def test_running_kernel_has_all_the_program_needs() -> None:
    need_btf()
    data = BTF_FILE.read_bytes()
    before = time.process_time()
    found = offsets.definitions(Btf(data))
    assert time.process_time() - before < 1
    assert found["SIZE_UPID"] == 16
    assert 0 < found["AT_TASK_START"] < 16384
    assert found["AT_TASK_START"] % 8 == 0
