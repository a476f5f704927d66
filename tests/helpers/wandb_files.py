"""What wandb recorded in a .wandb file."""

import json
import struct

from wandb.proto import wandb_internal_pb2


def recorded(path):
    """Return the records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    raw, records, record_bytes, position = path.read_bytes(), [], b"", 7
    assert raw[:4] == b":W&B"
    while position + 7 <= len(raw):
        left = 32768 - position % 32768
        if left < 7:  # no header fits: the rest of the block is padding
            position += left
            continue
        length, kind = struct.unpack("<HB", raw[position + 4 : position + 7])
        record_bytes += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a record in one piece, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(record_bytes)
            records.append(record)
            record_bytes = b""
    return records


def values(items):
    """Return key -> value of history or summary items; nested keys are joined by a slash."""
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
