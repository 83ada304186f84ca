"""The text or the conversation in one record, taken out of it and checked.

Whatever a record is, the error names its file and place.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from data.documents import BadRecord, Messages, Tools
from errors import shortened

# Half of a pair of UTF-16 without the other: JSON can write it (`\ud83d`), and it is no character.
SURROGATE = re.compile("[\ud800-\udfff]")


def parse_record(line: bytes, where: str, fields: Sequence[str]) -> dict[str, object]:
    """Returns a JSON object that has `fields`.

    Raises:
      BadRecord: `line` is not a JSON object, or lacks a field; the error begins with `where`.
    """
    text = decode_utf8(line, where).removeprefix("\ufeff")  # a byte order mark opens some files
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise BadRecord(
            f"{where}: a JSON {type(record).__name__}, not an object with a field "
            f"{json.dumps(fields[0])}"
        )
    for field in fields:
        if field not in record:
            raise BadRecord(f"{where}: {missing_field(field, record)}")
    return record


def without_nulls(value: object) -> object:
    """Drops the fields of an Arrow value that are null, at every depth.

    All structs of a column have the fields that any of them has, so that a null there means no more
    than that the field is absent.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def without_surrogates(value: Any) -> tuple[Any, int]:
    """Writes U+FFFD for each surrogate in the texts of a JSON value, at every depth.

    Returns:
      (the value, the number of surrogates in it).
    """
    if isinstance(value, str):
        return SURROGATE.subn("\ufffd", value)
    if isinstance(value, list):
        items = [without_surrogates(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if isinstance(value, dict):
        names, named = without_surrogates(list(value))
        values, count = without_surrogates(list(value.values()))
        return dict(zip(names, values, strict=True)), named + count
    return value, 0


def checked_body(body: object, where: str, field: str) -> str | Messages:
    """Returns `body` if it is text or a list of messages.

    Raises:
      BadRecord: it is neither; the error begins with `where`.
    """
    if isinstance(body, str):
        return body
    if isinstance(body, list) and body and all(is_message(message) for message in body):
        return body
    raise BadRecord(
        f'{where}: field "{field}" is {written(body)}, neither text nor a list of messages with '
        '"role" and "content"'
    )


def checked_tools(tools: object, where: str) -> Tools | None:
    """Returns a list of descriptions of tools, given as such or as its JSON, or None for no tools.

    Raises:
      BadRecord: `tools` is neither; the error begins with `where`.
    """
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f'{where}: field "tools" is not JSON ({error})') from error
    if not tools:
        return None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    raise BadRecord(
        f'{where}: field "tools" is {written(tools)}, not a list of descriptions of tools'
    )


def is_message(message: object) -> bool:
    """Returns whether an object has a role; a chat template says what else a message must have."""
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def written(value: object) -> str:
    """Returns a value as its record has it, the beginning if it is long."""
    return shortened(json.dumps(value, default=str), 60)


def missing_field(field: str, names: Iterable[str]) -> str:
    """Writes the part of an error that names a missing field and those that are there."""
    found = ", ".join(json.dumps(name, ensure_ascii=False) for name in names)
    return f'no field "{field}" (has: {shortened(found, 300)})'


def decode_utf8(content: bytes, where: str) -> str:
    """Decodes a record. Raises BadRecord, beginning with `where`, if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where}: not UTF-8 at byte {error.start} of the record") from error
