"""Which rollout a call belongs to: it is named by the URL's path, by the API key, or in the body.

No agent needs to know of rollouts. One that builds its own requests can be given a base URL or a key of its rollout;
through Gym the name comes in the body. Names that disagree are an error, never a choice.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final
from urllib.parse import quote

from starlette.types import Scope

from gymlink.gateway.wire import ROLLOUT_FIELD, WireError, invalid

_KEY: Final = "rk-"
_KEYS_ROLLOUT: Final = "gymlink.rollout"
"""Where a request's scope holds the rollout that its key opens."""


def rollout_key(secret: str, rollout_id: str) -> str:
    """An API key that opens the calls of this rollout and nothing else, made of the run's secret."""
    return f"{_KEY}{rollout_id}.{_tag(secret, rollout_id)}"


def rollout_path(rollout_id: str, path: str) -> str:
    """The path at which the calls of this rollout are answered; `path` begins with a slash."""
    return f"/rollout/{quote(rollout_id, safe='')}{path}"


def _tag(secret: str, rollout_id: str) -> str:
    return hmac.digest(secret.encode(), b"rollout:" + rollout_id.encode(), sha256).hex()[:32]


class Secret:
    """Tells what a request's credentials open. Keys are compared in constant time."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def admits(self, scope: Scope) -> bool:
        """Whether the request carries the run's secret, as OpenAI's clients send a key or as Anthropic's do."""
        return any(hmac.compare_digest(key, self._secret.encode()) for key in _keys(scope))

    def admits_rollout(self, scope: Scope) -> bool:
        """Whether it carries the key of a rollout; which one is noted in its scope."""
        for key in _keys(scope):
            named, _, tag = key.decode("latin-1").removeprefix(_KEY).rpartition(".")
            expected = _tag(self._secret, named)
            if key.startswith(_KEY.encode()) and hmac.compare_digest(tag.encode("latin-1"), expected.encode()):
                scope[_KEYS_ROLLOUT] = named
                return True
        return False


def _keys(scope: Scope) -> list[bytes]:
    given = dict(scope["headers"])
    bearer, _, token = given.get(b"authorization", b"").partition(b" ")
    keys = [token.strip()] if bearer.lower() == b"bearer" else []
    return [*keys, given[b"x-api-key"]] if b"x-api-key" in given else keys


def named_rollout(scope: Scope, body: Mapping[str, Any]) -> str | None:
    """The rollout that a call names; None when it names none.

    Raises:
        WireError: 400 when it names two, or one that is no text.
    """
    metadata = body.get("metadata")
    within = metadata.get(ROLLOUT_FIELD) if isinstance(metadata, Mapping) else None
    places = {
        "the path": scope.get("path_params", {}).get("rollout"),
        "the API key": scope.get(_KEYS_ROLLOUT),
        ROLLOUT_FIELD: body.get(ROLLOUT_FIELD),
        f"metadata.{ROLLOUT_FIELD}": within,
    }
    named = {place: name for place, name in places.items() if name is not None}
    for place, name in named.items():
        if not isinstance(name, str):
            raise invalid(f"{place}: the id of a rollout is a text, not {type(name).__name__}.", place)
    if len(set(named.values())) > 1:
        told = ", ".join(f"{place} names {name!r}" for place, name in named.items())
        raise invalid(f"The call names more than one rollout: {told}.", ROLLOUT_FIELD)
    return next(iter(named.values()), None)


def not_open(rollout_id: str | None) -> WireError:
    """The error for a rollout that is not here."""
    message = f"The rollout {rollout_id!r} is not open: it has ended, or its deadline has passed."
    return WireError(404, message, kind="not_found_error", param="rollout")
