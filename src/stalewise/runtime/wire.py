"""How a message looks on a link: fixed binary pages, then the raw bytes of its tensors. Nothing is unpickled.

    page = prefix (40 bytes), then room for 7 leaves (136 bytes each), padded to 1020, CRC-32 of all that

    prefix   magic "SWIS" | version u16 | kind u8 | flags u8 | batch i64 | plan u64 | structure u32 | leaves u16
             micro-batch i16 (-1: none) | share of the batch f64
    leaf     dtype u8 | place u8 | ndim u16 | .. | shape 8 x i64 | strides 8 x i64

A message of more than 7 leaves has more pages, each with the same prefix. `plan` is a hash of the job's plan: a peer
that runs another one is found at its first message. The checksum is there because pages say how much memory to take
and how much to read: all pages of a message are checked before either happens. The structure of nested values is
described once, by a SCHEMA message whose only leaf is JSON, and then named by its number. Torch-only and without a
network: `Encoder` gives the tensors to send in order, `Decoder` asks for tensors to be filled.
"""

from __future__ import annotations

import enum
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stalewise.engine.layout import dense, is_dense
from stalewise.engine.tree import Structure
from stalewise.errors import TransportError

__all__ = ["PAGE_BYTES", "Decoder", "Encoder", "Frame", "MessageKind", "as_bytes"]

MAGIC = b"SWIS"
VERSION = 1
PAGE_BYTES = 1024
MAX_DIMENSIONS = 8
MAX_SCHEMA_BYTES = 1 << 20
MAX_LEAVES = 4096
MAX_LEAF_BYTES = 1 << 34

_PREFIX = struct.Struct("<4sHBBqQIHhd")
_LEAF = struct.Struct(f"<BBH4x{MAX_DIMENSIONS}q{MAX_DIMENSIONS}q")
_CHECKSUM = struct.Struct("<I")
LEAVES_PER_PAGE = (PAGE_BYTES - _PREFIX.size - _CHECKSUM.size) // _LEAF.size

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class Place(enum.IntEnum):
    """Where a leaf is when it is sent, and so over which group it crosses."""

    ABSENT = 0
    HOST = 1
    DEVICE = 2


class MessageKind(enum.IntEnum):
    """What a message is."""

    SCHEMA = 1
    ACTIVATION = 2
    GRADIENT = 3
    END = 4
    LOSS = 5
    TOKEN = 6
    PROBE = 7
    MARK = 8


@dataclass(frozen=True, slots=True)
class Frame:
    """One message.

    Args:
        kind: what it is.
        batch: global index of its batch; of the next batch for END.
        leaves: its tensors; None where a leaf is absent.
        structure: of the leaves as a tree; None where the kind needs none.
        flags: of an END: how the sender goes on.
        micro_batch: index within the batch, or None.
        share: of the batch's samples that it holds.
    """

    kind: MessageKind
    batch: int
    leaves: list[Tensor | None]
    structure: Structure = None
    flags: int = 0
    micro_batch: int | None = None
    share: float = 1.0

    @property
    def computed(self) -> int:
        """Leaves, from the first on, that the receiving stage computes with; a target or a loss only passes by."""
        if self.kind is MessageKind.ACTIVATION and isinstance(self.structure, list) and self.structure:
            return self.structure[0] if isinstance(self.structure[0], int) else len(self.leaves)
        return {MessageKind.GRADIENT: len(self.leaves) - 1, MessageKind.LOSS: 0}.get(self.kind, len(self.leaves))


class Encoder:
    """Turns the frames of one direction of a link into tensors of bytes.

    Args:
        plan: hash of the job's plan.
    """

    def __init__(self, plan: int) -> None:
        self._plan = plan
        self._structure = "null"
        self._structure_index = 0

    def encode(self, frame: Frame) -> Iterator[Tensor]:
        """The tensors to send, in order; pages on the CPU, payloads on their own device, all one-dimensional uint8.

        Raises:
            TransportError: where a leaf cannot be sent.
        """
        structure = json.dumps(frame.structure)
        if structure != self._structure:
            self._structure = structure
            self._structure_index += 1
            text = torch.frombuffer(bytearray(structure.encode()), dtype=torch.uint8)
            if text.numel() > MAX_SCHEMA_BYTES:
                raise TransportError(
                    f"the structure of what crosses a cut takes {text.numel()} bytes to describe; at most "
                    f"{MAX_SCHEMA_BYTES} can be sent. Shorten the keys of its dicts, or pack its values into tensors."
                )
            yield from self._message(Frame(MessageKind.SCHEMA, frame.batch, [text]))
        yield from self._message(frame)

    def _message(self, frame: Frame) -> Iterator[Tensor]:
        if len(frame.leaves) > MAX_LEAVES:
            raise TransportError(
                f"{len(frame.leaves)} tensors cannot cross a cut in one message; at most {MAX_LEAVES} can. Stack them, "
                "or cut the model elsewhere."
            )
        leaves = [None if leaf is None else _sendable(leaf) for leaf in frame.leaves]
        prefix = _PREFIX.pack(
            MAGIC,
            VERSION,
            frame.kind,
            frame.flags,
            frame.batch,
            self._plan,
            self._structure_index,
            len(leaves),
            -1 if frame.micro_batch is None else frame.micro_batch,
            frame.share,
        )
        for start in range(0, max(len(leaves), 1), LEAVES_PER_PAGE):
            described = b"".join(_describe(leaf) for leaf in leaves[start : start + LEAVES_PER_PAGE])
            content = (prefix + described).ljust(PAGE_BYTES - _CHECKSUM.size, b"\0")
            page = bytearray(content + _CHECKSUM.pack(zlib.crc32(content)))
            yield torch.frombuffer(page, dtype=torch.uint8)
        for leaf in leaves:
            if leaf is not None and leaf.numel():
                yield as_bytes(leaf)


class Decoder:
    """Reads frames from one direction of a link.

    Args:
        plan: hash of the job's plan.
        fill: fills a one-dimensional uint8 tensor with the next bytes that the peer sent.
        device: where leaves that the peer sends from its device are received.
        link: names the link in errors.
        pins: whether what comes into host memory is to be copied to a device, so that the memory is to be pinned.
    """

    def __init__(
        self, plan: int, fill: Callable[[Tensor], None], device: torch.device, link: str, *, pins: bool = False
    ) -> None:
        self._plan = plan
        self._fill = fill
        self._device = device
        self._link = link
        self._pins = pins
        self._structure: Structure = None
        self._structure_index = 0

    def next(self) -> Frame:
        """The next frame that is not a SCHEMA.

        Raises:
            TransportError: where what arrives is not a message of this job.
        """
        while True:
            frame, structure_index = self._message()
            if frame.kind is not MessageKind.SCHEMA:
                if structure_index != self._structure_index:
                    raise self._error(
                        f"names structure {structure_index}; the last described is {self._structure_index}"
                    )
                return frame
            self._structure = self._parse_schema(frame)
            self._structure_index = structure_index

    def _message(self) -> tuple[Frame, int]:
        page = self._page()
        magic, version, kind, flags, batch, plan, structure_index, num_leaves, micro_batch, share = _PREFIX.unpack_from(
            page
        )
        if magic != MAGIC:
            raise self._error("does not begin as a message of stalewise; another program sent it")
        if version != VERSION:
            raise self._error(f"is of wire version {version}, ours is {VERSION}; run the same release on all ranks")
        self._check_sum(page)
        if plan != self._plan:
            raise self._error("belongs to another plan; start all ranks with the same model, cuts and method")
        if kind not in set(MessageKind) or num_leaves > MAX_LEAVES:
            raise self._error(f"is of kind {kind} with {num_leaves} leaves")
        pages = [page]
        while len(pages) * LEAVES_PER_PAGE < num_leaves:
            pages.append(self._page())
            self._check_sum(pages[-1])
            if pages[-1][: _PREFIX.size] != page[: _PREFIX.size]:
                raise self._error("is cut short by another")
        records = [
            _LEAF.unpack_from(pages[index // LEAVES_PER_PAGE], _PREFIX.size + index % LEAVES_PER_PAGE * _LEAF.size)
            for index in range(num_leaves)
        ]
        for record in records:
            self._check_leaf(record)
        if kind == MessageKind.SCHEMA and not (num_leaves == 1 and _is_schema(records[0])):
            raise self._error("is a schema of a wrong size")
        leaves = [self._leaf(record) for record in records]
        frame = Frame(
            MessageKind(kind),
            batch,
            leaves,
            self._structure,
            flags,
            micro_batch=None if micro_batch < 0 else micro_batch,
            share=share,
        )
        return frame, structure_index

    def _page(self) -> bytes:
        page = torch.empty(PAGE_BYTES, dtype=torch.uint8)
        self._fill(page)
        return bytes(page.numpy().data)

    def _check_sum(self, page: bytes) -> None:
        content, checksum = page[: -_CHECKSUM.size], page[-_CHECKSUM.size :]
        if _CHECKSUM.pack(zlib.crc32(content)) != checksum:
            raise self._error("is damaged: its checksum is wrong")

    def _check_leaf(self, record: tuple[int, ...]) -> None:
        code, place, ndim, *sizes = record
        if place == Place.ABSENT:
            return
        shape, strides = _shape_and_strides(record)
        if place not in set(Place) or code >= len(DTYPES) or ndim > MAX_DIMENSIONS or min(sizes) < 0:
            raise self._error(f"has a leaf of dtype {code}, shape {shape} and place {place}")
        if 0 not in shape and not is_dense(shape, strides):
            raise self._error(f"has a leaf of shape {shape} with strides {strides}, which has gaps")
        if math.prod(shape) * DTYPES[code].itemsize > MAX_LEAF_BYTES or max(sizes) > MAX_LEAF_BYTES:
            raise self._error(f"has a leaf of shape {shape}; at most {MAX_LEAF_BYTES} bytes can cross a cut at once")

    def _leaf(self, record: tuple[int, ...]) -> Tensor | None:
        code, place, *_ = record
        if place == Place.ABSENT:
            return None
        shape, strides = _shape_and_strides(record)
        device = self._device if place == Place.DEVICE else torch.device("cpu")
        pinned = self._pins and device.type == "cpu"
        leaf = torch.empty_strided(shape, strides, dtype=DTYPES[code], device=device, pin_memory=pinned)
        if leaf.numel():
            self._fill(as_bytes(leaf))
        return leaf

    def _parse_schema(self, frame: Frame) -> Structure:
        assert frame.leaves[0] is not None
        try:
            return json.loads(bytes(frame.leaves[0].numpy().data))
        except (ValueError, RecursionError) as error:
            raise self._error(f"is a schema that is not JSON ({error})") from None

    def _error(self, text: str) -> TransportError:
        return TransportError(f"a message on {self._link} {text}.")


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as one-dimensional uint8, without a copy."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)


def _sendable(leaf: Tensor) -> Tensor:
    """The leaf with its values in its own memory, densely: no lazy conjugation or negation, no gaps.

    Raises:
        TransportError: where a message cannot describe it.
    """
    if leaf.dtype not in _DTYPE_CODES or leaf.ndim > MAX_DIMENSIONS or leaf.layout is not torch.strided:
        raise TransportError(
            f"a tensor of dtype {leaf.dtype}, layout {leaf.layout} and {leaf.ndim} dimensions cannot cross a cut; "
            f"links carry dense tensors of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)} of up "
            f"to {MAX_DIMENSIONS} dimensions. Convert it before the end of the stage."
        )
    if leaf.numel() * leaf.element_size() > MAX_LEAF_BYTES:
        raise TransportError(
            f"a tensor of shape {tuple(leaf.shape)} cannot cross a cut; at most {MAX_LEAF_BYTES} bytes can at once. "
            "Use smaller batches, or cut the model elsewhere."
        )
    return dense(leaf.resolve_conj().resolve_neg())


def _shape_and_strides(record: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    _, _, ndim, *sizes = record
    return tuple(sizes[:ndim]), tuple(sizes[MAX_DIMENSIONS : MAX_DIMENSIONS + ndim])


def _is_schema(record: tuple[int, ...]) -> bool:
    """Whether the leaf may be the text of a schema: some bytes in host memory."""
    code, place, ndim, size, *_ = record
    return place == Place.HOST and DTYPES[code] == torch.uint8 and ndim == 1 and size <= MAX_SCHEMA_BYTES


def _describe(leaf: Tensor | None) -> bytes:
    if leaf is None:
        return bytes(_LEAF.size)
    place = Place.HOST if leaf.device.type == "cpu" else Place.DEVICE
    padding = [0] * (MAX_DIMENSIONS - leaf.ndim)
    return _LEAF.pack(_DTYPE_CODES[leaf.dtype], place, leaf.ndim, *leaf.shape, *padding, *leaf.stride(), *padding)
