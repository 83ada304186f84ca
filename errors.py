"""The one exception that speaks to the person who typed the command."""


class UserError(Exception):
    """What was wrong, where, and what to do, in one line. The commands print it and exit with code
    2; everything else is a bug and keeps its traceback.
    """


def require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        raise UserError(f"{field} = {value!r}: {rule}")
