"""Pairs: two conversations that begin alike, of which one is preferred, taken out of records.

A record has them in two fields, in one of TRL's forms:

    {"chosen": [...], "rejected": [...]}                     messages, the prompt in both
    {"prompt": [...], "chosen": [...], "rejected": [...]}    messages, and those that follow them
    {"prompt": "...", "chosen": "...", "rejected": "..."}    a user's turn, and the assistant's

What is preferred is what stands behind the messages that both begin with.
"""

from collections.abc import Mapping

from data.documents import BadRecord, Messages
from data.records import checked_body

PROMPT = "prompt"  # the field beside a pair that has what both answer


def checked_pair(
    values: Mapping[str, object], fields: tuple[str, ...], where: str
) -> tuple[Messages, Messages]:
    """Returns the chosen and the rejected conversation of a record, each with the prompt.

    Messages that contain the prompt already do not get it twice: those that begin with the messages
    of the prompt, or, where the prompt is a text, with anyone but the assistant.

    Args:
      values: the fields of the record; a prompt of None is none.
      fields: the names of the two.

    Raises:
      BadRecord: one of the two is no conversation, or they do not differ as answers do; the error
        begins with `where`.
    """
    prompt = values.get(PROMPT)
    if prompt is not None:
        prompt = checked_body(prompt, where, PROMPT)
    bodies = [checked_body(values[field], where, field) for field in fields]
    opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    whole = []
    for field, body in zip(fields, bodies, strict=True):
        if isinstance(body, str):
            if not opening:
                raise BadRecord(
                    f'{where}: field "{field}" is a text, and there is no field "{PROMPT}" that it '
                    "answers"
                )
            whole.append([*opening, {"role": "assistant", "content": body}])
        elif isinstance(prompt, str):
            whole.append([*opening, *body] if body[0]["role"] == "assistant" else body)
        else:
            whole.append(body if body[: len(opening)] == opening else [*opening, *body])
    chosen, rejected = whole
    if chosen == rejected:
        raise BadRecord(f'{where}: fields "{fields[0]}" and "{fields[1]}" are the same')
    for field, messages in zip(fields, whole, strict=True):
        if shared_messages(chosen, rejected) == len(messages):
            raise BadRecord(
                f'{where}: field "{field}" has no message behind those that both begin with'
            )
    return chosen, rejected


def shared_messages(chosen: Messages, rejected: Messages) -> int:
    """Returns how many messages two conversations have in common before they part."""
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    return count
