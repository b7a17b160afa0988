"""The bodies of the requests."""
from pydantic import BaseModel


class CreateRequest(BaseModel):
    """POST /create takes an empty object, as other servers of AgentGym do."""


class ResetRequest(BaseModel):
    id: int
    data_idx: int = 0


class StepRequest(BaseModel):
    id: int
    action: str


class CloseRequest(BaseModel):
    id: int
