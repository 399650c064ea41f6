"""What the server does not do, as the API says it."""

from __future__ import annotations

from lm.errors import UserError


class Refused(UserError):
    """A request that is not answered: `status` of HTTP, and the field and the short name that the API's errors have."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    @property
    def kind(self) -> str:
        """The API's class of errors."""
        if self.status >= 500:
            return "server_error"
        return "rate_limit_error" if self.status == 429 else "invalid_request_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """JSON as the API's clients read it."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}
