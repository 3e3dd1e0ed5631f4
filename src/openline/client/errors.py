"""What a session raises.

OpenlineError
├── Refused             the server did not take the create, and says why
├── TurnFailed          the turn ran and ended in `response.failed`
├── ConnectionLost      the line broke and nobody can say more than `why`
└── ToolOutcomeUnknown  a tool had started when its agent died, and its outcome was not noted
"""

from __future__ import annotations

from typing import Any

from openline.client.wire import Response


class OpenlineError(Exception):
    """Every error of the client; on its own: it was used in a way that cannot work, and the message says how."""


class Refused(OpenlineError):  # noqa: N818 - the server's answer
    """The server did not take a create: no turn ran.

    Attributes:
        status: the HTTP status; in WebSocket mode the `status` of the `error` event. 0 if none was told.
        code: the wire's stable code, such as `invalid_api_key`; None where the server gave none.
        message: the server's own words.
        param: the field at fault, if it named one.
        retry_after: seconds after which the server wants to be asked again; None if it did not say.

    Source: Responses API reference, "Errors"; WebSocket mode guide, "Error frame".
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code or status}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after


class TurnFailed(OpenlineError):  # noqa: N818 - what happened to the turn
    """A turn ended in `response.failed`.

    Attributes:
        response: the response as it ended, with what there is of its output and its `error`.
    """

    def __init__(self, response: Response) -> None:
        self.response = response
        super().__init__(f"{self.code or 'response.failed'}: {self.message}")

    @property
    def code(self) -> str | None:
        """The `code` of the response's `error`."""
        return self._error.get("code")

    @property
    def message(self) -> str:
        """The `message` of the response's `error`."""
        return self._error.get("message") or "the server gave no reason."

    @property
    def _error(self) -> dict[str, Any]:
        return self.response.get("error") or {}


class ConnectionLost(OpenlineError):  # noqa: N818 - what happened to the line
    """The line broke, and the turn cannot be gone on with; another one was not started.

    Attributes:
        why: what happened, and what was known of the turn then.
        idempotency_key: the turn's; a server that knows keys can be asked about it for a while.
        response: what is known of the response: what its events say up to the break, or its final state, where the
            server could still tell that but not the events. None if nothing came.
        may_have_run: False if the create has surely not reached the server.
    """

    def __init__(
        self,
        why: str,
        *,
        idempotency_key: str = "",
        response: Response | None = None,
        may_have_run: bool = True,
    ) -> None:
        super().__init__(why)
        self.why = why
        self.idempotency_key = idempotency_key
        self.response = response
        self.may_have_run = may_have_run


class ToolOutcomeUnknown(OpenlineError):  # noqa: N818 - what is the case
    """A tool call had started when its agent died, and nothing says how it ended.

    Attributes:
        call: the call's item: `name`, `arguments`, `call_id`.
    """

    def __init__(self, call: dict[str, Any]) -> None:
        name, call_id = call.get("name"), call.get("call_id")
        super().__init__(
            f"call {call_id} of tool '{name}' had started, and its outcome was not noted: "
            "find out what it did, and pass on_unknown= to say its output, or that it is to run again."
        )
        self.call = call
