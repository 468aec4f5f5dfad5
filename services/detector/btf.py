"""Reads BPF Type Format: where the running kernel keeps the members of its structures.

Format: Documentation/bpf/btf.rst of the kernel. Only what an offset needs is understood;
nothing here does I/O.
"""

import re
import struct
from array import array
from dataclasses import dataclass

from crashbus.errors import CrashbusError

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")  # name, info, size or type
_MEMBER = struct.Struct("=III")  # name, type, offset
_PARAMETER = struct.Struct("=II")  # name, type
_ENUMERATOR = struct.Struct("=Ii")  # name, value
_ARRAY = struct.Struct("=III")  # element type, index type, number of elements

_INT, _PTR, _ARR, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC_PROTO, _TYPE_TAG = 8, 9, 10, 11, 13, 18
_TRANSPARENT = frozenset({_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG})

# What follows the 12 bytes of a type, by kind: bytes always, and bytes per element.
_TRAILER = {
    _INT: (4, 0),
    _ARR: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    _FUNC_PROTO: (0, 8),
    14: (4, 0),  # variable
    15: (0, 12),  # section
    17: (4, 0),  # declaration tag
    19: (0, 12),  # 64-bit enumeration
}
_LAST_KIND = 19

_STEP = re.compile(r"([A-Za-z_]\w*)|\[(\d+)\]")


class BtfError(CrashbusError):
    """The type information is damaged, or does not hold what was asked for."""


@dataclass(frozen=True)
class _Type:
    at: int  # where its trailer begins
    name: int
    kind: int
    elements: int
    bitfields: bool
    target: int  # size, or the type it refers to


class Btf:
    """The types of one kernel.

    Args:
        data: the content of /sys/kernel/btf/vmlinux.

    Raises:
        BtfError: not BTF, or cut short.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        try:
            magic, version, _, header, types, types_size, names, names_size = _HEADER.unpack_from(
                data
            )
        except struct.error:
            raise BtfError("cut short in its header") from None
        if magic != _MAGIC or version != 1:
            raise BtfError(f"not BTF version 1 (magic {magic:#x}, version {version})")
        self._names = header + names
        self._names_end = self._names + names_size
        if self._names_end > len(data) or header + types + types_size > len(data):
            raise BtfError(f"cut short: {len(data)} bytes")
        self._places = self._walk(header + types, header + types + types_size)

    def offset(self, structure: str, path: str) -> int:
        """Return a member's offset in bytes, such as ``("pid", "numbers[0].nr")``.

        Members of anonymous structures and unions are found under their own names.

        Raises:
            BtfError: there is no such structure or member, or it is a bit field.
        """
        return self._locate(structure, path)[0]

    def size(self, structure: str) -> int:
        """Return a structure's size in bytes."""
        return self._type(self._named(structure, _STRUCT)).target

    def enumerator(self, enumeration: str, name: str) -> int:
        """Return the value of an enumeration's constant.

        Raises:
            BtfError: there is no such enumeration or constant.
        """
        found = self._type(self._named(enumeration, _ENUM))
        for place in range(found.at, found.at + found.elements * 8, 8):
            at, value = _ENUMERATOR.unpack_from(self._data, place)
            if self._name(at) == name:
                return int(value)
        raise BtfError(f"enum {enumeration} has no {name}")

    def points_to(self, function_type: str, parameter: int) -> str | None:
        """Return the name of the structure that a parameter points to; None: it is no pointer
        to one.

        Args:
            function_type: a typedef of a pointer to a function.
            parameter: counted from 0.

        Raises:
            BtfError: there is no such function type or parameter.
        """
        pointer = self._type(self._named(function_type, _TYPEDEF))
        function = self._type(self._resolved(pointer.target, through_pointer=True))
        if function.kind != _FUNC_PROTO or parameter >= function.elements:
            raise BtfError(f"{function_type} has no parameter {parameter}")
        _, kind = _PARAMETER.unpack_from(self._data, function.at + parameter * 8)
        if self._type(self._resolved(kind)).kind != _PTR:
            return None
        target = self._type(self._resolved(kind, through_pointer=True))
        return self._name(target.name) if target.kind == _STRUCT else None

    def _locate(self, structure: str, path: str) -> tuple[int, int]:
        """Return offset and type number of a member."""
        number, offset = self._named(structure, _STRUCT), 0
        for match in _STEP.finditer(path):
            member, index = match.groups()
            if member is None:
                number, size = self._element(number)
                offset += int(index) * size
                continue
            found = self._member(number, member)
            if found is None:
                raise BtfError(f"struct {structure} has no member {path}")
            bits, number = found
            if bits % 8:
                raise BtfError(f"member {path} of struct {structure} is a bit field")
            offset += bits // 8
            number = self._resolved(number)
        return offset, number

    def _member(self, number: int, name: str) -> tuple[int, int] | None:
        """Return offset in bits and type number of a member, also of an anonymous one's."""
        kind = self._type(number)
        if kind.kind not in (_STRUCT, _UNION):
            return None
        for place in range(kind.at, kind.at + kind.elements * 12, 12):
            at, target, bits = _MEMBER.unpack_from(self._data, place)
            if kind.bitfields:
                bits &= 0xFFFFFF  # the rest is the width of a bit field
            if at and self._name(at) == name:
                return bits, target
            if not at and (inner := self._member(self._resolved(target), name)):
                return bits + inner[0], inner[1]
        return None

    def _element(self, number: int) -> tuple[int, int]:
        """Return type number and size in bytes of an array's elements."""
        kind = self._type(number)
        if kind.kind != _ARR:
            raise BtfError("an index into what is no array")
        element = self._resolved(_ARRAY.unpack_from(self._data, kind.at)[0])
        target = self._type(element)
        return element, 8 if target.kind == _PTR else target.target

    def _resolved(self, number: int, through_pointer: bool = False) -> int:
        """Return what stands behind typedefs and qualifiers, and behind one pointer if asked."""
        for _ in range(32):  # more than any C declaration has; damaged data could go in circles
            kind = self._type(number)
            if kind.kind == _PTR and through_pointer:
                through_pointer = False
            elif kind.kind not in _TRANSPARENT:
                return number
            number = kind.target
        raise BtfError(f"type {number} refers to itself")

    def _named(self, name: str, kind: int) -> int:
        at = self._data.find(b"\0" + name.encode() + b"\0", self._names - 1, self._names_end)
        if at < 0:
            raise BtfError(f"nothing is named {name}")
        wanted = at + 1 - self._names
        for number, place in enumerate(self._places):
            if number and _TYPE.unpack_from(self._data, place)[0] == wanted:
                candidate = self._type(number)
                if candidate.kind == kind and (kind != _STRUCT or candidate.elements):
                    return number
        raise BtfError(f"nothing of the kind asked for is named {name}")

    def _type(self, number: int) -> _Type:
        if not 0 <= number < len(self._places):
            raise BtfError(f"there is no type {number}")
        if number == 0:
            return _Type(0, 0, 0, 0, False, 0)  # void
        place = self._places[number]
        name, info, target = _TYPE.unpack_from(self._data, place)
        kind, elements = info >> 24 & 0x1F, info & 0xFFFF
        return _Type(place + 12, name, kind, elements, bool(info >> 31), target)

    def _name(self, at: int) -> str:
        start = self._names + at
        return self._data[start : self._data.find(b"\0", start)].decode("utf-8", "replace")

    def _walk(self, at: int, end: int) -> "array[int]":
        """Return where each type lies; type 0 is void and lies nowhere."""
        places = array("L", [0])
        sizes = [_TRAILER.get(kind, (0, 0)) for kind in range(32)]
        unpack, data = _TYPE.unpack_from, self._data
        try:
            while at < end:
                places.append(at)
                info = unpack(data, at)[1]
                kind = info >> 24 & 0x1F
                if not 0 < kind <= _LAST_KIND:
                    raise BtfError(f"type {len(places) - 1} is of the unknown kind {kind}")
                fixed, each = sizes[kind]
                at += 12 + fixed + each * (info & 0xFFFF)
        except struct.error:
            at = end + 1
        if at != end:
            raise BtfError("cut short in its types")
        return places
