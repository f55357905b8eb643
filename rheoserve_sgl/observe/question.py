"""How the live page's question travels to the scheduler.

SGLang's request for its internal state has a field for a request's name, which it does not use: ours begins so.
"""

import json

MARK = "rheoserve:"


def write(rid: str, layer: int, head: int) -> str:
    """The field's content."""
    return MARK + json.dumps([rid, layer, head])


def read(field: str | None) -> tuple[str, int, int] | None:
    """What is asked for; None if it is SGLang's own question."""
    if not isinstance(field, str) or not field.startswith(MARK):
        return None
    return tuple(json.loads(field.removeprefix(MARK)))
