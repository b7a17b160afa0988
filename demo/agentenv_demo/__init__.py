"""A text game in AgentGym's package layout: `app` is the server, `launch` the start command."""
from .launch import launch
from .server import app

__all__ = ["app", "launch"]
