"""Whether a file of `torch.save` is as it was written, which torch.load does not look at."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import BinaryIO

import torch
from torch._weights_only_unpickler import Unpickler

from posttrain.common.errors import first_line

AT_ONCE = 2**24  # bytes that are read in one piece


def refuse_damaged(path: Path, parts: tuple[str, ...] = ()) -> None:
    """Raise ValueError where tensors of a file that torch.load has read are not those that were written.

    `parts`: the keys whose dicts hold the tensors; by default the file is one such dict. Files from before torch 1.6 say nothing.

    torch (2.13) takes the bytes of a zip's record as they are: those that a zip program has compressed, those behind a record that is too
    short, and those that a bad copy has changed. So the records of these tensors are read once more, at the speed of zlib.crc32 or that of
    the disk: 1.4 GB a second from memory on a core of a Xeon, where torch.load without a map takes 1.1.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            _compare(path, archive, file, parts)
    except (zipfile.BadZipFile, NotImplementedError, OSError, struct.error, KeyError) as error:
        raise ValueError(f"{path} is cut short or damaged ({first_line(error)}): copy it again") from error


def why_not_plain(tensor: torch.Tensor) -> str | None:
    """Return why a file's tensor is not one that can be worked with as any other; None for a plain one."""
    if vars(tensor):
        return f"carries attributes of its own ({', '.join(map(repr, list(vars(tensor))[:3]))})"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return "is sparse, quantized or nested, not plain"
    return None


def _compare(path: Path, archive: zipfile.ZipFile, file: BinaryIO, parts: tuple[str, ...]) -> None:
    """Raise ValueError as refuse_damaged does; `file` is the archive's."""
    records = archive.infolist()
    if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(
            f"{path} was zipped anew with compression ({len(packed)} of its records, first {packed[0]}), where torch.save stores the bytes "
            "as they are: copy the file again from where it was saved"
        )
    if len(set(archive.namelist())) < len(records):
        raise ValueError(f"{path} is damaged: a name is twice among its {len(records)} records; copy the file again")
    prefix = records[0].filename.partition("/")[0]
    content = _without_data(b"".join(_parts(file, archive.getinfo(f"{prefix}/data.pkl"))))
    needed = {record.filename for record in records if not record.filename.startswith(f"{prefix}/data/")}
    for tensor in (
        one for part in ([content[key] for key in parts] or [content]) for one in part.values() if isinstance(one, torch.Tensor)
    ):
        storage = tensor.untyped_storage()
        if (name := getattr(storage, "record", None)) is None:
            continue  # it was saved on the meta device
        record = archive.getinfo(f"{prefix}/data/{name}")
        if record.file_size < storage.nbytes():
            raise ValueError(
                f"{path} is damaged: {record.filename} in it has {record.file_size:,} bytes, its tensor {storage.nbytes():,}; copy it again"
            )
        needed.add(record.filename)
    if not any(record.CRC for record in records):
        return  # saved after torch.serialization.set_crc32_options(False)
    for record in records:  # in the order in which they lie in the file
        if record.filename in needed and reduce(lambda found, part: zlib.crc32(part, found), _parts(file, record), 0) != record.CRC:
            raise ValueError(f"{path} is damaged: {record.filename} in it is not what was written (its CRC-32 differs); copy it again")


def _without_data(pickled: bytes) -> dict:
    """Return what a file's pickle holds, its tensors on the meta device, each with a storage that knows its record's name."""
    unpickler = Unpickler(io.BytesIO(pickled), encoding="utf-8")  # torch's own, which runs no code

    def storage(saved: tuple) -> torch.storage.TypedStorage:
        _, kind, name, _, length = saved
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        untyped = torch.UntypedStorage(length * dtype.itemsize, device="meta")
        untyped.record = name
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)

    unpickler.persistent_load = storage
    return unpickler.load()


def _parts(file: BinaryIO, record: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield a record's bytes, which begin behind its local header."""
    file.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    file.seek(name + extra, os.SEEK_CUR)
    left = record.file_size
    while left and (part := file.read(min(AT_ONCE, left))):
        yield part
        left -= len(part)
