"""The wire format: what is sent arrives bit by bit, and what nobody sent is an error and nothing else."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dist_equal import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stalewise.engine.layout import is_dense
from stalewise.engine.tree import flatten, unflatten
from stalewise.errors import TransportError
from stalewise.runtime import wire
from stalewise.runtime.wire import DTYPES, PAGE_BYTES, Decoder, Encoder, Frame, MessageKind

PLAN = 0xFEEDFACECAFEBEEF
CPU = torch.device("cpu")


class Ended(Exception):
    """The bytes are used up: on a network, a read that waits or a closed connection."""


def sent(frames: list[Frame], plan: int = PLAN) -> list[bytes]:
    """What an encoder sends for these frames."""
    encoder = Encoder(plan)
    return [bytes(data.numpy().data) for frame in frames for data in encoder.encode(frame)]


def decoder_of(messages: list[bytes], *, exact: bool = True) -> Decoder:
    """A decoder that receives these messages; `exact`: a read must ask for a whole one, as gloo wants it."""
    stream = b"".join(messages)
    position = 0
    sizes = [len(message) for message in messages]

    def fill(data: Tensor) -> None:
        nonlocal position
        assert data.dtype == torch.uint8
        assert data.ndim == 1
        assert data.numel() > 0
        if exact and sizes:
            assert data.numel() == sizes.pop(0)
        if position + data.numel() > len(stream):
            raise Ended
        data.copy_(torch.frombuffer(bytearray(stream[position : position + data.numel()]), dtype=torch.uint8))
        position += data.numel()

    return Decoder(PLAN, fill, CPU, "activations from stage 0")


def received(messages: list[bytes], count: int) -> list[Frame]:
    """The frames that come out of these messages."""
    decoder = decoder_of(messages)
    frames = [decoder.next() for _ in range(count)]
    with pytest.raises(Ended):
        decoder.next()
    return frames


# -- round trips -------------------------------------------------------------------------------------------------


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """A contiguous tensor of any bits that the dtype can have, NaNs and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    count = math.prod(shape)
    data = torch.randint(256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype and shape; contiguous, permuted, channels-last, cut out, expanded, conjugated, negated."""
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    tensor = random_tensor(draw(st.sampled_from(DTYPES)), shape, draw(st.integers(0, 99)))
    form = draw(st.sampled_from(["plain", "permuted", "channels last", "strided", "offset", "expanded", "lazy"]))
    match form:
        case "permuted":
            return tensor.permute(draw(st.permutations(range(tensor.ndim))))
        case "channels last" if tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        case "strided" if tensor.ndim:
            return tensor[..., ::2]
        case "offset" if tensor.ndim:
            return tensor[1:]
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *tensor.shape)
        case "lazy" if tensor.is_complex():
            return draw(st.sampled_from([tensor.conj(), torch._neg_view(tensor), tensor.conj().imag]))
    return tensor


def assert_arrived(leaf: Tensor | None, original: Tensor | None) -> None:
    """Equal bits, shape and dtype; dense ones keep their strides."""
    if original is None:
        assert leaf is None
        return
    assert leaf is not None
    assert (leaf.dtype, leaf.shape) == (original.dtype, original.shape)
    assert bits(leaf) == bits(original)
    if is_dense(tuple(original.shape), original.stride()) and original.numel():
        assert leaf.stride() == original.stride()


@settings(max_examples=300, deadline=None)
@given(
    leaves=st.lists(st.none() | tensors(), max_size=17),
    kind=st.sampled_from([MessageKind.ACTIVATION, MessageKind.GRADIENT, MessageKind.LOSS]),
    batch=st.integers(0, 1 << 50),
    flags=st.integers(0, 255),
    micro_batch=st.none() | st.integers(0, 1000),
    share=st.floats(0, 1),
)
def test_a_frame_arrives(
    leaves: list[Tensor | None],
    kind: MessageKind,
    batch: int,
    flags: int,
    micro_batch: int | None,
    share: float,
) -> None:
    frame = Frame(kind, batch, leaves, flags=flags, micro_batch=micro_batch, share=share)
    (arrived,) = received(sent([frame]), 1)
    assert (arrived.kind, arrived.batch, arrived.flags) == (kind, batch, flags)
    assert (arrived.micro_batch, arrived.share) == (micro_batch, share)
    assert arrived.structure is None
    assert len(arrived.leaves) == len(leaves)
    for leaf, original in zip(arrived.leaves, leaves, strict=True):
        assert_arrived(leaf, original)


def trees() -> st.SearchStrategy[Any]:
    """Nested tuples, lists and dicts of tensors and None."""
    return st.recursive(
        st.none() | tensors(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        ),
        max_leaves=12,
    )


@settings(max_examples=200, deadline=None)
@given(values=st.lists(trees(), min_size=1, max_size=6))
def test_structures_that_change_arrive(values: list[Any]) -> None:
    """A structure is sent where it changes only, and an END in between has none."""
    frames = []
    for batch, value in enumerate(values):
        leaves, structure = flatten(value)
        frames.append(Frame(MessageKind.ACTIVATION, batch, list(leaves), structure))
    messages = sent([*frames, Frame(MessageKind.END, len(frames), [], flags=1), *frames])
    arrived = received(messages, 2 * len(frames) + 1)
    end = arrived.pop(len(frames))
    assert (end.kind, end.leaves, end.structure, end.flags) == (MessageKind.END, [], None, 1)
    for frame, original in zip(arrived, [*frames, *frames], strict=True):
        assert frame.structure == original.structure
        for leaf, expected in zip(frame.leaves, original.leaves, strict=True):
            assert_arrived(leaf, expected)
        assert flatten(unflatten(frame.structure, frame.leaves))[1] == original.structure


def test_a_structure_is_described_once() -> None:
    leaves, structure = flatten({"a": torch.ones(2), "b": (torch.ones(3), None)})
    frames = [Frame(MessageKind.ACTIVATION, batch, list(leaves), structure) for batch in range(5)]
    assert [len(message) for message in sent(frames)] == [
        *(PAGE_BYTES, len(json.dumps(structure))),
        *(PAGE_BYTES, 8, 12) * 5,
    ]


@pytest.mark.parametrize(("leaves", "pages"), [(0, 1), (1, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
def test_pages(leaves: int, pages: int) -> None:
    messages = sent([Frame(MessageKind.GRADIENT, 0, [torch.ones(1)] * leaves)])
    assert [len(message) for message in messages] == [PAGE_BYTES] * pages + [4] * leaves


def test_what_is_sent_is_the_memory_of_the_leaf() -> None:
    """No copy of a dense tensor is made."""
    leaf = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    *_, data = Encoder(PLAN).encode(Frame(MessageKind.GRADIENT, 0, [leaf]))
    assert data.data_ptr() == leaf.data_ptr()


# -- what cannot be sent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (Frame(MessageKind.GRADIENT, 0, [torch.zeros(2).to(torch.float8_e4m3fn)]), "dtype torch.float8_e4m3fn"),
        (Frame(MessageKind.GRADIENT, 0, [torch.zeros([1] * 9)]), "9 dimensions"),
        (Frame(MessageKind.GRADIENT, 0, [torch.eye(3).to_sparse()]), "layout torch.sparse_coo"),
        (Frame(MessageKind.GRADIENT, 0, [None] * 4097), "4097 tensors cannot cross"),
        (Frame(MessageKind.GRADIENT, 0, [torch.empty(1 << 33, device="meta")]), "at most 17179869184 bytes"),
        (Frame(MessageKind.ACTIVATION, 0, [], ["dict", ["x" * (1 << 20), None]]), "the structure of what crosses"),
    ],
)
def test_what_cannot_be_sent(frame: Frame, message: str) -> None:
    with pytest.raises(TransportError, match=message):
        list(Encoder(PLAN).encode(frame))


# -- wrong messages ----------------------------------------------------------------------------------------------


def sealed(page: bytes) -> bytes:
    """The page with the checksum that it should have."""
    content = page[: PAGE_BYTES - 4]
    return content + struct.pack("<I", zlib.crc32(content))


def changed(offset: int, layout: str, value: Any, *, leaves: int = 1, seal: bool = True) -> list[bytes]:
    """A message with one field of its first page changed."""
    messages = sent([Frame(MessageKind.GRADIENT, 3, [torch.ones(2, 3)] * leaves)])
    page = bytearray(messages[0])
    struct.pack_into(layout, page, offset, value)
    return [sealed(bytes(page)) if seal else bytes(page), *messages[1:]]


SHAPE, STRIDES = 48, 112
"""Offsets of the first leaf's."""


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (changed(0, "4s", b"HTTP"), "does not begin as a message of stalewise"),
        (changed(4, "<H", 2), "wire version 2, ours is 1"),
        (changed(16, "<Q", PLAN - 1), "belongs to another plan"),
        (sent([Frame(MessageKind.GRADIENT, 3, [])], plan=1), "belongs to another plan"),
        (changed(6, "B", 0), "is of kind 0"),
        (changed(6, "B", 77), "is of kind 77"),
        (changed(28, "<H", 4097), "with 4097 leaves"),
        (changed(24, "<I", 1), "names structure 1; the last described is 0"),
        (changed(8, "<q", 4, seal=False), "checksum is wrong"),
        (changed(40, "B", len(DTYPES)), "has a leaf of dtype 12"),
        (changed(41, "B", 9), "and place 9"),
        (changed(42, "<H", 9), "has a leaf of dtype 0"),
        (changed(42, "<H", 65535), "has a leaf of dtype 0"),
        (changed(SHAPE, "<q", -1), "shape (-1, 3)"),
        (changed(SHAPE, "<q", 1 << 62), "at most 17179869184 bytes"),
        (changed(SHAPE + 8, "<q", 4), "which has gaps"),
        (changed(STRIDES, "<q", 6), "which has gaps"),
        (changed(STRIDES + 8, "<q", 0), "which has gaps"),
        ([changed(8, "<q", 3, leaves=9)[0], changed(8, "<q", 4, leaves=9)[0]], "is cut short by another"),
        ([changed(8, "<q", 3, leaves=9)[0], b"x" * PAGE_BYTES], "checksum is wrong"),
        ([b"\0" * PAGE_BYTES], "does not begin as a message of stalewise"),
    ],
)
def test_wrong_messages(messages: list[bytes], text: str) -> None:
    with pytest.raises(TransportError) as raised:
        decoder_of(messages, exact=False).next()
    assert str(raised.value).startswith("a message on activations from stage 0 ")
    assert text in str(raised.value)


def schema(text: bytes, **fields: Any) -> list[bytes]:
    """A schema message that holds `text`, with other values in its only leaf where given."""
    leaf = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    page, *_ = sent([Frame(MessageKind.SCHEMA, 0, [leaf])])
    code, place, ndim, *sizes = struct.unpack_from("<BBH4x16q", page, 40)
    values = {"code": code, "place": place, "ndim": ndim, "size": sizes[0], **fields}
    changed_page = bytearray(page)
    struct.pack_into("<BBH4xq", changed_page, 40, values["code"], values["place"], values["ndim"], values["size"])
    return [sealed(bytes(changed_page)), text]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (schema(b"{nonsense"), "is a schema that is not JSON"),
        (schema(b"\xff\xfe\xfd"), "is a schema that is not JSON"),
        (schema(b"[" * 200_000), "is a schema that is not JSON"),
        (schema(b"[]", place=0), "is a schema of a wrong size"),
        (schema(b"[]", code=0), "is a schema of a wrong size"),
        (schema(b"[]", ndim=0), "is a schema of a wrong size"),
        (schema(b"[]", size=(1 << 20) + 1), "is a schema of a wrong size"),
        (sent([Frame(MessageKind.SCHEMA, 0, [])]), "is a schema of a wrong size"),
        (sent([Frame(MessageKind.SCHEMA, 0, [torch.ones(2), torch.ones(2)])]), "is a schema of a wrong size"),
    ],
)
def test_wrong_schemas(messages: list[bytes], text: str) -> None:
    with pytest.raises(TransportError, match=text):
        decoder_of(messages, exact=False).next()


# -- fuzz --------------------------------------------------------------------------------------------------------


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of the leaves that decoders made; none above a megabyte is really made."""
    sizes: list[int] = []
    original: Callable[..., Tensor] = torch.empty_strided

    def watched(shape: tuple[int, ...], strides: tuple[int, ...], **options: Any) -> Tensor:
        sizes.append(math.prod(shape) * options["dtype"].itemsize)
        if sizes[-1] > 1 << 20:
            raise Ended
        return original(shape, strides, **options)

    monkeypatch.setattr(wire.torch, "empty_strided", watched)
    return sizes


def conversation() -> list[bytes]:
    """Messages of all kinds, with a page per message and with several."""
    leaves, structure = flatten(({"a": torch.ones(2, 3), "b": [torch.zeros(4, dtype=torch.int64)]}, None))
    return sent(
        [
            Frame(MessageKind.ACTIVATION, 0, list(leaves), structure),
            Frame(MessageKind.GRADIENT, 1, [torch.ones(2)] * 9),
            Frame(MessageKind.ACTIVATION, 2, [torch.tensor(1.0), None, torch.ones(3, 0)], ["list"]),
            Frame(MessageKind.END, 3, [], flags=2),
        ]
    )


def drain(messages: list[bytes]) -> int:
    """Decode to the end; how many frames came out."""
    decoder = decoder_of(messages, exact=False)
    count = 0
    while True:
        try:
            decoder.next()
        except Ended:
            return count
        count += 1


def test_a_changed_page_is_always_found(allocated: list[int]) -> None:
    """Wherever a page is changed, its message is refused, before memory is taken."""
    generator = random.Random(1)
    original = conversation()
    pages = [index for index, message in enumerate(original) if len(message) == PAGE_BYTES]
    assert drain(original) == 4
    for _ in range(4000):
        messages = list(original)
        index = generator.choice(pages)
        page = bytearray(messages[index])
        for _ in range(generator.choice([1, 1, 2, 8])):
            page[generator.randrange(PAGE_BYTES)] ^= 1 << generator.randrange(8)
        if page == messages[index]:
            continue
        messages[index] = bytes(page)
        with pytest.raises(TransportError):
            drain(messages)
    assert max(allocated) <= 128


def test_pages_of_anything_are_refused_or_read(allocated: list[int]) -> None:
    """Pages whose checksum is right but whose content is arbitrary: a frame, or a TransportError."""
    generator = random.Random(2)
    original = conversation()
    pages = [index for index, message in enumerate(original) if len(message) == PAGE_BYTES]
    interesting = [0, 1, 2, 3, 7, 8, 9, 255, 256, 65535, 1 << 31, 1 << 33, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    refused = 0
    for _ in range(6000):
        messages = list(original)
        index = generator.choice(pages)
        page = bytearray(messages[index])
        for _ in range(generator.choice([1, 2, 5])):
            if generator.random() < 0.5:
                page[generator.randrange(6, 320)] = generator.randrange(256)
            else:
                struct.pack_into("<Q", page, generator.randrange(32, 320, 8), generator.choice(interesting))
        messages[index] = sealed(bytes(page))
        try:
            drain(messages)
        except TransportError:
            refused += 1
    assert refused > 1000
    assert max(allocated) <= 1 << 34


def test_garbage_is_refused() -> None:
    generator = random.Random(3)
    for length in [0, 1, PAGE_BYTES - 1, PAGE_BYTES] * 500:
        garbage = generator.randbytes(length)
        if length < PAGE_BYTES:
            assert drain([garbage]) == 0
        else:
            with pytest.raises(TransportError):
                drain([garbage])
            with pytest.raises(TransportError):
                drain([b"SWIS" + garbage[4:]])


def test_truncated_conversations_end() -> None:
    stream = b"".join(conversation())
    for length in range(0, len(stream), 97):
        assert drain([stream[:length]]) < 4
