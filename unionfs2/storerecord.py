"""``layer.json``: what the store knows of a layer beyond Docker's files.

Absent in stores that Docker wrote; every field then has its default. The text is JSON, one object,
with a version of its own: a reader refuses a newer one and passes on unknown keys of its own.

A layer that is about to be committed carries its next record within the present one, with the name
under which it is going to hold: the rename that commits the layer makes it the record in force.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from . import ondisk
from .errors import DamagedLayerError, show
from .storelayout import damaged, is_short_name
from .storemodel import Digest, LayerId, Quota, Size

DialectName = Literal["trusted", "user"]

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
RECORD_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """What ``layer.json`` says; times are seconds since the epoch."""

    writable: bool = True
    dialect: DialectName = "trusted"
    diff_id: Digest | None = None
    chain_id: Digest | None = None
    size: Size | None = None
    created: float | None = None
    created_by: str | None = None
    label: str = ""
    quota: Quota | None = None
    project_id: int | None = None
    committed_as: LayerId | None = None
    #: Short names of the layer and of its parent once more: what repair goes by when the files
    #: ``link`` or ``lower`` are lost. Nobody else reads them.
    link: str | None = None
    parent_link: str | None = None
    #: Keys of this version that this program does not know; they are kept.
    extra: Mapping[str, Any] = field(default_factory=dict)


class Pending(NamedTuple):
    """A record that holds as soon as the layer has the id *layer*."""

    layer: LayerId
    record: Record


def format_record(record: Record, pending: Pending | None = None) -> bytes:
    """Content of ``layer.json``."""
    value = _to_json(record)
    if pending is not None:
        value["pending"] = {"id": pending.layer, "record": _to_json(pending.record)}
    return json.dumps(value, ensure_ascii=True, indent=1).encode() + b"\n"


def _to_json(record: Record) -> dict[str, Any]:
    quota = None
    if record.quota or record.project_id is not None:
        limits = record.quota or Quota()
        quota = {
            "size_bytes": limits.size_bytes,
            "inodes": limits.inodes,
            "project_id": record.project_id,
        }
    return {
        **record.extra,
        "version": ondisk.RECORD_VERSION,
        "writable": record.writable,
        "dialect": record.dialect,
        "diff_id": record.diff_id,
        "chain_id": record.chain_id,
        "size": record.size._asdict() if record.size else None,
        "created": record.created,
        "created_by": record.created_by,
        "label": record.label,
        "quota": quota,
        "committed_as": record.committed_as,
        "link": record.link,
        "parent_link": record.parent_link,
    }


def parse_record(layer: LayerId, text: bytes) -> Record:
    """What *text*, the ``layer.json`` of *layer*, says. Raises DamagedLayerError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise damaged(layer, "layer.json", "is empty" if not text else "is not JSON") from exc
    if not isinstance(value, dict):
        raise damaged(layer, "layer.json", "is not a JSON object")
    pending = value.pop("pending", None)
    if isinstance(pending, dict) and pending.get("id") == layer:
        value = pending.get("record")
        if not isinstance(value, dict):
            raise damaged(layer, "layer.json", "has no record for the name of the layer")
    return _Reader(layer, value).record()


def _refuse_constant(name: str) -> float:
    raise ValueError(name)  # NaN and the infinities are no JSON and no numbers to reckon with


class _Reader:
    """Takes the known keys out of an object; what is left over goes into ``extra``."""

    def __init__(self, layer: LayerId, value: dict[str, Any]) -> None:
        self._layer = layer
        self._value = value

    def record(self) -> Record:
        self._check_version()
        quota, project_id = self._quota()
        return Record(
            writable=self._take("writable", True, _is_bool, "true or false"),
            dialect=self._take("dialect", "trusted", _is_dialect, "trusted or user"),
            diff_id=self._take("diff_id", None, _is_digest, "a sha256 digest"),
            chain_id=self._take("chain_id", None, _is_digest, "a sha256 digest"),
            size=self._size(),
            created=self._take("created", None, _is_time, "a number of seconds"),
            created_by=self._take("created_by", None, _is_text, "a text"),
            label=self._take("label", "", _is_text, "a text"),
            quota=quota,
            project_id=project_id,
            committed_as=self._take("committed_as", None, _is_text, "a text"),
            link=self._take("link", None, _is_short, "a short name"),
            parent_link=self._take("parent_link", None, _is_short, "a short name"),
            extra=self._value,
        )

    def _check_version(self) -> None:
        version = self._value.pop("version", None)
        if not _is_count(version) or version < 1:
            raise self._bad("version", version, "a format version")
        if version > ondisk.RECORD_VERSION:
            raise DamagedLayerError(
                f"layer {show(self._layer)} has a layer.json of version {version} and this program"
                f" reads up to {ondisk.RECORD_VERSION}: it was written by a newer unionfs2, use it"
            )

    def _take(self, key: str, default: Any, test: Callable[[Any], bool], wanted: str) -> Any:
        value = self._value.pop(key, None)
        if value is None:
            return default
        if not test(value):
            raise self._bad(key, value, wanted)
        return value

    def _size(self) -> Size | None:
        value = self._take("size", None, _is_size, "bytes and inodes")
        return None if value is None else Size(value["bytes"], value["inodes"])

    def _quota(self) -> tuple[Quota | None, int | None]:
        value = self._take("quota", None, _is_quota, "limits")
        if value is None:
            return None, None
        quota = Quota(value.get("size_bytes"), value.get("inodes"))
        return quota or None, value.get("project_id")

    def _bad(self, key: str, value: object, wanted: str) -> DamagedLayerError:
        shown = show(repr(value)[:80])
        return damaged(self._layer, "layer.json", f"has {key} = {shown}, not {wanted}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_dialect(value: Any) -> bool:
    return value in {"trusted", "user"} if isinstance(value, str) else False


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and is_short_name(value.encode())


def _is_size(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(k)) for k in ("bytes", "inodes"))


def _is_quota(value: Any) -> bool:
    return isinstance(value, dict) and all(
        value.get(key) is None or _is_count(value[key])
        for key in ("size_bytes", "inodes", "project_id")
    )


#: Fields that update_record() takes.
RECORD_FIELDS: Final = frozenset(item.name for item in dataclasses.fields(Record))
