"""A second reader of shards, written from docs/data-format.md with nothing but the standard library and xxhash."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

LETTERS = {"<u2": "H", "<u4": "I", "<u8": "Q"}


@dataclass
class ReadShard:
    facts: dict
    sections: dict[str, list[int]]

    def documents(self) -> list[list[int]]:
        tokens, offsets = self.sections["tokens"], self.sections["offsets"]
        return [tokens[start:stop] for start, stop in zip(offsets, offsets[1:], strict=False)]


def read_shard(path: Path) -> ReadShard:
    data = path.read_bytes()
    assert data[:8] == b"LLAMAPRO" and data[8:16].rstrip(b"\0") == b"shard"
    version, mark, size, block, count, facts_at, facts_bytes = struct.unpack_from("<IIQIIII", data, 16)
    assert (version, mark, size) == (1, 0x01020304, len(data))
    assert struct.unpack_from("<Q", data, 4088)[0] == xxhash.xxh3_64_intdigest(data[:4088])
    sections, checks = {}, []
    for index in range(count):
        name, kind, offset, length, digest = struct.unpack_from("<24s8sQQ16s", data, 64 + 64 * index)
        body = data[offset : offset + length]
        assert offset % 4096 == 0 and xxhash.xxh3_128_digest(body) == digest
        letter = LETTERS[kind.rstrip(b"\0").decode()]
        key = name.rstrip(b"\0").decode()
        sections[key] = list(struct.unpack(f"<{length // struct.calcsize(letter)}{letter}", body))
        if key != "block_checks":
            checks += [xxhash.xxh3_64_intdigest(body[start : start + block]) for start in range(0, length, block)]
    assert sections["block_checks"] == checks
    return ReadShard(json.loads(data[facts_at : facts_at + facts_bytes]), sections)
